"""Export a training checkpoint as a directory that transformers loads without remote code.

The export is reloaded with transformers and compared with the training code before it is moved to --out. Example:

    python tools/export_model.py --checkpoint data/runs/demo-stage3 --out data/runs/demo-export

A checkpoint of any ZeRO stage and number of ranks can be exported. With --push-to-hub the export is uploaded too, with
the token of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from shards.command import run


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run (name or path) or one of its checkpoints (path)")
    parser.add_argument("--out", required=True, type=Path, help="directory to create; an earlier export is replaced")
    parser.add_argument(
        "--remote-code-from",
        type=Path,
        metavar="DIR",
        help="copy the remote code of a downloaded release (its *.py files), which vLLM needs",
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
    from molmo2.checkpoint.files import RECIPE  # imported after parsing: these imports take seconds
    from molmo2.checkpoint.lookup import load_weights, open_checkpoint
    from molmo2.config import data_path
    from molmo2.export.card import about_checkpoint
    from molmo2.export.model import export_model
    from molmo2.export.upload import check_repository, push

    if args.push_to_hub:
        check_repository(args.push_to_hub)
    checkpoint = open_checkpoint(args.checkpoint)
    config, weights, _ = load_weights(checkpoint.path)
    about = about_checkpoint(checkpoint)
    tokenizer = data_path(checkpoint.read(RECIPE)["tokenizer"])
    differences = export_model(config, weights, tokenizer, args.out, about, args.remote_code_from)
    measured = ", ".join(f"{kind} {value:.1e}" for kind, value in differences.items())
    print(f"exported {checkpoint.path} to {args.out}; largest difference of logits in transformers: {measured}")
    if args.push_to_hub:
        message = f"{about.origin['run']}, step {about.origin['step']}"
        print(f"pushed to {push(args.out, args.push_to_hub, message)}")


if __name__ == "__main__":
    run(main)
