"""The command lines of the pages in `docs/`: shell blocks, indented lines, and code font that begins with a program."""

import re
from pathlib import Path

PROGRAMS = ("python", "deepspeed", "torchrun", "accelerate", "molmo2", "make", "tools/", "sbatch", "pip", "hf")
# Commands of the pages that test_guide.py runs after its own, in this order, and how they are run there, if not as
# written: with names of its small catalog, with its runs stage1 to stage3 and its export molmo2-4b.
RUN_AFTER_GUIDE = {
    "python tools/download_data.py --datasets pixmo-cap cosyn-point": (
        "python tools/download_data.py --datasets pixmo-cap molmo2-cap"
    ),
    "python tools/download_data.py --datasets pixmo-cap --max-images 1000": "",
    "python tools/download_data.py --datasets pixmo-cap --retry-failed": "",
    "python tools/download_data.py --stage sft --retry-failed": "",
    "python tools/download_data.py --stage sft --show-manual-instructions": "",
    "python tools/inspect_data.py --catalog demo demo-video-track --html samples.html": (
        "python tools/inspect_data.py molmo2-video-cap-qa --html samples.html"
    ),
    "python tools/inspect_shards.py data/shards/sft": "",
    "python tools/inspect_shards.py data/shards/sft --html sft.html --recipe recipes/demo/stage2.yaml": (
        "python tools/inspect_shards.py data/shards/sft --html sft.html --recipe recipes/stage2.yaml"
    ),
    "python tools/verify_shards.py data/shards --repair": "",
    "python tools/preview_mixture.py recipes/stage2.yaml": "",
    "python tools/preview_mixture.py RECIPE --ranks 64 256 --step-seconds 4": (
        "python tools/preview_mixture.py recipes/stage2.yaml --ranks 4 --step-seconds 4"
    ),
    "python molmo2/train.py --recipe recipes/stage1.yaml --dry-run --gpu-memory 80 --gpu-price 2.5": "",
    "python tools/evaluate.py --list": "",
    "python tools/evaluate.py --checkpoint demo-stage3 --loss demo-image-qa,demo-video-qa": (
        "python tools/evaluate.py --checkpoint stage3 --loss chart-qa"
    ),
    "python tools/evaluate.py --checkpoint OWNER/NAME --benchmarks chart-qa,next-qa --limit 200": (
        "python tools/evaluate.py --checkpoint molmo2-4b --benchmarks chart-qa --limit 2"
    ),
    "python tools/export_model.py --checkpoint stage3 --out data/exports/stage3-vllm --for vllm": "",
}
_STARTS = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)})(?:(?<=/)|\s)")


def commands_of(page: Path) -> list[str]:
    """The commands of a page in their order, each once, without comments and with continued lines joined."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [
        part for block in blocks for line in block.replace("\\\n", " ").splitlines() for part in line.split(" && ")
    ]
    lines += re.findall(r"^    (\S.*)", plain, re.MULTILINE) + re.findall(r"`([^`\n]+)`", plain)
    commands = (re.split(r"\s#", " ".join(line.split()))[0].strip() for line in lines)
    return list(dict.fromkeys(command for command in commands if _STARTS.match(command)))


def is_command(text: str) -> bool:
    """Whether it does something: a program alone or with an option that lacks its value is only mentioned."""
    return " " in text and text not in {"deepspeed --hostfile", "tools/inspect_shards.py --html"}
