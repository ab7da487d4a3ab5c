"""Raw folders from nothing to their manifest: a fake Hub, a faulty web server, kills, and the command line."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import Hub, client_of, environment, fake_hub
from fork_server import python
from web_server import Web, png, web_server

from shards.catalog import Catalog, Download, load_catalog
from shards.download.connect import FetchLimits
from shards.download.fetch import ARCHIVE_LIMITS
from shards.download.hub import DownloadError, list_files
from shards.download.manifest import missing_folders, read_manifest, unfinished_folders
from shards.download.raw_folder import FillOptions, fill, forecast
from shards.download.urls import DEFAULT_POLICY, media_path, read_failures
from shards.schema import RejectedError
from shards.sources.media_files import MediaFiles

ROOT = Path(__file__).resolve().parents[3]
LOCAL = FillOptions(
    images=FetchLimits(allow_private=True, max_seconds=2.0, stall=0.4, attempts=2, first_pause=0.01, longest_pause=3.0),
    archives=replace(ARCHIVE_LIMITS, allow_private=True, attempts=1),
    policy=replace(DEFAULT_POLICY, workers=8),
)
WIDER = Download(kind="hub", repo="owner/easy", include=("*/*.parquet",))
PIXMO = Download(
    kind="hub-urls", repo="owner/pixmo", include=("data/*.parquet",), url_column="url", sha256_column="sha"
)


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as running:
        yield running


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "hub/datasets").mkdir(parents=True)
    with fake_hub(tmp_path / "hub") as running, client_of(running, tmp_path / "home"):
        yield running


def publish(hub: Hub, repo: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = hub.root / "datasets" / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def table(columns: dict[str, list[Any]]) -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.table(columns), target)
    return target.getvalue()


def publish_pixmo(hub: Hub, urls: list[str], shas: list[str | None] | None = None) -> None:
    column = pa.array(shas or [None] * len(urls), pa.string())
    publish(hub, "owner/pixmo", {"data/train-0.parquet": table({"url": urls, "sha": column})})


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the Hub's and our own working state."""
    files = (path for path in folder.rglob("*") if path.is_file())
    inside = {path.relative_to(folder).as_posix(): path for path in files}
    state = {".cache", ".download"}
    return {name: path.read_bytes() for name, path in inside.items() if not state & set(Path(name).parts)}


def downloads(hub: Hub) -> list[str]:
    return [line for line in hub.log if line.startswith("GET") and "/resolve/" in line]


# --- repositories ----------------------------------------------------------------------------------------------------


def test_a_repository_is_fetched_at_one_commit_and_never_asked_again(hub: Hub, tmp_path: Path) -> None:
    publish(hub, "owner/set", {"data/a.parquet": b"a" * 100, "root.parquet": b"r", "README.md": b"no"})
    wanted = Download(kind="hub", repo="owner/set", include=("**/*.parquet",))
    folder = tmp_path / "raw"
    assert forecast(wanted, folder).bytes == forecast(wanted, folder).missing == 101
    assert not folder.exists() and not downloads(hub)
    manifest = fill("set", wanted, folder, LOCAL)
    assert manifest.listing is not None
    assert [(file.path, file.bytes) for file in manifest.listing.files] == [
        ("data/a.parquet", 100),
        ("root.parquet", 1),
    ]
    assert len(manifest.listing.commit) == 40
    assert set(tree(folder)) == {"data/a.parquet", "root.parquet", "manifest.json"}
    publish(hub, "owner/set", {"data/a.parquet": b"newer"})  # upstream moves on; what is here stays what it is
    asked = len(hub.log)
    assert fill("set", wanted, folder, LOCAL) == manifest == read_manifest(folder, wanted)
    assert forecast(wanted, folder).missing == 0
    assert len(hub.log) == asked
    assert read_manifest(folder, wanted.model_copy(update={"include": ("x/*",)})) is None


@pytest.mark.slow
def test_an_update_moves_to_the_newest_commit(hub: Hub, tmp_path: Path) -> None:
    """Killed in its middle, it goes on with the new commit, and never mixes two."""
    publish(hub, "owner/set", {"data/a.parquet": b"old a", "data/b.parquet": b"old b", "data/c.parquet": b"c"})
    wanted, folder = Download(kind="hub", repo="owner/set", include=("data/*",)), tmp_path / "raw"
    update = replace(LOCAL, update=True)
    first = fill("set", wanted, folder, LOCAL)
    asked = len(downloads(hub))
    assert fill("set", wanted, folder, update) == first and len(downloads(hub)) == asked  # there is nothing newer
    (hub.root / "datasets/owner/set/data/c.parquet").unlink()
    publish(hub, "owner/set", {"data/a.parquet": b"new a", "data/d.parquet": b"d"})
    assert fill("set", wanted, folder, LOCAL) == first
    hub.cuts.append("data/d.parquet")
    with contextlib.suppress(DownloadError):
        fill("set", wanted, folder, update)
    second = fill("set", wanted, folder, LOCAL)
    assert second.listing is not None and first.listing is not None
    assert second.listing.commit != first.listing.commit
    found = {name: data for name, data in tree(folder).items() if name.startswith("data/")}
    assert found == {"data/a.parquet": b"new a", "data/b.parquet": b"old b", "data/d.parquet": b"d"}


def test_a_cut_and_a_lost_file_are_made_good(hub: Hub, tmp_path: Path) -> None:
    publish(hub, "owner/set", {"data/a.parquet": os.urandom(5000)})
    wanted = Download(kind="hub", repo="owner/set", include=("data/*",))
    hub.cuts.append("data/a.parquet")
    fill("set", wanted, tmp_path / "raw", LOCAL)
    before = tree(tmp_path / "raw")
    (tmp_path / "raw/data/a.parquet").unlink()
    fill("set", wanted, tmp_path / "raw", LOCAL)
    assert tree(tmp_path / "raw") == before


def test_what_the_user_must_do_is_said(hub: Hub, tmp_path: Path) -> None:
    publish(hub, "owner/set", {"data/a.parquet": b"a"})
    hub.gated, hub.tokens = {"owner/set"}, {"granted"}
    wanted = Download(kind="hub", repo="owner/set", include=("data/*",))
    with pytest.raises(DownloadError, match=r"gated: log in at https://huggingface.co/datasets/owner/set.*HF_TOKEN"):
        fill("set", wanted, tmp_path / "raw", LOCAL)
    with client_of(hub, tmp_path / "home", "granted"):
        fill("set", wanted, tmp_path / "raw", LOCAL)
    with pytest.raises(DownloadError, match=r"owner/none: no such dataset on the Hub, or a private one"):
        list_files("owner/none", None, ["*"])
    with pytest.raises(DownloadError, match=r"no revision 'gone'"):
        list_files("owner/set", "gone", ["*"])
    with pytest.raises(DownloadError, match=r"no file matches x/\*"):
        list_files("owner/set", None, ["x/*"])


# --- archives --------------------------------------------------------------------------------------------------------


def test_archives_are_fetched_checked_and_unpacked_once(web: Web, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("images/1.jpg", b"one")
    web.files["a.zip"] = data = packed.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    wanted = Download(kind="archives", urls={"a.zip": f"{web.url}/file/a.zip"}, extract={"*.zip": "coco"})
    wrong = wanted.model_copy(update={"sha256": {"a.zip": "0" * 64}})
    with pytest.raises(DownloadError, match=r"the catalog says 000"):
        fill("coco", wrong, tmp_path, LOCAL)
    right = wanted.model_copy(update={"sha256": {"a.zip": digest}})
    for _ in range(2):
        manifest = fill("coco", right, tmp_path, LOCAL)
        assert manifest.extracted == {"a.zip": 1}
        assert manifest.archives[0].sha256 == digest
    assert web.asked["/file/a.zip"] == 2  # the wrong one, and once more
    assert (tmp_path / "coco/images/1.jpg").read_bytes() == b"one"
    gone = wanted.model_copy(update={"urls": {"b.zip": f"{web.url}/status/404"}})
    with pytest.raises(DownloadError, match=r"http 404; the same command continues, or put the file at"):
        fill("coco", gone, tmp_path / "other", LOCAL)


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def test_an_archive_that_is_not_published_is_a_warning_and_stops_no_other(hub: Hub, tmp_path: Path) -> None:
    publish(hub, "owner/set", {"b/1.zip": packed({"1.mp4": b"one"})})
    wanted = Download(kind="hub", repo="owner/set", include=("*/*.zip",), extract={"a/*.zip": "a", "b/*.zip": "b"})
    for _ in range(2):
        manifest = fill("set", wanted, tmp_path / "raw", LOCAL)
        assert manifest.extracted == {"b/1.zip": 1} and (tmp_path / "raw/b/1.mp4").read_bytes() == b"one"
        assert manifest.warnings == (f"{tmp_path}/raw/a/*.zip: no such archive, nothing was unpacked",)
    by_hand = Download(kind="manual", instructions="Ask the authors.", extract={"*.zip": "."})
    assert fill("set", by_hand, tmp_path / "hand", LOCAL).warnings[0].endswith("; Ask the authors.")
    (tmp_path / "hand/own.zip").write_bytes(packed({"2.mp4": b"two"}))
    manifest = fill("set", by_hand, tmp_path / "hand", LOCAL)
    assert (manifest.extracted, manifest.warnings) == ({"own.zip": 1}, ())


def test_a_table_that_is_not_packed_is_put_where_its_archive_would_put_it(web: Web, tmp_path: Path) -> None:
    table = b' {"qa_pairs": []}'
    wanted = Download(kind="archives", urls={"qa.json": f"{web.url}/file/qa"}, extract={"qa.json": "questions"})
    for name, data in {"plain": table, "zipped": packed({"qa.json": table})}.items():
        web.files["qa"] = data
        for _ in range(2):
            assert fill("qa", wanted, tmp_path / name, LOCAL).extracted == {"qa.json": 1}
            assert (tmp_path / name / "questions/qa.json").read_bytes() == table
    web.files["qa"] = b"<html>too many downloads"
    with pytest.raises(DownloadError, match=r"not a whole zip or tar archive"):
        fill("qa", wanted, tmp_path / "page", LOCAL)


# --- one folder of several rows --------------------------------------------------------------------------------------


def test_rows_that_share_a_folder_fill_it_together(hub: Hub, web: Web, tmp_path: Path) -> None:
    """Whichever comes first: neither makes the other incomplete, fetches a file twice, or moves the commit."""
    web.files["a.zip"] = packed({"1.jpg": b"one"})
    url = {"a.zip": f"{web.url}/file/a.zip"}
    publish(hub, "owner/set", {"train/a.parquet": b"train", "val/a.parquet": b"val"})
    train = Download(kind="hub", repo="owner/set", include=("train/*",))
    exam = Download(kind="archives", repo="owner/set", include=("val/*",), urls=url, extract={"a.zip": "images"})
    subset = Download(kind="hub", repo="owner/set", include=("val/a*.parquet",))
    for order in ((train, exam), (exam, train)):
        folder = tmp_path / order[0].kind
        hub.log.clear()
        first = fill("set", order[0], folder, LOCAL)
        shutil.copytree(hub.root / "datasets/owner/set", hub.root / f"datasets/owner/set@{order[0].kind}")
        publish(hub, "owner/set", {"val/b.parquet": order[0].kind.encode()})  # upstream moves on
        assert read_manifest(folder, order[1]) is None
        second = fill("set", order[1], folder, LOCAL)
        assert first.listing is not None and second.listing is not None
        assert second.listing.commit == first.listing.commit
        assert {"train/a.parquet", "val/a.parquet", "a.zip", "images/1.jpg"} <= set(tree(folder))
        assert len(downloads(hub)) == len(second.listing.files)
        asked = len(hub.log)
        for wanted in (train, exam, subset):
            assert read_manifest(folder, wanted) == fill("set", wanted, folder, LOCAL) == second
        assert len(hub.log) == asked
    assert web.asked["/file/a.zip"] == 2  # once for each of the two folders


def test_a_second_download_that_is_cut_leaves_the_first_complete(hub: Hub, web: Web, tmp_path: Path) -> None:
    publish(hub, "owner/set", {"train/a.parquet": b"train", "val/a.parquet": b"val"})
    train = Download(kind="hub", repo="owner/set", include=("train/*",))
    exam = Download(kind="archives", repo="owner/set", include=("val/*",), urls={"b.zip": f"{web.url}/status/404"})
    folder = tmp_path / "set"
    first = fill("set", train, folder, LOCAL)
    with pytest.raises(DownloadError, match="http 404"):
        fill("set", exam, folder, LOCAL)
    assert read_manifest(folder, train) == first
    assert read_manifest(folder, exam) is None


def test_another_repository_or_revision_takes_the_place_of_the_first(hub: Hub, tmp_path: Path) -> None:
    publish(hub, "owner/set", {"a.parquet": b"a"})
    publish(hub, "owner/other", {"a.parquet": b"other"})
    wanted = Download(kind="hub", repo="owner/set", include=("*.parquet",))
    moved = wanted.model_copy(update={"repo": "owner/other"})
    with pytest.raises(ValueError, match=r"repositories owner/set@None and owner/other@None"):
        wanted.joined(moved)
    fill("set", wanted, tmp_path / "raw", LOCAL)
    manifest = fill("set", moved, tmp_path / "raw", LOCAL)
    assert manifest.download == moved and read_manifest(tmp_path / "raw", wanted) is None


def test_globs_that_lie_within_others() -> None:
    def of(*globs: str) -> Download:
        return Download(kind="hub", repo="a/b", include=globs)

    assert of("data/*.parquet").covers(of("data/val-*.parquet"))
    assert of("a", "b").covers(of("b")) and not of("b").covers(of("a", "b"))
    assert not of("data/val-*.parquet").covers(of("data/*.parquet"))
    assert not of("data/?.parquet").covers(of("data/*.parquet"))
    assert not of("data/[*].parquet").covers(of("data/*.parquet"))


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_are_kept_checked_and_failures_recorded(hub: Hub, web: Web, tmp_path: Path) -> None:
    paths = ["image/1", "image/2", "image/1", "image/3", "bomb", "text", "status/404", "cut", "later"]
    shas: list[str | None] = [None] * len(paths)
    shas[1], shas[3] = hashlib.sha256(png(2)).hexdigest(), "0" * 64
    publish_pixmo(hub, [f"{web.url}/{path}" for path in paths] + ["http://[/", "ftp://host/a"], [*shas, None, None])
    manifest = fill("pixmo", PIXMO, tmp_path / "raw", LOCAL)
    assert manifest.media is not None
    assert (manifest.media.urls, manifest.media.present, manifest.media.failed) == (10, 2, 8)
    assert (tmp_path / "raw" / media_path(f"{web.url}/image/2")).read_bytes() == png(2)
    failures = {f.url.removeprefix(web.url): (f.row, f.reason) for f in read_failures(tmp_path / "raw").values()}
    assert failures == {
        "/image/3": (3, "another sha256 than the row says"),
        "/bomb": (4, "too many pixels"),
        "/text": (5, "not an image"),
        "/status/404": (6, "http 404"),
        "/cut": (7, "the connection broke"),
        "/later": (8, "http 429"),
        "http://[/": (9, "not a URL"),
        "ftp://host/a": (10, "scheme 'ftp' is not followed"),
    }
    media = MediaFiles(root=tmp_path / "raw")  # the builder reads the store, and asks nobody
    assert Path(media.image(f"{web.url}/image/1").path or "").read_bytes() == png(1)
    with pytest.raises(RejectedError, match=r"not downloaded"):
        media.image(f"{web.url}/text")
    assert web.asked["/image/1"] == web.asked["/text"] == 1


def test_failures_are_left_alone_until_they_are_asked_for(hub: Hub, web: Web, tmp_path: Path) -> None:
    publish_pixmo(hub, [f"{web.url}/image/{n}" for n in range(6)])
    web.gone = {"/image/1", "/image/2"}
    first = fill("pixmo", PIXMO, tmp_path / "raw", replace(LOCAL, max_images=4)).media
    assert first is not None and (first.urls, first.present, first.failed, first.limit) == (4, 2, 2, 4)
    with pytest.raises(DownloadError, match=r"2 of 6 images were never asked for; run without --retry-failed"):
        fill("pixmo", PIXMO, tmp_path / "raw", replace(LOCAL, retry_failed=True))
    web.gone, web.asked = {"/image/2"}, type(web.asked)()
    second = fill("pixmo", PIXMO, tmp_path / "raw", LOCAL).media  # the rest, none of the failed
    assert second is not None and (second.urls, second.present, second.failed) == (6, 4, 2)
    assert set(web.asked) == {"/image/4", "/image/5"}
    web.asked.clear()
    third = fill("pixmo", PIXMO, tmp_path / "raw", replace(LOCAL, retry_failed=True)).media
    assert third is not None and (third.present, third.failed) == (5, 1)
    assert set(web.asked) == {"/image/1", "/image/2"}
    web.asked.clear()
    assert fill("pixmo", PIXMO, tmp_path / "raw", LOCAL).media == third
    assert not web.asked
    assert list(read_failures(tmp_path / "raw")) == [f"{web.url}/image/2"]


def test_no_host_gets_more_than_its_share_and_none_holds_up_the_others(hub: Hub, web: Web, tmp_path: Path) -> None:
    publish_pixmo(hub, [f"{web.url}/slow/{n}" for n in range(12)])
    fill("pixmo", PIXMO, tmp_path / "raw", replace(LOCAL, policy=replace(DEFAULT_POLICY, workers=16, per_host=3)))
    assert web.most == 3


def test_a_dead_network_stops_early(hub: Hub, web: Web, tmp_path: Path) -> None:
    publish_pixmo(hub, [f"{web.url}/status/gone{n}" for n in range(400)])
    with pytest.raises(DownloadError, match=r"images failed: http 404 \(\d+\); if your network"):
        fill("pixmo", PIXMO, tmp_path / "raw", LOCAL)
    assert 200 <= len(read_failures(tmp_path / "raw")) < 260
    assert read_manifest(tmp_path / "raw", PIXMO) is None


def test_missing_columns_are_named(hub: Hub, tmp_path: Path) -> None:
    publish(hub, "owner/pixmo", {"data/a.parquet": table({"link": ["x"]})})
    with pytest.raises(DownloadError, match=r"no column url, sha; it has: link"):
        fill("pixmo", PIXMO, tmp_path / "raw", LOCAL)


FILL = """
import sys
from dataclasses import replace
from pathlib import Path
from shards.catalog import Download
from shards.download.raw_folder import FillOptions, fill
from shards.download.fetch import ARCHIVE_LIMITS, IMAGE_LIMITS
from shards.download.urls import DEFAULT_POLICY
options = FillOptions(
    images=replace(IMAGE_LIMITS, allow_private=True), archives=replace(ARCHIVE_LIMITS, allow_private=True),
    policy=replace(DEFAULT_POLICY, workers=2),
)
fill("pixmo", Download.model_validate_json(sys.argv[2]), Path(sys.argv[1]), options)
"""


@pytest.mark.slow
def test_killed_at_any_point_it_goes_on_and_fetches_nothing_twice(hub: Hub, web: Web, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(20):
            archive.writestr(f"{number}.jpg", os.urandom(1000))
    web.files["a.zip"] = packed.getvalue()
    urls = [f"{web.url}/slow/{n}" for n in range(40)]
    publish_pixmo(hub, [*urls, f"{web.url}/status/404"])
    wanted = PIXMO.model_copy(update={"urls": {"a.zip": f"{web.url}/file/a.zip"}, "extract": {"a.zip": "more"}})
    reference = fill("pixmo", wanted, tmp_path / "whole", LOCAL)
    hub.log.clear()
    web.asked.clear()
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", textwrap.dedent(FILL), str(folder), wanted.model_dump_json()]
    variables = {**os.environ, **environment(hub, tmp_path / "home2")}
    kills = 0
    for images in (3, 20, 10_000):
        with subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
            while process.poll() is None:
                if sum(1 for _ in folder.glob("media/*/*")) >= images:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.005)
    assert kills == 2 and process.returncode == 0
    assert tree(folder).keys() == tree(tmp_path / "whole").keys()
    assert {n: d for n, d in tree(folder).items() if n != "manifest.json"} == {
        n: d for n, d in tree(tmp_path / "whole").items() if n != "manifest.json"
    }
    assert read_manifest(folder, wanted) == reference
    assert web.asked["/file/a.zip"] == 1 and len(downloads(hub)) == 1
    assert web.asked["/status/404"] <= 1 + kills
    again = [path for path, count in web.asked.items() if path.startswith("/slow") and count > 1]
    assert len(again) <= 4 * kills  # only what was on its way when the kill came


# --- the command line ------------------------------------------------------------------------------------------------

CATALOG = """
preset: tiny
tokenizer: tokenizer
stages: {}
folders:
  pool: {download: {kind: manual, instructions: Ask for the pool.}}
templates:
  captions: {converter: image_caption, columns: {image: image, caption: text}}
  images: {like: captions, stages: [sft], files: {train: data/*.parquet}}
  easy: {like: images, download: {kind: hub, repo: owner/easy, include: ["data/*.parquet"]}}
rows:
  - {like: easy, name: easy}
  - {like: images, name: absent, download: {kind: hub, repo: owner/absent, include: ["data/*.parquet"]}}
  - {like: images, name: asking, download: {kind: manual, instructions: Ask nicely.}, media_from: [pool]}
  - {like: easy, name: exam, stages: [eval], files: {validation: data/*.parquet}}
"""


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    (tmp_path / "c.yaml").write_text(CATALOG)
    return load_catalog(str(tmp_path / "c.yaml"))


def run(hub: Hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [python(), "tools/download_data.py", "--catalog", str(tmp_path / "c.yaml"), *arguments]
    variables = {**os.environ, **environment(hub, tmp_path / "home2"), "MOLMO2_DATA": str(tmp_path / "data")}
    return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_line(hub: Hub, catalog: Catalog, tmp_path: Path) -> None:
    publish(hub, "owner/easy", {"data/a.parquet": b"a" * 2_000_000})
    dry = run(hub, tmp_path, "--dry-run")
    assert dry.returncode == 1 and "sizes not known: absent" in dry.stderr
    assert [line.split() for line in dry.stdout.splitlines() if line.startswith(("easy", "total", "asking"))] == [
        ["easy", "1", "0.002", "0.002"],
        ["asking", "by", "hand"],
        ["total", "1", "0.002", "0.002"],
    ]
    assert not (tmp_path / "data").exists() and not downloads(hub)
    whole = run(hub, tmp_path, "--stage", "sft")
    assert whole.returncode == 1
    assert "easy: 1 files, 0.002 GB" in whole.stdout
    assert "owner/absent: no such dataset on the Hub" in whole.stderr
    assert "Ask nicely." in whole.stderr and "Ask for the pool." in whole.stderr
    assert "not complete, 2 of 3: absent, asking" in whole.stderr and "Traceback" not in whole.stderr
    assert run(hub, tmp_path, "--datasets", "easy").returncode == 0
    manual = run(hub, tmp_path, "--show-manual-instructions", "--datasets", "asking")
    assert manual.returncode == 0 and manual.stdout.count("folder:") == 2
    unknown = run(hub, tmp_path, "--datasets", "nothing")
    assert unknown.returncode == 1 and "not in the catalog: nothing; known: easy" in unknown.stderr


JOINED = """
preset: tiny
tokenizer: tokenizer
evaluation: exam.yaml
stages: {}
rows:
  - name: easy
    stages: [sft]
    files: {train: train/*.parquet}
    converter: image_caption
    columns: {image: image, caption: text}
    download: {kind: hub, repo: owner/easy, include: ["train/*.parquet"]}
"""
EXAM = """
preset: tiny
tokenizer: tokenizer
stages: {eval: {num_variants: 1, examples_per_shard: 5, limits: {sequence_length: 768, max_crops: 32}}}
templates:
  captions: {converter: image_caption, columns: {image: image, caption: text}}
  exam: {like: captions, stages: [eval], files: {validation: val/*.parquet}}
rows:
  - {like: exam, name: easy, download: {kind: hub, repo: owner/easy, include: ["val/*.parquet"]}}
  - {like: exam, name: other, download: {kind: hub, repo: owner/other, include: ["val/*.parquet"]}}
"""


@pytest.mark.slow
def test_the_command_line_with_a_catalog_of_evaluation(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(JOINED)
    (tmp_path / "exam.yaml").write_text(EXAM)
    publish(hub, "owner/easy", {"train/a.parquet": b"t", "val/a.parquet": b"v"})
    publish(hub, "owner/other", {"val/a.parquet": b"o"})
    raw, loaded = tmp_path / "data/raw", load_catalog(str(tmp_path / "c.yaml"))
    train, exam, other = loaded.all_rows
    assert run(hub, tmp_path).returncode == 0
    assert set(tree(raw)) == {"easy/manifest.json", "easy/train/a.parquet"}
    assert [missing_folders(loaded, row, raw) for row in (train, exam, other)] == [[], ["easy"], ["other"]]
    assert run(hub, tmp_path, "--stage", "eval", "--datasets", "easy").returncode == 0
    assert "easy/val/a.parquet" in tree(raw) and "other/val/a.parquet" not in tree(raw)
    assert [missing_folders(loaded, row, raw) for row in (train, exam)] == [[], []]
    both = run(hub, tmp_path, "--include-eval")
    assert both.returncode == 0 and "easy: 2 files" in both.stdout and "other: 1 files" in both.stdout
    shutil.rmtree(raw)
    assert run(hub, tmp_path, "--datasets", "other").returncode == 0  # a name of the evaluation alone
    assert set(tree(raw)) == {"other/manifest.json", "other/val/a.parquet"}
    shutil.rmtree(raw)
    assert run(hub, tmp_path, "--stage", "eval").returncode == 0
    assert {name for name in tree(raw) if name.endswith("parquet")} == {"easy/val/a.parquet", "other/val/a.parquet"}


def test_what_is_missing_of_a_row(catalog: Catalog, tmp_path: Path) -> None:
    easy, _, asking, _ = catalog.rows
    assert missing_folders(catalog, easy, tmp_path) == ["easy"]
    assert missing_folders(catalog, asking, tmp_path) == ["asking", "pool"]
    for path in ("easy/data/a.parquet", "asking/data/a.parquet", "pool/video.mp4"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    assert missing_folders(catalog, asking, tmp_path) == []
    assert missing_folders(catalog, easy, tmp_path) == ["easy"]  # files without a manifest may be the half of it
    download = catalog.downloads([easy])["easy"].model_dump(mode="json")
    (tmp_path / "easy/manifest.json").write_text(json.dumps({"name": "easy", "download": download}))
    assert missing_folders(catalog, easy, tmp_path) == []
    (tmp_path / "pool/.download").mkdir()
    assert unfinished_folders(catalog, asking, tmp_path) == ["pool"]
    (tmp_path / "easy/.download").mkdir()
    assert unfinished_folders(catalog, easy, tmp_path) == []
    more = catalog.model_copy(update={"rows": (easy.model_copy(update={"download": WIDER}),)})
    assert unfinished_folders(more, easy, tmp_path) == missing_folders(more, easy, tmp_path) == ["easy"]


def test_two_downloads_do_not_share_a_folder(hub: Hub, tmp_path: Path) -> None:
    publish(hub, "owner/set", {"data/a.parquet": b"a"})
    wanted = Download(kind="hub", repo="owner/set", include=("data/*",))
    (tmp_path / "raw/.download").mkdir(parents=True)
    with (tmp_path / "raw/.download/lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another process downloads into"):
            fill("set", wanted, tmp_path / "raw", LOCAL)
    fill("set", wanted, tmp_path / "raw", LOCAL)


def test_every_folder_of_the_real_catalog_can_be_filled() -> None:
    catalog = load_catalog("molmo2")
    for name, download in catalog.downloads(catalog.rows).items():
        patterns = [*download.urls, *download.extract, *download.extract.values()]
        assert not [p for p in patterns if p.startswith("/") or ".." in Path(p).parts], name
        assert all(url.startswith(("https://", "http://")) for url in download.urls.values()), name
