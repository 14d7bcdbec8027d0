"""Runs on features of a real server process: as with the target resident, through its death, or to a clear end."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from feature_servers import prepare_processes, start_process, wait_until_ready
from training_world import changed, draft_weights, free_port, rank_environment, tiny_run, train_in_child

from deepspec.checkpoints import checkpoint_folder, list_checkpoints, newest_checkpoint
from deepspec.config import flatten
from deepspec.features.replicas import FeatureServerError
from deepspec.training import train
from deepspec.training.log import read_metrics
from deepspec.training.report import Reporter
from deepspec.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("in_temporary_folder")
ROOT = Path(__file__).parent.parent
PACKED = {"steps": 4, "tokens_per_batch": 128}


class Servers:
    """A server at one address, which can die and come back."""

    def __init__(self, target: str):
        self.target, self.port = target, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self) -> None:
        self.process = start_process(self.target, self.port, merge_requests=False)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def recover(self) -> None:
        """From SIGSTOP or from death."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGCONT)
        else:
            self.start()


@pytest.fixture(scope="module")
def door(training_world, tmp_path_factory):
    """`python -m deepspec.features.serve`, started early: it imports while other tests run."""
    prepare_processes()
    port, target = free_port(), str(training_world / "target")
    command = [sys.executable, "-m", "deepspec.features.serve", f"target={target}", f"port={port}", "device=cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = tmp_path_factory.mktemp("door")
    with subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        yield process, port, target
        process.kill()


@pytest.fixture(scope="module")
def server(door, training_world):
    servers = Servers(str(training_world / "target"))
    servers.start()
    yield servers
    servers.kill()


@pytest.fixture(scope="module")
def online(training_world, in_temporary_folder, tmp_path_factory):
    """Four steps on packed rows with the target resident."""
    return train(tiny_run(training_world, tmp_path_factory.mktemp("online"), **PACKED))


def served(world, folder, servers, *, features=None, **run):
    options = {"source": "served", "urls": [servers.url], "retry_for": 60.0} | (features or {})
    return changed(tiny_run(world, folder, **run), features=options)


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


def run_folder(result):
    return result.checkpoint.parents[1]


def test_packed_rows_agree_bit_for_bit(server, online, training_world, tmp_path):
    """They run in the same shapes on both sides."""
    result = train(served(training_world, tmp_path, server, features={"lookahead": 2}, **PACKED))
    assert losses(tmp_path) == losses(run_folder(online))
    assert draft_weights(result.checkpoint) == draft_weights(online.checkpoint)
    assert result.metrics["eval/loss"] == online.metrics["eval/loss"]


def test_padded_rows_agree_up_to_rounding(server, training_world, tmp_path):
    train(tiny_run(training_world, tmp_path / "online", steps=3))
    train(served(training_world, tmp_path / "served", server, steps=3))
    assert losses(tmp_path / "served") == pytest.approx(losses(tmp_path / "online"), rel=1e-6)


def test_bfloat16_on_the_wire(server, online, training_world, tmp_path):
    train(served(training_world, tmp_path, server, features={"dtype": "bfloat16"}, **PACKED))
    assert losses(tmp_path) == pytest.approx(losses(run_folder(online)), rel=1e-2)
    assert losses(tmp_path) != losses(run_folder(online))


def at_step(monkeypatch, number, act):
    original = Reporter.step

    def step(self, done, loss, row):
        original(self, done, loss, row)
        if done == number:
            act()

    monkeypatch.setattr(Reporter, "step", step)


def test_killed_and_started_again(server, online, training_world, tmp_path, monkeypatch):
    """The run waits, and ends with the very bytes of a run whose target never died."""
    restart = threading.Timer(0.5, server.start)
    at_step(monkeypatch, 2, lambda: (server.kill(), restart.start()))
    result = train(served(training_world, tmp_path, server, **PACKED))
    restart.join()
    assert result.status == "finished"
    assert draft_weights(result.checkpoint) == draft_weights(online.checkpoint)


def test_killed_for_good(server, online, training_world, tmp_path, monkeypatch):
    """The last checkpoint stays, and the same command goes on from it once a server is there again."""
    config = served(
        training_world, tmp_path, server, features={"lookahead": 2, "retry_for": 0.5, "timeout": 5.0}, **PACKED
    )
    with monkeypatch.context() as patch:
        at_step(patch, 2, server.kill)
        started = time.monotonic()
        with pytest.raises(FeatureServerError) as error:
            train(config)
    assert time.monotonic() - started < 30
    message = str(error.value)
    assert f"no feature server of features.urls answered for 0.5 s (features.retry_for): {server.url}: " in message
    assert "run the same command: training continues from its newest checkpoint" in message
    assert newest_checkpoint(tmp_path, subfolder="") == checkpoint_folder(tmp_path, 2)
    server.start()
    result = train(dataclasses.replace(config, features=dataclasses.replace(config.features, timeout=20.0)))
    assert result.step == 4
    assert draft_weights(result.checkpoint) == draft_weights(online.checkpoint)


def before_evaluation(monkeypatch, number, act):
    original = Trainer.evaluate

    def evaluate(self):
        if self.done == number:
            act()
        return original(self)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("blow", "lookahead", "strike_at", "step"),
    [
        (signal.SIGKILL, 0, at_step, 3),
        (signal.SIGSTOP, 0, before_evaluation, 3),
        (signal.SIGSTOP, 2, at_step, 1),
        (signal.SIGKILL, 2, before_evaluation, 3),
    ],
    ids=["dead", "silent in evaluation", "silent with lookahead", "dead in evaluation with lookahead"],
)
def test_sigterm_while_waiting_for_a_server(
    server, online, training_world, tmp_path, monkeypatch, capsys, blow, lookahead, strike_at, step
):
    """Saved and ended at once, with all threads; the same command then ends with the bytes of an undisturbed run."""
    config = served(training_world, tmp_path, server, features={"lookahead": lookahead}, **PACKED, save_steps=100)
    told = []

    def strike():
        os.kill(server.process.pid, blow)
        threading.Timer(0.4, lambda: (told.append(time.monotonic()), os.kill(os.getpid(), signal.SIGTERM))).start()

    with monkeypatch.context() as patch:
        strike_at(patch, step, strike)
        result = train(config)
    took = time.monotonic() - told[0]
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith(("features", "served"))]
    server.recover()
    assert took < 5, "not features.timeout or features.retry_for, 60 s each"
    assert not threads
    assert result.status == "stopped"
    assert step <= result.step < 4, "with a lookahead some features are there already"
    assert newest_checkpoint(tmp_path, subfolder="") == checkpoint_folder(tmp_path, result.step)
    given_up = f"told to stop while waiting for features: what follows step {result.step} is given up"
    assert given_up in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, result.step + 1))
    assert draft_weights(train(config).checkpoint) == draft_weights(online.checkpoint)


def test_sigterm_to_two_ranks_while_one_waits_for_a_server(server, training_world, tmp_path):
    """In accumulation. Rank 0 has features for longer, and so waits in a collective; they give up together."""
    config = served(training_world, tmp_path / "run", server, steps=100_000, save_steps=100_000, micro_batch_size=1)
    configs = [changed(config, features={"lookahead": lookahead}) for lookahead in (5, 0)]
    port, context = free_port(), multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(
            target=train_in_child, args=(configs[rank], str(tmp_path), None, rank_environment(rank, 2, port))
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    try:
        while len(read_metrics(tmp_path / "run")) < 2 and all(rank.is_alive() for rank in ranks):
            time.sleep(0.02)
        os.kill(server.process.pid, signal.SIGSTOP)
        time.sleep(1)
        for rank in ranks:
            os.kill(rank.pid, signal.SIGTERM)
        for rank in ranks:
            rank.join(10)
        codes = [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        server.recover()
    assert codes == [0, 0]
    done = len(read_metrics(tmp_path / "run"))
    assert newest_checkpoint(tmp_path / "run", subfolder="") == checkpoint_folder(tmp_path / "run", done)


def test_the_command_line_gives_up_with_one_message(server, training_world, tmp_path):
    """train.py, whose only server dies after the second step."""
    features = {"retry_for": 0.5, "timeout": 5.0}
    config = served(training_world, tmp_path / "run", server, features=features, steps=100_000)
    settings = {key: value for key, value in flatten(config).items() if key != "train.epochs"}  # steps are given
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *(f"{key}={json.dumps(value)}" for key, value in settings.items()),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while not list_checkpoints(tmp_path / "run") and process.poll() is None:
            time.sleep(0.02)
        server.kill()
        printed = process.communicate(timeout=60)[1]
    server.start()
    assert process.returncode == 2
    assert "Traceback" not in printed
    assert printed.count("error: ") == 1
    assert f"error: no feature server of features.urls answered for 0.5 s (features.retry_for): {server.url}" in printed
    assert "run the same command: training continues from its newest checkpoint" in printed


def test_sigterm_ends_a_server_with_status_0(server):
    os.kill(server.process.pid, signal.SIGTERM)
    server.process.join(10)
    assert server.process.exitcode == 0


def test_the_door(door):
    """Stopped with Ctrl+C."""
    process, port, target = door
    wait_until_ready(port, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=20)[1]
    assert process.returncode == 0, printed
    assert f"serving {target}" in printed
    assert f"at http://127.0.0.1:{port}" in printed
    assert "stopped after 0 requests of 0 tokens" in printed
    assert "Traceback" not in printed
