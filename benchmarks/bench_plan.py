"""What planning costs and how full packs are, on lengths like those of Molmo2's SFT mixture.

    python benchmarks/bench_plan.py                 all settings, all 7 million samples, a few minutes
    python benchmarks/bench_plan.py --scale 0.05    the same shares from fewer samples, in seconds

Sizes and group rates are those of the published mixture (118 names). Lengths are a *model*, since nobody needs to
download the data to judge a packer: for each name a kind, and for each kind

    image      one of the usual tilings of up to 8 crops, counted by `shards.layout`; pointing sets take up to 24
               crops in 30 % of the variants; multi-image sets hold 2-5 images
    video      log-normal duration around the set's median, 2 frames a second with the last one, at most F frames
               (and so many that the text fits), 83 tokens and a timestamp of 6 per frame
    text       log-normal around the set's median number of text tokens, over all annotations of the tree

and one crop per frame. Every length is drawn once, with K = 4 variants whose text differs by up to 10 %. The text is
one branch: a token sees all before it, and visual tokens see each other.

Baselines, in the same run on the same draws: next-fit in the order of the stream, and a pool of 48 samples from which
an exact two-dimensional knapsack takes the best pack, as Molmo2's loader does (value = tokens + 30 x crops, the token
axis in 512 parts; samples left in the pool at the end do not count). "Least possible" is a lower bound for any packer:
both limits as if samples were liquid, and samples that no other fits beside. Where it is above 0, lengths and limits
leave room that nothing can fill: 16,384 tokens of video frames hold 184 crops, so a limit of 128 crops ends a pack
early. The share of the time in which ranks work is simulated as plan_balance.py says. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from plan_balance import PACKS_PER_STEP, STEPS, Table, pack_costs, table, window_costs
from tqdm import tqdm

from shards.build.writer import row_facts
from shards.format import FORMAT_VERSION, DatasetIndex, ShardInfo, Totals, index_dtype
from shards.layout import VisualLayout, VisualTokens, visual_tokens
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, Draw, Plan, PlanSettings, StepSpec, open_plan

LAYOUT = VisualLayout(
    tokens=VisualTokens.after(151_936), crop_size=378, patch_size=14, overlap_margin=4, image_pool=2, video_pool=3
)
VARIANTS = 4
ROWS_PER_SHARD = 5_000
KNAPSACK_SAMPLES = 2_000  # it takes milliseconds for each
VISUAL_TOKENS = 83  # of a frame, with its two delimiters
FRAME_TOKENS = VISUAL_TOKENS + 6
TILINGS = {(1, 1): 10, (1, 2): 8, (2, 1): 8, (2, 2): 25, (2, 3): 18, (3, 2): 10, (2, 4): 12, (4, 2): 6, (8, 1): 3}
HIGH_TILINGS = {(3, 4): 50, (4, 4): 20, (4, 6): 20, (6, 4): 10}


@dataclass(frozen=True, slots=True)
class Setting:
    """A stage's limits: tokens and crops of a pack, frames of a sample."""

    tokens: int
    crops: int
    frames: int


SETTINGS = {
    "4096": Setting(4_096, 128, 46),
    "16384": Setting(16_384, 128, 128),
    "16384_192_crops": Setting(16_384, 192, 128),
    "36864": Setting(36_864, 384, 384),
}


# Setting, packs per step and data-parallel ranks -> the least share of working time.
WORKING_BARS = {
    ("36864", 128, 8): 0.97,
    ("36864", 128, 16): 0.93,
    ("36864", 512, 64): 0.85,
    ("16384", 128, 8): 0.98,
    ("16384", 128, 32): 0.94,
}


@dataclass(frozen=True, slots=True)
class Kind:
    """How the samples of a dataset look: median text tokens, and median seconds (video) or images (image)."""

    name: str
    text: int
    visual: float = 0


# The published mixture: group -> (rate, {name: (examples in thousands, size override or None, factor, kind)}).
# fmt: off
def _video(text: int, seconds: float) -> Kind: return Kind("video", text, seconds)
def _image(text: int, images: int = 1) -> Kind: return Kind("image", text, images)
def _points(text: int, images: int = 1) -> Kind: return Kind("points", text, images)


MIXTURE: dict[str, tuple[float, dict[str, tuple[float, int | None, float, Kind]]]] = {
    "demo": (0.15, {
        "pixmo_cap": (710, 100_000, 1, _image(260)), "pixmo_ask_model_anything": (71, None, 1, _image(220)),
        "pixmo_cap_qa": (190, None, 1, _image(160)), "multi_image_qa": (45, None, 1, _image(250, 3)),
        "molmo2_cap": (100, None, 1.5, _video(1200, 40)), "molmo2_ask": (43, None, 1, _video(250, 35)),
    }),
    "video_academic": (0.2, {
        "video_capqa": (190, None, 1, _video(500, 40)), "video_subtitle_qa": (100, None, 1, _video(900, 90)),
        "tgif": (63, 60_000, 1, _video(80, 3)), "tvqa": (120, 60_000, 1, _video(600, 75)),
        "paxion": (440, 60_000, 1, _video(60, 8)), "llava_video_mc": (31, None, 1, _video(250, 45)),
        "llava_video_oe": (31, None, 1, _video(250, 45)), "perception_test": (2, None, 1, _video(200, 23)),
        "nextqa": (3.9, None, 1, _video(250, 40)), "news_video_qa": (2.9, None, 1, _video(80, 30)),
        "how2qa": (25, None, 1, _video(150, 60)), "traffic_qa": (10, None, 1, _video(200, 14)),
        "social_iq2": (0.79, None, 1, _video(300, 60)), "sports_qa": (3.6, None, 1, _video(120, 12)),
        "cinepile": (9.2, None, 1, _video(1500, 160)), "clevrer": (20, None, 1, _video(300, 5)),
        "funqa": (21, None, 1, _video(200, 10)), "star": (19, None, 1, _video(150, 12)),
        "intent_qa": (3.2, None, 1, _video(200, 40)), "vln_qa": (28, None, 1, _video(100, 30)),
        "vln_caption": (28, None, 1, _video(120, 30)), "road_text_vqa": (2.6, None, 1, _video(80, 10)),
        "countix": (4.4, None, 1, _video(30, 8)), "camerabench": (1.4, None, 1, _video(150, 6)),
        "motionbench": (5, None, 1, _video(120, 10)), "moments": (710, 60_000, 1, _video(30, 3)),
        "kinetics": (420, 60_000, 1, _video(30, 10)), "charades_sta": (9.2, None, 1, _video(150, 30)),
        "coin": (30, None, 1, _video(120, 140)), "youcook2": (10, None, 1, _video(150, 300)),
        "activitynet": (21, None, 1, _video(200, 120)), "ego4d": (53, None, 1, _video(120, 180)),
        "epic_kitchens": (37, None, 1, _video(100, 30)), "qv_highlights": (7, None, 1, _video(80, 150)),
    }),
    "image_academic": (0.25, {
        "pixmo_clocks": (800, 250_000, 1, _image(30)), "vqa_v2": (83, None, 1, _image(90)),
        "text_vqa": (35, None, 1, _image(30)), "okvqa": (9, None, 1, _image(30)), "chart_qa": (28, None, 1, _image(40)),
        "doc_qa": (39, None, 1, _image(40)), "info_qa": (24, None, 1, _image(50)), "ai2d": (15, None, 1, _image(70)),
        "a_okvqa_mc": (34, None, 1, _image(60)), "a_okvqa_da": (34, None, 1, _image(30)),
        "science_qa": (6.2, None, 1, _image(120)), "tabwmp": (23, None, 1, _image(90)),
        "st_qa": (25, None, 1, _image(30)), "tally_qa": (130, None, 1, _image(50)),
        "mantis_llava": (160, None, 1, _image(250, 3)), "mantis_nlvr2": (86, None, 1, _image(60, 2)),
        "mantis_spot": (7.5, None, 1, _image(120, 2)),
        "dv_qa": (200, 10_000, 1, _image(200)), "figure_qa": (100, 10_000, 1, _image(200)),
        "plot_qa": (160, 20_000, 1, _image(300)), "cosyn_chart": (120, None, 1, _image(350)),
        "cosyn_chemical": (8.9, None, 1, _image(300)), "cosyn_diagram": (35, None, 1, _image(300)),
        "cosyn_document": (71, None, 1, _image(150)), "cosyn_math": (67, None, 1, _image(300)),
        "cosyn_music": (12, None, 1, _image(250)), "cosyn_table": (47, None, 1, _image(300)),
        "syn_mi_chart": (33, None, 1, _image(300, 3)), "syn_mi_chemical": (2.4, None, 1, _image(300, 3)),
        "syn_mi_diagram": (15, None, 1, _image(300, 3)), "syn_mi_doc": (28, None, 1, _image(300, 3)),
        "syn_mi_music": (4.7, None, 1, _image(300, 3)), "syn_mi_table": (14, None, 1, _image(300, 3)),
    }),
    "tracking": (0.15, {
        "mevis_track": (50, None, 0.36036, _video(600, 13)), "mevis_ground": (50, None, 0.18018, _video(200, 13)),
        "mevis_single": (50, None, 0.135135, _video(350, 13)), "ref_yt_vos": (26, None, 0.36036, _video(300, 5)),
        "lv_vis_track": (12.7, None, 0.36036, _video(300, 5)), "lv_vis_ground": (12.7, None, 0.18018, _video(120, 5)),
        "lv_vis_single": (12.7, None, 0.135135, _video(180, 5)), "vicas_track": (43, 30_000, 0.36036, _video(400, 10)),
        "vicas_ground": (43, 30_000, 0.18018, _video(150, 10)), "vicas_single": (43, 30_000, 0.135135, _video(250, 10)),
        "revos_track": (27, None, 0.36036, _video(500, 15)), "revos_ground": (27, None, 0.18018, _video(150, 15)),
        "revos_single": (27, None, 0.135135, _video(300, 15)), "video_track": (73, None, 0.36036, _video(700, 20)),
        "video_track_ground": (73, None, 0.18018, _video(250, 20)),
        "video_track_single": (73, None, 0.135135, _video(400, 20)), "burst": (2.9, None, 0.144, _video(500, 30)),
        "ref_davis": (1.1, None, 0.045045, _video(250, 4)), "yt_vis": (1.4, None, 0.045045, _video(200, 5)),
        "moca": (0.4, None, 0.054, _video(200, 8)), "webuav": (6.3, None, 0.18018, _video(700, 60)),
        "got10k": (18, None, 0.18018, _video(250, 12)), "vasttrack": (93, None, 0.18018, _video(250, 8)),
        "trackingnet": (29, None, 0.18018, _video(300, 15)), "lvos": (1.5, None, 0.14, _video(700, 60)),
        "lasot": (2.2, None, 0.09009, _video(700, 64)), "uwcot": (0.4, None, 0.09009, _video(500, 30)),
        "webuot": (1.5, None, 0.09009, _video(500, 30)), "latot": (0.45, None, 0.09009, _video(400, 25)),
        "tnl2k": (1.8, None, 0.09009, _video(400, 20)), "tnllt": (0.29, None, 0.09009, _video(700, 64)),
    }),
    "video_pointing": (0.15, {
        "video_points_0_5": (260, 1, 0.4, _video(60, 18)), "video_points_6_25": (60, 1, 0.3, _video(200, 18)),
        "video_points_26_60": (10, 1, 0.1, _video(600, 18)), "academic_points": (44, 1, 0.2, _video(150, 15)),
    }),
    "image_pointing": (0.1, {
        "pixmo_points": (265, None, 1, _points(250)), "pixmo_points_high": (265, None, 1, _points(500)),
        "pixmo_count": (74, None, 1, _points(60)), "multi_points": (470, 200_000, 1, _points(250, 3)),
        "cosyn_point": (68, None, 1, _points(200)),
    }),
    "nlp": (0.0995, {"tulu4": (980, None, 1, Kind("text", 550))}),
    "hardcodes": (0.0005, {"hardcodes": (0.3, None, 1, Kind("text", 80))}),
}
# fmt: on


# --- lengths ---------------------------------------------------------------------------------------------------------


def _images(rng: np.random.Generator, tilings: dict[tuple[int, int], int], count: np.ndarray) -> np.ndarray:
    """Summed (tokens, crops) of `count[i]` images each, [n, 2]."""
    table = np.array([[len(visual_tokens(LAYOUT, {"kind": "image", "tiling": t})), 1 + t[0] * t[1]] for t in tilings])
    share = np.array(list(tilings.values()), float)
    total = np.zeros((len(count), 2), np.int64)
    for i in range(int(count.max())):
        drawn = table[rng.choice(len(table), len(count), p=share / share.sum())]
        total += np.where((i < count)[:, None], drawn, 0)
    return total


def draw_lengths(name: str, kind: Kind, size: int, limits: Setting) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, crops and visual tokens [size, K] of a dataset under the model of this file's docstring."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    rng = np.random.Generator(np.random.Philox(key))
    base = np.minimum(kind.text * np.exp(0.6 * rng.standard_normal(size)), limits.tokens - 400)[:, None]
    text = (base * rng.uniform(0.9, 1.0, (size, VARIANTS))).astype(np.int64) + 8
    if kind.name == "text":
        return text, np.zeros_like(text), np.zeros_like(text)
    if kind.name == "video":
        wanted = (2 * kind.visual * np.exp(0.6 * rng.standard_normal(size))).astype(np.int64) + 2
        room = (
            limits.tokens - 1 - text.max(axis=1)
        ) // FRAME_TOKENS  # the builder takes fewer frames where text is long
        frames = np.maximum(np.minimum(np.minimum(wanted, limits.frames), room), 1)[:, None]
        frames = np.repeat(frames, VARIANTS, axis=1)
        return text + 1 + frames * FRAME_TOKENS, frames, frames * VISUAL_TOKENS
    most = int(kind.visual)
    count = np.ones(size, np.int64) if most == 1 else np.clip(most + rng.integers(-1, 3, size), 2, 5)
    low = _images(rng, TILINGS, count)
    visual = np.repeat(low[:, None], VARIANTS, axis=1)
    if kind.name == "points":
        high = _images(rng, HIGH_TILINGS, np.ones(size, np.int64))
        chosen = (count == 1)[:, None] & (rng.random((size, VARIANTS)) < 0.3) & (high[:, :1] + 600 < limits.tokens)
        visual = np.where(chosen[..., None], high[:, None], visual)
    over = visual[..., 0].max(axis=1) + 400 > limits.tokens  # several images that do not fit are shrunk to a few crops
    visual[over] = [4 * 410, 8]
    return np.minimum(text + 1 + visual[..., 0], limits.tokens), visual[..., 1], visual[..., 0]


def write_dataset(root: Path, name: str, kind: Kind, size: int, limits: Setting) -> None:
    """A dataset without tars: sidecars and index.json are all that a plan reads."""
    folder = root / name
    folder.mkdir()
    tokens, crops, visual = draw_lengths(name, kind, size, limits)
    rows = np.zeros(size, index_dtype(VARIANTS))
    rows["num_tokens"], rows["num_crops"], rows["loss_weight"] = tokens, crops, 1.0
    rows["num_pairs"] = tokens * (tokens + 1) / 2 + visual * (visual - 1) / 2
    rows["key_hash"] = np.arange(size) * 2654435761 % 2**32
    infos = []
    for number, first in enumerate(range(0, size, ROWS_PER_SHARD)):
        part, buffer = rows[first : first + ROWS_PER_SHARD], io.BytesIO()
        np.save(buffer, part)
        data, stem = buffer.getvalue(), f"{number:06d}"
        (folder / f"{stem}.idx.npy").write_bytes(data)
        infos.append(ShardInfo(name=stem, bytes=0, sha256="0" * 64, **row_facts(part, data)))
    totals = Totals(samples=size, annotations=size, tokens=0, crops=0, frames=0, bytes=0, rejects=0)
    index = DatasetIndex(
        format_version=FORMAT_VERSION,
        dataset=name,
        stage="sft",
        num_variants=VARIANTS,
        processor={"layout": LAYOUT.to_json()},
        source={},
        build={},
        totals=totals,
        shards=tuple(infos),
    )
    (folder / "index.json").write_text(index.model_dump_json())


def write_mixture(root: Path, scale: float, limits: Setting) -> int:
    """All datasets; returns their number of samples."""
    total = 0
    members = [(name, *rest) for _, sets in MIXTURE.values() for name, rest in sets.items()]
    for name, thousands, _, _, kind in tqdm(members, desc=f"lengths for {limits.tokens}", leave=False):
        size = max(1, round(thousands * 1000 * scale))
        write_dataset(root, name, kind, size, limits)
        total += size
    return total


def mixture_spec(scale: float) -> MixtureSpec:
    """The mixture with sizes as published, whatever the scale of this run."""
    groups = {}
    for group, (rate, sets) in MIXTURE.items():
        datasets = {
            name: {"size": size or max(1, round(thousands * 1000)), "factor": factor}
            for name, (thousands, size, factor, _) in sets.items()
        }
        groups[group] = {"rate": rate, "datasets": datasets}
    return MixtureSpec.model_validate({"groups": groups})


# --- baselines -------------------------------------------------------------------------------------------------------


def next_fit(lengths: np.ndarray, limits: Setting) -> list[list[int]]:
    """Packs when samples are taken as they come and a pack closes at the first that does not fit."""
    packs: list[list[int]] = [[]]
    tokens = crops = 0
    for number, (need, need_crops) in enumerate(lengths[:, :2].astype(int).tolist()):
        tokens, crops = tokens + need, crops + need_crops
        if tokens > limits.tokens or crops > limits.crops:
            tokens, crops = need, need_crops
            packs.append([])
        packs[-1].append(number)
    return packs


def best_subset(pool: list[tuple[int, int]], limits: Setting, unit: int) -> list[int]:
    """The exact two-dimensional knapsack over a pool: value = tokens + 30 x crops, tokens rounded up to `unit`s."""
    columns, depth = limits.tokens // unit, limits.crops
    value = np.zeros((columns + 1, depth + 1), np.float32)
    taken = np.zeros((len(pool), columns + 1, depth + 1), bool)
    for i, (tokens, crops) in enumerate(pool):
        width = -(-tokens // unit)
        if width > columns or crops > depth:
            continue
        candidate = value[: columns + 1 - width, : depth + 1 - crops] + (tokens + 30 * crops)
        target = value[width:, crops:]
        better = candidate > target
        taken[i, width:, crops:] = better
        value[width:, crops:] = np.where(better, candidate, target)
    chosen, column, row = [], columns, depth
    for i in reversed(range(len(pool))):
        if taken[i, column, row]:
            chosen.append(i)
            column, row = column - -(-pool[i][0] // unit), row - pool[i][1]
    return chosen


def least_packs(lengths: np.ndarray, limits: Setting) -> float:
    """A lower bound on the number of packs (Martello and Toth's L2 for tokens, the plain sum for crops)."""
    tokens, size = lengths[:, 0], limits.tokens
    bounds = [tokens.sum() / size, lengths[:, 1].sum() / max(1, limits.crops)]
    for small in np.unique(np.minimum(tokens, size - tokens)[tokens <= size]):
        alone, large = tokens > size - small, tokens[(tokens > size // 2) & (tokens <= size - small)]
        rest = tokens[(tokens >= small) & (tokens <= size // 2)].sum() - (len(large) * size - large.sum())
        bounds.append(alone.sum() + len(large) + max(0.0, rest / size))
    return float(max(bounds))


def pool_knapsack(lengths: np.ndarray, limits: Setting, slots: int = 48) -> tuple[list[list[int]], float]:
    """Packs taken from a pool that is topped up from the stream, and microseconds a sample."""
    unit = max(1, limits.tokens // 512)
    needs = [(tokens, crops) for tokens, crops in lengths[:, :2].astype(int).tolist()]
    pool: list[int] = []
    stream, packs = iter(range(len(needs))), list[list[int]]()
    since = time.process_time()
    while True:
        while len(pool) < slots and (sample := next(stream, None)) is not None:
            pool.append(sample)
        if len(pool) < slots:
            break
        chosen = best_subset([needs[i] for i in pool], limits, unit) or [0]
        packs.append([pool[i] for i in chosen])
        pool = [sample for i, sample in enumerate(pool) if i not in set(chosen)]
    return packs, (time.process_time() - since) / max(1, sum(map(len, packs))) * 1e6


# --- measuring -------------------------------------------------------------------------------------------------------


def first_steps(plan: Plan, num_samples: int) -> tuple[list[StepSpec], float]:
    """Steps with at least so many samples, and the CPU seconds that they took to plan."""
    steps, found = list[StepSpec](), 0
    since = time.process_time()
    while found < num_samples:
        steps.append(plan.step(steps[-1].cursor if steps else Cursor()))
        found += sum(len(pack.draws) for pack in steps[-1].packs)
    return steps, time.process_time() - since


def measure_plan(plans: list[Plan], limits: Setting, num_samples: int) -> tuple[dict[str, float], np.ndarray]:
    """Fill, cost (the best of equal plans) and bounds; and the (tokens, crops) in a random order for the baselines."""
    runs = [first_steps(plan, num_samples) for plan in plans]
    packs = [pack for step in runs[0][0] for pack in step.packs]
    lengths = sizes_of([draw for pack in packs for draw in pack.draws])
    shuffled = np.random.Generator(np.random.Philox(0)).permutation(lengths)
    return {
        "padding": padding(lengths, len(packs), limits),
        "crops": lengths[:, 1].sum() / len(packs) / limits.crops,
        "bound": padding(lengths, least_packs(lengths, limits), limits),
        "samples_per_pack": len(lengths) / len(packs),
        "us": min(seconds for _, seconds in runs) / len(lengths) * 1e6,
    }, shuffled


def sizes_of(draws: list[Draw]) -> np.ndarray:
    """Tokens, crops and pairs of draws, float64 [n, 3]."""
    return np.array([(draw.num_tokens, draw.num_crops, draw.num_pairs) for draw in draws], np.float64)


def balance(plan: Plan, limits: Setting, knapsack: list[float]) -> dict[str, list[float]]:
    """The costs of the packs of each way to make and to deal them, for `plan_balance.table`."""
    wanted, windows = STEPS * max(PACKS_PER_STEP), list[np.ndarray]()
    dealt: list[float] = []
    while len(dealt) < wanted:
        windows.append(sizes_of(plan.window_draws(len(windows))))
        dealt += window_costs(windows[-1:], limits.tokens, limits.crops, balanced=True)
    everything = np.random.Generator(np.random.Philox(0)).permutation(np.concatenate(windows))
    return {
        "dealt": dealt,
        "best fit": window_costs(windows, limits.tokens, limits.crops, balanced=False),
        "next fit": pack_costs(next_fit(everything, limits), everything, limits.tokens),
        "knapsack": knapsack,
    }


def padding(lengths: np.ndarray, num_packs: float, limits: Setting) -> float:
    """Share of the tokens of so many packs that is padding."""
    return float(1 - lengths[:, 0].sum() / (num_packs * limits.tokens))


def resume_seconds(root: Path, spec: MixtureSpec, settings: PlanSettings, step: int, window: int) -> float:
    """Open everything anew and plan the step at a cursor."""
    since = time.perf_counter()
    plan = open_plan([str(root)], spec, settings)
    plan.step(Cursor(step=step, window=window, offset=0))
    return time.perf_counter() - since


def measure(name: str, scale: float, window: int) -> tuple[dict[str, float], Table]:
    """All figures of one setting, and the table of working time."""
    limits = SETTINGS[name]
    settings = PlanSettings(
        sequence_length=limits.tokens, max_crops=limits.crops, packs_per_step=128, window=window, seed=0
    )
    root = Path(tempfile.mkdtemp(prefix="bench-plan-"))
    try:
        samples = write_mixture(root, scale, limits)
        spec = mixture_spec(scale)
        plans = [open_plan([str(root)], spec, settings) for _ in range(3)]
        figures, lengths = measure_plan(plans, limits, 8 * window)
        figures["samples"] = samples
        figures["next_fit"] = padding(lengths, len(next_fit(lengths, limits)), limits)
        chosen, figures["knapsack_us"] = pool_knapsack(lengths[:KNAPSACK_SAMPLES], limits)
        figures["knapsack"] = padding(lengths[list(itertools.chain(*chosen))], len(chosen), limits)
        working = balance(plans[0], limits, pack_costs(chosen, lengths, limits.tokens))
        per_window = window / figures["samples_per_pack"]  # packs
        far = int(10**6 * 128 / per_window)
        pairs = [[resume_seconds(root, spec, settings, *at) for at in ((0, 0), (10**6, far))] for _ in range(3)]
        figures["resume_0"], figures["resume_1e6"] = (min(column) for column in zip(*pairs, strict=True))
    finally:
        shutil.rmtree(root)
    return figures, table(working)


def cpu_name() -> str:
    """The processor, as Linux calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def main() -> None:
    """Measure, print the table, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the published number of samples")
    parser.add_argument("--window", type=int, default=4096, help="draws that are packed together")
    arguments = parser.parse_args()
    measured = {name: measure(name, arguments.scale, arguments.window) for name in SETTINGS}
    results = {name: figures for name, (figures, _) in measured.items()}
    rows = {
        "samples in the mixture": ("samples", "{:,.0f}"),
        "samples per pack": ("samples_per_pack", "{:.2f}"),
        "padding, ours": ("padding", "{:.2%}"),
        "  least possible": ("bound", "{:.2%}"),
        "  crops used": ("crops", "{:.2%}"),
        "padding, next-fit": ("next_fit", "{:.2%}"),
        "padding, knapsack over a pool of 48": ("knapsack", "{:.2%}"),
        "planning, CPU us a sample": ("us", "{:.1f}"),
        "knapsack, CPU us a sample": ("knapsack_us", "{:,.0f}"),
        "open + first step at step 0, best of 3, s": ("resume_0", "{:.2f}"),
        "open + first step at 10^6, best of 3, s": ("resume_1e6", "{:.2f}"),
    }
    print(
        f"{'tokens / crops / frames':42s}" + "".join(f"{s.tokens:>8}/{s.crops}/{s.frames}" for s in SETTINGS.values())
    )
    for label, (field, form) in rows.items():
        print(f"{label:42s}" + "".join(f"{form.format(result[field]):>16s}" for result in results.values()))
    bars: dict[str, dict[str, float | bool]] = {}
    for name, (_, (lines, _)) in measured.items():
        print(f"\nshare of the time in which ranks work, {SETTINGS[name].tokens} tokens / {SETTINGS[name].crops} crops")
        print("\n".join(lines))
    for (name, count, dp), least in WORKING_BARS.items():
        value = measured[name][1][1]["dealt", count][dp]
        bars[f"working_{name}_{count}_packs_dp{dp}"] = {"value": round(value, 4), "bar": least, "ok": value >= least}
    for name, result in results.items():
        bar = 0.01 if name == "36864" else 0.005
        bars[f"padding_{name}"] = {
            "value": round(float(result["padding"]), 5),
            "bar": bar,
            "ok": bool(result["padding"] <= bar),
        }
    cost = max(result["us"] for result in results.values())
    slowest = max(result["resume_1e6"] for result in results.values())
    bars["planning_us_per_sample"] = {"value": round(cost, 2), "bar": 10, "ok": cost <= 10}
    bars["resume_seconds_at_1e6"] = {"value": round(slowest, 3), "bar": 1, "ok": slowest < 1}
    print(json.dumps({"bench": "plan", "hardware": cpu_name(), "scale": arguments.scale, "bars": bars}))


if __name__ == "__main__":
    main()
