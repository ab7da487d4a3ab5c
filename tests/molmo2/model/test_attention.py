"""The backends of attention against the mask written out: values, gradients, and no block called empty that is not."""

import functools
import importlib.util
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend

from molmo2.model import flex as flex_file
from molmo2.model.attention import (
    DENSE,
    KeySpan,
    attention_of_group,
    choose_attention,
    dense_attention,
    key_spans,
    masked_attention,
    tiled_attention,
)
from molmo2.model.flex import block_tables, flex
from molmo2.model.mask import BLOCK, MEMBER, PAD_SEGMENT, TRUNK, AttentionMask, allowed
from molmo2.model.visual_order import visual_first_order

Vectors = tuple[torch.Tensor, torch.Tensor]


def member(number: int, trunk: str, branches: list[int]) -> tuple[list[int], list[bool]]:
    """One pack member; in `trunk` "v" is a visual token and "t" a word."""
    segments, visual = [number * MEMBER + TRUNK] * len(trunk), [kind == "v" for kind in trunk]
    for branch, length in enumerate(branches, 1):
        segments += [number * MEMBER + branch] * length
        visual += [False] * length
    return segments, visual


def row(members: list[tuple[str, list[int]]], length: int) -> tuple[list[int], list[bool]]:
    """Members one after the other, then padding."""
    segments: list[int] = []
    visual: list[bool] = []
    for number, (trunk, branches) in enumerate(members):
        more, seen = member(number, trunk, branches)
        segments, visual = segments + more, visual + seen
    assert len(segments) <= length
    return segments + [PAD_SEGMENT] * (length - len(segments)), visual + [False] * (length - len(visual))


def random_row(length: int, generator: torch.Generator) -> tuple[list[int], list[bool]]:
    """Random members until the row is nearly full."""
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    members: list[tuple[str, list[int]]] = []
    left = length
    while left > 40:
        kinds = ["t" * draw(1, 20), "tt" + ("v" * draw(5, 60) + "tt") * draw(1, 8), "v" * draw(1, 300)]
        trunk = kinds[draw(0, 3)][: left // 2]
        branches = [draw(1, 40) for _ in range(draw(1, 4))]
        if len(trunk) + sum(branches) > left:
            break
        members.append((trunk, branches))
        left -= len(trunk) + sum(branches)
    return row(members, length)


def vectors(*rows: tuple[list[int], list[bool]]) -> Vectors:
    """Tensors [B, S] of some rows."""
    return torch.tensor([r[0] for r in rows], dtype=torch.int32), torch.tensor([r[1] for r in rows])


def layouts() -> dict[str, Vectors]:
    """Named rows of the kinds that training meets, and random ones."""
    video = "ttt" + "".join("tt" + "v" * 81 for _ in range(9))
    found = {
        "one video, one branch": vectors(row([(video, [60])], 896)),
        "one video, many branches": vectors(row([(video, [15] * 6)], 896)),
        "texts": vectors(row([("t", [n]) for n in (100, 30, 250, 90, 200)], 700)),
        "images": vectors(row([("t" + "v" * 150 + "t", [20, 9]) for _ in range(4)], 768)),
        "text, then images": vectors(row([("t", [200]), ("v" * 200, [30]), ("t" + "v" * 120, [40, 40])], 700)),
        "padding alone": vectors(row([], 300)),
    }
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        found[f"random {seed}"] = vectors(*(random_row(600 + 37 * seed, generator) for _ in range(1 + seed % 2)))
    return found


LAYOUTS = layouts()


def inputs(segment_ids: torch.Tensor, num_heads: int = 4, num_kv_heads: int = 2, dim: int = 8) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    batch, length = segment_ids.shape
    shapes = [(batch, heads, length, dim) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("short", [4096, 100], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_tiles_equal_the_dense_mask(name: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molmo2.model.attention.SHORT", short)
    segment_ids, is_visual = LAYOUTS[name]
    *qkv, gradient = inputs(segment_ids)
    results = []
    for attend in (dense_attention, tiled_attention):
        leaves = [tensor.clone().requires_grad_() for tensor in qkv]
        out = attend(*leaves, AttentionMask(segment_ids, is_visual))
        out.backward(gradient)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        with torch.no_grad():
            torch.testing.assert_close(attend(*qkv, AttentionMask(segment_ids, is_visual)), out.detach())
    for tiled, dense in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(tiled, dense, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("tile", [32, 100])
@pytest.mark.parametrize("name", LAYOUTS)
def test_spans_hold_every_allowed_key_and_no_more_than_they_must(name: str, tile: int) -> None:
    segment_ids, is_visual = LAYOUTS[name]
    dense = allowed(segment_ids, is_visual)[:, 0]
    spans = key_spans(segment_ids, is_visual, tile=tile)
    assert [span.start for span in spans] == list(range(0, segment_ids.shape[1], tile))
    for span in spans:
        keys = dense[:, span.start : span.stop].any(dim=(0, 1)).nonzero()
        assert span.first_key <= int(keys[0]) and int(keys[-1]) < span.last_key
        if len(segment_ids) == 1:  # two rows share their spans
            assert span.first_key == int(keys[0])
            assert span.last_key <= max(int(keys[-1]) + 1, span.stop) or is_visual[:, span.start : span.stop].any()


def dense_blocks(segment_ids: torch.Tensor, is_visual: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
    """The dense mask in blocks, [B, query blocks, key blocks, BLOCK * BLOCK]; nothing is allowed behind the end."""
    missing = -segment_ids.shape[1] % BLOCK
    dense = torch.nn.functional.pad(allowed(segment_ids, is_visual, order)[:, 0], (0, missing, 0, missing))
    return dense.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3).flatten(3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_are_never_wrong(name: str) -> None:
    mixed, full = block_tables(*LAYOUTS[name])
    blocks = dense_blocks(*LAYOUTS[name])
    whole = LAYOUTS[name][0].shape[1] // BLOCK  # of queries before the end
    assert not (mixed & full).any()
    assert not (blocks.any(3) & ~mixed & ~full).any()  # a block that holds a pair is visited
    assert not (full & ~blocks.all(3))[:, :whole].any()


@pytest.mark.parametrize("name", LAYOUTS)
def test_few_blocks_are_visited_in_vain(name: str) -> None:
    mixed, full = block_tables(*LAYOUTS[name])
    needed = int(dense_blocks(*LAYOUTS[name]).any(3).sum())
    assert int((mixed | full).sum()) <= 1.25 * needed + len(mixed) + 1  # and the block at the end


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_in_another_order_see_the_same_keys(name: str) -> None:
    """The dense mask, tiles and blocks of a row whose tokens were moved."""
    segment_ids, is_visual = LAYOUTS[name]
    order = visual_first_order(segment_ids, is_visual)
    moved = AttentionMask(segment_ids.gather(1, order), is_visual.gather(1, order), order.int())
    both_ways = order[:, None, :, None], order[:, None, None, :]
    rows = torch.arange(len(order))[:, None, None, None]
    dense = allowed(segment_ids, is_visual)
    assert torch.equal(moved.dense(), dense[rows, 0, both_ways[0], both_ways[1]])
    q, k, v, _ = inputs(segment_ids)
    places = order[:, None, :, None].expand(-1, 4, -1, 8)
    wanted = dense_attention(q, k, v, AttentionMask(segment_ids, is_visual)).gather(2, places)
    found = tiled_attention(q.gather(2, places), *(x.gather(2, places[:, :2]) for x in (k, v)), moved)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    mixed, full = block_tables(*moved.vectors)
    blocks = dense_blocks(*moved.vectors)
    assert not (mixed & full).any() and not (blocks.any(3) & ~mixed & ~full).any()
    assert not (full & ~blocks.all(3))[:, : segment_ids.shape[1] // BLOCK].any()


def test_few_blocks_of_a_video_are_mixed_when_visual_tokens_come_first() -> None:
    """384 frames with their times, in 36,864 tokens: the share of mixed blocks among those that are visited."""
    video = ("tttttt" + "v" * 82 + "t") * 384
    segment_ids, is_visual = vectors(row([(video, [800])], 36864))
    shares = []
    for order in (None, visual_first_order(segment_ids, is_visual)):
        vector = (segment_ids, is_visual, None)
        if order is not None:
            vector = (segment_ids.gather(1, order), is_visual.gather(1, order), order)
        mixed, full = block_tables(*vector)
        shares.append(float(mixed.sum() / (mixed | full).sum()))
    assert shares[0] > 0.45 and shares[1] < 0.16, shares


@pytest.mark.slow
def test_flex_attention_equals_the_dense_mask() -> None:
    """The compiled kernel, which skips empty blocks and masks none of the full ones. Forward alone, as CPUs can."""
    video = "ttt" + "".join("tt" + "v" * 81 for _ in range(9))
    rows = [
        row([(video, [60])], 896),
        row([("t", [250]), ("v" * 300, [40, 40]), ("t", [190])], 896),
        random_row(896, torch.Generator().manual_seed(5)),
    ]
    for each in rows:
        segment_ids, is_visual = vectors(each)
        q, k, v, _ = inputs(segment_ids, dim=32)
        order = visual_first_order(segment_ids, is_visual)
        moved = AttentionMask(segment_ids.gather(1, order), is_visual.gather(1, order), order)
        for mask in (AttentionMask(segment_ids, is_visual), moved):
            with torch.no_grad():
                torch.testing.assert_close(flex(q, k, v, mask), dense_attention(q, k, v, mask), rtol=1e-5, atol=2e-6)


LENGTHS = (1040, 1152, 1281, 1300, 1419, 1500, 1664, 1700, 1800, 1921, 2048, 2100)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Count the graphs of FlexAttention, which are captured as on a GPU but not turned into kernels."""
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    flex_file._compiled_flex.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    flex_file._compiled_flex.cache_clear()
    torch._dynamo.reset()


def flex_error(length: int, batch: int = 1) -> float:
    """The largest difference of FlexAttention from the dense mask, of a random row."""
    row_ = random_row(length, torch.Generator().manual_seed(length))
    segment_ids, is_visual = vectors(*[row_] * batch)
    q, k, v, _ = inputs(segment_ids)
    with torch.no_grad():
        found = flex(q, k, v, AttentionMask(segment_ids, is_visual))
        return float((found - dense_attention(q, k, v, AttentionMask(segment_ids, is_visual))).abs().max())


@pytest.mark.slow
def test_flex_attention_compiles_two_graphs_for_twelve_lengths(graphs: CompileCounterWithBackend) -> None:
    assert max(flex_error(length) for length in LENGTHS) < 3e-6
    assert 1 <= graphs.frame_count <= 2


def test_flex_attention_never_falls_back_to_all_scores(graphs: CompileCounterWithBackend) -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        flex_error(1300)
        with pytest.raises(FailOnRecompileLimitHit):  # another number of rows is another kind of input
            flex_error(1300, batch=2)


@pytest.mark.parametrize("queries", [1, 37])
def test_groups_of_heads_as_queries_equal_heads(queries: int) -> None:
    generator = torch.Generator().manual_seed(queries)
    shapes = (2, 6, queries, 8), (2, 2, 53, 8), (2, 2, 53, 8), (2, 6, queries, 8)
    *qkv, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
    mask = torch.rand(2, 1, queries, 53, generator=generator) > 0.3
    results = []
    plain = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    runs: list[Callable[..., Any]] = [attention_of_group, lambda q, k, v, m: plain(q, k, v, attn_mask=m)]
    for attend in runs:
        leaves = [tensor.clone().requires_grad_() for tensor in qkv]
        out = attend(*leaves, mask)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, gradient)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=2e-6)


def test_long_rows_on_cuda_take_flex_or_tiles_but_no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    find, there = importlib.util.find_spec, {"triton": True}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there[name] or None if name in there else find(name))
    flex_file.has_triton.cache_clear()
    assert choose_attention(cuda, DENSE) is dense_attention
    assert choose_attention(cuda, DENSE + 1) is flex
    assert choose_attention(cpu, DENSE) is choose_attention(cpu, DENSE + 1) is tiled_attention
    there["triton"] = False
    flex_file.has_triton.cache_clear()
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert choose_attention(cuda, DENSE + 1) is tiled_attention
    flex_file.has_triton.cache_clear()


def test_a_hopper_gpu_takes_flash_attention_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu, find = torch.device("cuda"), torch.device("cpu"), importlib.util.find_spec
    installed, capability = {"flash_attn.cute": False}, [9, 0]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: installed[name] or None if name in installed else find(name)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))

    def options(device: torch.device) -> dict[str, Any]:
        flex_file.kernel_options.cache_clear()
        return flex_file.kernel_options(device)

    assert options(cuda) == {}
    installed["flash_attn.cute"] = True
    assert options(cuda) == {"BACKEND": "FLASH"} and options(cpu) == {}
    assert "FLASH" in typing.get_args(torch.nn.attention.flex_attention._Backend)  # torch knows the name
    capability[0] = 8
    assert options(cuda) == {}
    flex_file.kernel_options.cache_clear()


def test_inference_never_waits_for_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(flex_file, "_compiled_flex", lambda tuned: modes.append(tuned) or (lambda q, *_, **__: q))
    segment_ids, is_visual = LAYOUTS["texts"]
    q, k, v, _ = inputs(segment_ids)
    flex(q, k, v, AttentionMask(segment_ids, is_visual))
    with torch.no_grad():
        flex(q, k, v, AttentionMask(segment_ids, is_visual))
    assert modes == [True, False]


def test_work_goes_with_the_members_not_with_the_row() -> None:
    def keys(members: int) -> int:
        segment_ids, is_visual = vectors(row([("t" + "v" * 200, [55]) for _ in range(members)], 256 * members))
        return sum(span.last_key - span.first_key for span in key_spans(segment_ids, is_visual, tile=64))

    assert keys(16) == 8 * keys(2)


def test_a_cpu_computes_tiles_of_rows_of_any_length() -> None:
    segment_ids, is_visual = LAYOUTS["images"]
    q, k, v, _ = inputs(segment_ids)
    mask = AttentionMask(segment_ids, is_visual)
    dense = dense_attention(q, k, v, AttentionMask(segment_ids, is_visual))
    torch.testing.assert_close(masked_attention(q, k, v, mask), dense, rtol=1e-5, atol=2e-6)
    assert mask.made(key_spans)[1] == KeySpan(128, 256, 0, 332)  # made by the call: the mask keeps what it has made
    assert len(mask.made(key_spans)) == 6
