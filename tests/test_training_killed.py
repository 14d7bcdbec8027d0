"""Runs that are killed again and again, at any moment, end with the same bytes as runs that are left alone."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from cache_world import cached_run, write_cache
from training_world import assert_same_end, free_port, rank_environment, tiny_run, train_in_child

from deepspec.checkpoints import checkpoint_folder, list_checkpoints, newest_checkpoint, step_of
from deepspec.config import TrainRun
from deepspec.training.log import read_metrics

pytestmark = pytest.mark.usefixtures("in_temporary_folder")
PACKED = {"tokens_per_batch": 64}
INSIDE_SAVING = [("fsync", 1), ("fsync", 5), ("replace", 2), ("rename", 1), ("unlink", 2)]
IN_ACCUMULATION = ("accumulation", 5)


@dataclass(frozen=True)
class Case:
    """A run of steps of 4 samples, of which an epoch has 15; every second step is saved."""

    steps: int = 12
    ranks: int = 1
    is_cached: bool = False
    split: dict | None = None
    deaths: Sequence[tuple[str, int]] = (IN_ACCUMULATION,)  # before those at random moments
    seed: int = 0


CASES = {
    "padded": Case(steps=18, deaths=(IN_ACCUMULATION, *INSIDE_SAVING)),
    "packed": Case(split=PACKED),
    "cached": Case(is_cached=True),
    "packed and cached on 2 ranks": Case(
        ranks=2, is_cached=True, split=PACKED, deaths=(IN_ACCUMULATION, ("replace", 2))
    ),
}


@pytest.fixture(scope="module")
def cache(training_world, in_temporary_folder, tmp_path_factory):
    return write_cache(cached_run(training_world, tmp_path_factory.mktemp("cache") / "features"))


class Session:
    """All ranks of a run, from where its folder says to the end or to a death."""

    def __init__(self, processes, config: TrainRun, ranks: int, mortals: Sequence[int] = (), death=None):
        self.config = config
        self.rows_before = len(read_metrics(config.output_dir))
        folder, port = str(Path(config.output_dir).parent), free_port()
        self.ranks = []
        for rank in range(ranks):
            launcher = rank_environment(rank, ranks, port) if ranks > 1 else None
            arguments = (config, folder, death if rank in mortals else None, launcher)
            self.ranks.append(processes.Process(target=train_in_child, args=arguments))
        for process in self.ranks:
            process.start()

    def kill(self, mortals: Sequence[int], chance: random.Random) -> None:
        """After a few new steps, anywhere in the next."""
        steps = self.rows_before + chance.randint(1, 3)
        while len(rows := read_metrics(self.config.output_dir)) < steps and all(rank.is_alive() for rank in self.ranks):
            time.sleep(0.002)
        if rows:
            time.sleep(chance.uniform(0, 1) * rows[-1]["step_seconds"])
        for rank in mortals:
            self.ranks[rank].kill()

    def exit_codes(self) -> list[int | None]:
        """None for a rank that did not end by itself in bounded time."""
        deadline = time.monotonic() + 60
        for process in self.ranks:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
        return codes


def supervise(processes, config: TrainRun, case: Case) -> Iterator[tuple[int, list[int | None]]]:
    """Start the run again and again until it is complete.

    Yields:
        For each death the steps that were logged before, and the exit codes of all ranks.
    """
    chance, deaths = random.Random(case.seed), list(case.deaths)
    while deaths or newest_checkpoint(config.output_dir, subfolder="") != checkpoint_folder(
        config.output_dir, case.steps
    ):
        mortals = chance.choice([[0], [1], [0, 1]]) if case.ranks > 1 else [0]
        death = deaths.pop(0) if deaths else None
        if death and death[0] != "accumulation":
            mortals = [0]  # which saves
        session = Session(processes, config, case.ranks, mortals, death)
        if death is None:
            session.kill(mortals, chance)
        codes = session.exit_codes()
        if -signal.SIGKILL in codes:
            yield len(read_metrics(config.output_dir)), codes
        else:
            assert not any(codes), f"it ends by itself with {codes}"


@pytest.mark.parametrize("name", CASES)
def test_killed_again_and_again(processes, training_world, cache, tmp_path, name):
    case = CASES[name]

    def run(folder):
        settings = {"steps": case.steps, "collective_timeout": 0.5} | (case.split or {})
        if case.is_cached:
            return cached_run(training_world, cache, tmp_path / folder, **settings)
        return tiny_run(training_world, tmp_path / folder, **settings)

    alone, config = run("alone"), run("run")
    assert Session(processes, alone, case.ranks).exit_codes() == [0] * case.ranks
    killed_at = []
    for step, codes in supervise(processes, config, case):
        assert None not in codes, "a rank waits for the dead one"
        killed_at.append(step)
    assert len([step for step in killed_at if step < case.steps]) >= len(case.deaths) + 2, (
        "killed in the middle of the run"
    )
    assert_same_end(*(checkpoint_folder(one.output_dir, case.steps) for one in (config, alone)))
    assert not list(Path(config.output_dir).rglob(".*")), "what the deaths left behind is cleared away"
    assert [step_of(folder) for folder in list_checkpoints(config.output_dir)] == [case.steps - 2, case.steps]
