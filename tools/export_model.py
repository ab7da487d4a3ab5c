"""Export a training checkpoint as a directory that transformers loads without remote code.

The export is reloaded with transformers and compared with the training code before it gets its name. Example:

    python tools/export_model.py --checkpoint data/runs/demo-stage3 --out data/runs/demo-export

Any checkpoint will do, of any ZeRO stage and number of ranks. With --push-to-hub the export is uploaded as well; the
token is the one of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run (name or path) or one of its checkpoints (path)")
    parser.add_argument("--out", required=True, type=Path, help="directory to make; an earlier export is replaced")
    parser.add_argument(
        "--remote-code-from",
        type=Path,
        metavar="DIR",
        help="copy the remote code of a downloaded release (its *.py files), which vLLM wants",
    )
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload it there; a repository that is not there is made, private"
    )
    return parser.parse_args()


def main() -> None:
    """Export, and say what was checked."""
    args = parse_args()
    if not args.push_to_hub:
        os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on disk; read when transformers is imported
    from molmo2.checkpoint.files import RECIPE  # after --help: these imports take seconds
    from molmo2.checkpoint.open import load_weights, open_checkpoint
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
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"export_model: {error}")
