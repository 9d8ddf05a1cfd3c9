"""Products with four-bit weights beside dense ones and PyTorch's own, and models decoding with them."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.api import Handle, apply
from hasten.bench.figures import Figure, Reading, figure, race
from hasten.bench.timing import sample
from hasten.core.errors import HastenError
from hasten.kernels import lowbit
from hasten.math import packing

SIDE, BITS, GROUP, SMALL_GROUP = 4096, 4, 128, 32
MATRICES = 32  # 277 MB of codes and scales: as in a model, no weight is in the cache when its turn comes
DENSE = 8  # 512 MB in fp32, taken in turns
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def codes() -> Tensor:
    """The codes of one matrix, uint8 [4096, 4096]."""
    return torch.randint(0, 16, (SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@functools.cache
def vector() -> Tensor:
    """The input, fp32 [1, 4096]."""
    return torch.randn(1, SIDE, generator=torch.Generator().manual_seed(1))


@functools.cache
def scales(group: int) -> Tensor:
    """fp16 [4096, groups]: PyTorch's operator holds bf16 scales and zeros, so both sides have 16-bit statistics."""
    return (torch.rand(SIDE, SIDE // group, generator=torch.Generator().manual_seed(2)) / 100).half()


@functools.lru_cache(maxsize=1)
def packed(group: int) -> list[list[Tensor]]:
    """Codes, scales and zeros of each matrix in memory of its own; a zero for each group, as with GPTQ."""
    first = [packing.pack(codes(), BITS), scales(group), torch.full_like(scales(group), 8).to(torch.uint8)]
    return [[part.clone() for part in first] for _ in range(MATRICES)]


def ours(group: int, activations: int = 8) -> Callable[[], list[Tensor]]:
    if lowbit.path(BITS, group) != "native":
        raise HastenError("the native kernel can't be built here: install a C++ compiler")
    x, options = vector(), {"bits": BITS, "group": group, "columns": SIDE, "activations": activations}
    return lambda: [lowbit.linear(x, *parts, **options) for parts in packed(group)]  # type: ignore[arg-type]


def against_fp32(seconds: float, activations: int) -> Reading:
    weight = lowbit.dequantize(*packed(GROUP)[0], bits=BITS, group=GROUP, columns=SIDE)
    weights, x, arm = [weight.clone() for _ in range(DENSE)], vector(), ours(GROUP, activations)
    check(arm()[0], F.linear(x, weight), 0.02 if activations == 8 else 1e-5)
    return race(lambda: [F.linear(x, weights[n % DENSE]) for n in range(MATRICES)], arm, seconds=seconds)


def against_torch(seconds: float, group: int) -> Reading:
    """The same codes through PyTorch's operator, in the dtype of activations in which it is fastest here."""
    arms = {dtype: torch_arm(dtype, group) for dtype in DTYPES}
    times = {dtype: min(sample(arm).wall for _ in range(3)) for dtype, arm in arms.items()}
    best = min(DTYPES, key=lambda dtype: times[dtype])
    check(arms[best]()[0].float(), ours(group)()[0], 0.03)
    return race(arms[best], ours(group), seconds=seconds).but(dtype=str(best).removeprefix("torch."))


def torch_arm(dtype: torch.dtype, group: int) -> Callable[[], list[Tensor]]:
    """Its weight is (code - 8) * scale + zero, its scales and zeros [groups, rows, 2]."""
    first = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes().int(), 1)
    both = torch.stack([scales(group).T, torch.zeros_like(scales(group).T)], dim=-1).to(dtype).contiguous()
    weights = [(first.clone(), both.clone()) for _ in range(MATRICES)]
    x = vector().to(dtype)
    return lambda: [torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group, spread) for weight, spread in weights]


def check(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Arms that compute different things are not compared."""
    error = float((found - wanted).norm() / wanted.norm())
    if error > tolerance:
        raise HastenError(f"the two products differ by {error:.1%}")


def bound_share(seconds: float, group: int) -> Reading:
    """The time in which this machine just reads as many bytes, over the time of the products."""
    count = sum(part.nbytes for parts in packed(group) for part in parts)
    memory = torch.rand(count // 4)
    rows = memory[: count // 4 // SIDE * SIDE].view(-1, SIDE)
    readers: dict[str, Callable[[], object]] = {
        "sum": memory.sum,
        "dot": lambda: torch.dot(memory, memory),
        "product": lambda: torch.mv(rows, vector()[0]),
    }
    times = {name: min(sample(read).wall for _ in range(5)) for name, read in readers.items()}
    best = min(times, key=lambda name: times[name])
    found = race(readers[best], ours(group), seconds=seconds)
    return found.but(reader=best, gigabytes_per_second=count / found.facts["seconds_base"] / 1e9)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For setting up: the many small steps of calibrating wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def llama(width: int, hidden: int, layers: int) -> torch.nn.Module:
    """A randomly initialised Llama with heads of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = width // 64
    config = LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=512, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


SIZES = {"85m": (768, 2048, 12), "300m": (1024, 2816, 24)}


def decode(size: str, method: str, new: int, rows: int, seconds: float) -> Reading:
    """`rest_share`: of the time of the quantized model, what it takes without its products (they give zeros)."""
    ids = torch.randint(1, 512, (rows, 64), generator=torch.Generator().manual_seed(3))
    model = llama(*SIZES[size])
    weights = sum(parameter.numel() for parameter in model.parameters())
    with one_thread():
        small = apply(llama(*SIZES[size]), method, calibration=[ids])
    small.bake()
    dense = apply(model, "")
    prompt = ids[:1, :16]

    def writer(handle: Handle) -> Callable[[], Tensor]:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return lambda: handle.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    found = race(writer(dense), writer(small), seconds=seconds)
    with without_products():
        rest = min(sample(writer(small)).wall for _ in range(4))
    return found.but(
        weights=weights,
        method=method,
        tokens_per_second=new / found.facts["seconds"],
        tokens_per_second_base=new / found.facts["seconds_base"],
        rest_share=rest / found.facts["seconds"],
    )


@contextlib.contextmanager
def without_products() -> Iterator[None]:
    """Quantized layers give zeros at no cost."""
    real = lowbit.linear
    lowbit.linear = lambda x, packed, *_, **__: x.new_zeros(*x.shape[:-1], len(packed))
    try:
        yield
    finally:
        lowbit.linear = real


def figures(quick: bool) -> Iterator[Figure]:
    seconds = 40 if quick else 180
    yield figure(
        "gemv_int4_against_fp32",
        lambda: against_fp32(seconds, activations=8),
        against="torch fp32, 4096x4096, one row; ours with activations of 8 bits",
    )
    yield figure(
        "gemv_int4_exact_against_fp32",
        lambda: against_fp32(seconds, activations=32),
        against="torch fp32, 4096x4096, one row; ours with activations of 32 bits",
    )
    for group, name in ((GROUP, ""), (SMALL_GROUP, f"_g{SMALL_GROUP}")):
        yield figure(
            f"gemv_int4{name}_against_torch",
            lambda group=group: against_torch(seconds, group),
            against=f"torch._weight_int4pack_mm_for_cpu in its best dtype, 4096x4096, groups of {group}, one row",
            goal=1.5,
        )
        yield figure(
            f"gemv_int4{name}_bound_share",
            lambda group=group: bound_share(seconds, group),
            unit="share",
            against="reading the same bytes",
            goal=0.7,
        )
    packed.cache_clear()
    for size, method, goal in (
        ("85m", f"quant/gptq(bits={BITS})", 2.0),
        ("300m", f"quant/round_to_nearest(bits={BITS})", 3.0),
    ):
        yield figure(
            f"decode_int4_{size}",
            lambda size=size, method=method: decode(size, method, *((16, 4, 60) if quick else (64, 16, 300))),
            against=f"fp32, a random Llama of {size.upper()} weights, batch 1, tokens per second",
            goal=goal,
        )
