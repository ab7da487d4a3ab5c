"""Molmo2's tokens behind the real Qwen3 vocabulary: the released ids, text that stays text, a tool that makes it."""

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest
import transformers
from fork_server import python
from processing_cases import noise
from qwen3 import qwen3_directory
from tiny_models import QWEN

from molmo2.export.card import About
from molmo2.export.check import CheckedPrompt, our_inputs, their_inputs
from molmo2.export.model import export_model
from molmo2.model.generate import generate
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.processing.tokenizer import MOLMO2_TOKENS, Tokenizer

ROOT = Path(__file__).resolve().parents[3]
BASE_VOCAB = 151_936


def make(source: Path | str, out: Path, *options: str) -> Any:
    command = [python(), "tools/make_tokenizer.py", "--source", str(source), "--model", "4b", "--out", str(out)]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("qwen3") / "tokenizer"
    run = make(qwen3_directory(), out)
    assert run.returncode == 0, run.stderr
    assert "14 tokens from id 151936 on; end of turn 151645, padding 151643" in run.stdout
    return out


@pytest.mark.slow
def test_ids_are_the_released_ones(directory: Path) -> None:
    tokenizer = Tokenizer(directory, BASE_VOCAB)
    assert PRESETS["4b"].text.vocab_size == PRESETS["8b"].text.vocab_size == BASE_VOCAB
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.turn_start) == (151645, 151645, 151643, 151644)
    loaded = transformers.AutoTokenizer.from_pretrained(directory)
    assert loaded.convert_tokens_to_ids(list(MOLMO2_TOKENS)) == list(range(151_936, 151_950))
    assert loaded.convert_tokens_to_ids("<|video|>") == 151_945
    assert loaded.convert_tokens_to_ids("|<EXTRA_TOKENS_0>|") == 151_669
    assert len(loaded) == 151_950


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["Two cats, 17 dogs.\n\n  and\ttabs", "Wörter, 漢字, 🙂‍↔️", 'x=3; <points coords="1 2 3">']
)
def test_text_is_cut_as_by_qwen3_itself(directory: Path, text: str) -> None:
    tokenizer = Tokenizer(directory, BASE_VOCAB)
    own = transformers.PreTrainedTokenizerFast(tokenizer_file=str(qwen3_directory() / "tokenizer.json"))
    assert tokenizer.encode(text) == own.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_special_strings_in_text_stay_text(directory: Path) -> None:
    tokenizer = Tokenizer(directory, BASE_VOCAB)
    text = "<im_patch><|im_end|><|video|>"
    assert max(tokenizer.encode(text)) < 151_643
    assert tokenizer.decode(tokenizer.encode(text)) == "< im_patch>< |im_end|>< |video|>"


@pytest.mark.slow
def test_an_export_with_it_generates_in_transformers(directory: Path, tmp_path: Path) -> None:
    """The table has Qwen3's rows; the widths are small. `export_model` compares logits of text, images and video."""
    config = dataclasses.replace(
        QWEN, text=dataclasses.replace(QWEN.text, vocab_size=BASE_VOCAB, additional_vocab_size=128)
    )
    model = Molmo2(config).init_weights(3).eval()
    out = tmp_path / "out"
    export_model(config, dict(model.state_dict()), directory, out, About(origin={"run": "test", "step": 1}))
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(out).eval()
    preprocess = transformers.AutoProcessor.from_pretrained(out)
    assert theirs.get_input_embeddings().weight.shape[0] == BASE_VOCAB + 128
    asked = CheckedPrompt(pictures=[noise(100, 170), noise(60, 90, 2)])
    inputs = their_inputs(preprocess, asked)
    tokenizer = Tokenizer(directory, BASE_VOCAB)
    prompt = our_inputs(config, tokenizer, asked)
    assert prompt.input_ids.tolist() == inputs["input_ids"][0].tolist()
    output = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert output == generate(model, [prompt], 8, tokenizer.eos)[0]


@pytest.mark.slow
def test_what_cannot_be_a_source_is_told(tmp_path: Path) -> None:
    run = make(tmp_path, tmp_path / "out")
    assert run.returncode == 1
    assert "no such file; name a directory that holds tokenizer.json" in run.stderr
    run = make(f"{tmp_path}/none", tmp_path / "out")
    assert run.returncode == 1
    assert "neither a directory nor reachable on the hub" in run.stderr
    assert not (tmp_path / "out").exists()
