"""Benchmarks of points and tracks in videos: files in the published layout, and answers with their scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pycocotools import mask as coco

WIDTH, HEIGHT, FPS, NUM_FRAMES = 80, 60, 6, 13  # two seconds and a frame


def table(folder: Path, file: str, rows: list[dict[str, Any]]) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / file)


def video(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"not read here")


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    found = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def halves(frame: int) -> list[np.ndarray]:
    """Two objects: the left half of all frames, and the right half from one second on."""
    left, right = np.zeros((2, HEIGHT, WIDTH), bool)
    left[:, : WIDTH // 2] = True
    right[:, WIDTH // 2 :] = frame >= FPS
    return [left, right]


def tracked(**columns: Any) -> dict[str, Any]:
    """A row of the sets of tracks: every sixth frame is annotated."""
    frames = [
        {
            "frame": number,
            "time": number / FPS,
            "points": [
                {"id": 0, "point": [20.0, 30.0], "occluded": False},
                {"id": 1, "point": [60.0, 30.0], "occluded": number < FPS},
            ],
        }
        for number in range(0, NUM_FRAMES, FPS)
    ]
    return {
        "id": "q1", "video": "dogs", "expression": "the dogs", "fps": FPS, "sampling_fps": 1, "height": HEIGHT,
        "width": WIDTH, "n_frames": NUM_FRAMES, "task": "track", "frame_trajectories": frames,
        "mask_id": ["0", "1"], "obj_id": [1, 2], "qid": "4", "anno_id": ["17", "18"], **columns}  # fmt: skip


def save(folder: Path, name: str, pixels: np.ndarray) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(len(pixels)):
        Image.fromarray(pixels[number].astype(np.uint8)).save(folder / name / f"{number:05d}.png")


def mevis(folder: Path) -> None:
    (folder / "MeViS_release/valid_u/JPEGImages/dogs").mkdir(parents=True)
    masks: dict[str, list[Any]] = {"17": [], "18": []}
    for number in range(NUM_FRAMES):
        left, right = halves(number)
        masks["17"].append(run_lengths(left))
        masks["18"].append(run_lengths(right) if right.any() else None)
    (folder / "MeViS_release/valid_u/mask_dict.json").write_text(json.dumps(masks))
    faster = tracked(sampling_fps=2)  # not asked here
    table(folder, "track/valid_u-00000-of-00001.parquet", [tracked(), faster])


def ref_yt_vos(folder: Path) -> None:
    (folder / "valid/JPEGImages/dogs").mkdir(parents=True)
    save(folder, "valid/Annotations/dogs/4", np.stack([255 * halves(n)[0] for n in range(NUM_FRAMES)]))
    table(folder, "track/valid-00000-of-00001.parquet", [tracked()])


def ref_davis17(folder: Path) -> None:
    (folder / "DAVIS/JPEGImages/480p/dogs").mkdir(parents=True)
    pixels = np.stack([halves(n)[0] + 2 * halves(n)[1] for n in range(NUM_FRAMES)])
    save(folder, "DAVIS/Annotations/480p/dogs", pixels)
    table(folder, "track/valid-00000-of-00001.parquet", [tracked()])


def reason_vos(folder: Path) -> None:
    (folder / "JPEGImages/dogs").mkdir(parents=True)
    for place, number in enumerate((1, 2)):
        save(folder, f"Annotations/mose_dogs_{number}", np.stack([255 * halves(n)[place] for n in range(NUM_FRAMES)]))
    table(folder, "track/test-00000-of-00001.parquet", [tracked()])


def video_track_eval(folder: Path) -> None:
    video(folder, "videos/dancetrack/dogs_0.mp4")
    frames = range(NUM_FRAMES)
    objects = ["0", "1"]
    there = [[True] * NUM_FRAMES, [n >= FPS for n in frames]]
    row = {
        "id": "7", "video": "dogs", "clip": "dogs_0", "video_dataset": "dancetrack", "exp": "the dogs", "fps": FPS,
        "w": WIDTH, "h": HEIGHT, "n_frames": NUM_FRAMES, "start_frame": 0, "end_frame": NUM_FRAMES, "mask_id": objects,
        "points": [{"object_id": name, "points": [[20.0 + 40 * place, 30.0] if there[place][n] else [] for n in frames]}
                   for place, name in enumerate(objects)],
        "masks": [{"object_id": name, "masks": [run_lengths(halves(n)[place]) for n in frames]}
                  for place, name in enumerate(objects)],
    }  # fmt: skip
    table(folder, "dance/test-00000-of-00001.parquet", [row])


def video_count_eval(folder: Path) -> None:
    video(folder, "videos/abc.mp4")
    row = {"video_id": "abc", "question": "How many dogs appear?", "label": "dogs", "count": 3,
           "two_fps_timestamps": [0.5, 2.0], "points": [[{"x": 10.0, "y": 20.0}, {"x": 50.0, "y": 20.0}],
                                                        [{"x": 60.0, "y": 20.0}]],
           "annotator_unsure": False, "video_duration": 4.0, "clip_start": None, "clip_end": None}  # fmt: skip
    table(folder, "data/val-00000-of-00001.parquet", [row])


def video_point_eval(folder: Path) -> None:
    video(folder, "generated_videos/sora2/abc.mp4")
    moment = [[{"frame_id": frame, "rle": run_lengths(mask)} for frame in (1, 2)] for mask in halves(FPS)]
    row = {"video_id": "sora2/abc", "video_source": "generated", "label": "dogs", "height": HEIGHT, "width": WIDTH,
           "video_duration": 4.0, "two_fps_timestamps": [1.0, 1.0], "masks": moment, "count": 2,
           "points": [{"x": 20.0, "y": 30.0}, {"x": 60.0, "y": 30.0}]}  # fmt: skip
    table(folder, "data/val-00000-of-00001.parquet", [row])


BOTH = '<tracks coords="0.0 1 250 500;1.0 1 250 500 2 750 500;2.0 1 250 500 2 750 500">dogs</tracks>'
LEFT = '<tracks coords="0.0 1 250 500;1.0 1 250 500;2.0 1 250 500">dogs</tracks>'
CASES = {
    "mevis": (mevis, [(BOTH, 1.0)]),
    "ref-yt-vos": (ref_yt_vos, [(BOTH, 6 / 8)]),  # three of five points, three wanted
    "molmo2-video-track-eval": (video_track_eval, [(LEFT, 6 / 8)]),  # three of three points, five wanted
    "ref-davis17": (ref_davis17, [(BOTH, 1.0)]),
    "reason-vos": (reason_vos, [(LEFT, 6 / 8)]),
    "molmo2-video-count-eval": (video_count_eval, [("3", 1.0)]),
    "molmo2-video-point-eval": (video_point_eval, [('<points coords="1.0 1 250 500 2 300 500">dogs</points>', 0.5)]),
}
