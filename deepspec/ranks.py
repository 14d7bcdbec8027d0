"""What the launcher asked for, read before accelerate starts: ranks and device."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState


def launched_ranks() -> int:
    """Processes that `accelerate launch` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched_rank() -> int:
    """Which of them this is; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Which of those on this machine this is; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def ranks_on_this_machine() -> int:
    """How many of them share this machine; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank_device() -> torch.device:
    """The device of this rank on its machine."""
    accelerator = None if runs_on_cpu() else torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, local_rank())


def runs_on_cpu() -> bool:
    """Whether the launcher forces the CPU or there is no accelerator."""
    forced = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    return forced or not torch.accelerator.is_available()


def check_ranks(seen: int) -> None:
    """Refuse to work as rank 0 of 1 where more ranks were launched.

    Raises:
        RuntimeError: the launcher and the process group disagree on the number of ranks.
    """
    if seen != launched_ranks():
        raise RuntimeError(
            f"the launcher started {launched_ranks()} ranks, but this one sees {seen}: launch with one of "
            "configs/accelerate/*.yaml"
        )


def start_ranks(patience: timedelta | None = None) -> PartialState:
    """This process among those that were launched: `accelerate launch` on GPUs or CPUs, or a single one.

    Args:
        patience: how long a rank waits for the others; None = PyTorch's own bound.

    Raises:
        RuntimeError: the launcher and the process group disagree on the number of ranks.
    """
    use_cpu = runs_on_cpu()
    options: dict[str, Any] = {"backend": "gloo"} if use_cpu and launched_ranks() > 1 else {}
    if patience is not None and launched_ranks() > 1:
        options["timeout"] = patience
    state = PartialState(cpu=use_cpu, **options)
    check_ranks(state.num_processes)
    return state


class LostRankError(RuntimeError):
    """Another rank died or stopped answering."""


LOST_RANK = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "socket")


def tells_of_lost_rank(error: Exception) -> bool:
    """Whether a failed collective says that another rank died or no longer answers (gloo, NCCL, their store)."""
    of_torch = type(error) is RuntimeError or isinstance(error, torch.distributed.DistError)
    return of_torch and any(sign in str(error).lower() for sign in LOST_RANK)
