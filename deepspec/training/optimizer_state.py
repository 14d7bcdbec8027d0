"""What AdamW knows, in one file that does not depend on the launcher or the number of ranks.

For every trained parameter the file holds its two running averages in float32 and full shape (`NAME.exp_avg`,
`NAME.exp_avg_sq`) and, as metadata, the number of updates done, which bias correction needs. DeepSpeed cuts the
averages over the ranks: they are put together when saving and cut again when loading, one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deepspec.checkpoints import CheckpointError
from deepspec.files import safetensors_header
from deepspec.training.devices import zero_stage

MOMENTS = ("exp_avg", "exp_avg_sq")
_UPDATES = "updates"


def save_optimizer_state(
    file: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, accelerator: Accelerator
) -> None:
    """Write the file on the main rank. Every rank calls this: each tensor is gathered from all of them.

    Args:
        parameters: all that are trained, by name.
        optimizer: what `accelerator.prepare` made of a `torch.optim.AdamW`.
    """
    state = _state_of(optimizer, accelerator)
    shapes = {f"{name}.{moment}": whole_shape(parameters[name]) for name in parameters for moment in MOMENTS}
    tensors = (state.moment(parameters[name], moment) for name in parameters for moment in MOMENTS)
    if accelerator.is_main_process:
        file.parent.mkdir(exist_ok=True)
        write_float32(file, shapes, tensors, {_UPDATES: str(state.updates())})
    else:
        for _ in tensors:
            pass


def load_optimizer_state(
    file: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, accelerator: Accelerator
) -> None:
    """Continue with the state in `file`. Every rank calls this and reads the whole file, one tensor at a time.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to other parameters.
    """
    state = _state_of(optimizer, accelerator)
    try:
        with safe_open(file, framework="pt") as stored:
            state.start(int(stored.metadata()[_UPDATES]))
            for name, parameter in parameters.items():
                for moment in MOMENTS:
                    value = stored.get_tensor(f"{name}.{moment}")
                    if value.shape != whole_shape(parameter):
                        raise ValueError(f"{name}.{moment} is {list(value.shape)}, not {list(whole_shape(parameter))}")
                    state.set_moment(parameter, moment, value)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not the optimizer state of this draft ({error}); continue from another checkpoint, or start anew "
            "with train.resume=never output_dir=..."
        ) from error


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, also where ZeRO-3 has cut it over the ranks."""
    return getattr(parameter, "ds_shape", parameter.shape)


def write_float32(
    file: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[Tensor], metadata: dict[str, str]
) -> None:
    """A safetensors file of float32 tensors, one at a time in memory; the library would need all of them."""
    entries = {name: ("F32", shape, 4 * math.prod(shape)) for name, shape in shapes.items()}
    with file.open("wb") as opened:
        opened.write(safetensors_header(entries, metadata))
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert (tensor.dtype, tensor.shape) == (torch.float32, torch.Size(shape)), (tensor.dtype, tensor.shape)
            opened.write(tensor.detach().cpu().contiguous().numpy().astype("<f4", copy=False).data)


class _State(Protocol):
    def updates(self) -> int:
        """Updates done."""

    def start(self, updates: int) -> None:
        """Make averages of zeros, as after so many updates."""

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """One average in full shape; zeros before the first update. Every rank calls this."""

    def set_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Take this rank's part of one average."""


def _state_of(optimizer: Any, accelerator: Accelerator) -> _State:
    stage = zero_stage(accelerator)
    return _WholeState(optimizer.optimizer) if stage is None else _PartitionedState(optimizer.optimizer, stage)


class _WholeState:
    """One process or DDP: every rank has all of it."""

    def __init__(self, adam: torch.optim.Optimizer):
        self.adam = adam

    def updates(self) -> int:
        return _updates(self.adam)

    def start(self, updates: int) -> None:
        for parameter in (p for group in self.adam.param_groups for p in group["params"]):
            self.adam.state[parameter] = _averages_of_zeros(self.adam, parameter, updates)

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        return self.adam.state[parameter][name] if parameter in self.adam.state else torch.zeros_like(parameter)

    def set_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        self.adam.state[parameter][name].copy_(value)


class _PartitionedState:
    """DeepSpeed ZeRO: AdamW works on flat float32 tensors, which are this rank's parts of all parameters."""

    def __init__(self, zero: Any, stage: int):
        self.zero = zero
        self.adam: torch.optim.Optimizer = zero.optimizer
        self.is_stage_3 = stage == 3
        self.flat = zero.fp32_partitioned_groups_flat if self.is_stage_3 else zero.single_partition_of_fp32_groups

    def updates(self) -> int:
        return _updates(self.adam)

    def start(self, updates: int) -> None:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for group, flat in enumerate(self.flat):
            self.adam.state[flat] = _averages_of_zeros(self.adam, flat, updates)
            if not self.is_stage_3:  # DeepSpeed does this after the first update
                lazy_init_hp_params_optimizer_state(self.zero.bit16_groups[group], flat, self.adam.state)

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.adam.state:
            return torch.zeros(whole_shape(parameter))
        return safe_get_full_optimizer_state(parameter, name)

    def set_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.is_stage_3:
            safe_set_local_optimizer_state(parameter, _own_part(parameter, value), name)
        else:
            safe_set_full_optimizer_state(parameter, value, name)


def _own_part(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that ZeRO-3 cuts like `parameter`: equal parts, the last one filled up with zeros.

    `safe_set_full_optimizer_state` fails where a parameter cannot be cut evenly (DeepSpeed 0.19).
    """
    from deepspeed import comm

    part = whole.new_zeros(parameter.ds_tensor.numel())
    own = whole.flatten()[comm.get_rank(parameter.ds_process_group) * part.numel() :][: part.numel()]
    part[: own.numel()] = own
    return part


def _updates(adam: torch.optim.Optimizer) -> int:
    counts = {int(state["step"]) for state in adam.state.values()}
    assert len(counts) <= 1, counts
    return counts.pop() if counts else 0


def _averages_of_zeros(adam: torch.optim.Optimizer, like: Tensor, updates: int) -> dict[str, Any]:
    """The state of one tensor as its optimizer keeps it: AdamW counts in a tensor, DeepSpeedCPUAdam in an int."""
    step: Any = updates
    if isinstance(adam, torch.optim.AdamW):
        on_device = adam.defaults["fused"] or adam.defaults["capturable"]
        step = torch.tensor(float(updates), device=like.device if on_device else "cpu")
    return {"step": step} | {moment: torch.zeros_like(like, requires_grad=False) for moment in MOMENTS}
