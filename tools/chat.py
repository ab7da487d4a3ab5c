"""Talk with a model about images or a video, in the terminal.

    python tools/chat.py --checkpoint demo-stage3 --image photo.jpg
    python tools/chat.py --checkpoint data/runs/demo-export --video clip.mp4 --temperature 0.7 --top-p 0.9

Questions come from the standard input, a line each; what was said before stays part of the conversation. An empty line
or the end of the input ends it. Points in an answer are listed below it, in fractions of the image's width and height.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from molmo2.model.generate import PromptTensors, Sampling, stream
from molmo2.model.molmo2 import Molmo2
from molmo2.open_model import open_model
from molmo2.processing import Processor, ProcessorSettings, build_processor
from molmo2.processing.points import parse_points
from shards.schema import Chat, Example, ImageRef, Limits, Source, Turn, VideoRef

LIMITS = Limits(sequence_length=16384, max_crops=384, max_frames=384, max_images=16, image_crops=8)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run, a checkpoint, a model's directory, or OWNER/NAME")
    media = parser.add_mutually_exclusive_group()
    media.add_argument("--image", nargs="+", type=Path, default=[], help="image files")
    media.add_argument("--video", type=Path, help="a video file")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely answer (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the most likely tokens only (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: at least 1")
    return args


def conversation(turns: list[Turn], images: list[Path], video: Path | None) -> Example:
    """What has been said about the media, the last turn being a question."""
    return Example(
        key="chat",
        dataset="chat",
        source=Source(file="", row=0),
        annotations=(Chat(style="user_qa", turns=tuple(turns)),),
        images=tuple(ImageRef(path=str(path)) for path in images),
        video=None if video is None else VideoRef(path=str(video)),
    )


def answer(
    model: Molmo2, processor: Processor, example: Example, sampling: Sampling, max_new_tokens: int
) -> Iterator[str]:
    """The answer to the last question, piece by piece.

    Raises:
        RejectedError: unreadable media, or a conversation that has become too long.
    """
    device = next(model.parameters()).device
    prompt = PromptTensors.of(processor.prompt(example, LIMITS), device)
    tokenizer = processor.tokenizer
    ids: list[int] = []
    said = ""
    for (token,) in stream(model, [prompt], max_new_tokens, tokenizer.eos, sampling):
        if token != tokenizer.eos:
            ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character: its other bytes are yet to come
            yield text[len(said) :]
            said = text
    yield tokenizer.decode(ids)[len(said) :]


def point_lines(text: str) -> list[str]:
    """A line for every point in an answer; `at` is the image's number, or seconds."""
    return [f"  point {p.id}: at {p.at:g}, x {p.x:.3f}, y {p.y:.3f}\n" for p in parse_points(text)]


def main() -> None:
    """Load, then ask until the input ends."""
    args = parse_args()
    sampling = Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    missing = [str(path) for path in [*args.image, args.video] if path is not None and not path.is_file()]
    if missing:
        raise ValueError(f"no such file: {', '.join(missing)}")
    opened = open_model(args.checkpoint)
    model = Molmo2.with_weights(opened.config, opened.weights).to(args.device).eval()
    settings = ProcessorSettings(
        preset=opened.config.name, tokenizer_dir=str(opened.tokenizer_dir), stage="eval", num_variants=1
    )
    processor = build_processor(settings)
    turns: list[Turn] = []
    while True:
        print("> ", end="", flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        turns.append(Turn(role="user", text=question))
        pieces = []
        example = conversation(turns, args.image, args.video)
        for piece in answer(model, processor, example, sampling, args.max_new_tokens):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        text = "".join(pieces)
        print("".join(point_lines(text)), end="")
        turns.append(Turn(role="assistant", text=text.strip() or "-"))  # an empty answer would be no turn


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"chat: {error}")
