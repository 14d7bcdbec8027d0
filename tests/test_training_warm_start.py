"""`train.start_from`: a new run begins with the weights of a draft that is there already."""

from __future__ import annotations

import json

import pytest
import torch
from training_world import changed, draft_weights, tiny_run, tuned_target, write_rows

from deepspec.config import ConfigError, validate
from deepspec.drafts import load_draft
from deepspec.targets import load_target
from deepspec.training import train

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


@pytest.fixture(scope="module")
def earlier(training_world, in_temporary_folder, tmp_path_factory):
    return train(tiny_run(training_world, tmp_path_factory.mktemp("earlier"), steps=2))


def other_data(tmp_path):
    row = {"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "So it is. " * 3}]}
    return [write_rows(tmp_path / "other.jsonl", [row] * 8)]


@pytest.mark.parametrize("given", ["draft folder", "checkpoint", "run folder"])
def test_begins_with_its_weights_on_other_data(training_world, earlier, tmp_path, capsys, given):
    source = {"draft folder": earlier.checkpoint / "draft", "checkpoint": earlier.checkpoint}
    path = str(source.get(given, earlier.checkpoint.parents[1]))
    config = tiny_run(training_world, tmp_path / "run", steps=1, lr=0.0, start_from=path)
    result = train(changed(config, data={"train_files": other_data(tmp_path)}))
    assert f"starting from {path}: 1 of 1 steps, 8 samples" in capsys.readouterr().out
    assert draft_weights(result.checkpoint) == draft_weights(earlier.checkpoint)


def test_the_optimizer_is_fresh_and_the_run_continues_as_any_other(training_world, earlier, tmp_path, capsys):
    config = tiny_run(training_world, tmp_path / "run", steps=2, start_from=str(earlier.checkpoint))
    result = train(config)
    assert result.step == 2
    config.train.steps = 3
    assert train(config).step == 3
    assert f"continuing from {result.checkpoint}" in capsys.readouterr().out


def test_another_revision_of_the_target(training_world, earlier, tmp_path, caplog):
    """Embedding and head are those of the target given now, and the difference is told."""
    path = tuned_target(training_world, tmp_path)
    config = tiny_run(training_world, tmp_path / "run", steps=1, lr=0.0, start_from=str(earlier.checkpoint))
    result = train(changed(config, target={"path": path}))
    target = load_target(path)
    draft, before = load_draft(result.checkpoint, target=target), load_draft(earlier.checkpoint)
    assert torch.equal(draft.embed_tokens.weight, target.embedding_weight)
    assert torch.equal(draft.lm_head.weight, target.head_weight)
    assert torch.equal(draft.fc.weight, before.fc.weight)
    told = [record.message for record in caplog.records if "train.start_from=" in record.message]
    assert len(told) == 1
    assert before.config.target_fingerprint[:12] in told[0]
    assert target.fingerprint[:12] in told[0]


def test_other_settings_are_refused_with_those_to_give(training_world, earlier, tmp_path):
    shape = {"num_layers": 2, "markov_rank": 0, "confidence_head_with_markov": False}
    config = tiny_run(training_world, tmp_path, start_from=str(earlier.checkpoint), draft=shape)
    with pytest.raises(ConfigError) as error:
        train(config)
    message = str(error.value)
    assert "draft.num_layers is 2, the draft has 1" in message
    words = message.split(" Give ")[1].split()
    assert words == [
        "draft.num_layers=1",
        "draft.markov_rank=8",
        "draft.markov_head_type=vanilla",
        "draft.confidence_head_with_markov=true",
    ]


def test_what_the_run_leaves_open_comes_from_the_draft(training_world, tmp_path):
    first = train(tiny_run(training_world, tmp_path / "first", steps=1, draft={"target_layer_ids": [-1, 2]}))
    shape = {"target_layer_ids": None}
    second = train(
        tiny_run(training_world, tmp_path / "second", steps=1, draft=shape, start_from=str(first.checkpoint))
    )
    assert json.loads((second.checkpoint / "draft" / "config.json").read_text())["target_layer_ids"] == [-1, 2]


def test_no_draft_there(training_world, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.start_from=\./absent: no such folder"):
        train(tiny_run(training_world, tmp_path, start_from="./absent"))


def test_continuing_and_beginning_exclude_each_other(training_world, tmp_path):
    config = tiny_run(training_world, tmp_path, start_from="a/draft", resume="some/checkpoint")
    with pytest.raises(ConfigError, match=r"the first continues a run .* give one of them"):
        validate(config)
