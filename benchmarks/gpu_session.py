"""Everything that is worth knowing about this project on a GPU, in minutes: one command, one JSON, one table.

    python -m benchmarks.gpu_session [parts=[tests,decoding_1k]] [output_dir=outputs/gpu_session]

Each part is a process of its own with its own time limit and leaves PART.json and PART.log in `output_dir`; what it
had found stays also when it is stopped. A part that has finished before is not run again, so a session that was cut
off goes on where it was. At the end `session.json` holds all parts with the machine and the versions, `session.md`
the tables. Models have random weights of real shapes; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_tables import markdown
from benchmarks.summary import write_record
from deepspec.arguments import run_command
from deepspec.config import ConfigError, near_match
from deepspec.files import write_atomically

ROOT = Path(__file__).parent.parent
LOG_TAIL = 2000  # characters of a failed part's log that its JSON keeps
OK, FAILED, TIMED_OUT, INTERRUPTED = "ok", "failed", "timed out", "interrupted"


@dataclass(frozen=True)
class Part:
    """A command that prints lines of JSON, each a result."""

    command: Sequence[str]  # after the interpreter
    seconds: int  # at most


def module(name: str, *words: str) -> list[str]:
    return ["-m", f"benchmarks.{name}", *words]


def parts_of(model: str) -> dict[str, Part]:
    """In the order in which they run: what is wanted first comes first."""
    on_model = f"model={model}"
    decoding = ("gpu_decoding", on_model)
    training = ("training", on_model, "steps=3")
    sizes = ("vocab=151936", "slots=3584", "hidden=2560", "rank=256")
    losses = ("objective_step", "device=cuda", "dtype=bfloat16", "steps=5", *sizes)
    return {
        "ceilings": Part(module("device_clock"), 40),
        "decoding_1k": Part(
            module(*decoding, "context=1024", "batches=[1,8,32,128]", "kernels=true", "heads=true"), 120
        ),
        "training_given_packed": Part(module(*training, "features=given", "measure=ours, packed"), 100),
        "training_given_padded": Part(module(*training, "features=given", "measure=ours, padded"), 100),
        "training_resident_packed": Part(module(*training, "measure=ours, packed"), 100),
        "objective_naive": Part(module(*losses, "implementation=reference"), 40),
        "objective_chunked": Part(module(*losses, "implementation=chunked"), 40),
        "objective_triton": Part(module(*losses, "implementation=triton"), 40),
        "decoding_8k": Part(module(*decoding, "context=8192", "batches=[1,8,32]"), 90),
        "tests": Part(["-m", "pytest", "-q", "--tb=short", "-m", "gpu"], 150),
    }


@dataclass
class SessionOptions:
    """Run the parts that have not finished before."""

    model: str = "qwen3_4b"  # a shape of benchmarks.training
    parts: list[str] = field(default_factory=list)  # empty = all
    skip: list[str] = field(default_factory=list)
    output_dir: str = "outputs/gpu_session"
    commit: str | None = None  # of this code; null = ask git


def run_part(name: str, part: Part, folder: Path) -> dict[str, Any]:
    """What the part's JSON holds: its status, its results so far, and the end of its log where it failed."""
    started, log = time.monotonic(), folder / f"{name}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            status = FAILED if process.wait(timeout=part.seconds) else OK
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
        except KeyboardInterrupt:
            status = INTERRUPTED
        if status in (TIMED_OUT, INTERRUPTED):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    record = {
        "status": status,
        "seconds": time.monotonic() - started,
        "command": ["python", *part.command],
        "results": results_in(lines),
    }
    if name == "tests" and lines:
        record["results"] = [{"summary": lines[-1]}]
    if status != OK:
        record["log"] = "\n".join(lines)[-LOG_TAIL:]
    return record


def results_in(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The lines that are a JSON object each."""
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def main(options: SessionOptions) -> None:
    known = parts_of(options.model)
    for name in [*options.parts, *options.skip]:
        if name not in known:
            raise ConfigError(f"no part {name}; there are {', '.join(known)}.{near_match(name, known)}")
    if not torch.cuda.is_available():
        raise ConfigError("no GPU that PyTorch can use; nothing of this session would mean anything without one")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in known if name in (options.parts or known) and name not in options.skip]
    for name in chosen:
        file = folder / f"{name}.json"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["status"] == OK:
            continue
        record = run_part(name, known[name], folder)
        write_atomically(file, json.dumps(record, indent=1) + "\n")
        print(f"{name}: {record['status']}, {record['seconds']:.0f} s", flush=True)
        if record["status"] == INTERRUPTED:
            break
    files = [folder / f"{name}.json" for name in known]
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()}
    text = markdown(found)
    write_atomically(folder / "session.md", text)
    print(text)
    where = {"commit": options.commit or commit(), "gpu": gpu()}
    write_record(str(folder / "session.json"), found, options, **where)


def commit() -> str | None:
    """Of the working tree; None outside a repository."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or None


def gpu() -> dict[str, Any]:
    """Name, memory, multiprocessors and driver."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    run_command(main, SessionOptions)
