"""What long rows cost: each backend of attention by length and layout, and one whole pack of 36,864 tokens.

    python benchmarks/bench_long.py                       lengths up to 36,864
    python benchmarks/bench_long.py --longest 8192        in a minute

Forward and backward of one attention layer (8 heads, 2 key/value heads of 64, float32 on a CPU, bfloat16 on a GPU) on

    video    one video that fills the row, with 60 tokens of text at the end
    packed   members of 1,024 tokens: an image of 800 visual tokens, then two branches

"pairs" are the allowed pairs of query and key; the time per pair should not grow with the length. Every case runs in a
process of its own, so that its peak memory is its own; the peak is what the process used beyond what it held before.
Then a pack with one 384-frame video goes through the demo's model, forward and backward, on two ranks that share it
(sequence parallelism 2, gloo), and through one rank. On a GPU FlexAttention stands beside the dense mask as well.
The last line is one JSON object; what was not measured is not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_plan import cpu_name
from torch import Tensor

from molmo2.model.activations import MicroBatch, activation_bytes, measure_saved, saved_bytes
from molmo2.model.attention import dense_attention, tiled_attention
from molmo2.model.connector import Connector
from molmo2.model.flex import flex
from molmo2.model.loss import weighted_loss
from molmo2.model.mask import MEMBER, TRUNK, AttentionMask
from molmo2.model.molmo2 import Molmo2
from molmo2.model.pairs import attention_pairs
from molmo2.model.presets import PRESETS
from molmo2.parallel.gather import take_loss_rows
from molmo2.parallel.mesh import make_mesh
from molmo2.parallel.places import find_loss_places, find_visual_places
from molmo2.parallel.ulysses import ulysses
from molmo2.parallel.vision import encode_shared
from shards.split import split_visuals

LENGTHS = (1024, 2048, 4096, 8192, 16_384, 36_864)
DENSE_UP_TO = 8192
HEADS, KV_HEADS, DIM = 8, 2, 64
PER_FRAME = 93  # visual tokens of a frame of the whole pack: 384 of them and the words fill the row
FRAMES = 384
GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]


def layout(kind: str, length: int) -> tuple[Tensor, Tensor]:
    """Segment ids int [1, S] and visual tokens bool [1, S]."""
    if kind == "video":
        segments = torch.full((length,), TRUNK)
        segments[-60:] = 1
        visual = (torch.arange(length) % 84 >= 3) & (segments == TRUNK)
    else:
        place = torch.arange(length) % 1024
        segments = torch.arange(length) // 1024 * MEMBER
        segments = segments + torch.where(place < 804, TRUNK, torch.where(place < 914, 1, 2))
        visual = (place >= 2) & (place < 802)
    return segments[None].int(), visual[None]


def peak_memory(device: str) -> int:
    """Bytes at most so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attention_case(backend: str, kind: str, length: int, device: str) -> dict[str, Any]:
    """Seconds and peak bytes of a layer's forward and backward, and its allowed pairs."""
    torch.set_num_threads(1)
    attend = {"dense": dense_attention, "tiled": tiled_attention, "flex": flex}[backend]
    segment_ids, is_visual = (value.to(device) for value in layout(kind, length))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, length, DIM, generator=generator).to(device, dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    before, times = peak_memory(device), []
    for _ in range(3 if device == "cuda" or length <= 4096 else 1):
        since = time.perf_counter()
        attend(q, k, v, AttentionMask(segment_ids, is_visual)).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - since)
    pairs = int(attention_pairs(segment_ids, is_visual))
    return {"seconds": min(times), "bytes": peak_memory(device) - before, "pairs": pairs}


def whole_pack(rank: int, world: int, folder: str, answers: Any) -> None:
    """One rank of a pack with a video of 384 frames through the demo's model, forward and backward."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    mesh, config = make_mesh(world), PRESETS["tiny"]
    model = Molmo2(config).init_weights()
    model.set_recompute("full")
    model.train()
    length, words = LENGTHS[-1], 60
    frame = torch.arange(length - words) // (PER_FRAME + 3)
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[0, : length - words] = (torch.arange(length - words) % (PER_FRAME + 3) >= 3) & (frame < FRAMES)
    counts = torch.bincount(frame[visual[0, : length - words]], minlength=FRAMES)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (FRAMES, config.crop_size, config.crop_size, 3), generator=generator).to(torch.uint8)
    owner = torch.repeat_interleave(torch.arange(FRAMES), counts)
    patches = torch.randint(0, config.patches_per_crop, (len(owner), 9), generator=generator)
    pooling = patches + owner[:, None] * config.patches_per_crop
    ids = torch.randint(3, 500, (1, length), generator=generator).masked_fill(visual, config.image_patch_id)
    segments = torch.full((1, length), TRUNK, dtype=torch.int32)
    segments[0, -words:] = 1
    weights = (segments == 1).float()
    before, since = peak_memory("cpu"), time.perf_counter()
    own = torch.from_numpy(split_visuals([1] * FRAMES, counts.tolist(), world)[rank].crops)
    places = find_visual_places(pooling, torch.ones(FRAMES, dtype=torch.int64), counts, config.patches_per_crop, mesh)
    features, touch = encode_shared(model.encode_visuals, pixels[own], places, config.crop_size, mesh)
    x = model.embed(ids, features) + touch
    part = slice(mesh.sp_rank * length // world, (mesh.sp_rank + 1) * length // world)
    attend = ulysses(tiled_attention, mesh, config.text.num_heads, config.text.num_kv_heads)
    hidden = model.decode(x[:, part], torch.arange(length)[None, part], AttentionMask(segments, visual), attend=attend)
    rows = find_loss_places(ids.clamp(max=511), weights, torch.zeros_like(ids), mesh)
    sums = weighted_loss(
        take_loss_rows(hidden, rows, mesh), model.lm_head, labels=rows.labels, weights=rows.weights,
        z_loss=1e-4, chunk_rows=4096,
    )  # fmt: skip
    loss = (sums.cross_entropy + sums.z) / weights.sum()
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum()
    total = torch.stack([loss.detach(), norm])
    dist.all_reduce(total)
    answers[rank] = {
        "loss": float(total[0]),
        "seconds": time.perf_counter() - since,
        "bytes": peak_memory("cpu") - before,
    }
    dist.destroy_process_group()


def modelled(world: int) -> float:
    """Bytes of a rank's activations in `whole_pack` as `train.py --dry-run` counts them; the few logits left out."""
    config = PRESETS["tiny"]
    connector = Connector(config.connector, config.vit, config.text)
    width = config.vit.hidden_size * len(config.vit.feature_layers)
    features = torch.zeros(1, config.patches_per_crop, width, requires_grad=True)
    pooling = torch.randint(0, config.patches_per_crop, (PER_FRAME, 9))
    frame = saved_bytes(connector, lambda: connector(features, pooling)) + features.nbytes
    kept = dataclasses.replace(measure_saved(config, torch.float32), connector=frame)
    batch = MicroBatch(tokens=LENGTHS[-1] / world, crops=-(-FRAMES // world), recompute="full", sp=world, item_size=4)
    parts = activation_bytes(config, kept, batch)
    return sum(parts[name] for name in ("language model", "vision", "connector"))


def in_a_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of a call in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def run_pack(world: int) -> list[dict[str, Any]]:
    """The results of all ranks."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Manager() as manager:
        answers = manager.dict()
        ranks = [context.Process(target=whole_pack, args=(rank, world, folder, answers)) for rank in range(world)]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join()
        return [answers[rank] for rank in range(world)]


def main() -> None:
    """Measure, print the table, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="longest row (%(default)s)")
    longest = parser.parse_args().longest
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bars: dict[str, Any] = {}
    print(
        f"{'layout':8s}{'backend':8s}{'tokens':>8s}{'pairs, % of S x S':>19s}{'seconds':>10s}"
        f"{'ns a pair':>11s}{'peak, GiB':>11s}"
    )
    for kind in ("video", "packed"):
        per_pair: dict[int, float] = {}
        for length in (length for length in LENGTHS if length <= longest):
            for backend in ("dense", "tiled", *(("flex",) if device == "cuda" else ())):
                if backend == "dense" and length > DENSE_UP_TO:
                    continue
                got = in_a_process(attention_case, backend, kind, length, device)
                ns = 1e9 * got["seconds"] / got["pairs"]
                print(
                    f"{kind:8s}{backend:8s}{length:8,d}{got['pairs'] / length**2:19.1%}{got['seconds']:10.3f}"
                    f"{ns:11.2f}{got['bytes'] / GIB:11.3f}",
                    flush=True,
                )
                if backend == "tiled":
                    per_pair[length] = ns
        if len(per_pair) > 2:
            growth = per_pair[max(per_pair)] / per_pair[4096 if 4096 in per_pair else min(per_pair)]
            bars[f"time_a_pair_longest_over_4096_{kind}"] = {"value": round(growth, 3), "bar": 1.5, "ok": growth <= 1.5}
    if longest >= LENGTHS[-1]:
        alone, shared = run_pack(1), run_pack(2)
        for name, ranks in (("one rank", alone), ("two ranks", shared)):
            print(
                f"36,864 tokens, 384 frames, {name}: loss {ranks[0]['loss']:.5f}, "
                f"{max(r['seconds'] for r in ranks):.0f} s, "
                f"{max(r['bytes'] for r in ranks) / GIB:.2f} GiB a rank, {modelled(len(ranks)) / GIB:.2f} by the model"
            )
        off = abs(shared[0]["loss"] - alone[0]["loss"]) / alone[0]["loss"]
        bars["loss_sp2_against_sp1"] = {"value": off, "bar": 1e-5, "ok": off <= 1e-5}
        share = max(r["bytes"] for r in shared) / alone[0]["bytes"]
        bars["memory_sp2_over_sp1"] = {"value": round(share, 3), "bar": 0.75, "ok": share <= 0.75}
    print(
        json.dumps(
            {"bench": "long", "hardware": cpu_name() if device == "cpu" else torch.cuda.get_device_name(), "bars": bars}
        )
    )


if __name__ == "__main__":
    main()
