"""Runs decoding kernels in a process of its own, where Triton is what a test needs it to be.

kernels_driver.py interpret CASES RESULTS: reads {name: (operation of OPERATIONS, arguments)}, writes {name: what the
Triton implementation returns}; under Triton's interpreter, on the CPU.
kernels_driver.py compile CASES RESULTS: the same calls, but every launch only compiles its kernel for a GPU; writes
[(kernel, grid)] of all launches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.kernels.biased_sampling import argmax_biased, draw_biased
from deepspec.kernels.key_values import append_key_values
from deepspec.kernels.rejection import verify_logits
from deepspec.kernels.rms_norm import rms_norm

SHARED_MEMORY = 101_376  # bytes of a program on the GPUs that have least of it (compute capability 8.6 and 8.9)


def append(implementation: str, **arguments: Tensor) -> tuple[Tensor, ...]:
    """The caches, afterwards."""
    append_key_values(**arguments, implementation=implementation)
    return arguments["keys_cache"], arguments["values_cache"]


def draw(implementation: str, **arguments: Any) -> tuple[Tensor, ...]:
    return draw_biased(**arguments, implementation=implementation)


def draw_near(implementation: str, nearness: float, **arguments: Any) -> tuple[Tensor, ...]:
    """Draws just below and just above the boundary before the token that each row would draw.

    Returns:
        The distribution, the uniforms below, what they draw, the uniforms above, what they draw.
    """
    tokens, distribution = draw(implementation, **arguments)
    cumulative = distribution.double().cumsum(-1)
    before = (cumulative.gather(1, tokens[:, None]) - distribution.gather(1, tokens[:, None])) / cumulative[:, -1:]
    below, above = (before[:, 0] - nearness).clamp(min=0), before[:, 0] + nearness
    drawn = [draw(implementation, **arguments | {"uniform": uniform})[0] for uniform in (below, above)]
    return distribution, below, drawn[0], above, drawn[1]


def argmax(implementation: str, **arguments: Tensor) -> tuple[Tensor, ...]:
    return (argmax_biased(**arguments, implementation=implementation),)


def verify(implementation: str, **arguments: Any) -> tuple[Tensor, ...]:
    return tuple(verify_logits(**arguments, implementation=implementation))


def norm(implementation: str, **arguments: Any) -> tuple[Tensor, ...]:
    return (rms_norm(**arguments, implementation=implementation),)


OPERATIONS = {"append": append, "draw": draw, "draw_near": draw_near, "argmax": argmax, "verify": verify, "norm": norm}
Case = tuple[str, dict[str, Any]]


def in_a_process(task: str, cases: dict[str, Case], folder: Path) -> Any:
    """What this file writes for the cases."""
    torch.save(cases, folder / "cases.pt")
    subprocess.run(
        [sys.executable, __file__, task, folder / "cases.pt", folder / "results.pt"],
        env=os.environ
        | {"TRITON_INTERPRET": "1" if task == "interpret" else "0", "TRITON_CACHE_DIR": str(folder / "compiled")},
        check=True,
        timeout=240,
    )
    return torch.load(folder / "results.pt")


def pretend_to_have_a_gpu() -> list[tuple[str, tuple[int, ...]]]:
    """Let Triton compile for one. Returns the list to which every launch is added."""
    import triton
    from triton.backends.compiler import GPUTarget

    launches = []

    class Launcher:
        def __init__(self, source: Any, metadata: Any):
            self.name = source.fn.__name__

        def __call__(self, *arguments: Any) -> None:
            launches.append((self.name, arguments[:3]))

    class Driver:
        launcher_cls = Launcher
        utils = None

        def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
            assert binary.startswith(b"\x7fELF")
            return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_MEMORY}

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver = Driver()
    driver.utils = driver
    triton.runtime.driver.set_active(driver)
    return launches


if __name__ == "__main__":
    all_launches = pretend_to_have_a_gpu() if sys.argv[1] == "compile" else None
    results = {name: OPERATIONS[kind]("triton", **given) for name, (kind, given) in torch.load(sys.argv[2]).items()}
    torch.save(results if all_launches is None else all_launches, sys.argv[3])
