"""The benchmark of the losses: every way in a process of its own, and a lack of memory is a result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(module: str, *words: str) -> str:
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=280).stdout


def test_every_way_is_measured_and_compared_with_the_naive_one(tmp_path: Path) -> None:
    output = tmp_path / "objective.json"
    words = ["device=cpu", "vocab=2048", "anchors=64", "hidden=16", "rank=4", "steps=1", "repeats=1"]
    run("benchmarks.objective", *words, f"output={output}")
    record = json.loads(output.read_text(encoding="utf-8"))
    (size,) = record["results"]
    naive, chunked, half = size["ways"].values()
    assert (size["vocab"], size["slots"], record["settings"]["repeats"]) == (2048, 64 * 7, 1)
    for result in (chunked, half):
        for figure in ("peak_mib", "seconds"):
            assert result[f"{figure}_to_naive"]["median"] == result[figure]["median"] / naive[figure]["median"]
            assert result[figure]["median"] > 0


def test_a_lack_of_memory_is_a_result() -> None:
    words = ["implementation=reference", "vocab=4000000", "slots=400000", "hidden=2", "rank=1"]
    assert json.loads(run("benchmarks.objective_step", *words)) == {"out_of_memory": True}
