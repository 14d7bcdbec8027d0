"""Where and with what something was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from deepspec import __version__

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Of this project, Python and the libraries that numbers may depend on."""
    return {
        "deepspec": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def machine() -> dict[str, Any]:
    """Processor, cores, threads that PyTorch uses, memory in GiB, and the accelerator if there is one."""
    return {
        "cpu": cpu_name(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_name() -> str:
    """The processor's model name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def command_line() -> str:
    """The command of this process, as it can be typed in the project's root."""
    script = Path(sys.argv[0])
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    if (ranks := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        launcher = f"accelerate launch --num_processes {ranks}"
    return f"{launcher} {shlex.join([script.name, *sys.argv[1:]])}"
