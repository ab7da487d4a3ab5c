"""The tokenizer: a directory with `tokenizer.json`, loaded with `tokenizers`, with Molmo2's tokens at fixed ids.

All text of datasets and users is encoded as ordinary text: "<im_patch>" or "<|im_end|>" in a question never gives the
special id. `escape` breaks such strings with a space, because the tokenizers of other engines would find the token in
them; `chat_template.jinja` does the same. Special ids get into a sequence only through the attributes of `Tokenizer`.
`molmo2.processing.new_tokenizer` makes such a directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from shards.layout import VisualTokens

TOKENIZER_CONFIG = "tokenizer_config.json"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD = "<|endoftext|>"
MOLMO2_TOKENS = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<|image|>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
    "<|video|>",
    "<|points|>",
    "<|token_index|>",
    "<|vit_index|>",
    "<|vit_loc|>",
)
# How special tokens begin, those of Molmo2 and of its language models, and the fillers of the embedding table.
_OPENINGS = ("<|", "|<", "<im_", "<low_res_im_", "<frame_")


class TokenizerError(ValueError):
    """A tokenizer is missing or unreadable, or does not have Molmo2's tokens at their ids."""


def escape(text: str) -> str:
    """The text with a space in every string that could be a special token: "<|im_end|>" becomes "< |im_end|>"."""
    for opening in _OPENINGS:
        text = text.replace(opening, f"{opening[0]} {opening[1:]}")
    return text


class Tokenizer:
    """Encodes text to ids and decodes ids to text.

    Attributes:
        base_vocab: rows of the model's base embedding table; the ids of Molmo2's added tokens start here.
        bos, eos, pad, turn_start: ids. `eos` is `<|im_end|>`, the end of a turn; `bos` begins every sequence.
        visual: ids of the tokens for visuals.
        sha256: hash of `tokenizer.json`.
    """

    def __init__(self, directory: str | Path, base_vocab: int):
        """Load the tokenizer in `directory`.

        Raises:
            TokenizerError: there is no readable `tokenizer.json`, or a token is missing or has another id.
        """
        self.directory, self.base_vocab = Path(directory), base_vocab
        path = self.directory / "tokenizer.json"
        try:
            data = path.read_bytes()
            value = json.loads(data)
            for token in value["added_tokens"]:
                token["special"] |= token["content"] in MOLMO2_TOKENS or token["content"].startswith("|<EXTRA_TOKENS")
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(value))
        except Exception as error:  # tokenizers raises plain Exception
            raise TokenizerError(
                f"{path}: cannot read a tokenizer ({error}); give a directory that holds one"
            ) from None
        self._tokenizer.encode_special_tokens = True  # special strings in text are encoded as text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.sha256 = hashlib.sha256(data).hexdigest()
        for offset, token in enumerate(MOLMO2_TOKENS):
            number = self._tokenizer.token_to_id(token)
            if number != base_vocab + offset:
                raise TokenizerError(
                    f"{path}: token {token} has id {number}, the model wants {base_vocab + offset} (base vocabulary "
                    f"{base_vocab} + {offset}); use the model's own tokenizer, or add the tokens with write_tokenizer"
                )
        for token in value["added_tokens"]:
            if token["special"] and escape(token["content"]) == token["content"]:
                raise TokenizerError(
                    f"{path}: special token {token['content']!r} in a text could not be told from the token itself; "
                    f"special tokens must begin with one of {', '.join(_OPENINGS)}"
                )
        self.visual = VisualTokens.after(base_vocab)
        names = _special_names(tokenizer_config(self.directory))
        self.turn_start, self.eos = self._id(TURN_START), self._id(TURN_END)
        self.bos = self._id(names.get("bos_token") or names.get("eos_token") or TURN_END)
        self.pad = self._id(names.get("pad_token") or PAD)

    def _id(self, token: Any) -> int:
        number = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        if number is None:
            raise TokenizerError(f"{self.directory}: no token {token}, which the chat format needs")
        return int(number)

    def encode(self, text: str) -> list[int]:
        """Ids of the escaped `text` as ordinary text, without BOS or EOS."""
        return self._tokenizer.encode(escape(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def tokenizer_config(directory: Path) -> dict[str, Any]:
    """The content of `tokenizer_config.json`; empty if there is no such file.

    Raises:
        TokenizerError: the file is not JSON.
    """
    path = directory / TOKENIZER_CONFIG
    try:
        value = json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: is not a JSON object")
    return value


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The values of `bos_token`, `eos_token` and `pad_token` in `tokenizer_config.json`, as far as they are set."""
    names = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value  # older files nest an AddedToken
        if value:
            names[key] = value
    return names
