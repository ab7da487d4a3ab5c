"""A build depends on the media that it used: what changed is made again, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from build_cases import build, build_part, small_shards, tree

from shards.build.media_used import media_changed, record_media


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def test_changed_media_rebuild_their_shards_alone(raw: Path, tmp_path: Path) -> None:
    mine, out, name = tmp_path / "raw", tmp_path / "out", "demo-video-track"
    shutil.copytree(raw, mine)
    videos = sorted((mine / name / "videos").iterdir())
    build(mine, out, name, settings=small_shards())
    before, samples = stamps(out / name), tree(out / name)
    assert len(before) >= 2
    whole = videos[0].read_bytes()
    assert build_part(mine, out, name, settings=small_shards()).num_made == 0
    videos[0].write_bytes(b"not a video")
    built = build_part(mine, out, name, settings=small_shards(), reject_budget=1.0)
    assert (built.num_made, built.num_kept) == (1, len(before) - 1)
    changed = {shard for shard, stamp in stamps(out / name).items() if stamp != before[shard]}
    assert len(changed) == 1
    videos[0].unlink()  # the broken video is now missing
    assert build_part(mine, out, name, settings=small_shards(), reject_budget=1.0).num_made == 1
    videos[0].write_bytes(whole)  # and now mended
    assert build_part(mine, out, name, settings=small_shards()).num_made == 1
    tars = {file: data for file, data in tree(out / name).items() if file.endswith((".tar", ".npy"))}
    assert tars == {file: data for file, data in samples.items() if file in tars}


def test_with_verify_the_sha256_decides(raw: Path, tmp_path: Path) -> None:
    mine, out, name = tmp_path / "raw", tmp_path / "out", "demo-video-track"
    shutil.copytree(raw, mine)
    video = sorted((mine / name / "videos").iterdir())[0]
    build(mine, out, name, verify_media=True)
    os.utime(video, ns=(1, 1))  # copied without its times
    assert build_part(mine, out, name, verify_media=True).num_made == 0
    assert build_part(mine, out, name).num_made == 1


def test_states_of_files_and_folders(tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "mine"
    (raw / "frames").mkdir(parents=True)
    (raw / "frames" / "1.jpg").write_bytes(b"1")
    (raw / "a.png").write_bytes(b"a")
    files = [raw / "frames", raw / "a.png", raw / "missing.png"]
    recorded = record_media(files, raw, verify=False)
    assert list(recorded) == ["mine/a.png", "mine/frames", "mine/missing.png"]
    assert not media_changed(recorded, raw, verify=True)
    (tmp_path / "raw").rename(tmp_path / "moved")
    assert not media_changed(recorded, tmp_path / "moved" / "mine", verify=False)
    (tmp_path / "moved").rename(tmp_path / "raw")
    (raw / "frames" / "2.jpg").write_bytes(b"2")
    assert media_changed(recorded, raw, verify=False)
    (raw / "frames" / "2.jpg").unlink()
    (raw / "missing.png").write_bytes(b"come")
    assert media_changed(recorded, raw, verify=False)
    recorded = record_media(files, raw, verify=True)
    status = (raw / "a.png").stat()
    (raw / "a.png").write_bytes(b"b")
    os.utime(raw / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not media_changed(recorded, raw, verify=False)
    assert media_changed(recorded, raw, verify=True)
