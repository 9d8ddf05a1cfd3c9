"""GNA: windows as its authors define them, borders included; tiles that hold every window exactly; the simulator."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import hasten
import standins
from conformance.attention import denoise, dit, vit
from hasten.attention._gna_simulator import axis, best_tiles, simulate
from hasten.attention._gna_tiles import tile_order, tiled
from hasten.attention.gna import GNA, gna, naive_gna
from hasten.core.errors import PlanError, UsageError
from hasten.hosts import recognise
from hasten.math.blocks import seen

SMALL = {"window": 3, "tokens": 4}


def inputs(tokens, batch=1, heads=2, dim=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype) for _ in range(3)]


def cases():
    off, one = (False, False), (1, 1)
    yield {"args": (*inputs(20, batch=2), (4, 5), (3, 2), one, one, off), "grad": True}
    yield {"args": (*inputs(38), (5, 7), (4, 5), (2, 3), one, off), "kwargs": {"prefix": 3}, "grad": True}
    yield {"args": (*inputs(63), (7, 9), (3, 2), (1, 2), (2, 3), off)}
    yield {"args": (*inputs(42), (6, 7), (3, 4), (1, 4), one, (True, False)), "kwargs": {"scaling": 0.5}, "grad": True}
    yield {"args": (*inputs(37), (37,), (8,), (3,), (1,), (True,))}
    yield {"args": (*inputs(41), (41,), (9,), (9,), (2,), (False,))}
    yield {"args": (*inputs(60), (3, 4, 5), (2, 3, 9), (1, 2, 5), (1, 1, 1), (True, False, False))}
    yield {"args": (*inputs(81, dtype=torch.bfloat16), (8, 10), (5, 4), one, one, off, 1), "tolerance": 2e-2}


@pytest.mark.parametrize(
    "length, window, stride, dilation, causal, wanted",
    [
        # windows of three move inwards at both ends
        (6, 3, 1, 1, False, ["111...", "111...", ".111..", "..111.", "...111", "...111"]),
        # even windows take one more on the left
        (6, 4, 1, 1, False, ["1111..", "1111..", "1111..", ".1111.", "..1111", "..1111"]),
        # stride equal to the window: blocks
        (6, 3, 3, 1, False, ["111...", "111...", "111...", "...111", "...111", "...111"]),
        # groups of two follow the second of them; the last group has but one
        (5, 3, 2, 1, False, ["111..", "111..", "..111", "..111", "..111"]),
        # every second token, two groups of their own
        (6, 2, 1, 2, False, ["1.1...", ".1.1..", "1.1...", ".1.1..", "..1.1.", "...1.1"]),
        # causal windows end at the query and begin where the last of its group's does
        (5, 3, 1, 1, True, ["1....", "11...", "111..", ".111.", "..111"]),
        (5, 3, 2, 1, True, ["1....", "11...", ".11..", ".111.", "..111"]),
    ],
)
def test_the_windows_of_one_dimension(length, window, stride, dilation, causal, wanted):
    found = axis(length, window, stride, dilation, causal)
    assert ["".join(".1"[int(x)] for x in row) for row in found] == wanted


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("tiles", [((2, 2), (2, 4)), ((1, 8), (4, 2)), ((3, 3), (2, 2))])
@pytest.mark.parametrize(
    "pattern",
    [
        ((3, 5), (1, 1), (1, 1), (False, False)),
        ((4, 4), (4, 2), (1, 1), (False, False)),
        ((2, 3), (1, 2), (3, 2), (False, True)),
    ],
)
def test_the_tiles_hold_the_pattern_exactly(pattern, tiles, prefix):
    """Whatever the tiles, also where they do not divide the grid: the masks let through the product of the sides."""
    grid = (7, 9)
    blocks = tiled(grid, *pattern, prefix, *tiles)
    mask = seen(blocks, prefix + 63, prefix + 63, causal=False)[0, 0]
    sides = [axis(*side) for side in zip(grid, *pattern, strict=True)]
    wanted = (sides[0][:, None, :, None] & sides[1][None, :, None, :]).reshape(63, 63)
    assert torch.equal(mask[prefix:, prefix:], wanted)
    assert mask[:prefix].all() and mask[:, :prefix].all()


def test_tokens_stand_tile_by_tile_what_is_left_over_behind_and_the_prefix_last():
    assert tile_order((2, 5), (1, 1), (2, 2), 1).tolist() == [1, 2, 6, 7, 3, 4, 8, 9, 5, 10, 0]
    assert tile_order((6,), (2,), (2,)).tolist() == [0, 2, 1, 3, 4, 5]


@pytest.mark.parametrize("pattern", [((3, 5), (1, 1), (1, 1)), ((4, 4), (4, 4), (1, 1)), ((4, 2), (2, 2), (2, 4))])
@pytest.mark.parametrize("tiles", [((2, 4), (2, 4)), ((4, 4), (2, 2)), ((1, 8), (4, 2))])
def test_the_simulator_counts_what_is_visited(pattern, tiles):
    """Where tiles divide the grid and its dilation groups, its counts are those of the lists that are computed."""
    grid, causal = (8, 32), (False, False)
    found = simulate(grid, *pattern, causal, *tiles)
    blocks = tiled(grid, *pattern, causal, 0, *tiles)
    assert found.visited == int(blocks.counts.sum())
    valid = torch.arange(blocks.indices.shape[-1]) < blocks.counts[..., None]
    masked = 0 if blocks.mask_of is None else int(((blocks.mask_of >= 0) & valid).sum())
    assert found.masked == masked and found.perfect == (masked == 0)
    density = blocks.density(256, 256, causal=False)
    assert found.speedup == pytest.approx(1 / density)
    sides = [axis(*side) for side in zip(grid, *pattern, causal, strict=True)]
    assert found.flops == pytest.approx(256**2 / math.prod(int(side.sum()) for side in sides))


def test_the_paper_s_examples_of_perfect_block_sparsity():
    """HunyuanVideo and FLUX as there: with strides of the tile's side nothing is masked, and the bound is reached.

    FLUX at 4K: 256 x 256 tokens, window 80, stride 16: 90% of the pairs go. HunyuanVideo: (30, 48, 80) tokens, window
    (18, 24, 24), stride (16, 8, 8) does not divide 30 frames.
    """
    flux = best_tiles((256, 256), (80, 80), (16, 16), (1, 1), (False, False), 256, 128)
    assert flux.perfect and flux.speedup == pytest.approx(flux.flops) and flux.flops == pytest.approx(10.24)
    sliding = best_tiles((256, 256), (80, 80), (1, 1), (1, 1), (False, False), 256, 128)
    assert not sliding.perfect and sliding.speedup < 0.8 * sliding.flops
    video = best_tiles((30, 48, 80), (18, 24, 24), (16, 8, 8), (1, 1, 1), (False,) * 3, 256, 128)
    assert 1 < video.speedup < video.flops


def test_the_simulator_finds_the_best_of_all_shapes():
    pattern = ((24, 20), (6, 10), (1, 1), (1, 1), (False, False))
    best = best_tiles(*pattern, 16, 16)
    sides = [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)]
    every = [simulate(*pattern, *pair) for pair in itertools.product(sides, sides)]
    costs = [one.visited + one.masked for one in every]
    assert best.visited + best.masked == min(costs) < max(costs)


def test_a_window_as_large_as_the_grid_is_dense_attention():
    q, k, v = inputs(25)
    out = gna(q, k, v, (4, 6), (9, 6), (1, 1), (1, 1), (False, False), 1)
    wanted = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)


def test_on_a_denoiser_the_report_shows_the_tiles():
    handle = hasten.apply(dit(), "attention/gna(window=[2, 3], stride=[2, 3], tile_q=[2, 3], tile_k=[2, 3])")
    denoise(handle)
    report = handle.report["attention/gna"]
    assert report["tiles"]["masked"] == 0 and report["tiles"]["speedup_bound"] == 6
    assert report["density"] == pytest.approx(1 / 6, abs=1e-4) and report["dense_calls"] == 0


def test_far_patches_do_not_reach_through_local_layers():
    """Without the class token a patch's influence grows by one window per layer."""
    model = dit()
    handle = hasten.apply(model, "attention/gna(window=3)")
    sample = torch.randn(1, 2, 12, 12, generator=torch.Generator().manual_seed(3))

    def out(sample):
        with torch.no_grad():
            return handle.model(sample, timestep=torch.tensor([5]), class_labels=torch.tensor([1])).sample

    plain = out(sample)
    sample[..., :2, :2] += 1  # the patch at (0, 0)
    changed = ((out(sample) - plain).abs().amax((0, 1)) > 0).reshape(6, 2, 6, 2).any(3).any(1)
    assert changed[:4, :4].all() and not changed[4:].any() and not changed[:, 4:].any()


def test_it_trains_a_vision_transformer():
    model = vit().train()
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(model.config, name, 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    labels = torch.arange(10) % 5
    pixels = torch.rand(10, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    pixels[:, :, :, :12] += labels[:, None, None, None] - 2.0  # the left half is as bright as the label says
    run = hasten.training(model, optimizer, [(pixels, labels)] * 30, "attention/gna(window=3, tokens=9)", steps=30)
    losses = []
    for images, wanted in run:
        loss = F.cross_entropy(run.model(pixel_values=images).logits, wanted)
        run.backward(loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses


def wan():
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    inputs = {"hidden_states": torch.randn(2, 4, 3, 8, 10, generator=generator), "timestep": torch.tensor([5, 9])}
    return model, inputs | {"encoder_hidden_states": torch.randn(2, 5, 16, generator=generator)}, (3, 4, 5), 0


def timm_vit():
    transformer = standins.timm().models.VisionTransformer
    model = transformer(
        img_size=(16, 24), patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=7, reg_tokens=2
    )
    return model, {"x": torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))}, (4, 6), 3


@torch.no_grad()
@pytest.mark.parametrize("build", [wan, timm_vit])
def test_models_of_video_and_with_registers_equal_themselves_under_a_dense_mask(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs, grid, prefix = build()
    model.eval()
    plain = model(**inputs)
    handle = hasten.apply(model, "attention/gna(window=2, stride=2, tokens=4)")
    found = model(**inputs)
    assert handle.report["attention/gna"]["dense_calls"] == 0
    handle.undo()
    sides, tokens = [axis(length, 2, 2, 1, False) for length in grid], prefix + math.prod(grid)
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    for i, a in enumerate(itertools.product(*map(range, grid))):
        for j, b in enumerate(itertools.product(*map(range, grid))):
            mask[prefix + i, prefix + j] = all(side[x, y] for side, x, y in zip(sides, a, b, strict=True))
    host = recognise(model)
    for layer in range(3):
        host.attend_with(layer, lambda call: F.scaled_dot_product_attention(call.query, call.key, call.value, mask))
    wanted = model(**inputs)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert (plain[0] - found[0]).abs().max() > 1e-4


def test_only_the_named_blocks_become_local():
    handle = hasten.apply(vit(), "attention/gna(window=3, blocks=[2, 0])")
    assert ["forward" in vars(layer.attention) for layer in handle.host.layers] == [True, False, True]
    with pytest.raises(UsageError, match="layers 0 to 2"):
        hasten.apply(vit(), "attention/gna(window=3, blocks=[3])")


def test_options_that_do_not_go_together():
    with pytest.raises(PlanError, match="stride is at most window"):
        GNA(window=3, stride=4)
    with pytest.raises(PlanError, match="one entry per dimension"):
        GNA(window=(3, 3), stride=(1, 1, 1))
    with pytest.raises(PlanError, match="together"):
        GNA(tile_q=(2, 2))
    handle = hasten.apply(dit(), "attention/gna(window=[3, 3, 3])")
    with pytest.raises(UsageError, match="2 dimensions"):
        denoise(handle)


def test_the_naive_window_is_the_authors_worked_example():
    """Equal scores: a query's output is the mean of its window, read off by hand for a corner and a middle token."""
    q = torch.zeros(1, 1, 25, 2)
    v = torch.arange(25.0).repeat(2, 1).T[None, None]
    out = naive_gna(q, q, v, (5, 5), (3, 3), (1, 1), (1, 1), (False, False))[0, 0, :, 0]
    torch.testing.assert_close(out[[0, 4, 12, 24]], torch.tensor([6.0, 8.0, 12.0, 18.0]))
