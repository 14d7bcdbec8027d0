"""Measurements in processes of their own, so that none sees the memory or the caches of another."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


class OutOfMemory(RuntimeError):
    """The process was killed, which the system does where memory runs out."""


def in_fresh_process(module: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of the last line that `python -m module name=value ...` prints.

    Raises:
        OutOfMemory: the process was killed.
        RuntimeError: it failed otherwise.
    """
    command = [sys.executable, "-m", module, *(f"{name}={value}" for name, value in options.items())]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode == -signal.SIGKILL:
        raise OutOfMemory(f"{' '.join(command)} was killed: not enough memory")
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])
