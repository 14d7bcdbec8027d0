"""`train`: distil a frozen target into a draft, from a configuration to a folder of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import OmegaConf

from deepspec.checkpoints import remove_unfinished_checkpoints
from deepspec.config import TrainRun, validate
from deepspec.files import write_atomically
from deepspec.ranks import LostRankError, tells_of_lost_rank
from deepspec.targets import Target
from deepspec.training.devices import start_accelerator
from deepspec.training.interrupt import StopRequest
from deepspec.training.report import Reporter
from deepspec.training.resume import find_start
from deepspec.training.setup import prepare_materials
from deepspec.training.trainer import Trainer


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    status: str  # finished; already finished (nothing was left to do); stopped (SIGTERM: the same command continues)
    step: int  # optimizer steps done, over all sessions of the run
    checkpoint: Path  # of `step`
    metrics: dict[str, Any] = field(default_factory=dict)  # of the last logged step of this session


def train(config: TrainRun, check_target: Callable[[Target], None] | None = None) -> TrainResult:
    """Train a draft, or continue to, as `config` says. Every rank of a launch calls this.

    Args:
        check_target: raises what would make a draft of this target useless; not asked where features come from
            elsewhere.

    Raises:
        ConfigError, DataError, ValueError: what cannot work in the configuration, the data or the run folder.
        CheckpointError: a checkpoint cannot be written, or the one named by train.resume cannot be read.
        NotFiniteError: the loss, the gradient or the target's features are not finite.
        LostRankError: another rank died or stopped answering.
    """
    validate(config)
    accelerator = start_accelerator(config)
    start = find_start(config, accelerator)
    if accelerator.is_main_process:
        remove_unfinished_checkpoints(config.output_dir)
    if start.finished and start.checkpoint is not None:
        accelerator.print(f"{config.output_dir} is already finished at step {start.step}: {start.checkpoint}")
        return TrainResult("already finished", start.step, start.checkpoint)
    materials = prepare_materials(config, accelerator, start.checkpoint, check_target)
    _write_config(config, accelerator)
    stop = StopRequest()
    trainer = Trainer(config, accelerator, materials, start, stop)
    with stop, Reporter(config, accelerator, start=start.step, steps=trainer.steps) as reporter:
        reporter.say(materials.target_summary)
        if materials.vocabulary_summary is not None:
            reporter.say(materials.vocabulary_summary)
        reporter.say(trainer.description())
        try:
            finished = trainer.run(reporter)
        except RuntimeError as error:
            if accelerator.num_processes > 1 and tells_of_lost_rank(error):
                raise LostRankError(_explain_lost_rank(trainer, accelerator)) from error
            raise
        status = "finished" if finished else "stopped"
        reporter.say(f"{status} at step {trainer.done}: {trainer.checkpoint}")
    assert trainer.checkpoint is not None
    accelerator.free_memory()
    return TrainResult(status, trainer.done, trainer.checkpoint, reporter.last_row)


def _explain_lost_rank(trainer: Trainer, accelerator: Accelerator) -> str:
    survivor = (
        f"continues from {trainer.checkpoint}" if trainer.checkpoint else "starts again, there is no checkpoint yet"
    )
    return (
        f"rank {accelerator.process_index} of {accelerator.num_processes} gave up in step {trainer.done + 1}: another "
        "rank died or did not answer within train.collective_timeout="
        f"{trainer.config.train.collective_timeout:g} minutes; its own output says why. The same command {survivor}"
    )


def _write_config(config: TrainRun, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        write_atomically(Path(config.output_dir) / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
