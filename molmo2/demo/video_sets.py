"""The video sets of the demo: short H.264 clips of digits that move, appear and disappear, with questions.

As in `image_sets`, a function makes the rows and the files of one clip from a generator and a pool of digits.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from molmo2.demo.digits import Generator, Pixels, PlacedDigit, Pool, enlarge, pick
from molmo2.demo.image_sets import CELL, DemoExample, one_of

HEIGHT = WIDTH = 48
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
WHICH = "Which digit is shown?"
WHERE_TO = "In which direction does the digit move?"

_STRING, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
_POINT = pa.struct([("x", _FLOAT), ("y", _FLOAT)])
_TRACK_POINT = pa.struct([("id", _INT), ("point", pa.list_(_FLOAT)), ("occluded", pa.bool_())])
_TRACK_FRAME = pa.struct([("frame", _INT), ("time", _FLOAT), ("points", pa.list_(_TRACK_POINT))])

CAP_SCHEMA = pa.schema(
    [
        ("video_id", _STRING),
        ("video_start", _FLOAT),
        ("video_end", _FLOAT),
        ("video_caption", _STRING),
        ("merged_caption", _STRING),
        ("video_frame_merged_caption", _STRING),
        ("annotation_score", _FLOAT),
    ]
)
QA_SCHEMA = pa.schema(
    [
        ("video_id", _STRING),
        ("Question", _STRING),
        ("Answer", _STRING),
        ("NegativeAnswers", pa.list_(_STRING)),
        ("Category", _STRING),
    ]
)
POINT_SCHEMA = pa.schema(
    [
        ("video_id", _STRING),
        ("question", _STRING),
        ("label", _STRING),
        ("count", _INT),
        ("two_fps_timestamps", pa.list_(_FLOAT)),
        ("points", pa.list_(pa.list_(_POINT))),
        ("raw_frames", pa.list_(_INT)),
        ("raw_timestamps", pa.list_(_FLOAT)),
        ("annotator_unsure", pa.bool_()),
        ("category", _STRING),
        ("video_duration", _FLOAT),
        ("video_source", _STRING),
        ("clip_start", _FLOAT),
        ("clip_end", _FLOAT),
    ]
)
TRACK_SCHEMA = pa.schema(
    [
        ("id", _STRING),
        ("video", _STRING),
        ("expression", _STRING),
        ("fps", _INT),
        ("sampling_fps", _INT),
        ("height", _INT),
        ("width", _INT),
        ("n_frames", _INT),
        ("task", _STRING),
        ("frame_trajectories", pa.list_(_TRACK_FRAME)),
        ("mask_id", pa.list_(_STRING)),
        ("obj_id", pa.list_(_INT)),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """A digit that is visible from `start` to `end` (seconds) and may cross the frame in the middle fifth of the clip.

    `path`: its top left corner in pixels at the start and at the end of the clip, ((x, y), (x, y)).
    """

    digit: PlacedDigit
    path: tuple[tuple[float, float], tuple[float, float]]
    start: float
    end: float

    def corner(self, part: float) -> tuple[float, float]:
        """The top left corner in pixels after the fraction `part` of the clip."""
        (x0, y0), (x1, y1) = self.path
        part = min(max((part - 0.4) / 0.2, 0.0), 1.0)
        return x0 + (x1 - x0) * part, y0 + (y1 - y0) * part

    def center(self, part: float) -> tuple[float, float]:
        """The center in pixels after the fraction `part` of the clip."""
        x, y = self.corner(part)
        return x + self.digit.size / 2, y + self.digit.size / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitClip:
    """A clip of `num_frames` frames at `fps`, with its digits."""

    fps: int
    num_frames: int
    actors: list[Actor]

    @property
    def duration(self) -> float:
        """The duration in seconds."""
        return self.num_frames / self.fps

    def part(self, time: float) -> float:
        """The fraction of the clip before `time` (seconds)."""
        return min(1.0, time * self.fps / max(1, self.num_frames - 1))


def render_clip(clip: DigitClip, paper: int, ink: int) -> Pixels:
    """Draw the frames of a clip, uint8 [num_frames, HEIGHT, WIDTH, 3]."""
    shades = [enlarge(actor.digit.scan, actor.digit.size) for actor in clip.actors]
    frames = np.full((clip.num_frames, HEIGHT, WIDTH), paper, np.float32)
    for i, frame in enumerate(frames):
        time = i / clip.fps
        for actor, shade in zip(clip.actors, shades, strict=True):
            if actor.start <= time < actor.end:
                x, y = (round(c) for c in actor.corner(clip.part(time)))
                patch = frame[y : y + len(shade), x : x + len(shade)]
                patch += (ink - patch) * shade
    return np.repeat(np.round(frames).astype(np.uint8)[..., None], 3, axis=3)


def encode(frames: Pixels, fps: int) -> bytes:
    """Encode frames as H.264 in mp4, with one thread, so that equal frames give equal bytes."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # mbtree reads uninitialized memory when a frame has few macroblocks.
        stream.options = {"preset": "veryfast", "crf": "18", "x264-params": "mbtree=0"}
        stream.codec_context.thread_count = 1  # the option "threads" has no effect
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _file(rng: Generator, clip: DigitClip, name: str) -> dict[str, bytes]:
    frames = render_clip(clip, int(rng.integers(30)), int(rng.integers(210, 256)))
    return {f"videos/{name}.mp4": encode(frames, clip.fps)}


def _length(rng: Generator, shortest: float, longest: float, rates: Sequence[int] = (24, 25, 30)) -> tuple[int, int]:
    """Frames per second and number of frames; short clips are much more frequent than long ones."""
    fps = int(one_of(rng, rates))
    seconds = shortest + (longest - shortest) * float(rng.random()) ** 3
    return fps, round(seconds * fps)


def _actor(rng: Generator, pool: Pool, size: int, direction: str | None, span: tuple[float, float]) -> Actor:
    """A random digit in a corner of the frame that crosses the frame in `direction`, or does not move if None."""
    number, label, scan = pick(rng, pool)
    room_x, room_y = WIDTH - size, HEIGHT - size
    x, y = (room * int(rng.integers(2)) for room in (room_x, room_y))
    begin = end = (x, y)
    if direction is not None:
        dx, dy = DIRECTIONS[direction]
        begin = (0 if dx > 0 else room_x if dx < 0 else x, 0 if dy > 0 else room_y if dy < 0 else y)
        end = (room_x - begin[0] if dx else x, room_y - begin[1] if dy else y)
    digit = PlacedDigit(number=number, label=label, scan=scan, x=begin[0], y=begin[1], size=size)
    return Actor(digit=digit, path=(begin, end), start=span[0], end=span[1])


def _moving(rng: Generator, pool: Pool, longest: float) -> tuple[DigitClip, str]:
    """A clip with one digit that moves, and its direction."""
    fps, num_frames = _length(rng, 2.0, longest)
    direction = str(one_of(rng, list(DIRECTIONS)))
    actor = _actor(rng, pool, CELL, direction, (0.0, num_frames / fps + 1))
    return DigitClip(fps=fps, num_frames=num_frames, actors=[actor]), direction


def _turns(rng: Generator, pool: Pool, count: int, longest: float) -> DigitClip:
    """A clip with `count` digits, one after the other, each for an equal number of half seconds."""
    fps, num_frames = _length(rng, max(2.0, float(count)), longest)
    seconds = max(0.5, int(num_frames / fps / count * 2) / 2)
    spans = [(i * seconds, (i + 1) * seconds if i + 1 < count else num_frames / fps + 1) for i in range(count)]
    return DigitClip(fps=fps, num_frames=num_frames, actors=[_actor(rng, pool, CELL, None, span) for span in spans])


def _used(clip: DigitClip) -> list[int]:
    return [actor.digit.number for actor in clip.actors]


def caption_of_clip(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """Molmo2-Cap: one digit that moves, or several in turn; a short, a longer and a timed caption."""
    if rng.random() < 0.5:
        clip, direction = _moving(rng, pool, 40.0)
        label = clip.actors[0].digit.label
        short = f"The digit {label} moves {direction}."
        merged = f"The video shows the digit {label}. It moves {direction}."
        timed = f"From 0.0 to {clip.duration:.1f} the digit {label} moves {direction}."
    else:
        clip = _turns(rng, pool, int(rng.integers(2, 5)), 40.0)
        listed = [f"the digit {actor.digit.label}" for actor in clip.actors]
        short = f"{len(listed)} digits appear in turn."
        merged = f"The video shows {', then '.join(listed)}."
        timed = " ".join(f"At {actor.start:.1f} the digit {actor.digit.label} appears." for actor in clip.actors)
    row = {
        "video_id": name,
        "video_start": 0.0,
        "video_end": clip.duration,
        "video_caption": short if rng.random() < 0.85 else None,
        "merged_caption": merged,
        "video_frame_merged_caption": timed,
        "annotation_score": 2.0 if rng.random() < 0.04 else 4.0,
    }
    return DemoExample(rows=[row], digits=_used(clip), files=_file(rng, clip, name))


def _options(
    rng: Generator, name: str, question: str, answer: str, others: Sequence[str], category: str
) -> dict[str, object]:
    wrong = [others[i] for i in rng.permutation(len(others))[:3]]
    return {"video_id": name, "Question": question, "Answer": answer, "NegativeAnswers": wrong, "Category": category}


def qa(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """Molmo2-VideoCapQA: one moving digit; two questions, which digit it is and where it moves, with four options."""
    clip, direction = _moving(rng, pool, 4.0)
    label = clip.actors[0].digit.label
    digits = [str(i) for i in range(10) if i != label]
    ways = [way for way in DIRECTIONS if way != direction]
    rows = [
        _options(rng, name, WHICH, str(label), digits, "object"),
        _options(rng, name, WHERE_TO, direction, ways, "motion"),
    ]
    return DemoExample(rows=rows, digits=_used(clip), files=_file(rng, clip, name))


def point(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """Molmo2-VideoPoint: digits that appear one after the other, with a point at the time of each, in percent.

    The clip is so short that all frames at two a second fit into a sample, so that every point has a frame.
    """
    clip = _turns(rng, pool, int(rng.integers(1, 5)), 7.5)
    centers = [actor.center(clip.part(actor.start)) for actor in clip.actors]
    row = {
        "video_id": name,
        "question": "How many digits appear in the video?",
        "label": "digits",
        "count": len(clip.actors),
        "two_fps_timestamps": [actor.start for actor in clip.actors],
        "points": [[{"x": 100 * x / WIDTH, "y": 100 * y / HEIGHT}] for x, y in centers],
        "raw_frames": [round(actor.start * clip.fps) for actor in clip.actors],
        "raw_timestamps": [actor.start for actor in clip.actors],
        "annotator_unsure": bool(rng.random() < 0.03),
        "category": "object",
        "video_duration": clip.duration,
        "video_source": "generated",
        "clip_start": None,
        "clip_end": None,
    }
    return DemoExample(rows=[row], digits=_used(clip), files=_file(rng, clip, name))


def track(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """MeViS as Molmo2 publishes it: one or two moving digits, tracked at two frames a second, in pixels."""
    fps, num_frames = _length(rng, 2.0, 8.0, rates=(24, 30))
    span = (0.0, num_frames / fps + 1)
    ways = [str(way) for way in rng.permutation(list(DIRECTIONS))[: int(rng.integers(1, 3))]]
    actors = [_actor(rng, pool, CELL, way, span) for way in ways]
    clip = DigitClip(fps=fps, num_frames=num_frames, actors=actors)
    frames = [
        {
            "frame": frame,
            "time": frame / fps,
            "points": [
                {"id": i, "point": list(actor.center(clip.part(frame / fps))), "occluded": False}
                for i, actor in enumerate(actors)
            ],
        }
        for frame in range(0, num_frames, fps // 2)
    ]
    row = {
        "id": name,
        "video": name,
        "expression": "the moving digit" if len(actors) == 1 else "the moving digits",
        "fps": fps,
        "sampling_fps": 2,
        "height": HEIGHT,
        "width": WIDTH,
        "n_frames": num_frames,
        "task": "track",
        "frame_trajectories": frames,
        "mask_id": [f"{name}-{i}" for i in range(len(actors))],
        "obj_id": list(range(len(actors))),
    }
    return DemoExample(rows=[row], digits=_used(clip), files=_file(rng, clip, name))
