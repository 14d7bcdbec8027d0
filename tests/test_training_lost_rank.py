"""One of two ranks dies or hangs: the other ends in bounded time and says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_world import free_port, rank_environment

from deepspec.checkpoints import list_checkpoints

TESTS = Path(__file__).parent
RANK = """
from pathlib import Path
import sys
from training_world import tiny_run
from deepspec.training import train
train(tiny_run(Path(sys.argv[1]), sys.argv[2], steps=100_000, save_steps=5, eval_steps=100_000, micro_batch_size=1,
               collective_timeout=0.1))
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_the_other_rank_ends_and_says_why(training_world, tmp_path, blow):
    port = free_port()
    shared = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(training_world), str(run)],
            env=os.environ | shared | rank_environment(rank, 2, port),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        while not list_checkpoints(run):
            assert ranks[0].poll() is None, ranks[0].communicate()
            time.sleep(0.05)
        ranks[1].send_signal(blow)
        _, message = ranks[0].communicate(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode == 1
    assert "another rank died or did not answer within train.collective_timeout=0.1 minutes" in message
    assert "The same command continues from" in message
