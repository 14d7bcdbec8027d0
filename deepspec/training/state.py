"""Save and restore the trained state: the draft as the one copy of the weights, the rest as accelerate writes it."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from deepspec.checkpoints import DRAFT, STATE, rotate, write_checkpoint
from deepspec.config import TrainRun
from deepspec.drafts import DSparkModel
from deepspec.training.devices import is_deepspeed
from deepspec.training.resume import digest_of, run_identity


class TrainerState:
    """Writes checkpoints of one run and restores what is not in the draft's own folder."""

    def __init__(self, config: TrainRun, accelerator: Accelerator, draft: DSparkModel, steps: int):
        self.config = config
        self.accelerator = accelerator
        self.draft = draft
        identity = run_identity(config) if accelerator.is_main_process else {}
        self.description: dict[str, Any] = {
            "steps": steps,
            "identity": identity,
            "config_digest": digest_of(identity),
            "config": asdict(config),
            "world_size": accelerator.num_processes,
            "distributed_type": accelerator.distributed_type.value,
            "versions": _versions(),
        }
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def save(self, step: int) -> Path:
        """Write the checkpoint of `step` and drop the oldest. Every rank calls this. Raises CheckpointError."""
        folder = write_checkpoint(
            self.config.output_dir,
            step,
            self._write,
            self.description,
            is_main=self.accelerator.is_main_process,
            barrier=self.accelerator.wait_for_everyone,
        )
        if self.accelerator.is_main_process:
            rotate(self.config.output_dir, self.config.train.keep_checkpoints, step)
        return folder

    def restore(self, checkpoint: Path) -> None:
        """Optimizer and random states; the draft itself was built from the checkpoint's draft folder."""
        options = {"load_module_strict": False} if is_deepspeed(self.accelerator) else {}
        self.accelerator.load_state(str(checkpoint / STATE), **options)
        self.accelerator.step = 0  # micro-steps of an earlier launch may not fit this one's accumulation

    def _write(self, folder: Path) -> None:
        options = {"exclude_frozen_parameters": True} if is_deepspeed(self.accelerator) else {}
        self.accelerator.save_state(str(folder / STATE), **options)
        if self.accelerator.is_main_process:
            self.draft.save_pretrained(folder / DRAFT)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("deepspec", "transformers", "accelerate", "deepspeed"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
