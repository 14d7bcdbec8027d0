"""A regeneration that is killed at any moment goes on: no row is lost, none written twice, on any number of ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from regeneration_world import StandIn, options_for, saved_rows, write_prompts
from training_world import free_port, rank_environment

from deepspec.regeneration.regenerate import regenerate

ROOT = Path(__file__).parent.parent
COUNT = 40


def start(world: Path, folder: Path, prompts: str, url: str, rank: int, ranks: int, port: int) -> subprocess.Popen:
    words = [f"target.path={world / 'target'}", f"prompts=[{prompts}]", f"output_dir={folder}", f"urls=[{url}]"]
    words += ["max_new_tokens=12", "max_length=128", "concurrency=2"]
    environment = os.environ | rank_environment(rank, ranks, port) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "data_prep.regenerate", *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.timeout(180)
def test_killed_on_two_ranks_and_continued_on_one(training_world, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", COUNT)
    out, port = tmp_path / "out", free_port()
    with StandIn(seconds=0.1).running() as server:
        ranks = [start(training_world, out, prompts, server.url, rank, 2, port) for rank in range(2)]
        try:
            while len(server.bodies) < 14:
                assert all(rank.poll() is None for rank in ranks), [rank.communicate()[1] for rank in ranks]
                time.sleep(0.01)
            ranks[1].send_signal(signal.SIGKILL)
            time.sleep(0.15)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    first = {row["id"] for row in saved_rows(out)}
    assert 0 < len(first) < COUNT
    assert len(list(out.glob("answers-rank*.jsonl"))) == 2
    with (out / "answers-rank1.jsonl").open("a") as file:
        file.write('{"id": "row39", "prompt": "torn')
    with StandIn().running() as server:
        counts = regenerate(options_for(training_world, out, [prompts], urls=[server.url]))
        assert counts["rows"] == len(server.bodies) == COUNT - len(first)
    assert sorted(row["id"] for row in saved_rows(out)) == sorted(f"row{i}" for i in range(COUNT))
