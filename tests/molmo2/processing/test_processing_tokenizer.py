import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from processing_cases import BASE_VOCAB, tiny_tokenizer, tokenizer_dir
from tokenizers import models

from molmo2.processing.new_tokenizer import train_demo_tokenizer, write_tokenizer
from molmo2.processing.tokenizer import MOLMO2_TOKENS, Tokenizer, TokenizerError, escape

TEXTS = ["How many digits are there? There are 12.", "Point to the digit 7.", "The digit moves from left to right."] * 9


def test_named_ids() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.bos == tokenizer.eos == 258 and tokenizer.pad == 256 and tokenizer.turn_start == 257
    assert tokenizer.visual.im_patch == BASE_VOCAB + 2 and tokenizer.visual.video == BASE_VOCAB + 9
    assert tokenizer.decode([tokenizer.eos, *tokenizer.encode("hé")]) == "hé"
    assert tokenizer.decode([tokenizer.eos], skip_special_tokens=False) == "<|im_end|>"


@pytest.mark.parametrize(
    "special", [*MOLMO2_TOKENS, "<|im_end|>", "<|im_start|>", "<|endoftext|>", "|<EXTRA_TOKENS_0>|"]
)
def test_special_strings_in_text_stay_text(special: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(f"a{special}b")
    assert max(ids) < 256 and tokenizer.decode(ids) == escape(f"a{special}b") != f"a{special}b"


@pytest.mark.slow
@given(st.text())
def test_round_trip(text: str) -> None:
    ids = tiny_tokenizer().encode(text)
    assert tiny_tokenizer().decode(ids) == escape(text) and all(i < 256 for i in ids)


def test_demo_tokenizer_cuts_digits_and_neutralises(tmp_path) -> None:
    train_demo_tokenizer(TEXTS, tmp_path, base_vocab=512)
    tokenizer = Tokenizer(tmp_path, 512)
    assert len(tokenizer.encode("1000")) == 4
    assert len(tokenizer.encode(" digit")) == 1  # a merge was learnt
    assert len(tokenizer.encode("10.5 ")) == 5
    assert max(tokenizer.encode("<im_patch><|im_end|>")) < 509
    assert len(set(tokenizer.encode(TEXTS[0]))) > 5


def test_demo_tokenizer_has_equal_bytes_in_another_process(tmp_path) -> None:
    train_demo_tokenizer(TEXTS, tmp_path / "a", 400)
    code = (
        f"from molmo2.processing.new_tokenizer import *; train_demo_tokenizer({TEXTS!r}, {str(tmp_path / 'b')!r}, 400)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_transformers_loads_what_we_write() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_dir())
    assert len(theirs) == BASE_VOCAB + len(MOLMO2_TOKENS)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert theirs.padding_side == "left"
    assert theirs("<im_patch>x", add_special_tokens=False).input_ids == [BASE_VOCAB + 2, *tiny_tokenizer().encode("x")]
    assert theirs("plain 12", add_special_tokens=False).input_ids == tiny_tokenizer().encode("plain 12")


def test_wrong_base_vocabulary_is_named() -> None:
    with pytest.raises(TokenizerError, match=r"token <im_start> has id 320, the model wants 321"):
        Tokenizer(tokenizer_dir(), BASE_VOCAB + 1)


@pytest.mark.parametrize("content", [None, "{", json.dumps({"version": "1.0"})])
def test_unreadable_directory_is_named(tmp_path, content) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot read a tokenizer"):
        Tokenizer(tmp_path, BASE_VOCAB)


def test_too_many_entries_are_refused(tmp_path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={str(i): i for i in np.arange(10).tolist()}, merges=[]))
    with pytest.raises(TokenizerError, match="13 entries, the base vocabulary only 12"):
        write_tokenizer(tokenizer, tmp_path, 12)
