"""A tiny target, tokenizer and corpus on disk, and runs on them; also for the processes that tests start and kill."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Qwen3Config, Qwen3ForCausalLM

from deepspec.config import DataConfig, DraftConfig, LoggingConfig, TargetConfig, TrainConfig, TrainRun
from deepspec.data.tokenizer import train_tokenizer
from deepspec.training.log import read_metrics


def is_timing(metric: str) -> bool:
    """Whether it tells of the machine and not of the run."""
    return metric.endswith(("_seconds", "_per_second", "_gib", "_utilization"))


def build_world(root: Path) -> Path:
    """Writes target/, train.jsonl (20 rows) and eval.jsonl (4 rows)."""
    rows = [
        {
            "id": f"row{i}",
            "messages": [
                {"role": "user", "content": f"What is {i} + {i + 1}?"},
                {"role": "assistant", "content": f"{i} + {i + 1} = {2 * i + 1}. " + "So it is. " * (i % 4)},
            ],
        }
        for i in range(24)
    ]
    write_rows(root / "train.jsonl", rows[:20])
    write_rows(root / "eval.jsonl", rows[20:])
    texts = [message["content"] for row in rows for message in row["messages"]]
    tokenizer = train_tokenizer(texts * 3, 280)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=280,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(root / "target")
    tokenizer.save_pretrained(root / "target")
    return root


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def tiny_run(world: Path, output_dir: Path | str, *, draft: dict | None = None, **train: Any) -> TrainRun:
    """A run of 6 steps of 4 samples; `train` are keys of TrainConfig, `draft` of DraftConfig."""
    defaults: dict[str, Any] = {
        "steps": 6,
        "global_batch_size": 4,
        "micro_batch_size": None if train.get("tokens_per_batch") else 2,
        "num_anchors": 6,
        "lr": 3e-3,
        "warmup_ratio": 0.34,
        "save_steps": 2,
        "eval_steps": 3,
    }
    shape: dict[str, Any] = {"num_layers": 1, "block_size": 4, "target_layer_ids": [0, 1], "markov_rank": 8}
    return TrainRun(
        target=TargetConfig(path=str(world / "target")),
        draft=DraftConfig(**(shape | (draft or {}))),
        data=DataConfig(
            train_files=[str(world / "train.jsonl")], eval_files=[str(world / "eval.jsonl")], max_length=64
        ),
        train=TrainConfig(**(defaults | train)),
        logging=LoggingConfig(log_steps=1),
        output_dir=str(output_dir),
    )


def tuned_target(world: Path, folder: Path) -> str:
    """A copy of the world's target with slightly other weights. Returns its folder."""
    tuned = shutil.copytree(world / "target", folder / "tuned")
    model = Qwen3ForCausalLM.from_pretrained(tuned)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    model.save_pretrained(tuned)
    return str(tuned)


def changed(config: TrainRun, **sections: dict[str, Any]) -> TrainRun:
    """A copy with `changed(config, data={"max_length": 32})`."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    )


def draft_weights(folder: Path | str) -> bytes:
    """The weight file of a checkpoint, byte for byte."""
    return (Path(folder) / "draft" / "model.safetensors").read_bytes()


def optimizer_state(folder: Path | str) -> bytes:
    """The optimizer file of a checkpoint, byte for byte."""
    return (Path(folder) / "state" / "optimizer.safetensors").read_bytes()


def logged_rows(output_dir: Path | str) -> list[dict[str, Any]]:
    """metrics.jsonl without what tells of the machine."""
    return [{name: row[name] for name in row if not is_timing(name)} for row in read_metrics(output_dir)]


def assert_same_end(checkpoint: Path, other: Path) -> None:
    """Two runs wrote the same draft, optimizer state and metrics, bit for bit."""
    assert checkpoint.name == other.name
    assert draft_weights(checkpoint) == draft_weights(other)
    assert optimizer_state(checkpoint) == optimizer_state(other)
    assert logged_rows(checkpoint.parents[1]) == logged_rows(other.parents[1])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher sets for one of several ranks on the CPU."""
    return {
        "ACCELERATE_USE_CPU": "true",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def train_in_child(
    config: TrainRun, folder: str, die_at: tuple[str, int] | None = None, launcher: dict[str, str] | None = None
) -> None:
    """Train in `folder`.

    Args:
        die_at: ("fsync", 3): the process kills itself instead of its third call of os.fsync; ("accumulation", 3):
            instead of its third backward pass that adds to the gradients of an earlier one.
        launcher: environment variables.
    """
    from deepspec.training import train

    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= launcher or {}
    if die_at is not None and die_at[0] == "accumulation":
        die_in_accumulation(die_at[1])
    elif die_at is not None:
        die_at_call(*die_at)
    train(config)


def die_at_call(function: str, call: int) -> None:
    original, calls = getattr(os, function), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(os, function, counted)


def die_in_accumulation(call: int) -> None:
    original, calls, is_adding = Accelerator.backward, 0, False

    def counted(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        nonlocal calls, is_adding
        calls += is_adding
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *args, **kwargs)
        is_adding = not self.sync_gradients

    Accelerator.backward = counted
