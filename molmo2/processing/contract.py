"""The contract between a model and its data: geometry, tokenizer, chat format, templates.

The digest of its settings is the fingerprint of shards: the builder writes the settings into every index, and the
loader compares them. `molmo2.processing.processor` converts an `Example` to a `Sample` by these settings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from molmo2.model.presets import PRESETS, ModelConfig
from molmo2.processing.tokenizer import Tokenizer
from shards.format import digest
from shards.layout import VisualLayout, VisualTokens

CHAT_FORMAT_VERSION = 3  # part of the fingerprint; increase it when messages are encoded differently
JPEG_QUALITY = 95  # quality of stored views, canvases and frames, 0 to 100
TEMPLATES_FOLDER = Path(__file__).with_name("templates")
STAGE_MODES = {"pretraining": "pretraining", "sft": "sft", "long": "sft", "eval": "eval"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorSettings:
    """The settings from which a processor is built; picklable, so that each worker process builds its own.

    `preset` names a model in `molmo2.model.presets.PRESETS`; `stage` is one of `STAGE_MODES`.
    """

    preset: str
    tokenizer_dir: str
    stage: str
    num_variants: int = 4


class Contract(NamedTuple):
    """A model's geometry, its tokenizer, and a mode, one of the values of `STAGE_MODES`."""

    layout: VisualLayout
    tokenizer: Tokenizer
    mode: str

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that changes a token or a pixel, JSON; its digest is the shards' fingerprint."""
        return {
            "layout": self.layout.to_json(),
            "tokenizer": self.tokenizer.sha256,
            "chat_format": CHAT_FORMAT_VERSION,
            "conditioning": self.mode,
            "templates": digest(templates()),
            "jpeg_quality": JPEG_QUALITY,
            "jpeg_dct": "accurate",
        }


def read_contract(settings: ProcessorSettings) -> Contract:
    """The contract of a model preset and stage.

    Raises:
        ValueError: an unknown preset or stage, or a tokenizer that does not fit the preset (`TokenizerError`).
    """
    if settings.preset not in PRESETS:
        raise ValueError(f"unknown model preset {settings.preset!r}; known: {', '.join(sorted(PRESETS))}")
    if settings.stage not in STAGE_MODES:
        raise ValueError(f"unknown stage {settings.stage!r}; known: {', '.join(STAGE_MODES)}")
    config = PRESETS[settings.preset]
    tokenizer = Tokenizer(settings.tokenizer_dir, config.text.vocab_size)
    return Contract(visual_layout(config), tokenizer, STAGE_MODES[settings.stage])


def visual_layout(config: ModelConfig) -> VisualLayout:
    """The geometry of a model's vision input, in the form that `shards` uses."""
    return VisualLayout(
        tokens=VisualTokens.after(config.text.vocab_size),
        crop_size=config.crop_size,
        patch_size=config.patch_size,
        overlap_margin=config.overlap_margin,
        image_pool=config.image_pool,
        video_pool=config.video_pool,
    )


# libyaml, where PyYAML was installed with it, is ten times as fast.
SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@functools.cache
def templates() -> dict[str, list[str]]:
    """The question templates by style, of all files in `TEMPLATES_FOLDER`; no style is in two of them.

    Their order matters: evaluation always uses the first of a style.
    """
    by_style: dict[str, list[str]] = {}
    for path in sorted(TEMPLATES_FOLDER.glob("*.yaml")):
        by_style |= yaml.load(path.read_text(encoding="utf-8"), Loader=SAFE_LOADER)
    return by_style
