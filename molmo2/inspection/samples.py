"""Stored samples as the model sees them: JPEGs with crops, points and tracks to draw on them, text with loss weights.

The text is decoded from the stored tokens and the points are parsed from that text, so a page shows the training data
themselves and not their record. The template draws crops and points.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molmo2.inspection.facts import InspectionError
from molmo2.processing.pictures import COLOURS, MOST_FRAMES, SMALL, Picture, pictures_of, to_picture
from molmo2.processing.tokenizer import Tokenizer
from shards.format import FormatError, tar_members
from shards.layout import VisualLayout, visual_tokens
from shards.stream.dataset import Dataset
from shards.stream.plan import Draw, draws_of
from shards.stream.reader import ReadError, StoredSample, check_span, parse_sample

WEIGHT_LEVELS = 5  # number of shades for loss weights on a page


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpan:
    """Neighbouring tokens with equal loss weight. `level`: 0 without loss, up to WEIGHT_LEVELS for the largest weight.

    `visual`: the text is a placeholder for an image or a frame.
    """

    text: str
    weight: float
    level: int
    num_tokens: int
    visual: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchView:
    """The trunk (number 0) or one annotation. `weight`: the sum of its loss weights."""

    number: int
    spans: tuple[TextSpan, ...]
    num_tokens: int
    weight: float
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleView:
    """The view of one sample. `damage`: the reason why it cannot be read; the other fields are then empty."""

    key: str
    source: str = ""
    variant: int = 0
    num_variants: int = 1
    num_tokens: int = 0
    num_crops: int = 0
    num_frames: int = 0
    notes: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    branches: tuple[BranchView, ...] = ()
    damage: str = ""


def tokenizer_of(dataset: Dataset, directory: Path) -> Tokenizer:
    """Load the tokenizer in `directory`, and check that the dataset was built with it.

    Raises:
        TokenizerError: there is no tokenizer.
        InspectionError: the dataset was built with another tokenizer.
    """
    processor = dataset.index.processor
    tokenizer = Tokenizer(directory, VisualLayout.from_json(processor["layout"]).tokens.im_start)
    if tokenizer.sha256 != processor["tokenizer"]:
        raise InspectionError(
            f"{directory} is not the tokenizer that made {dataset.storage.root} (sha256 {tokenizer.sha256[:12]}..., "
            f"the index says {processor['tokenizer'][:12]}...); name the right one with --tokenizer"
        )
    return tokenizer


def view_sample(dataset: Dataset, number: int, tokenizer: Tokenizer) -> SampleView:
    """The view of sample `number` of a dataset, in the variant of the first epoch."""
    draw = draws_of(dataset, np.array([number]))[0]
    where = f"{dataset.index.shards[draw.shard].name}.tar, sample {draw.row}"
    try:
        span, stored = _read(dataset, draw)
    except (ReadError, FormatError, OSError) as error:
        return SampleView(key=where, damage=f"{error}; run tools/verify_shards.py, and fetch or build it again")
    record = json.loads(bytes(tar_members(span)[f"{stored.key}.json"]))
    layout = VisualLayout.from_json(dataset.index.processor["layout"])
    branches = tuple(_branches(stored, layout, tokenizer))
    texts = {branch.number: "".join(span.text for span in branch.spans) for branch in branches if branch.number}
    frames = sum(visual["kind"] == "frame" for visual in stored.visuals)
    pictures = pictures_of(stored, layout, texts)
    notes = [f"fitted: {json.dumps(note)}" for note in record.get("fitted", ())]
    if frames > MOST_FRAMES:
        notes.append(f"{len(pictures)} of {frames} frames are shown")
    return SampleView(
        key=stored.key,
        source=f"{record['source']['file']} row {record['source']['row']}",
        variant=draw.variant,
        num_variants=dataset.index.num_variants,
        num_tokens=draw.num_tokens,
        num_crops=draw.num_crops,
        num_frames=frames,
        notes=tuple(notes),
        pictures=pictures,
        branches=branches,
    )


def thumbnails(dataset: Dataset, places: Sequence[tuple[int, int]]) -> tuple[Picture, ...]:
    """Small pictures with the keys of their samples, each given as the sample's number and the picture's number in it.

    A picture that cannot be read, or that its sample does not show, is left out.
    """
    pictures = list[Picture]()
    for number, picture in places:
        try:
            _, stored = _read(dataset, draws_of(dataset, np.array([number]))[0])
        except (ReadError, FormatError, OSError):
            continue
        if picture < len(stored.visuals):
            jpeg = bytes(stored.images[stored.visuals[picture]["canvas"]])
            pictures.append(to_picture(jpeg, stored.key, SMALL))
    return tuple(pictures)


def _read(dataset: Dataset, draw: Draw) -> tuple[bytes, StoredSample]:
    span = dataset.storage.read(f"{dataset.index.shards[draw.shard].name}.tar", draw.offset, draw.span)
    check_span(span, draw)
    return span, parse_sample(span, draw.variant)


# --- text ------------------------------------------------------------------------------------------------------------


def _branches(stored: StoredSample, layout: VisualLayout, tokenizer: Tokenizer) -> Iterator[BranchView]:
    """The trunk, then every annotation, as spans of equal weight."""
    tokens, most = stored.tokens, float(stored.tokens["weight"].max(initial=0.0))
    names = iter(_visual_names(stored.visuals, layout))
    holders = {layout.tokens.image, layout.tokens.video}
    for number in np.unique(tokens["branch"]).tolist():
        part = tokens[tokens["branch"] == number]
        spans = []
        for (weight, holder), group in itertools.groupby(
            part.tolist(), key=lambda token: (token[2], token[0] in holders)
        ):
            ids = [token[0] for token in group]
            level = -int(-weight * WEIGHT_LEVELS // most) if weight > 0 else 0
            if holder:
                spans += [
                    TextSpan(text=next(names), weight=weight, level=level, num_tokens=1, visual=True) for _ in ids
                ]
            else:
                text = tokenizer.decode(ids, skip_special_tokens=False)
                spans.append(TextSpan(text=text, weight=weight, level=level, num_tokens=len(ids)))
        yield BranchView(
            number=number,
            spans=tuple(spans),
            num_tokens=len(part),
            weight=float(part["weight"].sum()),
            colour=COLOURS[(number - 1) % len(COLOURS)] if number else "#555",
        )


def _visual_names(visuals: Sequence[dict[str, Any]], layout: VisualLayout) -> Iterator[str]:
    for i, visual in enumerate(visuals):
        count = len(visual_tokens(layout, visual))
        if visual["kind"] == "frame":
            yield f"frame {visual['time']:.1f} s ({count} tokens)"
        else:
            yield f"image {i + 1}, {visual['tiling'][0]} x {visual['tiling'][1]} crops ({count} tokens)"
