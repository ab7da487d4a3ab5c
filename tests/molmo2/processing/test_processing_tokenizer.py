import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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


ODD = [None, 3, "x", [], {}, [1], True, [None], [{}]]
PLACES: dict[str, list[str | int]] = {  # the path of each value in tokenizer.json that is replaced
    **{name: [name] for name in ("added_tokens", "model", "normalizer", "pre_tokenizer", "decoder", "truncation")},
    **{f"added {name}": ["added_tokens", 0, name] for name in ("content", "id", "special")},
    **{f"model {name}": ["model", name] for name in ("type", "vocab", "merges")},
    "the whole": [],
}


def tokenizer_error(directory: Path, base_vocab: int) -> str:
    """The error of loading a tokenizer, "" if there is none; any other exception fails the test."""
    try:
        Tokenizer(directory, base_vocab)
    except TokenizerError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("place", PLACES)
def test_a_tokenizer_with_values_of_wrong_types_is_one_error(tmp_path: Path, place: str) -> None:
    train_demo_tokenizer(["a b c red blue"] * 20, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    base = next(token["id"] for token in content["added_tokens"] if token["content"] == MOLMO2_TOKENS[0])
    assert tokenizer_error(tmp_path, base) == ""
    errors = []
    for value in ODD:
        whole = {"whole": copy.deepcopy(content)}
        outer: Any = whole
        *path, last = ["whole", *PLACES[place]]
        for name in path:
            outer = outer[name]
        outer[last] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole["whole"]))
        errors.append(tokenizer_error(tmp_path, base))
    assert any(errors) and all("tokenizer.json" in error and len(error) < 600 for error in errors if error)


@pytest.mark.parametrize("key", ["bos_token", "eos_token", "pad_token"])
@pytest.mark.parametrize("value", [3, [1], True, {"content": 3}, {"content": [None]}, "no such token"], ids=str)
def test_a_special_token_that_is_no_text_is_one_error(tmp_path: Path, key: str, value: Any) -> None:
    train_demo_tokenizer(["a b c red blue"] * 20, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    base = next(token["id"] for token in content["added_tokens"] if token["content"] == MOLMO2_TOKENS[0])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": None, key: value}))
    assert "no token" in tokenizer_error(tmp_path, base)
