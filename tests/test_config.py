"""Typed configuration and the command line: what cannot work is refused before any model is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from deepspec.arguments import WAIT_FOR_FIRST_RANK, WAIT_FOR_LOST_RANK, answer_mistakes, parse_arguments
from deepspec.cli import leaf_types, let_the_command_line_choose
from deepspec.config import CHOICES, RANGES, ConfigError, EvalRun, InspectRun, TrainRun, flatten, validate
from deepspec.ranks import LostRankError

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
    keys = set(leaf_types(InspectRun)) | set(leaf_types(EvalRun))
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
        ("draft.algorithm=dsprak", "must be one of dspark, dflash, eagle3. Did you mean 'dspark'?"),
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
        ("data.train_files=a.jsonl", "must be of type list[str], in brackets: data.train_files=[...]"),
        ("recipes=smok", "Did you mean 'smoke'?"),
        ("draft.block_size=0", "error: draft.block_size=0: must be at least 1"),
        ("train.steps=5 train.epochs=2", "error: train.steps=5 and train.epochs=2: they exclude each other"),
    ],
)
def test_command_line_mistake_is_one_message(argument, expected, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *argument.split(), f"output_dir={tmp_path}"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 2
    assert expected in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("argument", ["train.lr=-1", "data.train_files=[absent.jsonl]"])
def test_mistake_in_a_launched_process_is_one_line(argument, tmp_path):
    """Neither Hydra nor the launcher adds anything, whether composing or the training refuses it."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command = [*launch, str(ROOT / "configs/accelerate/cpu.yaml"), str(ROOT / "train.py"), argument]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*command, f"output_dir={tmp_path}"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
    assert argument.split("=")[1].strip("[]") in finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("rank", "error", "waits"),
    [
        (0, ConfigError("lr: too small"), 0.0),
        (1, ConfigError("lr: too small"), WAIT_FOR_FIRST_RANK),
        (0, LostRankError("another rank died"), WAIT_FOR_LOST_RANK),
        (1, RuntimeError("Connection closed by peer"), WAIT_FOR_LOST_RANK),
    ],
)
def test_which_rank_speaks(rank, error, waits, tmp_path, monkeypatch, capsys):
    """A launcher ends the others when one ends, so those that wait are not heard; its table gets the message."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    report = tmp_path / "error.json"
    for name, value in {"WORLD_SIZE": 2, "LOCAL_RANK": rank, "TORCHELASTIC_ERROR_FILE": report}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as ended, answer_mistakes():
        raise error
    assert ended.value.code == 2
    assert slept == [waits]
    assert json.loads(report.read_text())["message"] + "\n" == capsys.readouterr().err
    assert str(error) in json.loads(report.read_text())["message"]


def test_what_is_no_mistake_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="Connection closed"), answer_mistakes():
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    ("words", "steps", "epochs", "tokens", "samples"),
    [
        ([], 500, 10.0, 2048, None),  # of the group train=minutes
        (["train.epochs=4"], None, 4.0, 2048, None),
        (["train.steps=7"], 7, None, 2048, None),
        (["train={epochs: 2}"], None, 2.0, 2048, None),
        (["train.steps=null"], None, 10.0, 2048, None),
        (["train.steps=null", "train.epochs=3"], None, 3.0, 2048, None),
        (["train.micro_batch_size=4"], 500, 10.0, None, 4),
    ],
)
def test_what_the_command_line_names_counts(words, steps, epochs, tokens, samples):
    ConfigStore.instance().store(name="train_schema", node=TrainRun)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=["recipes=smoke", *words])
        let_the_command_line_choose(config, words)
    train = OmegaConf.to_object(config).train
    assert (train.steps, train.epochs, train.tokens_per_batch, train.micro_batch_size) == (
        steps,
        epochs,
        tokens,
        samples,
    )


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
