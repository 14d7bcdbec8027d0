"""Typed configuration and the command line: what cannot work is refused before any model is loaded."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from deepspec.arguments import parse_arguments
from deepspec.cli import leaf_types
from deepspec.config import CHOICES, RANGES, ConfigError, EvalRun, TrainRun, flatten, validate

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def composed(config_name: str, schema: type, overrides: list[str]) -> TrainRun | EvalRun:
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return OmegaConf.to_object(compose(config_name, overrides=overrides))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_and_is_valid(recipe):
    run = composed("train", TrainRun, [f"recipes={recipe}"])
    if not run.data.train_files:
        run.data.train_files = ["given on the command line"]
    validate(run)


def test_eval_config_composes():
    validate(composed("eval", EvalRun, ["checkpoint=x"]))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("decode.min_p=1.2", "decode.min_p=1.2: must be at least 0 and at most 1"),
        ("decode.repetition_penalty=0", "decode.repetition_penalty=0.0: must be at least 0.01 and at most 100"),
        ("decode.stop_strings=[a,'']", "an empty string would end every answer"),
    ],
)
def test_impossible_evaluation(override, expected):
    with pytest.raises(ConfigError) as error:
        validate(composed("eval", EvalRun, ["checkpoint=x", override]))
    assert expected in str(error.value)


def test_ranges_and_choices_name_existing_keys():
    keys = set(leaf_types(TrainRun)) | set(leaf_types(EvalRun))
    assert set(CHOICES) <= keys
    assert set(RANGES) <= keys


def test_flatten_and_leaf_types_agree():
    assert list(flatten(TrainRun())) == list(leaf_types(TrainRun))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("draft.block_size=0", "draft.block_size=0: must be at least 1 and at most 64"),
        ("train.lr=-1", "train.lr=-1.0: must be at least 0"),
        ("train.warmup_ratio=1.5", "train.warmup_ratio=1.5: must be at least 0 and at most 1"),
        ("draft.algorithm=dsprak", "must be one of dspark, dflash. Did you mean 'dspark'?"),
        ("draft.algorithm=dflash", "has no heads, but draft.markov_rank=64"),
        ("data.train_files=[]", "name at least one JSONL file"),
        ("train.micro_batch_size=3", "train.tokens_per_batch=2048: padded and packed batches exclude each other"),
        ("train.loss={ce: 0.0, tv: 0.0}", "nothing would train the draft"),
    ],
)
def test_impossible_value(override, expected):
    run = composed("train", TrainRun, ["recipes=smoke", override])
    with pytest.raises(ConfigError) as error:
        validate(run)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("train.stesp=5", "error: unknown key 'train.stesp=5'. Did you mean 'train.steps'?"),
        ("trian.steps=5", "Did you mean 'train'?"),
        ("train.steps=many", "train.steps=many: Value 'many'"),
        ("recipes=smok", "Did you mean 'smoke'?"),
        ("draft.block_size=0", "error: draft.block_size=0: must be at least 1"),
    ],
)
def test_command_line_mistake_is_one_message(argument, expected, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), argument, f"output_dir={tmp_path}"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 2
    assert expected in finished.stderr
    assert "Traceback" not in finished.stderr


def test_missing_checkpoint_is_asked_for(tmp_path):
    finished = subprocess.run([sys.executable, str(ROOT / "eval.py")], capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 2
    assert "checkpoint: must be given on the command line" in finished.stderr


def test_help_lists_the_groups(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert finished.returncode == 0
    assert "recipes: " in finished.stdout
    assert "smoke" in finished.stdout


@dataclass
class Options:
    name: str = "???"
    count: int = 3


def test_small_commands_parse_key_value():
    assert parse_arguments(Options, ["name=a", "count=4"]) == Options("a", 4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nmae=a"], "unknown key 'nmae'; the keys are name, count. Did you mean 'name'?"),
        (["name"], "'name': expected key=value"),
        (["name=a", "count=b"], "Value 'b'"),
        ([], "name: must be given"),
    ],
)
def test_small_commands_refuse(arguments, expected):
    with pytest.raises(ConfigError) as error:
        parse_arguments(Options, arguments)
    assert expected in str(error.value)
