"""Export a training checkpoint as a directory that transformers loads without remote code.

The export is reloaded with transformers and compared with the training code before it gets its name. Example:

    python tools/export_model.py --checkpoint data/runs/demo-stage3 --out data/runs/demo-export
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on disk; read by transformers when it is imported


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run (name or path) or one of its checkpoints (path)")
    parser.add_argument("--out", required=True, type=Path, help="directory to make; an earlier export is replaced")
    return parser.parse_args()


def main() -> None:
    """Export, and say what was checked."""
    args = parse_args()
    from molmo2 import checkpoint as checkpoints  # after --help: these imports take seconds
    from molmo2.config import data_path
    from molmo2.export import export_model

    checkpoint = checkpoints.open_checkpoint(args.checkpoint)
    config, weights, meta = checkpoints.load_weights(checkpoint.path)
    recipe = checkpoint.read(checkpoints.RECIPE)
    origin = {name: meta[name] for name in ("run", "stage", "step", "finished", "commit")}
    differences = export_model(config, weights, data_path(recipe["tokenizer"]), args.out, origin)
    measured = ", ".join(f"{kind} {value:.1e}" for kind, value in differences.items())
    print(f"exported {checkpoint.path} to {args.out}; largest difference of logits in transformers: {measured}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"export_model: {error}")
