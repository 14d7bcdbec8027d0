"""Start accelerate on whatever it was launched: one device, DDP or DeepSpeed; GPUs or CPUs."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from transformers.utils.logging import disable_progress_bar

from deepspec.config import ConfigError, TrainConfig, TrainRun
from deepspec.ranks import check_ranks, launched_ranks, runs_on_cpu
from deepspec.training.batches import batch_split


def start_accelerator(config: TrainRun) -> Accelerator:
    """An accelerator for this run. Also works when an earlier run in the same process left one behind (multirun).

    Mixed precision is not handed to accelerate: under DeepSpeed it would hold the weights in bfloat16, while
    `train.mixed_precision=bf16` promises float32 weights and gradients. `autocast` gives that under every launcher.

    Raises:
        ConfigError: the global batch cannot be split over the ranks, or an unsupported ZeRO stage.
    """
    _forget_earlier_run()
    _quieten_libraries()
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    use_cpu = runs_on_cpu()
    if use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed even where nothing uses it
    if with_deepspeed and use_cpu:
        _switch_off_compiled_collectives()
    batch_split(config.train, launched_ranks())
    accelerator = Accelerator(
        cpu=use_cpu and not with_deepspeed,
        mixed_precision="no",
        deepspeed_plugin=_deepspeed_plugin(config.train) if with_deepspeed else None,
        log_with=None if config.logging.wandb.mode == "disabled" else "wandb",
        kwargs_handlers=[_process_group(use_cpu, timedelta(minutes=config.train.collective_timeout))],
    )
    check_ranks(accelerator.num_processes)
    return accelerator


def autocast(accelerator: Accelerator, mixed_precision: str) -> torch.autocast:
    """The context of every forward pass."""
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=mixed_precision == "bf16")


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def _process_group(use_cpu: bool, timeout: timedelta) -> InitProcessGroupKwargs:
    """Without an explicit backend, ranks on CPUs would each believe to be rank 0 of 1."""
    launched = "LOCAL_RANK" in os.environ
    return InitProcessGroupKwargs(backend="gloo" if use_cpu and launched else None, timeout=timeout)


def _switch_off_compiled_collectives() -> None:
    """DeepSpeed's shared-memory collectives need a minute of compiling; gloo does without."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _deepspeed_plugin(train: TrainConfig) -> DeepSpeedPlugin:
    """The launcher's DeepSpeed settings with the clipping of this run. The trainer says where accumulation ends."""
    plugin = DeepSpeedPlugin(gradient_accumulation_steps=1, gradient_clipping=train.grad_clip)
    if plugin.zero_stage not in (0, 1, 2):
        raise ConfigError(
            f"zero_stage={plugin.zero_stage}: the draft's weights are saved from one rank, so use ZeRO stage 1 or 2"
        )
    plugin.deepspeed_config["gradient_accumulation_steps"] = 1
    plugin.deepspeed_config["gradient_clipping"] = train.grad_clip
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # not used
    return plugin


def _quieten_libraries() -> None:
    """Their bars and notes on loading, saving and probing for a compiler would break into the progress of training."""
    for name in ("accelerate", "compilers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()


def _forget_earlier_run() -> None:
    """Reset accelerate's singletons; the process group stays and is used again."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
