"""`speculators train` on a CPU: its trainer moves everything to device 0 of an accelerator, and ends without one
("RuntimeError: Cannot access accelerator device when none is available")."""

from __future__ import annotations

import torch
from speculators.train import trainer
from speculators.train.cli import main
from speculators.train.config import TrainConfig

if __name__ == "__main__":
    trainer.get_local_rank = lambda: "cpu"
    torch.accelerator.synchronize = lambda *_: None
    main(TrainConfig.resolve())
