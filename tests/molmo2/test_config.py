"""Recipes: strict, every error at once, with the path and the nearest known name."""

import subprocess
import sys
from pathlib import Path

import pytest

from molmo2.config import RecipeError, data_path, load_recipe

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "recipes/demo/stage1.yaml"


NOT_RECIPES = {"mixtures", "launch"}
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.parent.name not in NOT_RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_loads(path: Path) -> None:
    assert load_recipe(path).train.steps > 0


def test_datasets_that_are_not_at_hand_are_left_out_of_the_mixture() -> None:
    path = ROOT / "recipes/stage2.yaml"
    whole, less = load_recipe(path), load_recipe(path, ["data.leave_out=[tulu4, ego4d]"])
    assert set(whole.data.drawn_mixture.dataset_names) - set(less.data.drawn_mixture.dataset_names) == {
        "tulu4",
        "ego4d",
    }
    assert "nlp" not in less.data.drawn_mixture.groups  # it had no other
    with pytest.raises(RecipeError, match="not in the mixture, so they cannot be left out: tulu5"):
        load_recipe(path, ["data.leave_out=[tulu5]"])


def test_recipes_share_a_mixture_by_its_file(tmp_path: Path) -> None:
    text = (ROOT / "recipes/stage1.yaml").read_text()
    (tmp_path / "r.yaml").write_text(text.replace("mixtures/pretraining.yaml", "m.yaml"))
    with pytest.raises(RecipeError, match=r"no such recipe or mixture: .*m\.yaml"):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "m.yaml").write_text("groups: {text: {rate: 1, datasets: {tulu4: }}}")
    spec = load_recipe(tmp_path / "r.yaml", ["data.mixture.groups.text.datasets.tulu4.factor=2"]).data.mixture
    assert spec.dataset_names == ("tulu4",)
    assert spec.groups["text"].datasets["tulu4"].factor == 2


def broken(tmp_path: Path, old: str, new: str) -> Path:
    text = DEMO.read_text()
    assert old in text
    path = tmp_path / "broken.yaml"
    path.write_text(text.replace(old, new))
    return path


def test_all_errors_are_told_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    path = broken(tmp_path, "  micro_batch: 2", "  microbatch: 2\n  steps_: many")
    overrides = ["optim.vit.lr=-1", "optim.llm.warmup=3", "data.sequence_length=long", "data.mixture.groups.text.rte=1"]
    with pytest.raises(RecipeError) as error:
        load_recipe(path, [*overrides, "colour=red"])
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path}: 7 errors"
    told = "\n".join(lines[1:])
    for expected in (
        "train.microbatch: unknown key; did you mean micro_batch?",
        "train.steps_: unknown key; did you mean steps?",
        "optim.vit.lr: Input should be greater than or equal to 0 (got -1)",
        "optim.llm.warmup: unknown key; did you mean warmup_steps?",
        "data.sequence_length: Input should be a valid integer",
        "data.mixture.groups.text.rte: unknown key; did you mean rate?",
        "colour: unknown key; known: anomalies, data, eval, init, logging, model,",
    ):
        assert expected in told


def test_missing_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.steps: missing"):
        load_recipe(broken(tmp_path, "  steps: 700\n", ""))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.precision=bf16", "precision bf16 needs zero_stage 2 or 3, not 1"),
        ("train.micro_batch=3", "packs_per_step 4 is not a multiple of train.micro_batch 3"),
        ("train.keep_every=150", "keep_every 150 is not a multiple of checkpoint_every"),
        ("train.sp=5", "data.sequence_length 768 is not a multiple of train.sp 5"),
        ("train.freeze=[vit,connector,llm]", "freeze: every component is frozen, so nothing is trained"),
        ("train.freeze=[vt]", r"train\.freeze\.0: Input should be 'vit', 'connector' or 'llm' \(got 'vt'\)"),
        ("init=demo-stage1", "init names the run itself"),
        ("name=../escape", r"name: String should match pattern"),
    ],
)
def test_settings_that_contradict_each_other(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(DEMO, [override])


def test_overrides_reach_any_depth_and_keep_types() -> None:
    recipe = load_recipe(DEMO, ["optim.vit.lr=1e-4", "data.roots=[a,b]", "init=null", "logging.wandb=project"])
    assert recipe.optim.vit.lr == 1e-4
    assert recipe.data.roots == ("a", "b")
    assert recipe.init is None
    assert recipe.logging.wandb == "project"
    assert recipe.optim.llm == load_recipe(DEMO).optim.llm


@pytest.mark.parametrize("value", ["${oc.env:TOKEN}", "a${oc.decode:'${oc.env:TOKEN}'}", "${oc.env:NONE,x}"])
def test_a_recipe_takes_nothing_from_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recipe resolves is stored with the run, in its report and in the card of an export."""
    monkeypatch.setenv("TOKEN", "secret")
    with pytest.raises(RecipeError, match="may refer to its own keys only") as error:
        load_recipe(DEMO, [f"name={value}"])
    assert "secret" not in str(error.value)
    assert load_recipe(DEMO, ["name=run-${train.steps}"]).name == "run-700"


def test_unreadable_recipes_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: [unclosed\n")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(bad)
    bad.write_text("name: a\nname: b\n")
    with pytest.raises(RecipeError, match="duplicate"):
        load_recipe(bad)
    with pytest.raises(RecipeError, match=r"--set steps: write key\.path=value"):
        load_recipe(DEMO, ["steps"])


def test_paths_are_below_the_data_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path))
    assert load_recipe(DEMO).run_dir == tmp_path / "runs/demo-stage1"
    assert data_path("/elsewhere") == Path("/elsewhere")
    monkeypatch.delenv("MOLMO2_DATA")
    assert data_path("raw") == Path("data/raw")


def test_reading_a_recipe_does_not_import_torch() -> None:
    code = "import sys, molmo2.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("value", ["true", "false"])
def test_the_former_name_of_recompute_is_refused_with_the_remedy(value: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.activation_checkpointing: was replaced: write recompute"):
        load_recipe(DEMO, [f"train.activation_checkpointing={value}"])


def test_the_former_setting_block_is_refused_with_the_remedy() -> None:
    with pytest.raises(RecipeError, match=r"data.block: is gone, since it saved no seeks; delete the key \(got 64\)"):
        load_recipe(DEMO, ["data.block=64"])


@pytest.mark.parametrize("place", ["s3://bucket/data", "https://host/data"])
def test_the_folder_of_runs_is_no_url(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """It was a folder "s3:" below the working directory."""
    monkeypatch.setenv("MOLMO2_DATA", place)
    with pytest.raises(RecipeError, match=f"MOLMO2_DATA={place}: .*a local folder.*data.roots.*train.mirror"):
        load_recipe(DEMO)
    with pytest.raises(ValueError, match=f"MOLMO2_DATA={place}: "):
        data_path("runs")


@pytest.mark.parametrize("place", ["https://host/runs", "hf://datasets/owner/name", "gs://bucket/runs"])
def test_a_mirror_is_written(place: str) -> None:
    with pytest.raises(RecipeError, match=f"train: mirror {place}: .*s3://bucket/runs"):
        load_recipe(DEMO, [f"train.mirror={place}"])
    for fine in ("s3://bucket/runs", "file:///far/runs", "/far/runs"):
        assert load_recipe(DEMO, [f"train.mirror={fine}"]).train.mirror == fine


def test_offloaded_activations_need_full_recomputation() -> None:
    with pytest.raises(RecipeError, match="offload of activations needs recompute: full"):
        load_recipe(DEMO, ["train.recompute=light", "train.offload=[activations]"])
