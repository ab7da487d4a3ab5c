"""Export a training checkpoint, or a model saved by transformers, as a directory in the layout of a release.

The export is reloaded with transformers and compared with the training code before it is moved to --out. Example:

    python tools/export_model.py --checkpoint data/runs/demo-stage3 --out data/runs/demo-export

A checkpoint of any ZeRO stage and number of ranks can be exported; a directory that `save_pretrained` of transformers
wrote becomes a release again. With --adapters-for MODEL only what a LoRA run has trained is exported, in peft's format.
With --push-to-hub the export is uploaded too, with the token of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from shards.command import run


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run, a checkpoint, or a model's directory")
    parser.add_argument("--out", required=True, type=Path, help="directory to create; an earlier export is replaced")
    code = parser.add_mutually_exclusive_group()
    code.add_argument(
        "--for",
        dest="engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="the engine to export for; vllm adds a configuration and a processor in Python, which vLLM runs",
    )
    code.add_argument(
        "--remote-code-from",
        type=Path,
        metavar="DIR",
        help="copy the remote code of a downloaded release (its *.py files), which transformers 4.57 needs",
    )
    code.add_argument(
        "--adapters-for",
        dest="base",
        metavar="MODEL",
        help="export only what a LoRA run has trained, in peft's format, for the model from which the run began",
    )
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload to this repository, which is created as private if missing"
    )
    return parser.parse_args()


def main() -> None:
    """Export the checkpoint, and print the result of the comparison."""
    args = parse_args()
    if not args.push_to_hub:
        os.environ["HF_HUB_OFFLINE"] = "1"  # all files are on disk; transformers reads the variable on import
    from molmo2.checkpoint.lookup import open_checkpoint  # imported after parsing: these imports take seconds
    from molmo2.export.card import About, about_checkpoint
    from molmo2.export.model import export_model
    from molmo2.export.upload import check_repository, push
    from molmo2.weights.load import is_run, open_model

    if args.push_to_hub:
        check_repository(args.push_to_hub)
    if args.base:
        from molmo2.export.adapters import export_adapters

        checkpoint = open_checkpoint(args.checkpoint)
        path, about = checkpoint.path, about_checkpoint(checkpoint)
        differences = export_adapters(checkpoint, args.base, args.out, about)
    else:
        opened = open_model(args.checkpoint)
        path, about = opened.path, About(origin=opened.origin)
        if is_run(args.checkpoint):
            about = about_checkpoint(open_checkpoint(opened.path))
        differences = export_model(
            opened.config,
            opened.weights,
            opened.tokenizer_dir,
            args.out,
            about,
            args.remote_code_from,
            for_vllm=args.engine == "vllm",
        )
    measured = ", ".join(f"{kind} {value:.1e}" for kind, value in differences.items())
    print(f"exported {path} to {args.out}; largest difference of logits in transformers: {measured}")
    if args.push_to_hub:
        message = ", ".join(f"{key} {value}" for key, value in about.origin.items() if key in ("run", "step", "model"))
        print(f"pushed to {push(args.out, args.push_to_hub, message)}")


if __name__ == "__main__":
    run(main)
