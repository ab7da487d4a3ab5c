"""The visuals of an example: media are opened, planned within a budget, and converted to files or model inputs.

A *plan* determines the visuals without pixels: each image's tiling, or the times of a video's frames. Its *budget* is
the maximum number of tiles per image, or of frames; a smaller budget shrinks the visuals. Decoding is in
`shards.media.video`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo2.processing import tiling as images
from molmo2.processing.contract import JPEG_QUALITY
from molmo2.processing.frames import frame_times, track_times
from molmo2.processing.tiling import Pixels
from shards import layout as geometry
from shards.layout import VisualLayout
from shards.media.images import load_with_notes
from shards.media.jpeg import encode_jpeg
from shards.media.types import Frames, Make, MediaError, VideoInfo
from shards.media.video import probe_video, read_frames
from shards.schema import Example, Limits, PictureNotes, RejectedError, Tracks, VideoRef


@dataclass(frozen=True, slots=True)
class ProbedVideo:
    """A video that has been probed but not decoded."""

    ref: VideoRef
    info: VideoInfo
    track_fps: int | None  # rate of the annotated frames of a video with tracks: sampled frames are among them


Opened = tuple[Pixels, ...] | ProbedVideo


@dataclass(frozen=True, slots=True)
class VisualPlan:
    """The planned visuals: `visuals` as in a sample's record, but with "image" (a number) in place of files."""

    budget: int
    visuals: tuple[dict[str, Any], ...]

    @property
    def num_crops(self) -> int:
        """Number of ViT inputs."""
        return sum(geometry.visual_crops(visual) for visual in self.visuals)

    @property
    def times(self) -> tuple[float, ...]:
        """Times of a video's frames; () without a video."""
        return tuple(visual["time"] for visual in self.visuals if "time" in visual)

    def have_frames(self, times: Sequence[float], reach: float) -> list[bool]:
        """For each time, whether a frame is at most `reach` seconds from it."""
        frames = np.array(self.times)
        return [bool(len(frames)) and bool(np.abs(frames - time).min() <= reach) for time in times]


def open_media(example: Example, limits: Limits, notes: list[PictureNotes] | None = None) -> Opened:
    """Decode the images, or probe the video; the result is `()` for text. `notes` receives those on the images.

    Raises:
        RejectedError: media are unreadable, there are too many images, or there are both images and a video.
    """
    if example.video is not None and example.images:
        raise RejectedError("an example has images or a video, not both")
    if len(example.images) > limits.max_images:
        raise RejectedError(f"{len(example.images)} images, the limit is {limits.max_images}")
    try:
        if example.video is None:
            loaded = [load_with_notes(ref) for ref in example.images]
            if notes is not None:
                notes.extend(noted for _, noted in loaded)
            return tuple(pixels for pixels, _ in loaded)
        info = probe_video(example.video)
    except MediaError as error:
        raise RejectedError(f"media: {error}") from error
    rates = [annotation.video_fps or info.fps for annotation in example.annotations if isinstance(annotation, Tracks)]
    return ProbedVideo(example.video, info, track_fps=max(1, round(rates[0])) if rates else None)


def make_plan(layout: VisualLayout, opened: Opened, limits: Limits, budget: int) -> VisualPlan:
    """Plan the visuals with at most `budget` tiles per image, or at most `budget` frames."""
    if isinstance(opened, ProbedVideo):
        duration = opened.info.duration
        if opened.track_fps is not None:
            times = track_times(duration, opened.track_fps, budget)
        else:
            times = frame_times(duration, limits.fps, budget)
        return VisualPlan(budget, tuple({"kind": "frame", "time": time} for time in times))
    visuals = []
    for number, rgb in enumerate(opened):
        tiling = images.choose_tiling(layout, rgb.shape[0], rgb.shape[1], budget)
        visuals.append({"kind": "image", "image": number, "tiling": list(tiling)})
    return VisualPlan(budget, tuple(visuals))


def full_plan(layout: VisualLayout, opened: Opened, limits: Limits, image_tiles: int) -> VisualPlan:
    """The largest plan whose crops fit the limits; the budget of a video is then its number of frames.

    Raises:
        RejectedError: not even one tile per image fits.
    """
    if isinstance(opened, ProbedVideo):
        plan = make_plan(layout, opened, limits, min(limits.max_frames, limits.max_crops))
        return VisualPlan(len(plan.visuals), plan.visuals)
    for budget in range(image_tiles, 0, -1):
        plan = make_plan(layout, opened, limits, budget)
        if plan.num_crops <= limits.max_crops:
            return plan
    raise RejectedError(f"{len(opened)} images need {2 * len(opened)} crops, the limit is {limits.max_crops}")


def _read(clip: ProbedVideo, plan: VisualPlan, make: Make) -> Frames:
    try:
        return read_frames(clip.ref, [visual["time"] for visual in plan.visuals], make)
    except MediaError as error:
        raise RejectedError(f"media: {error}") from error


def _view_file(layout: VisualLayout, rgb: Pixels) -> bytes:
    return encode_jpeg(images.view(layout, rgb), JPEG_QUALITY)


@dataclass(frozen=True, slots=True)
class StoredVisuals:
    """Visuals as a shard stores them: the record's "visuals" and "media", JPEG files, each plan's visuals by index."""

    visuals: list[dict[str, Any]]
    facts: dict[str, Any]
    files: list[bytes]
    chosen: list[list[int]]


def store(layout: VisualLayout, opened: Opened, plans: Sequence[VisualPlan]) -> StoredVisuals:
    """Decode, resize and encode the visuals of all plans; equal visuals are stored once."""
    if isinstance(opened, ProbedVideo):
        (plan,) = plans
        frames = _read(opened, plan, functools.partial(_view_file, layout))  # encoded in the decoding process
        times = [visual["time"] for visual in plan.visuals]
        records = [{"kind": "frame", "view": i, "time": time} for i, time in enumerate(times)]
        facts: dict[str, Any] = {"video": asdict(opened.info) | {"decoder": frames.decoder}}
        return StoredVisuals(records, facts, frames.each, [list(range(len(records)))])
    records, files = [], list[bytes]()
    views: dict[int, int] = {}
    canvases: dict[tuple[int, tuple[int, int]], int] = {}
    for visual in (visual for plan in plans for visual in plan.visuals):
        number, tiling = visual["image"], tuple(visual["tiling"])
        if (number, tiling) in canvases:
            continue
        canvases[number, tiling] = len(records)
        if number not in views:
            views[number] = len(files)
            files.append(_view_file(layout, opened[number]))
        canvas = views[number]
        if not images.canvas_is_view(tiling):
            canvas = len(files)
            files.append(encode_jpeg(images.canvas(layout, opened[number], tiling), JPEG_QUALITY))
        records.append({"kind": "image", "view": views[number], "canvas": canvas, "tiling": list(tiling)})
    chosen = [[canvases[v["image"], tuple(v["tiling"])] for v in plan.visuals] for plan in plans]
    sizes = [{"height": rgb.shape[0], "width": rgb.shape[1]} for rgb in opened]
    return StoredVisuals(records, {"images": sizes} if sizes else {}, files, chosen)


def model_inputs(layout: VisualLayout, opened: Opened, plan: VisualPlan) -> tuple[Pixels, npt.NDArray[np.int64]]:
    """Crops uint8 [N, crop, crop, 3] and pooling [T, pool ** 2] into the flat [N * patches] axis, -1 pads."""
    if isinstance(opened, ProbedVideo):
        crops = list(_read(opened, plan, functools.partial(images.view, layout)).pixels[:, None])
    else:
        crops = []
        for visual in plan.visuals:
            rgb, tiling = opened[visual["image"]], tuple(visual["tiling"])
            view, canvas = images.view(layout, rgb), images.canvas(layout, rgb, tiling)
            crops.append(geometry.split_crops(layout, tiling, view, canvas))
    if not crops:
        size = layout.crop_size
        return np.zeros((0, size, size, 3), np.uint8), np.zeros((0, layout.image_pool**2), np.int64)
    starts = np.cumsum([0, *(len(piece) for piece in crops[:-1])]) * layout.crop_patches**2
    pooling = []
    for start, visual in zip(starts, plan.visuals, strict=True):
        local = geometry.visual_pooling(layout, visual)
        pooling.append(np.where(local >= 0, local + start, -1))
    return np.concatenate(crops), np.concatenate(pooling)
