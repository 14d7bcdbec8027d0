"""One way of computing the losses over the vocabulary, measured in this process; prints a line of JSON.

    python -m benchmarks.objective_step implementation=chunked vocab=32768 slots=448

`peak_bytes`: most memory in use during the steps (forward and backward) beyond what was in use before the first, so
without the inputs; of the process on a CPU, of the allocator on a GPU. `seconds`: of each step after a first one that
is not counted. `out_of_memory` instead of these where there was not enough. All inputs are random numbers.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from deepspec.arguments import run_command
from deepspec.config import ConfigError
from deepspec.kernels.losses import vocabulary_losses

CE, TV = 0.1, 0.9


@dataclass
class StepOptions:
    """Peak memory and seconds of some steps of one implementation of the losses."""

    implementation: str = "chunked"  # reference, chunked or triton
    vocab: int = 32768
    slots: int = 448
    supervised_every: int = 1  # 2: only every other slot carries a loss
    hidden: int = 256
    rank: int = 64
    dtype: str = "float32"  # of hidden states and head; W2 is trained in float32
    device: str = "cpu"
    steps: int = 2  # counted; one more goes first


class Step:
    """Random inputs of the losses, and one forward and backward pass over the supervised slots."""

    def __init__(self, options: StepOptions):
        self.implementation = options.implementation
        self.device, dtype = torch.device(options.device), getattr(torch, options.dtype)
        torch.manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=self.device).mul_(scale)

        slots, vocab, size, rank = options.slots, options.vocab, options.hidden, options.rank
        self.hidden, self.target_hidden = normal(slots, size), normal(slots, size)
        self.latents = normal(slots, rank)
        self.head = normal(vocab, size, scale=2 * size**-0.5)
        self.markov_w2 = normal(vocab, rank, dtype=torch.float32, scale=rank**-0.5)
        self.targets = torch.randint(0, vocab, (slots,), device=self.device)
        self.weights = torch.rand(slots, device=self.device)
        self.supervised = torch.arange(slots, device=self.device) % options.supervised_every == 0
        self.trained = [self.hidden.requires_grad_(), self.latents.requires_grad_(), self.markov_w2.requires_grad_()]

    def run(self) -> None:
        chosen = self.supervised.nonzero().squeeze(1)
        losses = vocabulary_losses(
            self.hidden[chosen],
            self.latents[chosen],
            self.head,
            self.markov_w2,
            self.targets[chosen],
            self.target_hidden[chosen],
            self.weights[chosen],
            CE,
            TV,
            implementation=self.implementation,
        )
        losses.loss.backward()
        for tensor in self.trained:
            tensor.grad = None

    def timed(self) -> float:
        self._wait()
        started = time.perf_counter()
        self.run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def memory_in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """Bytes since the process began, or since the allocator's peak was reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: unlike getrusage, does not count the parent process before this one's program began
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fail_rather_than_be_killed() -> None:
    """Let allocations fail that the machine's free memory cannot serve."""
    allowed = psutil.Process().memory_info().vms + psutil.virtual_memory().available
    resource.setrlimit(resource.RLIMIT_AS, (allowed, resource.RLIM_INFINITY))


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def main(options: StepOptions) -> None:
    if options.implementation not in ("reference", "chunked", "triton"):
        raise ConfigError(f"implementation={options.implementation}: must be reference, chunked or triton")
    step = Step(options)
    if step.device.type == "cpu":
        fail_rather_than_be_killed()
    before = memory_in_use(step.device)
    try:
        seconds = [step.timed() for _ in range(options.steps + 1)]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(json.dumps({"out_of_memory": True}))
        return
    print(json.dumps({"peak_bytes": peak_memory(step.device) - before, "seconds": seconds[1:]}))


if __name__ == "__main__":
    run_command(main, StepOptions)
