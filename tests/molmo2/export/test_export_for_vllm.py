"""An export for vLLM has a configuration and a processor that give what training saw; vLLM itself is not run here."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from exports import ABOUT, exported, noisy, reload, run_tool, weights_of, write_checkpoint
from PIL import Image
from processing_cases import TEMPLATE, noise, tokenizer_dir
from tiny_models import QWEN, YARN
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template
from transformers.video_utils import VideoMetadata

from molmo2.export.check import FPS, QUESTION, CheckedPrompt, our_inputs
from molmo2.export.model import export_model
from molmo2.export.vllm.processing_molmo2 import Molmo2VideoProcessor, choose_tiling, to_array
from molmo2.processing import tiling
from molmo2.processing.contract import visual_layout
from molmo2.processing.tokenizer import Tokenizer
from molmo2.weights.names import hub_config
from shards.media.images import load_image
from shards.schema import ImageRef

CODE = ("configuration_molmo2", "processing_molmo2")
ASKED = {
    "text": CheckedPrompt(),
    "image": CheckedPrompt(pictures=[noise(100, 170)]),
    "small image": CheckedPrompt(pictures=[noise(40, 33)]),
    "three images": CheckedPrompt(pictures=[noise(170, 100, 1), noise(60, 90, 2), noise(84, 84, 3)]),
    "one frame": CheckedPrompt(frames=np.stack([noise(50, 70)])),
    "video": CheckedPrompt(frames=np.stack([noise(50, 70, seed) for seed in range(7)])),
}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vllm") / "out"
    export_model(QWEN, weights_of(noisy(QWEN)), tokenizer_dir(), out, ABOUT, for_vllm=True)
    return out


@pytest.fixture(scope="module")
def code(export: Path) -> Iterator[dict[str, ModuleType]]:
    """The files of the export, not those of the project, imported as an engine does."""
    modules = {}
    for name in CODE:
        spec = importlib.util.spec_from_file_location(f"exported_{name}", export / f"{name}.py")
        assert spec and spec.loader
        modules[name] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = modules[name]
        spec.loader.exec_module(modules[name])
    yield modules
    for module in modules.values():
        del sys.modules[module.__name__]


def settings(export: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((export / name).read_text()))


def test_every_reference_names_a_class_that_is_there(export: Path, code: dict[str, ModuleType]) -> None:
    processor = settings(export, "processor_config.json")
    maps = {
        "config": settings(export, "config.json")["auto_map"],
        "processor": processor["auto_map"],
        "images": settings(export, "preprocessor_config.json")["auto_map"],
        "videos": settings(export, "video_preprocessor_config.json")["auto_map"],
    }
    assert {name: set(auto_map) for name, auto_map in maps.items()} == {
        "config": {"AutoConfig"},
        "processor": {"AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor"},
        "images": {"AutoImageProcessor"},
        "videos": {"AutoVideoProcessor"},
    }
    for auto_map in maps.values():
        for reference in auto_map.values():
            module, _, name = reference.partition(".")
            assert isinstance(getattr(code[module], name), type), reference
    assert processor["image_processor"] == settings(export, "preprocessor_config.json")
    assert processor["video_processor"] == settings(export, "video_preprocessor_config.json")
    assert {path.stem for path in export.glob("*.py")} == set(CODE)


def test_transformers_uses_its_own_classes_and_a_plain_export_has_no_code(export: Path, tmp_path: Path) -> None:
    for part in reload(export):
        assert type(part).__module__.startswith("transformers.")
    card = (export / "README.md").read_text()
    assert "trust_remote_code=True" in card and "transparency" in card
    plain = exported(noisy(QWEN), tmp_path / "out")
    assert not list(plain.glob("*.py"))
    assert not any("auto_map" in path.read_text() for path in plain.glob("*.json"))
    assert "vllm" not in (plain / "README.md").read_text().split("## Use")[1].split("- **Images")[0]


@pytest.mark.parametrize("kind", ASKED)
def test_the_processor_gives_what_training_saw(kind: str, export: Path, code: dict[str, ModuleType]) -> None:
    """Called as vLLM does."""
    asked, module = ASKED[kind], code["processing_molmo2"]
    tokenizer = AutoTokenizer.from_pretrained(export)
    flags = {k: v for k, v in settings(export, "processor_config.json").items() if k.endswith(("tokens", "token"))}
    processor = module.Molmo2Processor(
        module.Molmo2ImageProcessor(**settings(export, "preprocessor_config.json")),
        module.Molmo2VideoProcessor(**settings(export, "video_preprocessor_config.json")),
        tokenizer,
        **flags,
    )
    content: list[dict[str, Any]] = [{"type": "image"} for _ in asked.pictures]
    media: dict[str, Any] = {"images": [Image.fromarray(rgb) for rgb in asked.pictures]}
    if asked.frames is not None:
        content = [{"type": "video"}]
        facts = VideoMetadata(
            total_num_frames=len(asked.frames), fps=float(FPS), frames_indices=list(range(len(asked.frames)))
        )
        media = {"videos": [[asked.frames]], "video_metadata": [[facts]], "do_sample_frames": False}
    message = {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}
    text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    assert text.startswith(tokenizer.bos_token)
    inputs = processor(text=text, return_tensors="pt", **media)
    expected = our_inputs(QWEN, Tokenizer(tokenizer_dir(), 320), asked)
    assert inputs["input_ids"][0].tolist() == expected.input_ids.tolist()
    pixels = inputs.get("pixel_values", inputs.get("pixel_values_videos"))
    if kind == "text":
        assert pixels is None
        return
    patches = expected.pixels.reshape(-1, 6, 14, 6, 14, 3).swapaxes(2, 3).reshape(-1, 36, 588) / 127.5 - 1
    torch.testing.assert_close(pixels, patches, rtol=0, atol=1e-6)
    assert pooling_of_the_whole(inputs) == expected.pooling.tolist()


def pooling_of_the_whole(inputs: Any) -> list[list[int]]:
    """Pooling indices that count from the first image's first patch, as vLLM makes them for a batch."""
    if "video_token_pooling" in inputs:
        return list(inputs["video_token_pooling"].tolist())
    sizes = (inputs["image_grids"][:, :2].prod(1) + inputs["image_grids"][:, 2:].prod(1)).tolist()
    starts = [0, *(inputs["image_num_crops"].cumsum(0) * inputs["pixel_values"].shape[1]).tolist()]
    parts = zip(inputs["image_token_pooling"].split(sizes), starts[:-1], strict=True)
    return torch.cat([torch.where(part >= 0, part + start, -1) for part, start in parts]).tolist()


def test_tilings_are_ours() -> None:
    """For images that are no thinner than the margins: vLLM does not clamp the sides of thinner ones."""
    layout = visual_layout(QWEN)
    window, margin = layout.window_patches * layout.patch_size, 2 * layout.overlap_margin * layout.patch_size
    for height in range(margin + 1, 700, 23):
        for width in range(margin + 1, 700, 29):
            expected = tiling.choose_tiling(layout, height, width, 8)
            assert choose_tiling(height - margin, width - margin, window, 8) == expected


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_images_are_upright_and_on_white(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.dstack([noise(20, 30), noise(20, 30, 1)[..., :1]])).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "image.png", exif=exif, **({"transparency": 3} if mode == "P" else {}))
    expected = load_image(ImageRef(path=str(tmp_path / "image.png")))
    np.testing.assert_array_equal(to_array(Image.open(tmp_path / "image.png")), expected)


def test_frames_are_sampled_to_the_last(export: Path) -> None:
    """The examples are of the released code's rule for frames at a known rate."""
    videos = Molmo2VideoProcessor(**settings(export, "video_preprocessor_config.json"))
    assert [videos.sample(n, 30.0) for n in (1, 2, 3)] == [[0], [0, 1], [0, 2]]
    ten_seconds = videos.sample(300, 30.0)
    assert ten_seconds == [*range(0, 299, 15), 299]
    long = videos.sample(20_000, 25.0)
    assert len(long) == 384 and long[0] == 0 and long[-1] == 19_999


@pytest.mark.parametrize("config", [QWEN, YARN], ids=["qwen3", "yarn"])
def test_the_configuration_has_every_value(config: Any, code: dict[str, ModuleType]) -> None:
    values = hub_config(config)
    read = code["configuration_molmo2"].Molmo2Config(**values)
    assert read.image_patch_id == values["image_patch_id"] and read.model_type == "molmo2"
    for part in ("vit_config", "adapter_config", "text_config"):
        own = (
            "model_type",
            "rope_scaling",
            "use_cache",
            "attn_implementation",
        )  # names that transformers takes for itself
        kept = {key: value for key, value in values[part].items() if key not in own}
        assert {key: getattr(getattr(read, part), key) for key in kept} == kept
    rope = read.text_config.rope_parameters
    assert rope["rope_theta"] == config.text.rope_theta
    assert rope["rope_type"] == ("yarn" if config.text.rope_scaling else "default")
    assert "rope_parameters" in repr(read)


def test_vllm_sees_that_the_template_takes_parts() -> None:
    """It looks for a loop over `message.content`, bare or filtered.

    Without one it writes placeholders into the text, where the template breaks them up as what a user wrote.
    """
    tree = _compile_jinja_template(TEMPLATE.read_text()).environment.parse(TEMPLATE.read_text())
    loops = [loop.iter for loop in tree.find_all(jinja2.nodes.For)]
    bare = [node.node if isinstance(node, jinja2.nodes.Filter) else node for node in loops]
    assert any(isinstance(node, jinja2.nodes.Getattr) and node.attr == "content" for node in bare)


@pytest.mark.slow
def test_the_tool_exports_for_vllm(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tokenizer_dir())
    done = run_tool("--checkpoint", tmp_path / "run", "--out", tmp_path / "out", "--for", "vllm")
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (tmp_path / "out").glob("*.py")} == set(CODE)
    both = run_tool("--checkpoint", "x", "--out", "y", "--for", "vllm", "--remote-code-from", "z")
    assert both.returncode == 2 and "not allowed with" in both.stderr
