"""Start accelerate on whatever it was launched: one device, DDP or DeepSpeed; GPUs or CPUs."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import nn
from transformers.integrations import unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

from deepspec.config import ConfigError, TrainRun
from deepspec.ranks import check_ranks, launched_ranks, runs_on_cpu
from deepspec.training.batches import batch_split


def start_accelerator(config: TrainRun) -> Accelerator:
    """An accelerator for this run. Also works when an earlier run in the same process left one behind (multirun).

    Mixed precision is not handed to accelerate: under DeepSpeed it would hold the weights in bfloat16, while
    `train.mixed_precision=bf16` promises float32 weights and gradients. `cast_inside` gives that under every launcher.

    Raises:
        ConfigError: the global batch cannot be split over the ranks, or unsupported DeepSpeed settings.
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
    timeout = timedelta(minutes=config.train.collective_timeout)
    accelerator = Accelerator(
        cpu=use_cpu and not with_deepspeed,
        mixed_precision="no",
        deepspeed_plugin=_deepspeed_plugin(config.train.grad_clip) if with_deepspeed else None,
        log_with=None if config.logging.wandb.mode == "disabled" else "wandb",
        kwargs_handlers=[_process_group(use_cpu, timeout), DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    unset_hf_deepspeed_config()  # Transformers would cut the target over the ranks too; only the draft shall be
    check_ranks(accelerator.num_processes)
    return accelerator


def cast_inside(module: nn.Module, accelerator: Accelerator, mixed_precision: str) -> None:
    """Let `module.forward` run in bfloat16 autocast if `mixed_precision` is bf16.

    Inside the module because DeepSpeed's engine switches off what is entered around it.
    """
    context = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=mixed_precision == "bf16")
    module.forward = context(module.forward)


def zero_stage(accelerator: Accelerator) -> int | None:
    """DeepSpeed's ZeRO stage; None without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return accelerator.deepspeed_plugin.zero_stage


def launcher_name(accelerator: Accelerator) -> str:
    """one process, DDP, or DeepSpeed ZeRO with its stage."""
    stage = zero_stage(accelerator)
    if stage is not None:
        offloads = accelerator.deepspeed_plugin.offload_optimizer_device == "cpu"
        return f"DeepSpeed ZeRO-{stage}" + (" with optimizer offload" if offloads else "")
    return "DDP" if accelerator.num_processes > 1 else "one process"


def _process_group(use_cpu: bool, timeout: timedelta) -> InitProcessGroupKwargs:
    """Without an explicit backend, ranks on CPUs would each believe to be rank 0 of 1."""
    launched = "LOCAL_RANK" in os.environ
    return InitProcessGroupKwargs(backend="gloo" if use_cpu and launched else None, timeout=timeout)


def _switch_off_compiled_collectives() -> None:
    """DeepSpeed's shared-memory collectives need a minute of compiling; gloo does without."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _deepspeed_plugin(grad_clip: float) -> DeepSpeedPlugin:
    """The launcher's DeepSpeed settings with the clipping of this run and buffers that suit the draft."""
    plugin = DeepSpeedPlugin(gradient_accumulation_steps=1, gradient_clipping=grad_clip, zero3_init_flag=False)
    if plugin.zero_stage not in (1, 2, 3):
        raise ConfigError(f"zero_stage={plugin.zero_stage}: must be 1, 2 or 3; without ZeRO use DDP")
    if plugin.offload_optimizer_device not in ("none", "cpu"):
        raise ConfigError(f"offload_optimizer_device={plugin.offload_optimizer_device}: must be none or cpu")
    settings = plugin.deepspeed_config
    settings["gradient_accumulation_steps"] = 1
    settings["gradient_clipping"] = grad_clip
    settings["train_micro_batch_size_per_gpu"] = 1  # DeepSpeed only counts samples with it
    settings.setdefault("zero_force_ds_cpu_optimizer", False)  # DeepSpeed's own CPU Adam is compiled at the first use
    for size in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"):
        settings["zero_optimization"].setdefault(size, "auto")  # accelerate derives them from the draft's hidden size
    return plugin


def _quieten_libraries() -> None:
    """Their bars and notes on loading, saving and probing for a compiler would break into the progress of training.

    So would warnings that DeepSpeed and accelerate call PyTorch's collectives and DDP by names that are getting old.
    """
    for name in ("accelerate", "compilers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()
    warnings.filterwarnings(
        "ignore", r"`(torch\.distributed\.\w+|broadcast_buffers)` is deprecated", category=FutureWarning
    )


def _forget_earlier_run() -> None:
    """Reset accelerate's singletons; the process group stays and is used again."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
