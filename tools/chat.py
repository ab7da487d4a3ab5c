"""Chat with a model about images or a video, in the terminal or on a web page.

    python tools/chat.py --checkpoint demo-stage3 --image photo.jpg
    python tools/chat.py --checkpoint data/runs/demo-export --video clip.mp4 --temperature 0.7 --top-p 0.9
    python tools/chat.py --checkpoint demo-stage3 --web --port 8080

Questions are read from the standard input, one per line; earlier turns stay part of the conversation. An empty line or
the end of the input ends it. Points in an answer are listed below it, as fractions of the width and height of an image
or frame.
`--web` serves a page to this machine only, on which images or a video are chosen, dropped or pasted, answers can be
stopped, and points and tracks are drawn; `--temperature` and `--max-new-tokens` are what its controls show first.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from molmo2.model.presets import PRECISION_NAMES
from molmo2.processing.points import parse_points
from shards.command import run
from shards.schema import Turn


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run, a checkpoint, a model's directory, or OWNER/NAME")
    media = parser.add_mutually_exclusive_group()
    media.add_argument("--image", nargs="+", type=Path, default=[], help="image files")
    media.add_argument("--video", type=Path, help="a video file")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely answer (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the most likely tokens only (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampling (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (%(default)s)")
    parser.add_argument("--device", help="(cuda if there is a GPU, else cpu)")
    parser.add_argument("--precision", choices=PRECISION_NAMES, help="(bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--web", action="store_true", help="a page at http://127.0.0.1:PORT instead of the terminal")
    parser.add_argument("--port", type=int, default=8080, help="port of the page (%(default)s)")
    args = parser.parse_args()
    if args.web and (args.image or args.video):
        parser.error("--web: images and videos are uploaded on the page; drop --image and --video")
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: at least 1")
    return args


def point_lines(text: str, video: bool) -> list[str]:
    """A line per point of an answer."""
    places = [(f"at {p.at:.1f} s" if video else f"in image {p.at:g}", p) for p in parse_points(text)]
    return [f"  point {p.id} {where}: x {p.x:.3f}, y {p.y:.3f}\n" for where, p in places]


def main() -> None:
    """Answer questions until the input ends or Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        converse(parse_args())


def converse(args: argparse.Namespace) -> None:
    """Load the model, then answer questions in the terminal or on the page."""
    import pydantic
    import torch  # these imports take seconds, so they wait until the command line has been read

    from molmo2.chat.conversation import LIMITS, answer, conversation
    from molmo2.chat.web_page import AnswerOptions, first_problem, serve
    from molmo2.model.generate import Sampling
    from molmo2.model.molmo2 import Molmo2
    from molmo2.processing.contract import ProcessorSettings
    from molmo2.processing.processor import build_processor
    from molmo2.processing.visuals import open_media
    from molmo2.weights.load import open_model

    def drawn_at(temperature: float) -> Sampling:
        return Sampling(temperature=temperature, top_p=args.top_p, seed=args.seed)

    sampling = drawn_at(args.temperature)
    if args.web:
        try:
            first = AnswerOptions(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
        except pydantic.ValidationError as error:
            raise ValueError(f"--web: {first_problem(error)}") from None
    missing = [str(path) for path in [*args.image, args.video] if path is not None and not path.is_file()]
    if missing:
        raise ValueError(f"no such file: {', '.join(missing)}")
    if args.image or args.video:  # unreadable media are refused before the model is loaded
        open_media(conversation([Turn(role="user", text="-")], args.image, args.video), LIMITS)
    opened = open_model(args.checkpoint)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = Molmo2.for_inference(opened.config, opened.weights, device, args.precision)
    settings = ProcessorSettings(
        preset=opened.config.name, tokenizer_dir=str(opened.tokenizer_dir), stage="eval", num_variants=1
    )
    processor = build_processor(settings)
    if args.web:
        serve(
            lambda turns, images, video, options: answer(
                model,
                processor,
                conversation(turns, images, video),
                drawn_at(options.temperature),
                options.max_new_tokens,
            ),
            args.port,
            first,
        )
        return
    if sys.stdin.isatty():
        print("Ask a question on one line; an empty line ends the conversation.")
    turns: list[Turn] = []
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        question = line.strip()
        if not question:
            print("" if line else "\n", end="")  # at the end of the input the cursor still stands after the prompt
            return
        turns.append(Turn(role="user", text=question))
        pieces = []
        example = conversation(turns, args.image, args.video)
        for piece in answer(model, processor, example, sampling, args.max_new_tokens):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        text = "".join(pieces)
        print("".join(point_lines(text, args.video is not None)), end="")
        turns.append(Turn(role="assistant", text=text.strip() or "-"))  # a turn must not be empty


if __name__ == "__main__":
    run(main)
