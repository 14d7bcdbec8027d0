"""Runs a driver script in the environment of an engine: a JSON request in, a JSON answer out, tensors in files beside;
and vLLM's server.

A driver is a file of `drivers/` that calls `answer(function)`; it imports nothing of this project.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import environments
from training_world import free_port

HERE = Path(sys.executable)  # the interpreter that runs the tests: it has this project
DRIVERS = Path(__file__).parent / "drivers"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
}


def run(python: Path | str, *words: str | Path) -> tuple[str, float]:
    """Output and wall seconds of a command in the project's root, that must succeed."""
    started = time.monotonic()
    done = subprocess.run([python, *words], cwd=environments.ROOT, env=_variables(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout, time.monotonic() - started


def drive(python: Path | str, driver: str, folder: Path, **request: Any) -> dict[str, Any]:
    """What the driver answers; `folder` keeps request, answer and what else the driver writes."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, answered = folder / f"{driver}.request.json", folder / f"{driver}.answer.json"
    asked.write_text(json.dumps(request, default=str), encoding="utf-8")
    answered.unlink(missing_ok=True)
    run(python, DRIVERS / f"{driver}.py", asked, answered)
    return json.loads(answered.read_text(encoding="utf-8"))


@contextmanager
def vllm_server(target: Path, log: Path, *words: str) -> Iterator[str]:
    """The URL of `vllm serve` with this target in float32."""
    port = free_port()
    command = [environments.vllm(), "-m", "vllm.entrypoints.openai.api_server", "--model", target, *words]
    command += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=_variables(), stdout=file, stderr=file, cwd=log.parent)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def _variables() -> dict[str, str]:
    return os.environ | QUIET | {"HF_HOME": str(environments.folder() / "hf"), "PYTHONPATH": str(DRIVERS)}


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if urllib.request.urlopen(url, timeout=5).status == 200:
                return
        except OSError:
            time.sleep(1)
    raise AssertionError("the server did not start:\n" + log.read_text(encoding="utf-8")[-4000:])
