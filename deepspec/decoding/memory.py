"""Whether the caches fit, asked before they are allocated."""

from __future__ import annotations

import psutil
import torch

from deepspec.config import ConfigError
from deepspec.decoding.cache import SlotCache
from deepspec.decoding.proposers import Proposer
from deepspec.targets import Target


def check_memory(target: Target, proposer: Proposer | None, slots: int, columns: int) -> None:
    """Compare the caches of target and proposer with the free memory of the device.

    Raises:
        ConfigError: they do not fit; says how many slots would.
    """
    each = SlotCache.bytes_per_slot(target, columns, 1 + (proposer.block_size if proposer else 0))
    if proposer:
        each += proposer.bytes_per_slot(columns)
    free = free_bytes(target.device)
    if slots * each > free:
        raise ConfigError(
            f"decode.batch_size={slots}: the caches of so many slots of {columns} positions need {gib(slots * each)} "
            f"({gib(each)} each), and {gib(free)} are free on {target.device}; {free // each} would fit: lower "
            "decode.batch_size or decode.max_length"
        )


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
