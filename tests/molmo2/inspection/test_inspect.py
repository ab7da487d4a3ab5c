"""Looking into shards: facts against the index, and pages that are whole, safe and drawn by a browser."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from build_cases import build, make_raw
from fork_server import python
from programs import why_missing
from s3_server import BUCKET, environment, s3_server, upload

from molmo2.inspection.facts import InspectionError, count_reasons, facts_of, find, histogram
from molmo2.inspection.inventory import commands, inventory
from molmo2.inspection.originals import AnnotationView, ExampleView, _marks, lines, view_examples
from molmo2.inspection.samples import tokenizer_of, view_sample
from molmo2.processing.new_tokenizer import train_demo_tokenizer
from molmo2.processing.pictures import MOST_FRAMES, _shown
from molmo2.processing.points import format_points, format_tracks, parse_points
from molmo2.processing.prompts import Message
from shards.catalog import load_catalog
from shards.schema import Example, PointGroup, Points, Source, TrackGroup, Tracks
from shards.stream.dataset import Dataset, open_dataset

pytestmark = pytest.mark.slow  # the shards that all of it looks at
ROOT = Path(__file__).resolve().parents[3]
NAMES = ("demo-points", "demo-video-cap", "demo-video-track", "demo-chat")
HOSTILE = '<script>alert("pwned")</script><img src=x onerror=alert(1)>'
VOID = {"meta", "img", "br", "link", "input"}  # elements without an end tag


class Strict(HTMLParser):
    """Every tag closed by its own end tag, in order; collects text, tags and references."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.references += [value or "" for name, value in attrs if name in {"href", "src", "xlink:href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def tool(name: str, *arguments: str | Path, data: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), f"tools/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "MOLMO2_DATA": str(data)},
        capture_output=True,
        text=True,
    )


def poison(raw: Path) -> None:
    """Put markup into what a dataset's authors wrote."""
    (path,) = (raw / "demo-chat" / "data").glob("train-*.parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row in rows:
        row["messages"][0]["content"] = HOSTILE
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small built datasets, one with hostile texts, under a data root of their own; a recipe of two of them."""
    root = tmp_path_factory.mktemp("inspect")
    raw = make_raw(root / "raw", scale=0.02)
    poison(raw)
    for name in NAMES:
        build(raw, root / "shards" / "sft", name)
    recipe = yaml.safe_load((ROOT / "recipes/demo/stage2.yaml").read_text())
    groups = {
        "one": {"rate": 3, "datasets": {"demo-points": None}},
        "two": {"rate": 1, "datasets": {"demo-chat": None}},
    }
    recipe["data"] |= {"mixture": {"groups": groups}, "window": 256}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module")
def page(data: Path) -> Path:
    """The stage's page with a mixture."""
    run = tool(
        "inspect_shards", data / "shards/sft", "--html", data / "sft.html", "--recipe", data / "recipe.yaml", data=data
    )
    assert run.returncode == 0, run.stderr
    return data / "sft.html"


def opened(data: Path, name: str) -> Dataset:
    return open_dataset(str(data / "shards/sft"), name)


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_those_of_the_index(data: Path, name: str) -> None:
    dataset = opened(data, name)
    facts, totals = facts_of(dataset), dataset.index.totals
    assert sum(facts.tokens.counts) == sum(facts.crops.counts) == totals.samples
    assert facts.tokens.mean * totals.samples == pytest.approx(totals.tokens)
    assert facts.crops.mean * totals.samples == pytest.approx(totals.crops)
    assert (facts.frames is not None) == ("video" in name)
    if facts.frames:
        assert facts.frames.mean * totals.samples == pytest.approx(totals.frames)
    assert facts.num_faults + facts.num_omitted == totals.rejects


def test_a_histogram_puts_every_value_into_its_bin() -> None:
    values = np.array([3, 3, 4, 50, 102])
    found = histogram(values, 10)
    assert (found.first, found.width, sum(found.counts)) == (3, 10, 5)
    assert (found.counts[0], found.counts[4], found.counts[9]) == (3, 1, 1)
    assert (found.median, found.most) == (4, 102)
    assert histogram(values[:0]).counts == ()
    assert histogram(values[:2]).counts == (2,)


def test_rejects_are_counted_by_reason_and_faults_come_first() -> None:
    place = {"file": "a.parquet", "row": 7}
    reasons = ["media: a.png: no such image", "media: b.png: no such image", "filter: score is '2', wanted min 3"]
    rejects = [{**place, "reason": reason, "omitted": reason.startswith("filter")} for reason in reversed(reasons)]
    first, second = count_reasons(rejects)
    assert (first.reason, first.num_examples, first.omitted) == ("media", 2, False)
    assert (second.reason, second.num_examples, second.omitted) == ("filter: score", 1, True)
    assert first.example == "a.parquet row 7: media: b.png: no such image"


def test_a_lost_list_of_rejects_is_told(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "shards/sft/demo-chat", tmp_path / "demo-chat")
    before = facts_of(open_dataset(str(tmp_path), "demo-chat"))
    assert before.num_omitted > 0
    (tmp_path / "demo-chat/rejects.jsonl").unlink()
    after = facts_of(open_dataset(str(tmp_path), "demo-chat"))
    assert after.reasons[0].num_examples == before.index.totals.rejects
    assert "has 0 lines" in after.reasons[0].reason


def test_marks_and_text_are_those_of_the_tokens(data: Path) -> None:
    dataset = opened(data, "demo-video-track")
    tokenizer = tokenizer_of(dataset, data / "raw/tokenizer")
    view = view_sample(dataset, 0, tokenizer)
    text = "".join(span.text for branch in view.branches for span in branch.spans if not span.visual)
    points = parse_points(text)
    marks = [mark for picture in view.pictures for mark in picture.marks]
    assert "<tracks coords=" in text
    assert len(marks) == len(points) > 0
    assert {(mark.x, mark.y) for mark in marks} == {(point.x * 48, point.y * 48) for point in points}
    assert max(len(mark.trail) for mark in marks) == max(sum(p.id == q.id for q in points) for p in points) - 1
    assert len(view.pictures) == view.num_frames == view.num_crops


def test_weights_and_lengths_are_those_of_the_sidecar(data: Path) -> None:
    dataset = opened(data, "demo-video-cap")
    view = view_sample(dataset, 1, tokenizer_of(dataset, data / "raw/tokenizer"))
    row = dataset.sidecars[0][1]
    assert sum(branch.weight for branch in view.branches) == pytest.approx(row["loss_weight"][view.variant], rel=1e-5)
    assert (view.num_tokens, view.num_frames) == (row["num_tokens"][view.variant], row["num_frames"])
    assert [branch.number for branch in view.branches] == list(range(len(view.branches)))
    assert max(span.level for branch in view.branches for span in branch.spans) == 5


def test_frames_of_a_long_video_are_thinned_out_but_not_the_marked_ones() -> None:
    assert {7, 301} <= _shown(384, [7, 301])
    assert len(_shown(384, [7, 301])) == len(_shown(384, list(range(100)))) == MOST_FRAMES


def test_marks_of_raw_samples_are_numbered_as_in_the_answer() -> None:
    """Groups and objects in an order that is not that of the text, and object ids of a source's own."""
    groups = (PointGroup(at=2.0, points=((0.5, 0.5),)), PointGroup(at=1.0, points=((0.75, 0.25), (0.25, 0.75))))
    points = Points(style="video_point", label="it", groups=groups)
    objects = (
        TrackGroup(time=1.0, objects=((7, 0.5, 0.25), (0, 0.25, 0.5))),
        TrackGroup(time=0.0, objects=((7, 0.75, 0.75),)),
    )
    tracks = Tracks(style="video_point_track_per_frame", label="it", fps=1.0, groups=objects)
    texts = {
        points: format_points(points.groups, "it", seconds=True, separator=";"),
        tracks: format_tracks(tracks.groups, "it", separator=";"),
    }
    for annotation, text in texts.items():
        example = Example(key="k", dataset="d", source=Source(file="f", row=0), annotations=(annotation,))
        marks = sorted((at, int(mark.label), mark.x, mark.y) for at, mark in _marks(example))
        assert marks == sorted((point.at, point.id, point.x, point.y) for point in parse_points(text))


def test_the_page_is_whole_and_stands_alone(data: Path, page: Path) -> None:
    html = page.read_text()
    parsed = Strict(html)
    assert "script" not in parsed.tags
    assert {"svg", "image", "polyline", "circle"} <= set(parsed.tags)
    assert all(reference.startswith(("data:image/jpeg;base64,", "#")) for reference in parsed.references)
    text = "".join(parsed.texts)
    for name in NAMES:
        facts = facts_of(opened(data, name))
        assert name in text
        assert f"{facts.index.totals.tokens:,}" in text
    assert "75.00%" in text
    assert "demo-stage2: the first 200 of 1150 steps" in text


def test_markup_in_a_dataset_stays_text(page: Path) -> None:
    html = page.read_text()
    assert HOSTILE in "".join(Strict(html).texts)
    assert "<script" not in html


def test_without_a_recipe_there_is_no_mixture(data: Path, tmp_path: Path) -> None:
    folder = data / "shards/sft/demo-points"
    run = tool("inspect_shards", folder, "--html", tmp_path / "one.html", "--num-samples", "1", data=data)
    assert run.returncode == 0, run.stderr
    parsed = Strict((tmp_path / "one.html").read_text())
    assert "Mixture" not in "".join(parsed.texts)
    assert f"{facts_of(opened(data, 'demo-points')).index.totals.tokens:,}" in run.stdout


def test_each_stage_gets_its_page_and_a_build_under_way_is_named(data: Path, tmp_path: Path) -> None:
    for stage in ("sft", "long"):
        folder = tmp_path / "shards" / stage / "demo-chat"
        shutil.copytree(data / "shards/sft/demo-chat", folder)
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, "stage": stage}))
    (tmp_path / "shards/sft/begun").mkdir()
    (tmp_path / "shards/sft/begun/build.json").write_text("{}")
    found = find(str(tmp_path / "shards"))
    assert sorted(found.stages) == ["long", "sft"]
    run = tool("inspect_shards", tmp_path / "shards", "--html", tmp_path / "all.html", data=data)
    assert run.returncode == 0, run.stderr
    assert "shards/sft/begun" in run.stdout
    assert "begun" in (tmp_path / "all-sft.html").read_text()
    assert (tmp_path / "all-long.html").exists()


@pytest.mark.server
def test_a_bucket_is_shown_like_a_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(tmp_path) as endpoint:
        upload(endpoint, data / "shards/sft/demo-chat", "shards/sft/demo-chat")
        for name, value in environment(endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        out = tmp_path / "bucket.html"
        run = tool("inspect_shards", f"s3://{BUCKET}/shards", "--html", out, data=data)
    assert run.returncode == 0, run.stderr
    assert f"{facts_of(opened(data, 'demo-chat')).index.totals.tokens:,}" in run.stdout
    assert HOSTILE in "".join(Strict(out.read_text()).texts)


def test_a_folder_without_an_index_names_the_remedy(data: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/build.json").write_text("{}")
    run = tool("inspect_shards", tmp_path, data=data)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "no index.json" in run.stderr
    assert "begun" in run.stderr
    assert "tools/build_shards.py" in run.stderr


def test_another_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    train_demo_tokenizer(["something else entirely"], tmp_path)
    with pytest.raises(InspectionError, match="--tokenizer"):
        tokenizer_of(opened(data, "demo-chat"), tmp_path)


def test_a_damaged_sample_is_shown_as_such(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "shards/sft/demo-chat", tmp_path / "demo-chat")
    dataset = open_dataset(str(tmp_path), "demo-chat")
    tar = tmp_path / "demo-chat/000000.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    tokenizer = tokenizer_of(dataset, data / "raw/tokenizer")
    assert "checksum" in view_sample(dataset, 0, tokenizer).damage
    assert not view_sample(dataset, 1, tokenizer).damage


def test_the_inventory_tells_built_from_missing_and_how_to_get_it(data: Path) -> None:
    run = tool("inspect_data", "--catalog", "demo", "--stage", "sft", data=data)
    assert run.returncode == 0, run.stderr
    assert "Stage sft: 10 of 10 datasets are here, 4 built" in run.stdout
    lines = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines() if line.startswith("  demo-")}
    samples = facts_of(opened(data, "demo-points")).index.totals.samples
    assert lines["demo-points"][-4:-2] == ["built", f"{samples:,}"]
    assert "not built" in " ".join(lines["demo-count"])
    (build_line,) = [line for line in run.stdout.splitlines() if line.startswith("build: ")]
    assert "--stage sft --catalog demo --datasets demo-cap " in build_line and " demo-count " in build_line
    assert "demo-points" not in build_line


def test_states_of_raw_folders_and_shards(tmp_path: Path) -> None:
    catalog, raw, shards = load_catalog("molmo2"), tmp_path / "raw", tmp_path / "shards"
    (raw / "pixmo-cap" / ".download").mkdir(parents=True)
    (raw / "pixmo-cap" / "half.parquet").write_bytes(b"12345")
    for name, content in {"pixmo-cap/build.json": "{}", "tulu4/index.json": "{}"}.items():
        (shards / "pretraining" / name).parent.mkdir(parents=True)
        (shards / "pretraining" / name).write_text(content)
    found = {e.row.name: e for e in inventory(catalog, ["pretraining", "sft"], raw, shards) if e.stage == "pretraining"}
    cap, tulu = found["pixmo-cap"], found["tulu4"]
    assert (cap.raw, cap.raw_bytes, cap.built, cap.totals) == ("unfinished", 5, "unfinished", None)
    assert (tulu.raw, tulu.built) == ("missing", "damaged")
    entries = list(inventory(catalog, ["sft"], raw, shards))
    assert {e.row.name: e.raw for e in entries}["doc-qa"] == "by hand"
    fetch, by_hand = commands(entries, "molmo2")
    assert fetch.startswith("fetch: python tools/download_data.py --catalog molmo2 --datasets ")
    assert "pixmo-cap" in fetch.split()
    assert "doc-qa" in by_hand.split()
    both = [*entries, *inventory(catalog, ["eval"], raw, shards)]
    fetch, held_out, by_hand, held_out_by_hand = commands(both, "molmo2")
    assert held_out.startswith("fetch: python tools/download_data.py --catalog molmo2 --stage eval --datasets ")
    assert "vqa-v2" in fetch.split() and "vqa-v2" in held_out.split() and "mmmu" not in fetch.split()
    assert "--stage eval" in held_out_by_hand and "tomato" in held_out_by_hand.split() and "tomato" not in by_hand


def test_samples_of_a_source_are_told_as_text(data: Path) -> None:
    options = ("--catalog", "demo", "--stage", "sft", "--num-samples", "3")
    run = tool("inspect_data", *options, "demo-points", "demo-video-track", data=data)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("--- demo-video-track-") == 3
    assert '<points coords="1 1 ' in run.stdout
    assert '<tracks coords="0.0 1 ' in run.stdout
    assert "frames/s, h264" in run.stdout


def test_a_dataset_that_is_missing_does_not_stop_the_others(data: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/demo-points").symlink_to(data / "raw/demo-points")
    run = tool("inspect_data", "--catalog", "demo", "demo-chat", "demo-points", data=tmp_path)
    assert run.returncode == 1
    assert "demo-points-0" in run.stdout
    assert "demo-chat: no such folder" in run.stderr
    assert "make demo" in run.stderr
    unknown = tool("inspect_data", "demo-pints", "--catalog", "demo", data=data)
    assert unknown.returncode == 1
    assert "not in the catalog: demo-pints" in unknown.stderr


def test_what_is_left_out_or_cannot_be_read_is_said(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "raw/demo-video-cap", tmp_path / "demo-video-cap")
    chat, row = load_catalog("demo").select("sft", ["demo-chat", "demo-video-cap"])
    omitted = [view.left_out for view in view_examples(chat, "sft", data / "raw/demo-chat", 10**6, pictures=False)]
    left_out = facts_of(opened(data, "demo-chat")).num_omitted
    assert sum(reason.startswith("filter: ") for reason in omitted) == left_out > 0
    whole = next(view_examples(row, "sft", tmp_path / "demo-video-cap", 1, pictures=False))
    Path(whole.media[0].rpartition(": ")[2]).write_bytes(b"no video")
    after = next(view_examples(row, "sft", tmp_path / "demo-video-cap", 1, pictures=True))
    assert "not readable" in after.media[0]
    assert after.annotations == whole.annotations


def test_control_characters_of_a_dataset_do_not_reach_the_terminal() -> None:
    message = Message("user", "red \x1b[31m and\nline")
    annotation = AnnotationView(kind="Text", style="s", messages=(message,), num_points=None, colour="#000")
    told = "\n".join(lines([ExampleView(key="k", source="f row 0", annotations=(annotation,))]))
    assert "\x1b" not in told
    assert "red \\x1b[31m and\n    line" in told


@pytest.fixture(scope="module")
def source_page(data: Path) -> Path:
    """Samples of three raw datasets."""
    names = ("demo-points", "demo-video-track", "demo-chat")
    out = data / "source.html"
    run = tool("inspect_data", "--catalog", "demo", "--stage", "sft", *names, "--html", out, data=data)
    assert run.returncode == 0, run.stderr
    return out


def test_the_page_of_a_source_is_whole_and_safe(source_page: Path) -> None:
    html = source_page.read_text()
    parsed = Strict(html)
    assert HOSTILE in "".join(parsed.texts)
    assert "<script" not in html
    assert {"image", "circle"} <= set(parsed.tags)
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in parsed.references)


@pytest.fixture(scope="module")
def browser() -> Iterator[str]:
    """Chromium's command."""
    if reason := why_missing("chromium"):
        pytest.skip(reason)
    yield "chromium"


def screenshot(browser: str, page: Path, picture: Path, height: int) -> PIL.Image.Image:
    """What a browser draws, 1280 pixels wide."""
    options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", f"--window-size=1280,{height}"]
    command = [browser, *options, f"--user-data-dir={picture.parent}", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with PIL.Image.open(picture) as image:
        return image.convert("RGB")


def test_a_browser_draws_the_page(browser: str, page: Path, tmp_path: Path) -> None:
    """Points in the colours of branches, tracks in those of objects, loss weights in green, bars in blue."""
    image = screenshot(browser, page, tmp_path / "page.png", 9000)
    pixels = np.asarray(image)
    assert pixels.shape == (9000, 1280, 3)
    for colour in ((0xE6, 0x19, 0x4B), (0x43, 0x63, 0xD8), (0x55, 0xB1, 0x59), (0x1F, 0x5F, 0xA8)):
        assert (pixels == colour).all(axis=2).sum() > 100, colour


def test_a_browser_draws_the_page_of_a_source(browser: str, source_page: Path, tmp_path: Path) -> None:
    pixels = np.asarray(screenshot(browser, source_page, tmp_path / "page.png", 6000))
    for colour in ((0xE6, 0x19, 0x4B), (0x43, 0x63, 0xD8), (0xC5, 0xE4, 0xC6)):
        assert (pixels == colour).all(axis=2).sum() > 100, colour
