"""Media values of a row in the forms that people write them, and what is refused with a remedy."""

from __future__ import annotations

import base64
import http.server
import io
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import PIL.Image
import pytest

from shards.catalog import Row
from shards.download.connect import FetchLimits
from shards.media.images import load_image
from shards.schema import RejectedError
from shards.sources.media_files import MediaFiles

NAME = "süß 1%20é.png"


def png(colour: str = "red") -> bytes:
    sink = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), colour).save(sink, "PNG")
    return sink.getvalue()


BASE64 = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "value",
    [
        f"data:image/png;base64,{BASE64}",
        f"DATA:image/png;charset=x;BASE64,{BASE64.rstrip('=')}",
        f"data:;base64,{quote(BASE64)}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(png()).decode()}",
        "data:image/png;base64," + "\n".join(BASE64[i : i + 20] for i in range(0, len(BASE64), 20)),
        f"data:image/png,{quote(png())}",
        BASE64,
        png(),
        {"bytes": png(), "path": "nowhere.png"},
        {"bytes": png(), "path": None},
        {"bytes": None, "path": "1.png"},
        {"path": "1.png"},
        {"bytes": None, "path": f"data:image/png;base64,{BASE64}"},
        {"bytes": BASE64, "path": None},
        {"url": "1.png"},
        [{"bytes": png(), "path": None}],
        ["1.png"],
        "1.png",
        "images\\sub\\2.png",
        "./images//sub/2.png",
        "images%2Fsub%2F2.png",
        "file://ROOT/1.png",
        "file://localhostROOT/1.png",
        "file://images/sub/2.png",
    ],
)
def test_an_image_is_found(tmp_path: Path, value: Any) -> None:
    (tmp_path / "images/sub").mkdir(parents=True)
    for name in ("1.png", "images/sub/2.png"):
        (tmp_path / name).write_bytes(png())
    value = value.replace("ROOT", str(tmp_path)) if isinstance(value, str) else value
    assert load_image(MediaFiles(root=tmp_path).image(value)).shape == (4, 6, 3)


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
@pytest.mark.parametrize("table", ["NFC", "NFD"])
@pytest.mark.parametrize("write", [str, quote, lambda name: f"file://{quote(name)}"])
def test_names_in_other_unicode_forms(tmp_path: Path, disk: Any, table: Any, write: Any) -> None:
    folder = tmp_path / unicodedata.normalize("NFC", "fotös")
    folder.mkdir()
    (folder / unicodedata.normalize(disk, NAME)).write_bytes(png())
    value = write(unicodedata.normalize(table, f"fotös/{NAME}"))
    assert load_image(MediaFiles(root=tmp_path).image(value)).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("data:image/png;base64", "without a comma"),
        ("data:image/png;base64,", "without content"),
        ("data:image/png;base64,%%%", "base64 is broken"),
        ("data:image/png;base64," + "A" * 4000, "at most 1000"),
        (bytes(2000), "at most 1000"),
        (b"", "no image in the row"),
        ({"bytes": None, "path": None}, "no image in the row"),
        ([], "a list of 0 images"),
        (["1.png", "2.png"], "a list of 2 images"),
        ("a" * 5000, "cannot be opened: File name too long"),
        ("a\0b", "zero byte"),
        ("file:///a%00b", "cannot be opened"),
        ("file:///" + "a" * 300, "cannot be opened"),
        ("http://[/", "not a URL"),
        ("%2e%2e/outside.png", "lies outside"),
        ("..\\outside.png", "lies outside"),
    ],
)
def test_what_is_no_image_is_rejected_briefly(tmp_path: Path, value: Any, match: str) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "outside.png").write_bytes(png())
    with pytest.raises(RejectedError, match=match) as caught:
        MediaFiles(root=tmp_path / "raw", limits=FetchLimits(max_bytes=1000)).image(value)
    assert len(str(caught.value)) < 600


def test_links_are_followed_where_the_row_allows_it(tmp_path: Path) -> None:
    disk, root = tmp_path / "other disk", tmp_path / "raw"
    disk.mkdir()
    root.mkdir()
    (disk / "1.png").write_bytes(png())
    (root / "images").symlink_to(disk)
    values = ["images/1.png", str(disk / "1.png"), f"file://{quote(str(disk / '1.png'))}"]
    for value in values:
        with pytest.raises(RejectedError, match=r"lies outside.*media_roots: \[.*other disk\]"):
            MediaFiles(root=root).image(value)
        assert MediaFiles(root=root, outside=(disk,)).image(value).path == str(disk / "1.png")
    with pytest.raises(RejectedError, match="lies outside"):
        MediaFiles(root=root, outside=(disk,)).image("../../etc/hostname")


def test_a_folder_of_media_roots_is_absolute() -> None:
    row = {"name": "a", "stages": ["sft"], "files": {"train": "x"}, "converter": "chat", "columns": {}}
    assert Row.model_validate({**row, "media_roots": "/mnt/a"}).media_roots == ("/mnt/a",)
    for wrong in ("mnt/a", "/"):
        with pytest.raises(ValueError, match="is not the absolute path of a folder"):
            Row.model_validate({**row, "media_roots": [wrong]})


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = {"/clip.mp4": b"\0\0\0\x18ftypmp42", "/page": b"<html>", "/big.mp4": bytes(5000)}.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_videos_are_fetched_with_the_guards_of_images(tmp_path: Path, server: str) -> None:
    limits = FetchLimits(attempts=1, allow_private=True, max_bytes=1000)
    media = MediaFiles(root=tmp_path, video_limits=limits)
    for _ in range(2):
        clip = media.video(f"{server}/clip.mp4", 1.0, 2.0)
        assert (Path(clip.path).read_bytes()[4:8], clip.start, clip.end) == (b"ftyp", 1.0, 2.0)
    for name, match in (("none", "http 404"), ("page", "not a video"), ("big.mp4", "larger than 1000 bytes")):
        with pytest.raises(RejectedError, match=match):
            media.video(f"{server}/{name}")
    assert [path.name for path in tmp_path.glob("media/*/*")] == [Path(clip.path).name]
    with pytest.raises(RejectedError, match="private address"):
        MediaFiles(root=tmp_path / "other").video(f"{server}/clip.mp4")
    with pytest.raises(RejectedError, match="write it into a file"):
        media.video("data:video/mp4;base64,AAAA")
