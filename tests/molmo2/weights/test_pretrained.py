"""First weights: checkpoints that transformers itself wrote, read from directories and through a hub."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import exported, noisy, weights_of
from fake_hub import Hub, client_of, fake_hub
from processing_cases import noise, tokenizer_dir
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, OLMO, QWEN, YARN, pair
from transformers import (
    Olmo3Config,
    Olmo3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from molmo2.config import FirstWeights
from molmo2.model.mask import TRUNK
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS, ModelConfig, config_differences
from molmo2.weights import names as hub
from molmo2.weights.config_json import read_base_text, read_molmo2
from molmo2.weights.config_types import ForeignConfigError
from molmo2.weights.load import open_model
from molmo2.weights.names import WeightsError
from molmo2.weights.pretrained import PretrainedError, first_weights, load_released, locate

OLMO4 = dataclasses.replace(  # as Olmo-3 is: YaRN on the last layer of every four
    YARN,
    text=dataclasses.replace(
        YARN.text, num_layers=4, rope_scaling=dataclasses.replace(YARN.text.rope_scaling, layers=(3,))
    ),
)
SILENT = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def add_noise(model: torch.nn.Module, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def base_text(config: ModelConfig, tied: bool = False) -> Any:
    """Qwen3 or Olmo-3 of transformers, of the size of a model's decoder."""
    text = config.text
    sizes = {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "vocab_size": text.vocab_size,
        "rms_norm_eps": text.norm_eps,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "attn_implementation": "eager",
        **SILENT,
    }
    plain = {"rope_type": "default", "rope_theta": text.rope_theta}
    if not text.norm_after:
        return Qwen3ForCausalLM(Qwen3Config(head_dim=text.head_dim, rope_parameters=plain, **sizes))
    assert text.rope_scaling is not None
    yarn = {
        "rope_type": "yarn",
        "rope_theta": text.rope_theta,
        "factor": text.rope_scaling.factor,
        "attention_factor": text.rope_scaling.attention_factor,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": text.rope_scaling.original_max_positions,
    }
    rope = {"full_attention": yarn, "sliding_attention": plain}
    return Olmo3ForCausalLM(Olmo3Config(rope_parameters=rope, **sizes))


def base_vision(config: ModelConfig) -> Any:
    """SigLIP of transformers with both towers; two more blocks than are used, images of a broken number of patches."""
    vit = config.vit
    sizes = {
        "hidden_size": vit.hidden_size,
        "intermediate_size": vit.intermediate_size,
        "num_hidden_layers": vit.num_layers + 2,
        "num_attention_heads": vit.num_heads,
        "image_size": config.crop_size + 6,
        "patch_size": config.patch_size,
    }
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 50, "max_position_embeddings": 8, **SILENT}
    return SiglipModel(SiglipConfig(vision_config=sizes, text_config=text, attn_implementation="eager"))


def save(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of base models: qwen, qwen-tied, olmo, siglip; the tokenizer lies beside the language models."""
    root = tmp_path_factory.mktemp("bases")
    save(add_noise(base_text(QWEN)), root / "qwen", max_shard_size="100KB")
    save(add_noise(base_text(QWEN, tied=True)), root / "qwen-tied")
    save(add_noise(base_text(OLMO4)), root / "olmo")
    save(add_noise(base_vision(QWEN)), root / "siglip")
    for name in ("qwen", "olmo"):
        shutil.copy(Path(tokenizer_dir(), "tokenizer.json"), root / name)
    return root


def start(config: ModelConfig, seed: int = 0, tokenizer: Path | None = None, **init: Any) -> dict[str, torch.Tensor]:
    names = {key: str(value) for key, value in init.items()}
    found = first_weights(FirstWeights(**names), config, tokenizer or Path(tokenizer_dir()), seed, lambda text: None)
    return {name: read() for name, read in found.items()}


def our_logits(config: ModelConfig, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    model = Molmo2.with_weights(config, weights).eval()
    size = (0, config.crop_size, config.crop_size, 3)
    pixels, pooling = torch.zeros(size, dtype=torch.uint8), torch.zeros(0, 4, dtype=torch.int64)
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    with torch.no_grad():
        return model(
            ids, positions, torch.full_like(ids, TRUNK), torch.zeros_like(ids, dtype=torch.bool), pixels, pooling
        )


@pytest.mark.parametrize(("name", "config"), [("qwen", QWEN), ("qwen-tied", QWEN), ("olmo", OLMO4)])
def test_language_models_give_the_logits_of_transformers(name: str, config: ModelConfig, bases: Path) -> None:
    weights = start(config, llm=bases / name, vit=bases / "siglip")
    kind = Olmo3ForCausalLM if name == "olmo" else Qwen3ForCausalLM
    theirs = kind.from_pretrained(bases / name, attn_implementation="eager").eval()
    ids = torch.randint(0, 320, (2, 90), generator=torch.Generator().manual_seed(1))  # past YaRN's 64 positions
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(config, weights, ids), expected, atol=1e-5, rtol=0)
    assert weights["lm_head.weight"].data_ptr() != weights["text.embedding.base"].data_ptr()
    assert torch.equal(weights["lm_head.weight"], weights["text.embedding.base"]) == (name == "qwen-tied")


def test_vision_features_are_those_of_transformers(bases: Path, tmp_path: Path) -> None:
    theirs = SiglipVisionModel.from_pretrained(bases / "siglip", attn_implementation="eager").eval()
    crops = torch.stack([torch.from_numpy(noise(84, 84, seed)) for seed in (0, 1)])
    pixels = (crops.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        states = theirs(pixels, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer + 1] for layer in QWEN.vit.feature_layers], -1)
    for directory in (bases / "siglip", save(theirs, tmp_path / "tower")):  # both towers, or the one alone
        model = Molmo2.with_weights(QWEN, start(QWEN, llm=bases / "qwen", vit=directory)).eval()
        with torch.no_grad():
            torch.testing.assert_close(model.vit(crops), expected, atol=1e-5, rtol=0)


def test_what_no_base_has_is_drawn_from_the_seed(bases: Path) -> None:
    one, same, other = (start(QWEN, seed, llm=bases / "qwen", vit=bases / "siglip") for seed in (1, 1, 2))
    assert one.keys() == Molmo2(QWEN).state_dict().keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = {name for name in one if not torch.equal(one[name], other[name])}
    biases = {name for name in one if name.startswith("connector.") and name.endswith(".bias")}
    assert drawn == {n for n in one if n.startswith("connector.") or n == "text.embedding.added"} - biases
    assert all(abs(one[name].std() - 0.02) < 0.003 for name in drawn)
    assert not any(one[name].any() for name in biases)


def test_base_configs_of_older_transformers(bases: Path, tmp_path: Path) -> None:
    value = json.loads((bases / "olmo/config.json").read_text())
    rope = value.pop("rope_parameters")["full_attention"]
    value["rope_theta"] = rope.pop("rope_theta")
    rope.pop("attention_factor")
    (tmp_path / "config.json").write_text(json.dumps(value | {"rope_scaling": rope}))
    text, tied = read_base_text(tmp_path)
    assert not tied and config_differences(text, read_base_text(bases / "olmo")[0]) == []


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["native", "halved", "exported"])
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_models_in_every_form(name: str, form: str, tmp_path: Path) -> None:
    reference, ours = pair(CONFIGS[name])
    if form == "exported":
        exported(ours, tmp_path / "out")
    else:  # by default transformers uses the released names, and cuts the embedding into halves
        save(reference, tmp_path / "out", save_original_format=form == "halved", max_shard_size="200KB")
    if form == "halved":
        shapes = {key: tensor.shape for key, tensor in hub.open_tensors(tmp_path / "out").items()}
        assert shapes["model.transformer.wte.embedding"] == shapes["model.transformer.wte.new_embedding"] == (168, 64)
    config, weights = load_released(tmp_path / "out")
    # Transformers' own files have no processor, so its geometry is Molmo2's.
    ignored = [] if form == "exported" else ["overlap_margin"]
    assert config_differences(config, CONFIGS[name], ignored) == []
    expected = ours.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    opened = open_model(str(tmp_path / "out"))
    assert opened.config == config and opened.tokenizer_dir == tmp_path / "out"


@pytest.mark.parametrize("name", PRESETS)
def test_config_is_the_inverse_of_ours(name: str, tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS[name], overlap_margin=4)  # not in config.json
    (tmp_path / "config.json").write_text(json.dumps(hub.hub_config(config)))
    found = read_molmo2(tmp_path)
    assert found == dataclasses.replace(config, name=name if name != "tiny" else "molmo2")


def test_the_released_config_counts_layers_from_the_end(tmp_path: Path) -> None:
    value = hub.hub_config(PRESETS["8b"])
    value["vit_config"]["num_hidden_layers"] = 27
    value["adapter_config"]["vit_layers"] = [-3, -9]
    (tmp_path / "config.json").write_text(json.dumps(value))
    assert read_molmo2(tmp_path) == PRESETS["8b"]


def test_deeper_blocks_of_a_released_model_are_left_out(tmp_path: Path) -> None:
    out = exported(noisy(QWEN), tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    blocks = "model.vision_backbone.image_vit.transformer.resblocks"
    tensors |= {name.replace(f"{blocks}.3.", f"{blocks}.4."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, out / "model.safetensors")
    value = json.loads((out / "config.json").read_text())
    value["vit_config"]["num_hidden_layers"] = 5
    (out / "config.json").write_text(json.dumps(value))
    config, weights = load_released(out)
    assert config.vit == QWEN.vit and weights.keys() == Molmo2(QWEN).state_dict().keys()


def test_a_run_starts_from_a_whole_model(tmp_path: Path) -> None:
    out = exported(noisy(QWEN), tmp_path / "out")
    weights = start(QWEN, molmo2=out)
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(noisy(QWEN)).items())
    with pytest.raises(PretrainedError) as caught:
        start(dataclasses.replace(OLMO, patch_size=6), molmo2=out)
    for field in ("patch_size 14, wanted 6", "text.qk_norm qwen3, wanted olmo", "text.num_kv_heads 2, wanted 4"):
        assert field in str(caught.value)
    start(dataclasses.replace(QWEN, text=dataclasses.replace(QWEN.text, max_positions=99)), molmo2=out)


# --- what is refused -------------------------------------------------------------------------------------------------


def changed(directory: Path, copy: Path, **values: Any) -> Path:
    """A copy of a model with some keys of its config.json changed; a dotted key goes one level down."""
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    for name, value in values.items():
        *above, last = name.split("__")
        (config[above[0]] if above else config)[last] = value
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize("wrong", [None, "x", [], {}, True, -1, 0, 1.5, float("inf"), [[]], 10**30], ids=repr)
def test_any_value_of_a_wrong_type_is_one_error(wrong: Any, tmp_path: Path) -> None:
    config = hub.hub_config(PRESETS["8b"])
    raised = 0
    for above, key in places(config):
        before, above[key] = above[key], wrong
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            read_molmo2(tmp_path)
        except ForeignConfigError:
            raised += 1
        above[key] = before
    assert raised > 20  # keys that other code needs may have any value


@pytest.mark.parametrize(
    ("key", "name", "values", "message"),
    [
        (
            "llm",
            "qwen",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            "text.rope_theta 5.0, wanted",
        ),
        ("llm", "qwen", {"vocab_size": 384}, "text.vocab_size 384, wanted 320"),
        ("llm", "qwen", {"attention_bias": True}, "attention_bias is True, supported is False"),
        ("llm", "qwen", {"model_type": "llama"}, "model_type 'llama'; Molmo2's language model is qwen3 or olmo3"),
        ("llm", "qwen", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}}, "known: default, yarn"),
        ("llm", "olmo", {}, "text.norm_after True, wanted False"),
        ("llm", "siglip", {}, "model_type 'siglip'"),
        ("vit", "siglip", {"vision_config__image_size": 98}, "patches on a side 7, wanted 6"),
        ("vit", "siglip", {"vision_config__num_hidden_layers": 3}, "3 blocks, but the model needs block 3"),
        (
            "vit",
            "siglip",
            {"vision_config__hidden_act": "relu"},
            "hidden_act is 'relu', supported is 'gelu_pytorch_tanh'",
        ),
        ("vit", "qwen", {}, "a SigLIP2 of fixed size"),
    ],
)
def test_another_model_is_refused(
    key: str, name: str, values: dict[str, Any], message: str, bases: Path, tmp_path: Path
) -> None:
    init: dict[str, Any] = {"llm": bases / "qwen", "vit": bases / "siglip"}
    init[key] = changed(bases / name, tmp_path / "copy", **values)
    with pytest.raises((PretrainedError, ForeignConfigError), match=message):
        start(QWEN, **init)


def test_misfits_of_base_models_are_listed(bases: Path, tmp_path: Path) -> None:
    shutil.copytree(bases / "qwen-tied", tmp_path / "llm")
    path = tmp_path / "llm/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.norm.weight"] = torch.zeros(63)
    tensors["model.layers.1.self_attn.q_norm.weight"][3] = torch.nan
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(WeightsError) as caught:
        start(QWEN, llm=tmp_path / "llm", vit=bases / "siglip")
    assert str(caught.value).splitlines()[1:] == [
        "  missing model.layers.2.mlp.up_proj.weight",
        "  unexpected model.layers.0.self_attn.q_proj.bias",
        "  model.norm.weight: shape [63], wanted [64]",
    ]


def test_values_that_cannot_be_used_are_refused_when_they_are_read(bases: Path, tmp_path: Path) -> None:
    shutil.copytree(bases / "qwen-tied", tmp_path / "llm")
    path = tmp_path / "llm/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_norm.weight"][3] = torch.nan
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.self_attn\.q_norm\.weight: holds infinity or NaN"):
        start(QWEN, llm=tmp_path / "llm", vit=bases / "siglip")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, path)
    with pytest.raises(WeightsError, match="give weights that are not quantised"):
        start(QWEN, llm=tmp_path / "llm", vit=bases / "siglip")


def test_known_leftovers_are_left_out(bases: Path, tmp_path: Path) -> None:
    """A tied head that is stored all the same, and buffers of older files."""
    shutil.copytree(bases / "qwen-tied", tmp_path / "llm")
    path = tmp_path / "llm/model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, path)
    weights = start(QWEN, llm=tmp_path / "llm", vit=bases / "siglip")
    expected = start(QWEN, llm=bases / "qwen-tied", vit=bases / "siglip")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_shards_that_do_not_fit_their_index(bases: Path, tmp_path: Path) -> None:
    shutil.copytree(bases / "qwen", tmp_path / "llm")
    index = tmp_path / "llm/model.safetensors.index.json"
    (tmp_path / "llm/stale.safetensors").write_bytes(b"not named by the index, so not read")
    start(QWEN, llm=tmp_path / "llm", vit=bases / "siglip")
    value = json.loads(index.read_text())
    files = sorted(set(value["weight_map"].values()))
    assert len(files) > 2
    value["weight_map"]["model.norm.weight"] = next(f for f in files if f != value["weight_map"]["model.norm.weight"])
    index.write_text(json.dumps(value))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight is not in model-0"):
        start(QWEN, llm=tmp_path / "llm", vit=bases / "siglip")
    (tmp_path / "llm" / files[1]).unlink()
    with pytest.raises(WeightsError, match=f"{files[1]} is missing"):
        start(QWEN, llm=tmp_path / "llm", vit=bases / "siglip")
    index.write_text("{}")
    with pytest.raises(WeightsError, match="no readable index"):
        start(QWEN, llm=tmp_path / "llm", vit=bases / "siglip")


def test_another_tokenizer_is_refused(bases: Path, tmp_path: Path) -> None:
    value = json.loads((bases / "qwen/tokenizer.json").read_text())
    vocabulary = value["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(PretrainedError, match=r"gives 2 tokens other ids than .*make the tokenizer from that one"):
        start(QWEN, tokenizer=tmp_path, llm=bases / "qwen", vit=bases / "siglip")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config": None}, "text_config is None; it must be an object"),
        ({"model_type": "llava"}, "model_type 'llava', wanted 'molmo2'"),
        ({"image_patch_id": 7}, "image_patch_id is 7, supported is 322"),
        ({"text_config__head_dim": 15}, "missing|shape|wanted"),
        ({"vit_config__image_default_input_size": [84, 98]}, "is not a square"),
        ({"adapter_config__pooling_attention_mask": False}, "pooling_attention_mask is False, supported is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, supported is False"),
    ],
)
def test_other_configs_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    out = exported(noisy(QWEN), tmp_path / "out")
    with pytest.raises((ForeignConfigError, WeightsError), match=message):
        load_released(changed(out, tmp_path / "copy", **values))


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(bases: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub with every base model below owner/."""
    shutil.copytree(bases, tmp_path / "root/models/owner")
    (tmp_path / "root/models/owner/qwen/onnx").mkdir()
    (tmp_path / "root/models/owner/qwen/onnx/model.safetensors").write_bytes(b"another format")
    changed(bases / "qwen", tmp_path / "root/models/owner/qwen@old", rms_norm_eps=1e-5)
    with fake_hub(tmp_path / "root") as hub, client_of(hub, tmp_path / "home"):
        yield hub


def test_weights_from_the_hub(served: Hub, bases: Path) -> None:
    weights = start(QWEN, llm="owner/qwen", vit="owner/siglip@main")
    expected = start(QWEN, llm=bases / "qwen", vit=bases / "siglip")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not any("onnx" in line for line in served.log)
    with pytest.raises(PretrainedError, match=r"text\.norm_eps 1e-05, wanted 1e-06"):
        start(QWEN, llm="owner/qwen@old", vit="owner/siglip")
    assert locate("owner/qwen@old").name != locate("owner/qwen").name


def test_the_hub_refuses(served: Hub, tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match="no revision v3"):
        locate("owner/qwen@v3")
    with pytest.raises(PretrainedError, match="nor is it a directory here"):
        locate("owner/qwem")
    with pytest.raises(PretrainedError, match=r"no such directory.*and no OWNER/NAME"):
        locate("no/such/directory")
    with pytest.raises(PretrainedError, match="no run in"):
        open_model("nothing")
    served.gated, served.tokens = {"owner/qwen"}, {"granted"}
    with pytest.raises(PretrainedError, match=rf"is gated; accept its terms at {served.url}/owner/qwen, then log in"):
        locate("owner/qwen")
    with client_of(served, tmp_path / "home", token="granted"):
        fetched = locate("owner/qwen")
    with fake_hub(tmp_path / "root") as gone:
        pass
    with client_of(gone, tmp_path / "home"):
        assert locate("owner/qwen") == fetched  # from the cache
        with pytest.raises(PretrainedError, match="is not in the cache"):
            locate("owner/siglip")


# --- in the trainer --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_is_held_once(tmp_path: Path) -> None:
    """Loading takes the memory of the weights and little more; in a process of its own, whose peak is its own."""
    config = dataclasses.replace(QWEN, text=dataclasses.replace(QWEN.text, hidden_size=1024, intermediate_size=4096))
    exported_to = tmp_path / "out"
    exported_to.mkdir()
    hub.write_hub(weights_of(Molmo2(config).init_weights()), exported_to, shard_bytes=64 << 20)
    (exported_to / "config.json").write_text(json.dumps(hub.hub_config(config)))
    size = sum(file.stat().st_size for file in exported_to.glob("*.safetensors"))
    # The kernel's peak is set back first: a child begins with that of the process which started it.
    code = """
import pathlib, sys
from molmo2.weights.pretrained import load_released
def peak():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = peak()
weights = load_released(sys.argv[1])
print((peak() - before) * 1024)
"""
    command = [sys.executable, "-c", code, str(exported_to)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    largest = max(tensor.numel() for tensor in Molmo2(config).state_dict().values()) * 4
    assert size > 100e6
    assert size < int(done.stdout) < size + 4 * largest + 30e6
