"""Make a tokenizer: `write_tokenizer` adds Molmo2's tokens to a byte-level one, `train_demo_tokenizer` trains one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from molmo2.processing.tokenizer import MOLMO2_TOKENS, PAD, TOKENIZER_CONFIG, TURN_END, TURN_START, TokenizerError

# Qwen's pre-tokenization: each digit is a piece of its own, and a word includes the space before it.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(tokenizer: tokenizers.Tokenizer, directory: str | Path, base_vocab: int) -> None:
    """Add Molmo2's tokens to `tokenizer` at `base_vocab` + offset, and write it in the layout of transformers.

    Ids between the tokenizer's own and `base_vocab` are filled with unused tokens, because the embedding table may
    have more rows than the tokenizer has entries.

    Raises:
        TokenizerError: the tokenizer already has more than `base_vocab` entries.
    """
    tokenizer.add_special_tokens([PAD, TURN_START, TURN_END])
    size = tokenizer.get_vocab_size()
    if size > base_vocab:
        raise TokenizerError(f"the tokenizer has {size} entries, the base vocabulary only {base_vocab}")
    tokenizer.add_special_tokens([f"|<EXTRA_TOKENS_{i}>|" for i in range(base_vocab - size)])
    tokenizer.add_special_tokens(list(MOLMO2_TOKENS))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": TURN_END,
        "eos_token": TURN_END,
        "pad_token": PAD,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 36864,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (directory / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_demo_tokenizer(texts: Iterable[str], directory: str | Path, base_vocab: int = 512) -> None:
    """Train a byte-level BPE on `texts` and write it; the same texts give the same bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    num_named = 3  # <|endoftext|>, <|im_start|>, <|im_end|>
    trainer = trainers.BpeTrainer(
        vocab_size=base_vocab - num_named,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    write_tokenizer(tokenizer, directory, base_vocab)
