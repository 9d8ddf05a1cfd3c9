"""What `fuzz_kernels.py` runs: for each kernel, a random valid case, and hostile inputs that must be refused.

A case is what it is, its tensors, the kernel on them, the PyTorch path on them, and how far the two may differ.
"""

import copy
import random
from collections.abc import Callable
from typing import Any

import torch

from hasten.hosts.sparse import BitmapLinear, BlockSparseLinear
from hasten.kernels import bitmap, block_sparse, csr, int8, lowbit, lowbit_gemm, relu_ffn
from hasten.math import packing

Call = Callable[[], Any]
Case = tuple[dict[str, Any], list[Any], Callable[..., Any], Callable[..., Any], float]
Hostile = list[tuple[str, Call]]


def low_bit_weight(draw: random.Random, bits: int, tables: bool) -> tuple[dict[str, Any], list[Any]]:
    """(rows, columns, group and kinds), [packed, scales, zeros, bias, tables, levels]."""
    rows, columns = draw.choice([1, 2, 5, 16, 17, 40]), draw.choice([1, 31, 63, 64, 65, 127, 200, 257, 640, 700])
    group = draw.choice([16, 32, 64, 128, 192, 512])
    groups = -(-columns // group)
    kind = draw.choice(["tables"] if tables else ["fp32", "fp16", "uint8", "one", "compact", "levels"])
    packed = packing.pack(torch.randint(0, 2**bits, (rows, columns)), bits)
    scales, zeros, more, levels = torch.rand(rows, groups) + 0.1, torch.rand(rows, groups) * 2**bits, None, None
    if kind == "tables":
        more = torch.randn(3, 2**bits)
        zeros = torch.randint(0, 3, (rows, groups), dtype=torch.int32)
    elif kind == "levels":
        scales, zeros = (torch.randint(0, 8, (rows, groups), dtype=torch.uint8) for _ in range(2))
        levels = torch.rand(rows, -(-groups // 16), 4)
    elif kind == "one":
        zeros = torch.full((1, 1), 2.0 ** (bits - 1))
    elif kind == "compact":
        scales, zeros = lowbit.compact(scales.half().float(), zeros.floor())
    elif kind != "fp32":
        zeros = zeros.byte() if kind == "uint8" else zeros.half()
        scales = scales.half()
    bias = draw.choice([None, torch.float32, torch.float16, torch.bfloat16])
    bias = None if bias is None else torch.randn(rows).to(bias)
    about = {"bits": bits, "rows": rows, "columns": columns, "group": group, "statistics": kind}
    return about, [packed, scales, zeros, bias, more, levels]


def lowbit_case(draw: random.Random, isa: str) -> Case:
    bits = draw.choice([2, 3, 4, 6, 8])
    tables = bits <= 4 and draw.random() < 0.2  # noqa: PLR2004
    about, parts = low_bit_weight(draw, bits, tables)
    activations, count = 32 if tables else draw.choice([8, 32]), draw.choice([0, 1, 2, 3, 5, 8, 9])
    x = torch.randn(count, about["columns"])
    kernel = lowbit.kernel(bits, None if isa == "AMX" else isa)
    assert kernel is not None, "it can't be built"

    def native(x: Any, packed: Any, scales: Any, zeros: Any, bias: Any, tables: Any, levels: Any) -> Any:
        sizes = bits, about["group"]
        return lowbit.native_linear(kernel, x, packed, scales, zeros, bias, *sizes, tables, levels, activations)

    def expected(x: Any, packed: Any, scales: Any, zeros: Any, bias: Any, tables: Any, levels: Any) -> Any:
        sizes = bits, about["group"]
        return lowbit.torch_linear(x, packed, scales, zeros, bias, *sizes, tables, levels, activations)

    return {**about, "count": count, "activations": activations}, [x, *parts], native, expected, 1e-4


def gemm_case(draw: random.Random, isa: str) -> Case:
    bits = draw.choice([2, 3, 4, 6, 8])
    tables = bits <= 4 and draw.random() < 0.2  # noqa: PLR2004
    about, parts = low_bit_weight(draw, bits, tables)
    activations, count = 32 if tables else draw.choice([8, 32]), draw.choice([9, 15, 16, 17, 33, 70])
    kernel = lowbit_gemm.kernel(bits, isa)
    assert kernel is not None, "it can't be built"

    def expected(x: Any, packed: Any, scales: Any, zeros: Any, bias: Any, tables: Any, levels: Any) -> Any:
        sizes = bits, about["group"]
        return lowbit.torch_linear(x, packed, scales, zeros, bias, *sizes, tables, levels, activations)

    def native(x: Any, packed: Any, scales: Any, zeros: Any, bias: Any, tables: Any, levels: Any) -> Any:
        sizes = bits, about["group"]
        found = lowbit_gemm.gemm(x, packed, scales, zeros, bias, *sizes, activations, tables, levels, run=kernel)
        return expected(x, packed, scales, zeros, bias, tables, levels) if found is None else found

    about = {**about, "count": count, "activations": activations}
    return about, [torch.randn(count, about["columns"]), *parts], native, expected, 1e-4


def lowbit_hostile() -> Hostile:
    packed = packing.pack(torch.randint(0, 16, (5, 100)), 4)
    scales, zeros = torch.rand(5, 4), torch.rand(5, 4)
    which, tables = torch.zeros(5, 4, dtype=torch.int32), torch.randn(2, 16)
    good: dict[str, Any] = {"packed": packed, "scales": scales, "zeros": zeros, "bias": None, "bits": 4, "group": 32,
                            "columns": 100}  # fmt: skip
    changes: list[tuple[str, dict[str, Any]]] = [
        ("truncated codes", {"packed": packed[:, :-1].contiguous()}),
        ("codes that are not contiguous", {"packed": packed.t().contiguous().t()}),
        ("codes of another dtype", {"packed": packed.char()}),
        ("codes of one dimension", {"packed": packed.flatten()}),
        ("too few scales", {"scales": scales[:, :3].contiguous()}),
        ("scales of fewer rows", {"scales": scales[:4].contiguous()}),
        ("scales in fp64", {"scales": scales.double()}),
        ("zeros as int64", {"zeros": zeros.long()}),
        ("one row of zeros", {"zeros": zeros[:1].contiguous()}),
        ("no group", {"group": 0}),
        ("a negative group", {"group": -32}),
        ("a group that needs more scales", {"group": 16}),
        ("five bits", {"bits": 5}),
        ("a short bias", {"bias": torch.randn(4)}),
        ("a bias of whole numbers", {"bias": torch.zeros(5, dtype=torch.int64)}),
        ("other activations", {"activations": 4}),
        ("a table that is not there", {"zeros": which + 2, "tables": tables}),
        ("a table below zero", {"zeros": which - 1, "tables": tables}),
        ("narrow tables", {"zeros": which, "tables": tables[:, :8].contiguous()}),
        ("no table", {"zeros": which, "tables": tables[:0]}),
        ("tables with rounded activations", {"zeros": which, "tables": tables, "activations": 8}),
        ("levels of fp32 statistics", {"levels": torch.rand(5, 1, 4)}),
        ("too few levels", {"scales": scales.byte(), "zeros": zeros.byte(), "levels": torch.rand(5, 1, 3)}),
    ]
    cases = [(what, call(lowbit.linear, torch.randn(1, 100), {**good, **change})) for what, change in changes]
    for width in (99, 101, 0, 164):
        cases.append((f"x of {width} columns", call(lowbit.linear, torch.randn(1, width), good)))
    return cases


def call(function: Callable[..., Any], x: Any, options: dict[str, Any]) -> Call:
    return lambda: function(x, **options)


def int8_case(draw: random.Random, isa: str) -> Case:
    rows, columns = draw.choice([1, 15, 16, 17, 48, 70]), draw.choice([1, 3, 63, 64, 65, 130, 256, 500])
    count, kind = draw.choice([0, 1, 2, 4, 5, 16, 17, 40]), draw.choice(["fp32", "bf16", "fp16", "int8"])
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    x = torch.randn(count, columns) * draw.choice([1.0, 0.0, 1e-20, 1e30])
    if kind == "int8":
        x = torch.randint(-127, 128, (count, columns), dtype=torch.int8)
    else:
        x = x.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind])
        if count and draw.random() < 0.2:  # noqa: PLR2004
            x[draw.randrange(count), draw.randrange(columns)] = draw.choice([torch.nan, torch.inf])
    given = draw.choice([None, 1, columns]) if kind != "int8" else None
    scale = None if given is None else torch.rand(given) + 0.01
    bias = torch.randn(rows) if draw.random() < 0.5 else None  # noqa: PLR2004
    kernel = int8.kernel(isa)
    assert kernel is not None, "it can't be built"
    about = {"rows": rows, "columns": columns, "count": count, "kind": kind, "scales": given}
    inputs = [x, int8.pack(codes), torch.rand(rows), int8.sums(codes), bias, scale]
    return about, inputs, lambda *parts: int8.native_linear(kernel, *parts), int8.torch_linear, 1e-2


def int8_hostile() -> Hostile:
    codes = torch.randint(-127, 128, (20, 100), dtype=torch.int8)
    packed, scales, sums = int8.pack(codes), torch.rand(20), int8.sums(codes)
    good: dict[str, Any] = {"packed": packed, "scales": scales, "sums": sums}
    changes: list[tuple[str, dict[str, Any]]] = [
        ("codes of fewer rows", {"packed": packed[:1].contiguous()}),
        ("truncated codes", {"packed": packed[:, :-16].contiguous()}),
        ("codes that are not contiguous", {"packed": packed.transpose(0, 1).contiguous().transpose(0, 1)}),
        ("codes of another dtype", {"packed": packed.byte()}),
        ("codes as they were", {"packed": codes}),
        ("too few scales", {"scales": scales[:3]}),
        ("scales in fp16", {"scales": scales.half()}),
        ("scales of every other place", {"scales": torch.rand(40)[::2]}),
        ("too few sums", {"sums": sums[:19]}),
        ("sums in int64", {"sums": sums.long()}),
        ("a short bias", {"bias": torch.randn(19)}),
        ("a scale of fewer columns", {"scale": torch.rand(99)}),
        ("a scale in fp64", {"scale": torch.rand(100).double()}),
    ]
    cases = [(what, call(int8.linear, torch.randn(1, 100), {**good, **change})) for what, change in changes]
    return [*cases, ("x of 200 columns", call(int8.linear, torch.randn(1, 200), good))]


def csr_case(draw: random.Random, isa: str) -> Case:
    rows, width, count = (
        draw.choice([1, 3, 17, 40]),
        draw.choice([1, 7, 64, 300]),
        draw.choice([0, 1, 2, 5, 16, 17, 40]),
    )
    dense = torch.randn(rows, width) * (torch.rand(rows, width) < draw.choice([0, 0.01, 0.2, 1]))
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    values, columns, starts = csr.compress(dense, dtype)
    columns = columns if draw.random() < 0.5 else columns.int()  # noqa: PLR2004
    csr.check(values, columns, starts, rows=rows, width=width)
    about = {"rows": rows, "width": width, "count": count, "dtype": str(dtype), "numbers": len(values)}

    def native(*parts: Any) -> Any:
        return csr.native_product(*parts, isa=isa)

    return about, [torch.randn(count, width), values, columns, starts], native, csr.torch_product, 1e-5


def csr_hostile() -> Hostile:
    values, columns, starts = csr.compress(torch.eye(5), torch.float32)
    good: dict[str, Any] = {"columns": columns, "starts": starts, "rows": 5, "width": 5}
    changes: list[tuple[str, dict[str, Any]]] = [
        ("a column beyond the last", {"columns": columns.int() + 1}),
        ("a column below zero", {"columns": columns.int() - 1}),
        ("a wide uint16 column", {"columns": (columns.int() + 60000).to(torch.uint16)}),
        ("columns in int64", {"columns": columns.long()}),
        ("fewer columns than values", {"columns": columns.int()[:4]}),
        ("starts beyond the values", {"starts": starts + 1}),
        ("starts that fall", {"starts": torch.tensor([0, 3, 1, 3, 4, 5], dtype=torch.int32)}),
        ("starts in int64", {"starts": starts.long()}),
        ("starts of fewer rows", {"starts": starts[:5]}),
        ("a start below zero", {"starts": torch.tensor([-1, 1, 2, 3, 4, 5], dtype=torch.int32)}),
    ]
    cases = [(what, call(csr.check, values, {**good, **change})) for what, change in changes]
    return [*cases, ("values in fp64", call(csr.check, values.double(), good))]


def block_sparse_case(draw: random.Random, isa: str) -> Case:
    r, c, bits = draw.choice([1, 3, 4, 8, 12, 16, 32, 64]), draw.choice([1, 1, 4, 16]), draw.choice([8, 32])
    rows, width, count = (
        draw.choice([1, 5, 16, 33, 70]),
        draw.choice([1, 17, 64, 130]),
        draw.choice([0, 1, 2, 5, 17, 70]),
    )
    kept = torch.rand(-(-rows // r), width) < draw.choice([0, 0.1, 0.5, 1])
    parts = block_sparse.pack(torch.randn(rows, width) * kept.repeat_interleave(r, 0)[:rows], r, c, bits)
    block_sparse.check(*parts, rows=rows, width=width)
    bias, vnni = (torch.randn(rows) if draw.random() < 0.5 else None), draw.random() < 0.5  # noqa: PLR2004
    values, columns, starts, scales, sums = parts
    about = {"block": f"{r}x{c}", "bits": bits, "rows": rows, "width": width, "count": count, "vnni": vnni}

    def native(*given: Any) -> Any:
        return block_sparse.native_linear(*given, rows, isa=isa, vnni=vnni)

    def expected(*given: Any) -> Any:
        return block_sparse.torch_linear(*given, rows)

    return about, [torch.randn(count, width), values, columns, starts, bias, scales, sums], native, expected, 1e-5


def block_sparse_hostile() -> Hostile:
    dense = torch.randn(40, 30)
    cases: list[tuple[str, Call]] = []
    for bits in (8, 32):
        layer = BlockSparseLinear.from_dense(dense, None, block=(16, 1), bits=bits)
        good = {name: part.clone() for name, part in layer.state_dict().items()}
        changes: list[tuple[str, dict[str, Any]]] = [
            ("a column beyond the last", {"columns": good["columns"] + 1}),
            ("a column below zero", {"columns": good["columns"] - 1}),
            ("starts beyond the columns", {"starts": good["starts"] + 4}),
            ("starts that fall", {"starts": good["starts"].flip(0)}),
        ]
        for what, change in changes:
            cases.append((f"{what}, {bits} bits", loaded(layer, {**good, **change})))
        whole = {**good, "rows": 40, "width": 30}
        values = whole.pop("values")
        cut: list[tuple[str, Any, dict[str, Any]]] = [
            ("truncated values", values[:-1], {}),
            ("values in fp64", values.double(), {}),
            ("more rows", values, {"rows": 64}),
            ("fewer columns", values, {"columns": good["columns"][:-4]}),
            ("columns in int64", values, {"columns": good["columns"].long()}),
        ]
        cases += [(f"{what}, {bits} bits", call(block_sparse.check, part, {**whole, **change}))
                  for what, part, change in cut]  # fmt: skip
        for width in (29, 31, 0):
            cases.append((f"x of {width} columns, {bits} bits", call(layer, torch.randn(2, width), {})))
    return cases


def loaded(layer: Any, state: dict[str, Any]) -> Call:
    """Loading hostile tensors into a copy of a layer, as from a file."""
    return lambda: copy.deepcopy(layer).load_state_dict(state)


def bitmap_case(draw: random.Random, isa: str) -> Case:
    rows, width, count = (
        draw.choice([1, 5, 16, 40]),
        draw.choice([1, 15, 16, 17, 64, 130]),
        draw.choice([0, 1, 2, 3, 8]),
    )
    weight = torch.randn(rows, width) * (torch.rand(rows, width) < draw.choice([0, 0.1, 0.5, 1]))
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.int8])
    values, bits, starts, scales = bitmap.pack(weight, dtype)
    bitmap.check(values, bits, starts, scales, rows=rows, width=width)
    bias = torch.randn(rows) if draw.random() < 0.5 else None  # noqa: PLR2004
    about = {"rows": rows, "width": width, "count": count, "dtype": str(dtype), "numbers": len(values)}

    def native(*parts: Any) -> Any:
        return bitmap.native_linear(*parts, isa=isa)

    def expected(x: Any, values: Any, bits: Any, starts: Any, bias: Any, scales: Any) -> Any:
        return torch.nn.functional.linear(x, bitmap.expand(values, bits, starts, scales, width=width), bias)

    return about, [torch.randn(count, width), values, bits, starts, bias, scales], native, expected, 1e-5


def bitmap_hostile() -> Hostile:
    layer = BitmapLinear.from_dense(torch.randn(9, 20) * (torch.rand(9, 20) < 0.5), None)
    good = {name: part.clone() for name, part in layer.state_dict().items()}
    changes: list[tuple[str, dict[str, Any]]] = [
        ("more bits than values", {"bits": good["bits"] | 1}),
        ("bits beyond the last column", {"bits": good["bits"] | torch.tensor([0, 0, 0x80, 0], dtype=torch.uint8)}),
        ("starts that fall", {"starts": good["starts"].flip(0)}),
        ("starts beyond the values", {"starts": good["starts"] + 8}),
    ]
    cases = [(what, loaded(layer, {**good, **change})) for what, change in changes]
    whole = {**good, "rows": 9, "width": 20}
    values = whole.pop("values")
    cases += [
        ("truncated values", call(bitmap.check, values[:-1], whole)),
        ("values in fp64", call(bitmap.check, values.double(), whole)),
        ("fewer rows of bits", call(bitmap.check, values, {**whole, "bits": good["bits"][:8]})),
        ("another width", call(bitmap.check, values, {**whole, "width": 40})),
    ]
    return [*cases, *((f"x of {width} columns", call(layer, torch.randn(2, width), {})) for width in (19, 21, 33, 0))]


def relu_ffn_case(draw: random.Random, isa: str) -> Case:
    width, hidden, out = draw.choice([1, 15, 33, 100]), draw.choice([1, 7, 64, 130, 600]), draw.choice([1, 16, 31, 80])
    count, dtype = draw.choice([0, 1, 2, 3, 8]), draw.choice([torch.float32, torch.bfloat16])
    threshold = draw.choice([0.0, 0.5, 100.0])

    def maybe(*shape: int) -> Any:
        return torch.randn(*shape) if draw.random() < 0.5 else None  # noqa: PLR2004

    up = maybe(hidden, width)
    matrices = [None if m is None else m.to(dtype) for m in (torch.randn(hidden, width), torch.randn(hidden, out), up)]
    gate_bias, up_bias, down_bias = maybe(hidden), None if up is None else maybe(hidden), maybe(out)
    about = {"width": width, "hidden": hidden, "out": out, "count": count, "dtype": str(dtype), "gated": up is not None}

    def native(*parts: Any) -> Any:
        return relu_ffn.native_ffn(*parts, threshold, isa=isa)

    def expected(x: Any, *parts: Any) -> Any:
        return relu_ffn.dense_ffn(x, *(None if part is None else part.float() for part in parts), threshold)

    return about, [torch.randn(count, width), *matrices, gate_bias, up_bias, down_bias], native, expected, 1e-4


def relu_ffn_hostile() -> Hostile:
    good: dict[str, Any] = {"gate": torch.randn(64, 20), "down_t": torch.randn(64, 30), "up": torch.randn(64, 20)}
    changes: list[tuple[str, dict[str, Any]]] = [
        ("a gate of fewer neurons", {"gate": torch.randn(63, 20)}),
        ("a gate of fewer inputs", {"gate": torch.randn(64, 19)}),
        ("a down of fewer neurons", {"down_t": torch.randn(63, 30)}),
        ("an up of fewer neurons", {"up": torch.randn(63, 20)}),
        ("an up of fewer inputs", {"up": torch.randn(64, 19)}),
        ("a short gate bias", {"gate_bias": torch.randn(63)}),
        ("a short up bias", {"up_bias": torch.randn(63)}),
        ("a short down bias", {"down_bias": torch.randn(29)}),
    ]
    cases = [(what, call(relu_ffn.relu_ffn, torch.randn(1, 20), {**good, **change})) for what, change in changes]
    return [*cases, ("x of 21 columns", call(relu_ffn.relu_ffn, torch.randn(1, 21), good))]


KERNELS: dict[str, tuple[Callable[[random.Random, str], Case], Callable[[], Hostile]]] = {
    "lowbit": (lowbit_case, lowbit_hostile),
    "lowbit_gemm": (gemm_case, list),  # `lowbit` checks what it is given
    "int8": (int8_case, int8_hostile),
    "csr": (csr_case, csr_hostile),
    "block_sparse": (block_sparse_case, block_sparse_hostile),
    "bitmap": (bitmap_case, bitmap_hostile),
    "relu_ffn": (relu_ffn_case, relu_ffn_hostile),
}
