"""Save and restore the trained state: one kind of checkpoint for every launcher and any number of ranks.

The draft's folder is the one copy of the weights: what is trained in float32, the target's embedding and head in the
target's dtype. state/optimizer.safetensors is what AdamW knows. No random state is saved because training uses none:
the order of the data and the anchors are pure functions of (seed, step), and the draft has no dropout.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from deepspec.checkpoints import DRAFT, STATE, rotate, write_checkpoint
from deepspec.config import TrainRun
from deepspec.drafts import DraftModel
from deepspec.training.devices import launcher_name
from deepspec.training.optimizer_state import load_optimizer_state, save_optimizer_state
from deepspec.training.resume import TARGET_WEIGHTS, digest_of, run_identity

OPTIMIZER = "optimizer.safetensors"


class TrainerState:
    """Writes checkpoints of one run and restores what is not in the draft's own folder.

    Args:
        draft: as `Accelerator.prepare` left it.
        optimizer: what `Accelerator.prepare` returned.
        steps: of the whole run.
        samples: that are trained on.
    """

    def __init__(
        self, config: TrainRun, accelerator: Accelerator, draft: DraftModel, optimizer: Any, steps: int, samples: int
    ):
        self.config = config
        self.accelerator = accelerator
        self.draft = draft
        self.optimizer = optimizer
        identity = run_identity(config) if accelerator.is_main_process else {}
        identity |= {TARGET_WEIGHTS: draft.config.target_fingerprint}
        self.description: dict[str, Any] = {
            "steps": steps,
            "samples": samples,
            "identity": identity,
            "config_digest": digest_of(identity),
            "config": asdict(config),
            "world_size": accelerator.num_processes,
            "launcher": launcher_name(accelerator),
            "versions": _versions(),
        }

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
        """The optimizer's state; the draft was built from the checkpoint's draft folder. Raises CheckpointError."""
        parameters = dict(self.draft.trainable_parameters())
        load_optimizer_state(checkpoint / STATE / OPTIMIZER, parameters, self.optimizer, self.accelerator)

    def _write(self, folder: Path) -> None:
        is_main = self.accelerator.is_main_process
        weights = _whole_weights(self.draft, is_main=is_main)
        if is_main:
            self.draft.save_pretrained(folder / DRAFT, state_dict=weights)
        del weights
        parameters = dict(self.draft.trainable_parameters())
        save_optimizer_state(folder / STATE / OPTIMIZER, parameters, self.optimizer, self.accelerator)


def _whole_weights(draft: DraftModel, *, is_main: bool) -> dict[str, Tensor]:
    """The draft's state dict; what ZeRO-3 has cut is gathered tensor by tensor and kept in the main rank's host memory.

    Every rank calls this; the dict is complete on the main rank.
    """
    weights = draft.state_dict()
    for name, parameter in draft.named_parameters():
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_full_fp32_param

            whole = safe_get_full_fp32_param(parameter)
            if is_main:
                weights[name] = whole.cpu()
    return weights


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("deepspec", "transformers", "accelerate", "deepspeed"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
