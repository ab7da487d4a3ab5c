"""Fixtures of published layouts: YAML -> a raw folder -> a build by the real code -> a rendering for human eyes.

A fixture stands in `fixtures/<family>.yaml` under the name of its raw folder:

    pixmo-count:
      data/train-00000-of-00001.parquet:
        types: {count: int32, points: "struct<x: list<float>, y: list<float>>"}   # where inference would differ
        rows: [{image_url: "https://a.example/1.jpg", image_sha256: "sha256:60x40:red", count: 2, ...}]
      train.json: {json: ...}          # a JSON document; .jsonl and .csv take `rows`; `text: ...` is taken as it is
      https://a.example/1.jpg: 60x40:red       # kept where a download of this URL is kept
      images/1.png: 60x40:red                  # an image of 60 x 40 pixels
      videos/1.mp4: 64x48:30:10                # a video: size, number of frames, frames per second
      frames/1/: 64x48:30                      # a folder of images: size, number of frames

In rows "image:60x40:red" is an embedded image ({bytes, path}), and "sha256:60x40:red" the hash of its file.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import re
import tarfile
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import yaml
from tokenizers import decoders, models, pre_tokenizers

from molmo2.processing.contract import STAGE_MODES
from molmo2.processing.new_tokenizer import write_tokenizer
from molmo2.processing.processor import Processor
from molmo2.processing.tokenizer import Tokenizer
from shards.build.builder import build_dataset
from shards.catalog import Catalog, Row, Stage, load_catalog
from shards.download.urls import media_path
from shards.format import REJECTS_NAME, TOKEN_DTYPE
from shards.layout import VisualLayout, VisualTokens

FIXTURES = Path(__file__).with_name("fixtures")
GOLDEN = Path(__file__).with_name("golden")
BASE_VOCAB = 320
NUM_VARIANTS = 2
SCALARS = {
    "string": pa.string(),
    "binary": pa.binary(),
    "bool": pa.bool_(),
    "int8": pa.int8(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
}


@functools.cache
def catalog() -> Catalog:
    return load_catalog("molmo2")


@functools.cache
def fixtures() -> dict[str, dict[str, Any]]:
    """All fixtures by raw folder."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(FIXTURES.glob("*.yaml")):
        family = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert not found.keys() & family.keys(), path
        found |= family
    return found


def cases() -> list[tuple[str, Stage]]:
    """Every row whose raw folder has a fixture, in every stage that trains; in "long" a row of each converter."""
    rows = [row for row in catalog().rows if row.folder in fixtures()]
    long = {row.converter: row.name for row in reversed(rows) if "long" in row.stages}
    return [
        (row.name, stage)
        for row in rows
        for stage in row.stages
        if stage in {"pretraining", "sft"} or (stage == "long" and long[row.converter] == row.name)
    ]


# --- fixture -> files ------------------------------------------------------------------------------------------------


def write_raw(raw: Path, row: Row) -> None:
    """The raw folders that a row reads."""
    for folder in row.folders:
        for name, spec in fixtures()[folder].items():
            kept = str(media_path(name)) if "://" in name else name
            path = raw / folder / kept
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                size, _, number = spec.partition(":")
                for frame in range(int(number)):
                    (path / f"{frame}.jpg").parent.mkdir(exist_ok=True)
                    (path / f"{frame}.jpg").write_bytes(image(f"{size}:rgb({9 * frame},0,0)"))
            else:
                _write(path, spec)


def _write(path: Path, spec: Any) -> None:
    if isinstance(spec, str):
        path.write_bytes(video(spec) if path.suffix.lower() in {".mp4", ".webm", ".mkv", ".avi"} else image(spec))
    elif "text" in spec:
        path.write_text(spec["text"], encoding="utf-8")
    elif "json" in spec:
        path.write_text(json.dumps(_filled(spec["json"])), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(_arrow(_filled(spec["rows"]), spec.get("types", {})), path)
    elif path.suffix == ".arrow":
        table = _arrow(_filled(spec["rows"]), spec.get("types", {}))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(_filled(row)) + "\n" for row in spec["rows"]), encoding="utf-8")
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(spec["rows"][0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(spec["rows"])
        path.write_text(buffer.getvalue(), encoding="utf-8", newline="")


def _filled(value: Any) -> Any:
    """A value with its images and hashes in place."""
    if isinstance(value, dict):
        return {name: _filled(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled(item) for item in value]
    if isinstance(value, str) and value.startswith("image:"):
        return {"bytes": image(value.removeprefix("image:")), "path": None}
    if isinstance(value, str) and value.startswith("sha256:"):
        return hashlib.sha256(image(value.removeprefix("sha256:"))).hexdigest()
    return value


def _arrow(rows: list[dict[str, Any]], types: dict[str, str]) -> pa.Table:
    inferred = pa.Table.from_pylist(rows)
    fields = [pa.field(f.name, arrow_type(types[f.name]) if f.name in types else f.type) for f in inferred.schema]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def arrow_type(text: str) -> pa.DataType:
    """ "list<struct<x: double, y: double>>" and the like."""
    if inner := re.fullmatch(r"list<(.*)>", text):
        return pa.list_(arrow_type(inner[1]))
    if inner := re.fullmatch(r"struct<(.*)>", text):
        parts, depth, start = [], 0, 0
        for place, letter in enumerate(inner[1] + ","):
            depth += (letter == "<") - (letter == ">")
            if letter == "," and depth == 0:
                parts.append(inner[1][start:place].partition(":"))
                start = place + 1
        return pa.struct([(name.strip(), arrow_type(kind.strip())) for name, _, kind in parts])
    return SCALARS[text]


@functools.cache
def image(spec: str) -> bytes:
    """A PNG of "WIDTHxHEIGHT:colour": a frame, a cross and that colour, so that no two sizes look alike."""
    size, _, colour = spec.partition(":")
    width, height = map(int, size.split("x"))
    picture = PIL.Image.new("RGB", (width, height), colour or "grey")
    draw = PIL.ImageDraw.Draw(picture)
    draw.rectangle((0, 0, width - 1, height - 1), outline="black")
    draw.line((0, 0, width, height), fill="white")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@functools.cache
def video(spec: str) -> bytes:
    """An H.264 file of "WIDTHxHEIGHT:frames:fps"; frames grow brighter."""
    size, frames, fps = spec.split(":")
    width, height = map(int, size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.mp4"
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps), options={"g": "10", "threads": "1"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for number in range(int(frames)):
                pixels = np.full((height, width, 3), 20 + 200 * number // int(frames), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            container.mux(stream.encode())
        return path.read_bytes()


# --- build and render ------------------------------------------------------------------------------------------------


@functools.cache
def tokenizer() -> Tokenizer:
    """A token for every byte of text: the number of loss tokens is the answer's length and one."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(made, folder, BASE_VOCAB)
        return Tokenizer(folder, BASE_VOCAB)


def processor(stage: Stage) -> Processor:
    """The real geometry; only the tokenizer is a small one."""
    layout = VisualLayout(
        tokens=VisualTokens.after(BASE_VOCAB),
        crop_size=378,
        patch_size=14,
        overlap_margin=4,
        image_pool=2,
        video_pool=3,
    )
    return Processor(layout, tokenizer(), STAGE_MODES[stage], NUM_VARIANTS)


def rendered(name: str, stage: Stage, folder: Path) -> str:
    """Build the fixture of a catalog row and say in words what its shards hold."""
    (row,) = catalog().select(stage, [name])
    write_raw(folder / "raw", row)
    settings = catalog().stages[stage].model_copy(update={"num_variants": NUM_VARIANTS})
    out = folder / "shards"
    build_dataset(
        row,
        stage,
        settings,
        functools.partial(processor, stage),
        raw=folder / "raw" / row.folder,
        out=out,
        reject_budget=1.0,
    )
    lines = [f"# {name}, stage {stage}: what its fixture becomes"]
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for record in sorted(n for n in members if n.endswith(".json")):
            lines += _sample(json.loads(members[record]), record.removesuffix(".json"), members)
    rejects = [json.loads(line) for line in (out / REJECTS_NAME).read_text().splitlines()]
    for reject in rejects:
        kind = "left out" if reject["omitted"] else "REJECTED"
        lines.append(f"\n{kind}: {reject['file']} row {reject['row']}: {reject['reason']}")
    return "\n".join(lines).replace(str(folder), "FOLDER") + "\n"


def _sample(record: dict[str, Any], key: str, members: dict[str, bytes]) -> list[str]:
    source = record["source"]
    lines = ["", f"== {key}  ({source['file']} row {source['row']})", f"   sees {_visuals(record)}"]
    lines += [f"   fitted: {json.dumps(note)}" for note in record.get("fitted", [])]
    if said := record.get("subtitles"):
        lines.append("   hears " + said.rstrip().replace("\n", "\n         "))
    for number, variant in enumerate(record["variants"]):
        tokens = np.load(io.BytesIO(members[f"{key}.tokens{number}.npy"]))
        assert tokens.dtype == TOKEN_DTYPE
        lines.append(f"-- variant {number}")
        for message in variant["messages"]:
            text = message["content"].replace("\n", "\n              ")
            lines.append(f" {message['branch']:>2} {message['role']:>9}: {text}")
        lines.append(
            f"    loss: {', '.join(_weights(tokens, branch) for branch in sorted(set(tokens['branch']) - {0}))}"
        )
    return lines


def _visuals(record: dict[str, Any]) -> str:
    visuals, names = record["visuals"], []
    for visual in visuals:
        if visual["kind"] == "frame":
            names.append(f"{visual['time']:.1f}s")
        else:
            names.append(visual["kind"])
    frames = [name for name in names if name.endswith("s")]
    if frames and len(frames) == len(names):
        return f"{len(frames)} frames at {' '.join(frames)}"
    return ", ".join(names) or "text alone"


def _weights(tokens: Any, branch: int) -> str:
    weights = tokens["weight"][tokens["branch"] == branch]
    weights = weights[weights > 0]
    return f"[{branch}] {len(weights)} tokens x {weights[0]:.4g}" if len(weights) else f"[{branch}] none"
