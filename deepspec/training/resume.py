"""Where a run starts: from scratch, from a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from deepspec.checkpoints import (
    DRAFT,
    CheckpointError,
    list_checkpoints,
    newest_checkpoint,
    read_trainer_state,
    verify_checkpoint,
)
from deepspec.config import ConfigError, TrainRun, flatten
from deepspec.data.sources import source_digest
from deepspec.files import sha256_of
from deepspec.targets import dtype_name, resolve_dtype
from deepspec.training.devices import launcher_name
from deepspec.training.schedule import learning_rate, total_steps

logger = logging.getLogger(__name__)

# Keys that may differ between a run and its continuation: they do not change what is learned, or say where something
# lies whose content is compared instead, or (steps, epochs) how long to go on.
FREE_KEYS = {
    "output_dir",
    "data.train_files",
    "data.eval_files",
    "data.eval_samples",
    "data.chat_template",
    "data.on_bad_row",
    "data.num_workers",
    "target.path",
    "target.revision",
    "target.gguf_file",
    "target.device_map",
    "train.steps",
    "train.epochs",
    "train.micro_batch_size",
    "train.tokens_per_batch",
    "train.compile",
    "train.activation_checkpointing",
    "train.save_steps",
    "train.keep_checkpoints",
    "train.eval_steps",
    "train.resume",
    "train.start_from",
    "train.collective_timeout",
}
FREE_GROUPS = ("logging.", "features.")
DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
# What a run is compared by beside its settings.
TRAIN_DATA, CHAT_TEMPLATE, TARGET_WEIGHTS = (
    "content of data.train_files (SHA-256)",
    "content of data.chat_template (SHA-256)",
    "weights of the target (fingerprint)",
)


@dataclass(frozen=True)
class Start:
    """Where a run starts."""

    checkpoint: Path | None  # None = from scratch
    step: int  # optimizer steps already done
    finished: bool  # nothing is left to do


def find_start(config: TrainRun, accelerator: Accelerator) -> Start:
    """What `train.resume` and the run folder ask for. Rank 0 decides, the others follow.

    Raises:
        ConfigError: the run folder belongs to a run with other settings or data. Its target is compared later, see
            `check_same_target`.
        CheckpointError: a checkpoint named by `train.resume` is damaged.
    """
    decision: list[Any] = [_decide(config, accelerator) if accelerator.is_main_process else None]
    broadcast_object_list(decision)
    return decision[0]


def _decide(config: TrainRun, accelerator: Accelerator) -> Start:
    existing = list_checkpoints(config.output_dir)
    if config.train.resume == "never":
        if existing:
            raise ConfigError(
                f"train.resume=never, but {config.output_dir} already holds checkpoints up to {existing[-1].name}; "
                "give another output_dir, or delete that folder"
            )
        return Start(None, 0, finished=False)
    if config.train.resume == "auto":
        checkpoint = newest_checkpoint(config.output_dir, subfolder="")
        if checkpoint is None:
            if existing:
                logger.warning("no checkpoint in %s is valid: training starts from scratch", config.output_dir)
            return Start(None, 0, finished=False)
    else:
        checkpoint = _named_checkpoint(config.train.resume)
    state = read_trainer_state(checkpoint)
    _check_same_run(config, state, checkpoint)
    _note_other_layout(config, accelerator, state, checkpoint)
    if config.train.start_from is not None:
        logger.warning(
            "train.start_from=%s counts at the beginning of a run alone: this one goes on from %s",
            config.train.start_from,
            checkpoint,
        )
    return Start(checkpoint, state["step"], finished=_steps_of_whole_run(config, state) <= state["step"])


def _steps_of_whole_run(config: TrainRun, state: dict[str, Any]) -> int:
    """What is asked for now, which may be more or fewer than before; what follows from that is said."""
    key = "train.epochs" if config.train.steps is None else "train.steps"
    done, before, now = state["step"], state["steps"], total_steps(config.train, state["samples"])
    if now < done:
        logger.warning("%s=%s: asks for %d steps, but %d are done", key, flatten(config)[key], now, done)
    if done < now != before:
        rates = [
            learning_rate(done, peak=config.train.lr, warmup_ratio=config.train.warmup_ratio, steps=steps)
            for steps in (before, now)
        ]
        logger.warning(
            "%s=%s: %d steps instead of %d; from step %d on the learning rate follows the new schedule and is %.2e "
            "there instead of %.2e",
            key,
            flatten(config)[key],
            now,
            before,
            done + 1,
            rates[1],
            rates[0],
        )
    return now


def _named_checkpoint(path: str) -> Path:
    """The checkpoint that train.resume names; of a run folder, its newest."""
    folder = Path(path).expanduser()
    if (folder / "checkpoints").is_dir():
        newest = newest_checkpoint(folder, subfolder="")
        if newest is None:
            raise CheckpointError(f"train.resume={path}: no valid checkpoint in this run folder")
        return newest
    if not folder.is_dir():
        raise ConfigError(f"train.resume={path}: must be auto, never, or an existing checkpoint folder")
    if (folder / "config.json").is_file():
        raise ConfigError(
            f"train.resume={path}: a draft without the state of its optimizer cannot be continued; begin a new run "
            f"with its weights by train.start_from={path}"
        )
    verify_checkpoint(folder)
    return folder


def run_identity(config: TrainRun) -> dict[str, Any]:
    """Every setting that changes what is learned, by its dotted key, and the content of the files it reads."""
    identity = {
        key: value for key, value in flatten(config).items() if key not in FREE_KEYS and not key.startswith(FREE_GROUPS)
    }
    target = config.target
    dtype = resolve_dtype(target.dtype, target.path, revision=target.revision, gguf_file=target.gguf_file)
    identity["target.dtype"] = dtype_name(dtype)
    identity[TRAIN_DATA] = [source_digest(file) for file in config.data.train_files]
    identity[CHAT_TEMPLATE] = _content(config.data.chat_template)
    return json.loads(json.dumps(identity, default=str))


def _content(file: str | None) -> str | None:
    return sha256_of(file) if file is not None and Path(file).is_file() else None


def check_same_target(checkpoint: Path, fingerprint: str) -> None:
    """Refuse to continue with another target, once its fingerprint is known.

    Raises:
        ConfigError: the checkpoint belongs to a run with other target weights.
    """
    before = read_trainer_state(checkpoint)["identity"]
    _refuse_differences(before | {TARGET_WEIGHTS: fingerprint}, before, checkpoint)


def digest_of(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _check_same_run(config: TrainRun, state: dict[str, Any], checkpoint: Path) -> None:
    before = {key: value for key, value in state["identity"].items() if key != TARGET_WEIGHTS}
    _refuse_differences(run_identity(config), before, checkpoint)


def _refuse_differences(now: dict[str, Any], before: dict[str, Any], checkpoint: Path) -> None:
    changed = [
        f"{key}: was {_shown(before.get(key))}, is now {_shown(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{checkpoint} was written by a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nGive the old ones to continue it; or start a new run in another output_dir, either with the weights "
            f"of its draft (train.start_from={checkpoint / DRAFT}) or from scratch (train.resume=never)"
        )


def _shown(value: Any) -> str:
    text = DIGEST.sub(r"\1...", json.dumps(value))
    return text if len(text) <= 200 else f"{text[:200]}..."


def _note_other_layout(config: TrainRun, accelerator: Accelerator, state: dict[str, Any], checkpoint: Path) -> None:
    """Say what is no longer exact when the work of a step is split differently than before."""
    before = _layout(state["launcher"], state["world_size"], state["config"]["train"])
    now = _layout(launcher_name(accelerator), accelerator.num_processes, asdict(config.train))
    if before != now:
        logger.warning(
            "%s was written by %s, and this is %s: every step keeps its samples and anchors, but gradients are summed "
            "in another order, so weights will differ by rounding (about 1e-6) from those of an uninterrupted run",
            checkpoint,
            before,
            now,
        )


def _layout(launcher: str, ranks: int, train: dict[str, Any]) -> str:
    key = "tokens_per_batch" if train["tokens_per_batch"] else "micro_batch_size"
    return f"{launcher} on {ranks} rank{'s' if ranks > 1 else ''} with train.{key}={train[key]}"
