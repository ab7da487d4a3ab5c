"""Put code beside the weights of an export, for engines that have no Molmo2 of their own.

vLLM gets our own configuration and processor, from `molmo2/export/vllm`. Older versions of transformers get released
code, which is not part of this project: only the `*.py` files of a downloaded release are copied. `auto_map` names the
classes in the code. No code is run here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from molmo2.export.check import ExportError

# Files of a release, and of an export, that may have an `auto_map`.
FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
VLLM_CODE = Path(__file__).with_name("vllm")
VLLM_FILES = ("configuration_molmo2.py", "processing_molmo2.py")
_IMAGES = {"AutoImageProcessor": "processing_molmo2.Molmo2ImageProcessor"}
_VIDEOS = {"AutoVideoProcessor": "processing_molmo2.Molmo2VideoProcessor"}
_PROCESSOR = {"AutoProcessor": "processing_molmo2.Molmo2Processor", **_IMAGES, **_VIDEOS}


def write_vllm_code(directory: Path) -> None:
    """Copy `VLLM_FILES` into an export, and name their classes wherever a version of transformers looks for them.

    `processor_config.json` also gets the settings of images and videos, since new versions read them there.
    """
    for name in VLLM_FILES:
        shutil.copyfile(VLLM_CODE / name, directory / name)
    _set_auto_map(directory / "config.json", {"AutoConfig": "configuration_molmo2.Molmo2Config"})
    _set_auto_map(directory / "preprocessor_config.json", _IMAGES)
    _set_auto_map(directory / "video_preprocessor_config.json", _VIDEOS)
    parts = {
        "image_processor": json.loads((directory / "preprocessor_config.json").read_text()),
        "video_processor": json.loads((directory / "video_preprocessor_config.json").read_text()),
    }
    _update(directory / "processor_config.json", {"auto_map": _PROCESSOR, **parts})


def copy_remote_code(source: Path, directory: Path) -> list[str]:
    """Copy `source`/*.py into an export and set `auto_map` in its `FILES`.

    Args:
        source: a downloaded release; its `config.json` must have an `auto_map`.
        directory: the export.

    Returns:
        Names of the copied files.

    Raises:
        ExportError: there is no code, a file is a link to outside of `source`, or `auto_map` does not fit the files.
    """
    files = sorted(source.glob("*.py"))
    if not files:
        raise ExportError(f"{source}: no *.py files in it; give a download of a released Molmo2 repository")
    root = source.resolve()
    for file in files:
        if not file.resolve().is_relative_to(root) or not file.is_file():
            raise ExportError(
                f"{file}: points outside {source} or is no file; fetch real files with "
                "`hf download OWNER/NAME --local-dir DIR`"
            )
    modules = {file.stem for file in files}
    if not (source / "config.json").exists():
        raise ExportError(f"{source}: no config.json; its auto_map must name the classes of the code")
    for name in FILES:
        if (source / name).exists():
            auto_map = _read_auto_map(source / name, modules)
            if name == "config.json" and not auto_map:
                raise ExportError(f"{source / name}: no auto_map; this release does not use remote code")
            if auto_map:
                _set_auto_map(directory / name, auto_map)
    for file in files:
        shutil.copyfile(file, directory / file.name)
    return [file.name for file in files]


def _read_auto_map(path: Path, modules: set[str]) -> dict[str, Any]:
    """Read `auto_map` and make its references local: "OWNER/NAME--module.Class" would be downloaded from the hub."""
    try:
        references_by_class = json.loads(path.read_text()).get("auto_map", {})
        auto_map = {auto: _localise(reference) for auto, reference in references_by_class.items()}
    except (ValueError, AttributeError) as error:
        raise ExportError(f"{path}: no readable auto_map ({error}); fetch the release again") from None
    references = [r for value in auto_map.values() for r in (value if isinstance(value, list) else [value]) if r]
    missing = sorted({r for r in references if r.partition(".")[0] not in modules})
    if missing:
        raise ExportError(f"{path}: auto_map names {', '.join(missing)}, but no such *.py is beside it")
    return auto_map


def _localise(reference: Any) -> Any:
    if isinstance(reference, list):
        return [_localise(item) for item in reference]
    return reference if reference is None else reference.rpartition("--")[2]


def _set_auto_map(path: Path, auto_map: dict[str, Any]) -> None:
    _update(path, {"auto_map": auto_map})


def _update(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings, indent=2) + "\n")
