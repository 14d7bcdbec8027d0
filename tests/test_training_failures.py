"""What a user can get wrong, or a machine, and what the message then says."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal

import pytest
import torch
from training_world import changed, tiny_run, write_rows
from transformers import AutoTokenizer

from deepspec.checkpoints import CheckpointError, checkpoint_folder, newest_checkpoint
from deepspec.config import ConfigError
from deepspec.data.jsonl import DataError
from deepspec.drafts import load_draft
from deepspec.features import OnlineFeatures
from deepspec.training import setup, train
from deepspec.training.finite import NotFiniteError
from deepspec.training.log import read_metrics
from deepspec.training.objective import DraftTrainingModule
from deepspec.training.report import Reporter

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


def poison(monkeypatch, change):
    """From the 7th training pass on (step 4 with 2 passes a step), `change(sums)` alters what the objective returns."""
    original, passes = DraftTrainingModule.forward, 0

    def forward(self, *args, **kwargs):
        nonlocal passes
        sums = original(self, *args, **kwargs)
        passes += self.training
        return change(sums) if self.training and passes >= 7 else sums

    monkeypatch.setattr(DraftTrainingModule, "forward", forward)


def test_loss_that_turns_nan(training_world, tmp_path, monkeypatch):
    poison(monkeypatch, lambda sums: sums | {"loss": sums["loss"] * float("nan")})
    applied = []
    original = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a, **k: (applied.append(1), original(self, *a, **k))[1]
    )
    with pytest.raises(RuntimeError) as error:
        train(tiny_run(training_world, tmp_path))
    message = str(error.value)
    assert "step 4: the loss is nan; training stopped before anything was saved from it" in message
    assert f"the last good checkpoint is {checkpoint_folder(tmp_path, 2)}" in message
    assert message.split("(ids in data.train_files): ")[1].split(".")[0].count("row") == 4
    assert "train.lr=0.003" in message
    assert len(applied) == 3
    assert newest_checkpoint(tmp_path, subfolder="") == checkpoint_folder(tmp_path, 2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_only_the_bad_micro_batch_is_named(training_world, tmp_path, monkeypatch):
    seen = []
    original = DraftTrainingModule.forward

    def forward(self, *args, **kwargs):
        sums = original(self, *args, **kwargs)
        seen.append(kwargs["input_ids"].shape[0])
        return sums | {"loss": sums["loss"] * float("inf")} if len(seen) == 2 else sums

    monkeypatch.setattr(DraftTrainingModule, "forward", forward)
    with pytest.raises(RuntimeError, match=r"step 1: the loss is .*there is no checkpoint yet") as error:
        train(tiny_run(training_world, tmp_path, micro_batch_size=1))
    assert str(error.value).count("row") == 1
    assert newest_checkpoint(tmp_path) is None


def test_gradient_that_turns_nan_behind_a_finite_loss(training_world, tmp_path, monkeypatch):
    def steep(sums):
        loss = sums["loss"]
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return sums

    poison(monkeypatch, steep)
    with pytest.raises(RuntimeError, match="step 4: the gradient norm is nan"):
        train(tiny_run(training_world, tmp_path))
    assert newest_checkpoint(tmp_path, subfolder="") == checkpoint_folder(tmp_path, 2)


class OverflowingFeatures:
    """A feature source whose target overflows in two samples."""

    def __init__(self, source):
        self._source = source
        self.concurrency, self.flops_per_token, self.is_remote = 1, source.flops_per_token, False

    def batch_features(self, batch):
        features = self._source.batch_features(batch)
        for document in batch.documents:
            if document.index == 3:
                features.context[document.row, document.columns, 32:] = float("inf")  # the second of two layers
            if document.index in (3, 5):
                features.final[document.row, document.columns] = float("nan")
        return features

    def close(self):
        pass


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        ("float16", "target.dtype=float16 is too narrow for this target: set target.dtype=bfloat16 or float32"),
        ("bfloat16", "target.dtype=bfloat16 is too narrow for this target: set target.dtype=float32"),
        ("float32", "look at the target's weights, are they damaged?"),
    ],
)
@pytest.mark.parametrize("split", [{"micro_batch_size": 2}, {"tokens_per_batch": 128}], ids=["padded", "packed"])
def test_features_that_overflow_are_not_blamed_on_the_learning_rate(
    training_world, tmp_path, monkeypatch, dtype, advice, split
):
    monkeypatch.setattr(setup, "OnlineFeatures", lambda *arguments: OverflowingFeatures(OnlineFeatures(*arguments)))
    config = tiny_run(training_world, tmp_path, global_batch_size=20, **split)
    with pytest.raises(NotFiniteError) as error:
        train(changed(config, target={"dtype": dtype}, data={"min_supervised_tokens": 0}))
    message = str(error.value)
    samples = "(row3, row5|row5, row3)"
    assert re.search(
        rf"step 1: the target's features are not finite: layer 1, the final state of samples {samples} \(ids", message
    )
    assert advice in message
    assert "there is no checkpoint yet" in message
    assert "train.lr" not in message


def single_token_answers(path, count, also=()):
    """Rows whose assistant turn is one supervised token: no two in a row, so no anchor."""
    rows = [
        {"id": f"one{i}", "messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": ""}]}
        for i in range(count)
    ]
    return write_rows(path, [*rows, *also])


def test_data_without_a_single_anchor(training_world, tmp_path):
    file = single_token_answers(tmp_path / "one.jsonl", 8)
    config = changed(
        tiny_run(training_world, tmp_path / "run"), data={"train_files": [file], "min_supervised_tokens": 0}
    )
    with pytest.raises(DataError, match=r"a whole pass over the data found no place for an anchor") as error:
        train(config)
    assert file in str(error.value)
    assert "two assistant tokens in a row" in str(error.value)


def test_batch_without_an_anchor_changes_nothing(training_world, tmp_path, caplog, capsys):
    answer = {"role": "assistant", "content": "So it is. 1 + 2 = 3."}
    good = {"id": "good", "messages": [{"role": "user", "content": "1 + 2?"}, answer]}
    file = single_token_answers(tmp_path / "mostly.jsonl", 15, also=[good])
    config = changed(
        tiny_run(training_world, tmp_path / "run", steps=4, warmup_ratio=0.0),
        data={"train_files": [file], "min_supervised_tokens": 0},
    )
    result = train(config)
    rows = read_metrics(tmp_path / "run")
    learned = [row["step"] for row in rows if row["supervised_weight"] > 0]
    assert len(learned) == 1
    assert caplog.text.count("no sample of the batch has a place for an anchor") == 3
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ") and "lr " in line]
    assert [line.split()[1][0] for line in printed if "loss " in line] == [str(step) for step in learned]
    assert sum("no anchor" in line for line in printed) == 3
    assert result.status == "finished"
    assert [row["lr"] for row in rows] == sorted((row["lr"] for row in rows), reverse=True)


def test_tokenizer_of_another_target(training_world, tmp_path):
    shutil.copytree(training_world / "target", tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(training_world / "target")
    tokenizer.add_tokens([f"<extra{i}>" for i in range(30)])
    tokenizer.save_pretrained(tmp_path / "target")
    config = changed(tiny_run(training_world, tmp_path / "run"), target={"path": str(tmp_path / "target")})
    with pytest.raises(ValueError, match=r"the tokenizer has ids up to \d+, but the target has a vocabulary of 280"):
        train(config)


def test_tokenizer_without_a_mask_token(training_world, tmp_path):
    shutil.copytree(training_world / "target", tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(training_world / "target")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "target")
    config = changed(tiny_run(training_world, tmp_path / "run"), target={"path": str(tmp_path / "target")})
    checkpoint = train(config).checkpoint
    assert load_draft(checkpoint).mask_token_id == len(tokenizer)  # the first row of the embedding without a token


def test_what_engines_cannot_do_is_said_before_training(training_world, tmp_path, caplog):
    train(tiny_run(training_world, tmp_path / "run", steps=1))
    assert "engines cannot serve" not in caplog.text
    train(tiny_run(training_world, tmp_path / "rnn", steps=1, draft={"markov_head_type": "rnn"}))
    assert "engines cannot serve this draft as it is trained: vLLM: has only the vanilla" in caplog.text


def test_a_start_from_other_layers_fails_before_training(training_world, tmp_path):
    config = tiny_run(training_world, tmp_path / "run", draft={"start_from_target": True, "intermediate_size": 20})
    with pytest.raises(ConfigError, match=r"draft.start_from_target=true: layer 3 of the target, a Qwen3DecoderLayer"):
        train(config)
    assert newest_checkpoint(tmp_path / "run") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must not be there")
@pytest.mark.parametrize("device", ["own", "cuda:3", "nowhere"])
def test_target_device_that_is_not_there(training_world, tmp_path, device):
    config = changed(tiny_run(training_world, tmp_path), features={"target_device": device})
    with pytest.raises(ConfigError, match=f"features.target_device={device}: cannot be used by local rank 0"):
        train(config)


def test_impossible_draft_fails_before_weights_are_read(training_world, tmp_path):
    shutil.copytree(training_world / "target", tmp_path / "target")
    (tmp_path / "target" / "model.safetensors").unlink()
    config = tiny_run(training_world, tmp_path / "run", draft={"target_layer_ids": [0, 3]})
    with pytest.raises(ConfigError, match=r"draft.target_layer_ids=\[0, 3\]: 3 is the final layer"):
        train(changed(config, target={"path": str(tmp_path / "target")}))


def test_length_beyond_the_targets_range_is_told(training_world, tmp_path, caplog):
    shutil.copytree(training_world / "target", tmp_path / "target")
    file = tmp_path / "target" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 48}))
    config = changed(tiny_run(training_world, tmp_path / "run", steps=1), target={"path": str(tmp_path / "target")})
    train(config)
    told = [record.message for record in caplog.records if "data.max_length=" in record.message]
    assert len(told) == 1
    assert "data.max_length=64, but target" in told[0]
    assert "reads 48 positions" in told[0]
    assert re.search(r" [1-9]\d* of 15 samples are longer; set data.max_length=48", told[0])


def test_missing_data_file(training_world, tmp_path):
    config = changed(tiny_run(training_world, tmp_path), data={"train_files": [str(tmp_path / "absent.jsonl")]})
    with pytest.raises(DataError, match=r"absent.jsonl: no such file"):
        train(config)


def test_disk_that_fills_while_saving(training_world, tmp_path, monkeypatch):
    """A real write error: this process may write no file above 20 kB from step 3 on."""
    original = Reporter.step
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(self, done, loss, row):
        original(self, done, loss, row)
        if done == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    monkeypatch.setattr(Reporter, "step", step)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    config = tiny_run(training_world, tmp_path)
    try:
        with pytest.raises(CheckpointError) as error:
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    message = str(error.value)
    assert f"could not write the checkpoint {checkpoint_folder(tmp_path, 4)}" in message
    assert "the checkpoint before, step-00000002, is untouched" in message
    assert newest_checkpoint(tmp_path, subfolder="") == checkpoint_folder(tmp_path, 2)
    monkeypatch.undo()
    assert train(config).step == 6


def test_output_folder_that_cannot_be_made(training_world, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        train(tiny_run(training_world, tmp_path / "file" / "run", steps=1))


def test_a_target_that_could_not_be_decoded_is_refused_before_training(training_world, tmp_path):
    def refuse(target):
        raise ConfigError(f"target.path={target.name_or_path}: cannot be decoded here")

    with pytest.raises(ConfigError, match="cannot be decoded here"):
        train(tiny_run(training_world, tmp_path), check_target=refuse)
    assert not (tmp_path / "checkpoints").exists()
