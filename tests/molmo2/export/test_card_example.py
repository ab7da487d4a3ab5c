"""The code of the model card runs as it stands, and gives the model what training saw."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exports import exported, noisy
from PIL import Image
from processing_cases import example, noise, tokenizer_dir, write_video
from tiny_models import QWEN

from molmo2.processing.contract import visual_layout
from molmo2.processing.processor import Processor, Prompt
from molmo2.processing.tokenizer import Tokenizer
from shards.schema import ImageRef, Limits, Text, VideoRef

LIMITS = Limits(sequence_length=4096, max_crops=384, max_frames=384, image_crops=8)


def our_prompt(question: str, **media: Any) -> Prompt:
    processor = Processor(visual_layout(QWEN), Tokenizer(tokenizer_dir(), 320), "eval", num_variants=1)
    return processor.prompt(example(Text(style="user_qa", question=question, answer=""), **media), LIMITS)


def patches(prompt: Prompt) -> Any:
    """Our pixels as transformers' processor lays and scales them."""
    crops = prompt.pixels.reshape(-1, 6, 14, 6, 14, 3).swapaxes(2, 3).reshape(-1, 36, 588)
    return crops / 127.5 - 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_the_example_shows_what_training_saw(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image with transparent parts and an EXIF turn; a video whose last frame is not at a multiple of 0.5 s."""
    out = exported(noisy(QWEN), tmp_path / "out")
    image = Image.fromarray(np.dstack([noise(100, 170), noise(100, 170, 1)[..., :1]])).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    options = {"transparency": 3} if mode == "P" else {}
    image.save(out / "picture.png", exif=exif, **options)
    write_video(out / "clip.mp4", 19, 10)
    monkeypatch.chdir(out)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    values: dict[str, Any] = {}
    exec(code, values)
    picture = our_prompt("What is this?", images=(ImageRef(path=str(out / "picture.png")),))
    assert values["about_picture"]["input_ids"][0].tolist() == picture.input_ids.tolist()
    np.testing.assert_allclose(values["about_picture"]["pixel_values"], patches(picture), atol=1e-6)
    video = our_prompt("What happens?", video=VideoRef(path=str(out / "clip.mp4")))
    assert [visual["time"] for visual in video.visuals] == [0.0, 0.5, 1.0, 1.5, 1.9]
    assert values["about_clip"]["input_ids"][0].tolist() == video.input_ids.tolist()
    np.testing.assert_allclose(values["about_clip"]["pixel_values_videos"], patches(video), atol=0.03)
