"""Make the tokenizer of a model: the language model's tokenizer with Molmo2's tokens after its base vocabulary.

    python tools/make_tokenizer.py --source Qwen/Qwen3-4B-Instruct-2507 --model 4b
    python tools/make_tokenizer.py --source ~/models/Olmo-3-7B-Instruct --model o-7b --out data/raw/tokenizer

The source is a directory with tokenizer.json, or OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face hub. The
build of shards, training and export read this tokenizer; `download_data.py` and `build_shards.py` are the next steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tokenizers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from molmo2.config import data_path
from molmo2.model.presets import PRESETS
from molmo2.processing.new_tokenizer import write_tokenizer
from molmo2.processing.tokenizer import MOLMO2_TOKENS, Tokenizer, TokenizerError
from shards.command import run

NAME = "tokenizer.json"


def find_source(source: str) -> Path:
    """Path of the language model's tokenizer.json, which is downloaded if `source` is not a directory.

    Raises:
        TokenizerError: the repository cannot be reached, or has no such file.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / NAME
    repository, _, revision = source.partition("@")
    try:
        return Path(hf_hub_download(repository, NAME, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise TokenizerError(
            f"{source}: neither a directory nor reachable on the hub ({error}); check the name and HF_ENDPOINT"
        ) from None


def main() -> None:
    """Fetch the base tokenizer, add the tokens, write the result and load it as a check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="directory or OWNER/NAME[@REVISION] of the language model")
    parser.add_argument("--model", required=True, choices=sorted(PRESETS), help="preset of the model")
    parser.add_argument("--out", type=Path, help="directory to write (default: raw/tokenizer below MOLMO2_DATA)")
    arguments = parser.parse_args()
    out = arguments.out or data_path("raw/tokenizer")
    base_vocab = PRESETS[arguments.model].text.vocab_size
    path = find_source(arguments.source)
    if not path.is_file():
        raise TokenizerError(f"{path}: no such file; name a directory that holds {NAME}")
    write_tokenizer(tokenizers.Tokenizer.from_file(str(path)), out, base_vocab)
    tokenizer = Tokenizer(out, base_vocab)
    print(
        f"{out}: {len(MOLMO2_TOKENS)} tokens from id {base_vocab} on; end of turn {tokenizer.eos}, padding "
        f"{tokenizer.pad}; sha256 {tokenizer.sha256[:16]}"
    )


if __name__ == "__main__":
    run(main)
