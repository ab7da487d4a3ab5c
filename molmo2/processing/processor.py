"""The processor: it converts an `Example` to a `Sample` for the shards, or to a `Prompt` for generation.

It renders K text variants, chooses tilings and frames, computes loss weights and fits everything into `Limits`. Visuals
are shrunk for this, at most to a quarter. If a tree of annotations still does not fit, the builder splits the tree; for
a single annotation a video may have fewer frames. Of a video with points a part is taken where points would lose their
frame.
Files are read and shards written elsewhere (`shards.media.video`, `shards.build.builder`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo2.processing import clips, visuals
from molmo2.processing import prompts as text
from molmo2.processing.chat_format import Branch, assemble, encode_messages
from molmo2.processing.contract import Contract, ProcessorSettings, read_contract
from molmo2.processing.frames import FRAME_REACH, subtitle_text, timestamp
from molmo2.processing.tiling import Pixels
from molmo2.processing.tokenizer import Tokenizer
from molmo2.processing.visuals import Opened, ProbedVideo, VisualPlan
from shards import layout as geometry
from shards.layout import VisualLayout
from shards.schema import (
    Annotation,
    Example,
    Limits,
    OverlongError,
    PictureNotes,
    Points,
    RejectedError,
    Sample,
    Tracks,
    in_variant,
)

HIGH_RESOLUTION_SHARE = 0.3  # probability that a variant with points in images gets `Limits.pointing_crops` tiles
SHRINK_AT_MOST = 4  # visuals are shrunk at most by this factor to make room for text
FEWEST_FRAMES = 8  # a video with a single annotation, which cannot be split, is shrunk to this


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Model inputs that end where the answer begins: one row, no batch axis.

    Attributes:
        input_ids: int64 [tokens], with expanded placeholders.
        is_visual: bool [tokens], True for tokens that attend to each other in both directions.
        pixels: uint8 [crops, crop, crop, 3].
        pooling: int64 [im_patch tokens, pool ** 2] into the flat patch axis of all crops; -1 pads.
        visuals: the plan of the visuals, as in a sample's record but without files.
        text: the messages up to the question, readable.
    """

    input_ids: npt.NDArray[np.int64]
    is_visual: npt.NDArray[np.bool_]
    pixels: Pixels
    pooling: npt.NDArray[np.int64]
    visuals: tuple[dict[str, Any], ...]
    text: str


@dataclass(frozen=True, slots=True)
class _Fitted:
    """Variants of an example that share their visuals; `notes` records how visuals were shrunk to fit."""

    plan: VisualPlan
    trunk: list[int]
    branches: dict[int, list[Branch]]
    notes: list[dict[str, Any]]


def build_processor(settings: ProcessorSettings) -> Processor:
    """The processor of a model preset and stage.

    Raises:
        ValueError: an unknown preset or stage, or a tokenizer that does not fit the preset (`TokenizerError`).
    """
    contract = read_contract(settings)
    return Processor(contract.layout, contract.tokenizer, contract.mode, settings.num_variants)


def draws(dataset: str, key: str, variant: int) -> np.random.Generator:
    """The random generator for one text variant of one example."""
    seed = hashlib.sha256(f"{dataset}\0{key}\0{variant}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(seed)))


class Processor:
    """Processes examples by the contract of a model: chat format, tokenizer and geometry.

    Attributes:
        settings: every setting that changes a token or a pixel, JSON; its digest is the shards' fingerprint.
    """

    def __init__(self, layout: VisualLayout, tokenizer: Tokenizer, mode: str, num_variants: int = 4):
        """`mode` is one of `text.MODES`; in "eval" nothing is random and all variants are equal."""
        self.layout, self.tokenizer, self.mode, self.num_variants = layout, tokenizer, mode, num_variants
        self.settings = Contract(layout, tokenizer, mode).settings

    def __call__(self, example: Example, limits: Limits) -> Sample:
        """Process one example for training or for scoring answers.

        Raises:
            OverlongError: several annotations exceed the limits, even with the smallest visuals.
            RejectedError: unreadable media, an annotation that cannot be rendered, or one that is too long alone.
        """
        if not example.annotations:
            raise RejectedError("no annotations")
        notes: list[dict[str, Any]] = []
        if len(example.images) > limits.max_images and self.mode != "eval":
            notes.append({"images": {"wanted": len(example.images), "kept": limits.max_images}})
            example = _first_images(example, limits.max_images)
        pictures: list[PictureNotes] = []
        opened = visuals.open_media(example, limits, pictures)
        example, opened, clip_notes = self._around_points(example, opened, limits)
        notes += clip_notes
        groups: dict[int, list[int]] = {}  # tiles per image -> variants
        for variant in range(self.num_variants):
            groups.setdefault(self._image_tiles(example, limits, variant), []).append(variant)
        parts = [self._fit(example, opened, limits, tiles, members) for tiles, members in groups.items()]
        stored = visuals.store(self.layout, opened, [part.plan for part in parts])
        flat = 1.0 if self.mode == "pretraining" else example.loss_weight
        tokens, readable = {}, {}
        for part, chosen in zip(parts, stored.chosen, strict=True):
            for variant, branches in part.branches.items():
                tokens[variant] = assemble(part.trunk, branches, flat)
                tokens[variant]["weight"] *= example.loss_scale
                readable[variant] = _readable(branches, chosen, len(stored.visuals))
        record: dict[str, Any] = {
            "key": example.key,
            "dataset": example.dataset,
            "source": asdict(example.source),
            "media": stored.facts,
            "visuals": stored.visuals,
            "variants": [readable[variant] for variant in range(self.num_variants)],
        }
        if example.subtitles is not None:
            record["subtitles"] = _subtitles(example, parts[0].plan)
        if notes := notes + [note for part in parts for note in part.notes]:
            record["fitted"] = notes
        variants = tuple(tokens[variant] for variant in range(self.num_variants))
        asked = tuple(_tree(example.annotations, 0, None)) if self.mode == "eval" else ()
        return Sample(
            key=example.key,
            record=record,
            variants=variants,
            images=tuple(stored.files),
            asked=asked,
            pictures=tuple(pictures),
        )

    def prompt(self, example: Example, limits: Limits, annotation: int = 0) -> Prompt:
        """Model inputs that ask `example.annotations[annotation]`; its answer may be empty and is not used.

        The caller must leave room for the answer: `limits.sequence_length` limits the prompt alone.

        Raises:
            RejectedError: unreadable media, or a prompt that exceeds the limits even with the smallest visuals.
        """
        opened = visuals.open_media(example, limits)
        plan = visuals.full_plan(self.layout, opened, limits, self._image_tiles(example, limits, None))
        messages = text.render_messages(
            example.annotations[annotation], self.mode, None, video=isinstance(opened, ProbedVideo)
        )
        turns = messages[:-1] if messages[-1].role == "assistant" else messages
        branch = encode_messages(self.tokenizer, turns)
        trunk = self._trunk(example, plan)
        while (excess := self._length(trunk, plan) + len(branch.ids) - limits.sequence_length) > 0:
            smaller = self._shrink(opened, limits, plan, excess, floor=1)
            if smaller is None:
                raise RejectedError(f"the prompt is {excess} tokens longer than the limit {limits.sequence_length}")
            plan, trunk = smaller, self._trunk(example, smaller)
        stored = assemble([*trunk, *branch.ids.tolist()], [], None)
        expanded = geometry.expand(self.layout, stored, list(plan.visuals))
        pixels, pooling = visuals.model_inputs(self.layout, opened, plan)
        return Prompt(
            input_ids=expanded.input_ids.astype(np.int64),
            is_visual=expanded.is_visual,
            pixels=pixels,
            pooling=pooling,
            visuals=plan.visuals,
            text="\n".join(f"{message.role}: {message.content}" for message in turns),
        )

    def _around_points(
        self, example: Example, opened: Opened, limits: Limits
    ) -> tuple[Example, Opened, list[dict[str, Any]]]:
        """The part of a video with points to take, if fewer frames of all would leave points without one."""
        points = clips.points_of(example)
        if not isinstance(opened, ProbedVideo) or not points or self.mode == "eval":  # "eval" ignores where points are
            return example, opened, []
        duration, last = opened.info.duration, max(group.at for group in points)
        if last > duration + 0.5 / limits.fps:
            raise RejectedError(f"a point at {last:.1f} s of a video of {duration:.1f} s")
        plan = self._fit(example, opened, limits, limits.image_crops, range(self.num_variants)).plan
        times = [group.at for group in points]
        seen = plan.have_frames(times, 0.5 / limits.fps + 1e-6)
        if all(seen):
            return example, opened, []
        if len(example.annotations) > 1:
            lost = times[seen.index(False)]
            raise OverlongError(f"points at {lost:.1f} s and elsewhere have no frame in any part of the video")
        seconds = max(1, len(plan.visuals) - 2) / limits.fps  # a frame less than fits: the question may change
        rng = draws(example.dataset, f"{example.key}\0part", 0)
        start, end = clips.richest_part(points, duration, seconds, limits.fps, rng)
        part = clips.cut(example, start, end)
        wanted, kept = (sum(len(group.points) for group in found) for found in (points, clips.points_of(part)))
        notes: list[dict[str, Any]] = [{"clip": {"wanted": [0.0, duration], "kept": [start, end]}}]
        if kept < wanted:
            notes.append({"points": {"wanted": wanted, "kept": kept}})
        return part, visuals.open_media(part, limits), notes

    def _image_tiles(self, example: Example, limits: Limits, variant: int | None) -> int:
        """Maximum tiles per image; some variants with points in images get a higher resolution."""
        points = len(example.images) == 1 and any(isinstance(a, Points) for a in example.annotations)
        if self.mode != "sft" or variant is None or not points or limits.pointing_crops is None:
            return limits.image_crops
        # This draw has its own generator, so that changed limits do not change any other draw.
        high = draws(example.dataset, f"{example.key}\0resolution", variant).random() < HIGH_RESOLUTION_SHARE
        return limits.pointing_crops if high else limits.image_crops

    def _trunk(self, example: Example, plan: VisualPlan) -> list[int]:
        """Ids of BOS, a placeholder per visual after "Image i" (several images) or the frame's time, and subtitles."""
        ids = [self.tokenizer.bos]
        for i, visual in enumerate(plan.visuals):
            if visual["kind"] == "frame":
                ids += [*self.tokenizer.encode(timestamp(i, visual["time"])), self.layout.tokens.video]
            else:
                name = self.tokenizer.encode(f"Image {i + 1}") if len(plan.visuals) > 1 else []
                ids += [*name, self.layout.tokens.image]
        return ids + self.tokenizer.encode(_subtitles(example, plan))

    def _length(self, trunk: Sequence[int], plan: VisualPlan) -> int:
        """Number of tokens in the trunk after expansion of the placeholders."""
        return len(trunk) + sum(len(geometry.visual_tokens(self.layout, visual)) - 1 for visual in plan.visuals)

    def _fit(self, example: Example, opened: Opened, limits: Limits, tiles: int, members: Sequence[int]) -> _Fitted:
        """Find a plan for the variants `members` such that the branches of each variant fit beside it."""
        full = plan = visuals.full_plan(self.layout, opened, limits, tiles)
        floor = max(1, full.budget // SHRINK_AT_MOST)
        if isinstance(opened, ProbedVideo) and len(example.annotations) == 1:
            floor = min(floor, FEWEST_FRAMES)
        while True:
            trunk = self._trunk(example, plan)
            room = limits.sequence_length - self._length(trunk, plan)
            branches = {v: self._branches(example, plan, limits, v) for v in members}
            excess = max(_length(variant) for variant in branches.values()) - room
            smaller = self._shrink(opened, limits, plan, excess, floor) if excess > 0 else None
            if smaller is None:
                break
            plan = smaller
        notes: list[dict[str, Any]] = []
        largest = full if isinstance(opened, ProbedVideo) else visuals.make_plan(self.layout, opened, limits, tiles)
        if plan.num_crops < largest.num_crops:
            notes.append({"variants": list(members), "crops": {"wanted": largest.num_crops, "kept": plan.num_crops}})
        longest = max(_length(variant) for variant in branches.values())
        if longest > room:
            error = OverlongError if len(example.annotations) > 1 else RejectedError
            raise error(
                f"{len(example.annotations)} annotations of {longest} tokens: {plan.num_crops} crops leave {room} of "
                f"{limits.sequence_length}"
            )
        return _Fitted(plan, trunk, branches, notes)

    def _shrink(self, opened: Opened, limits: Limits, plan: VisualPlan, excess: int, floor: int) -> VisualPlan | None:
        """A smaller plan that saves about `excess` tokens, or None if nothing may be shrunk further."""
        if not opened or plan.budget <= floor:
            return None
        step = 1
        if isinstance(opened, ProbedVideo):
            frame = geometry.visual_tokens(self.layout, plan.visuals[0])
            step = max(1, excess // (len(frame) + 8))  # 8: no timestamp is longer, so this never overshoots
        return visuals.make_plan(self.layout, opened, limits, max(floor, plan.budget - step))

    def _branches(self, example: Example, plan: VisualPlan, limits: Limits, variant: int) -> list[Branch]:
        rng = None if self.mode == "eval" else draws(example.dataset, example.key, variant)
        conversations = []
        for annotation in _tree(example.annotations, 0 if rng is None else variant, rng):
            if isinstance(annotation, Tracks):
                seen = plan.have_frames([group.time for group in annotation.groups], FRAME_REACH)
                annotation = replace(annotation, groups=tuple(itertools.compress(annotation.groups, seen)))
            messages = text.render_messages(annotation, self.mode, rng, video=example.video is not None)
            if messages[-1].role != "assistant":
                raise RejectedError("a conversation must end with the assistant")
            conversations.append(messages)
        # Each of these draws has its own generator, so that a changed share does not change any other draw.
        share = draws(example.dataset, f"{example.key}\0conversation", variant).random()
        if rng is not None and share < example.multi_turn:
            conversations = [tuple(message for messages in conversations for message in messages)]
        return [encode_messages(self.tokenizer, messages) for messages in conversations]


def _first_images(example: Example, most: int) -> Example:
    """The example with its first `most` images, and the points in them."""
    annotations = []
    for annotation in example.annotations:
        kept = [
            replace(drawn, groups=tuple(group for group in drawn.groups if group.at <= most))
            for drawn in (annotation, *annotation.other_variants)
            if isinstance(drawn, Points)
        ]
        annotations.append(replace(kept[0], other_variants=tuple(kept[1:])) if kept else annotation)
    return replace(example, images=example.images[:most], annotations=tuple(annotations))


def _subtitles(example: Example, plan: VisualPlan) -> str:
    if example.subtitles is None:
        return ""
    return subtitle_text(example.subtitles, [visual["time"] for visual in plan.visuals if "time" in visual])


def _length(branches: Sequence[Branch]) -> int:
    """Number of input tokens in the branches; the last token of each is only a label."""
    return sum(len(branch.ids) - 1 for branch in branches)


def _tree(annotations: tuple[Annotation, ...], variant: int, rng: np.random.Generator | None) -> list[Annotation]:
    """The annotations of one variant, in random order if there is a generator."""
    chosen = [in_variant(annotation, variant) for annotation in annotations]
    return chosen if rng is None else [chosen[i] for i in rng.permutation(len(chosen))]


def _readable(branches: Sequence[Branch], chosen: list[int], num_visuals: int) -> dict[str, Any]:
    """A variant's entry in the record."""
    messages = [
        {"branch": i + 1, "role": message.role, "content": message.content}
        for i, branch in enumerate(branches)
        for message in branch.messages
    ]
    return {"messages": messages} | ({"visuals": chosen} if len(chosen) != num_visuals else {})
