"""The load benchmark: small cases computed by hand, conservation, and the same figures for the same seed."""

from __future__ import annotations

import json
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import pytest
from decoding_world import random_target

from benchmarks import serving_load
from benchmarks.load_engine import sizes_to
from benchmarks.load_model import Answer, ModelServer, read_answers
from benchmarks.load_results import (
    ASYNCHRONOUS,
    CLOSED,
    FIXED_1,
    FIXED_BLOCK,
    PLAIN,
    POISSON,
    PREFIX,
    THRESHOLD,
    against_fixed,
    figures_of,
    verdicts,
)
from benchmarks.load_serving import ClosedLoop, EngineServer, Poisson, Service, Slice, in_turn
from benchmarks.serving_load import LoadOptions, policy_of
from deepspec.config import ConfigError
from deepspec.data.jsonl import DataError
from deepspec.decoding import Request, SpeculativeEngine
from deepspec.decoding.policies import PolicySetup
from deepspec.decoding.sps import SpsTable

FLAT = SpsTable([1, 2], [100.0, 100.0], [1, 2], [0.002, 0.002])  # 10 ms a pass, 2 ms to draft
LINEAR = SpsTable([1], [1000.0])  # 1 ms for each token of a pass
BLOCK = 4


def answer(tokens: int, accepted: list[int], confidences: list[float] | None = None) -> Answer:
    given = np.array([confidences or [0.5] * BLOCK] * len(accepted))
    return Answer(tokens, given, np.array(accepted))


def server(table: SpsTable, name: str, slots: int, *, threshold: float = 0.6, **more) -> ModelServer:
    setup = PolicySetup(BLOCK, slots, has_confidences=True, sps=table)
    return ModelServer(table, policy_of(name, setup, threshold), slots, **more)


def closed(table: SpsTable, name: str, users: int, item: Answer, **more) -> Service:
    return Service(server(table, name, users, **more), ClosedLoop(users), repeat(item))


@pytest.mark.parametrize(
    ("name", "table", "round_seconds", "rounds"),
    [
        # 9 tokens, the first from the prompt's pass: 8 in rounds that could keep 3
        (PLAIN, FLAT, 0.010, 8),
        (FIXED_1, FLAT, 0.012, 4),
        (FIXED_BLOCK, FLAT, 0.012, 2),
        (PLAIN, LINEAR, 0.002, 8),
        (FIXED_1, LINEAR, 0.004, 4),
        (FIXED_BLOCK, LINEAR, 0.010, 2),
    ],
)
def test_throughput_is_what_one_computes_by_hand(name: str, table: SpsTable, round_seconds: float, rounds: int) -> None:
    users = 2
    service = closed(table, name, users, answer(9, [3]))
    figures = figures_of([service.serve(10), service.serve(10)])
    seconds = rounds * round_seconds
    assert figures["tokens_per_second"] == pytest.approx(dict.fromkeys(("median", "min", "max"), users * 9 / seconds))
    assert figures["tokens_per_second_per_user"] == pytest.approx(9 / seconds)
    assert figures["requests_per_second"] == pytest.approx(users / seconds)
    assert figures["concurrency"] == pytest.approx(users)
    assert figures["latency_seconds"] == pytest.approx(dict.fromkeys(("p50", "p90", "p99"), seconds))
    assert figures["tau"] == 8 / rounds
    length = {PLAIN: 0, FIXED_1: 1, FIXED_BLOCK: BLOCK}[name]
    assert (figures["verified_per_round"], figures["verified_per_pass"]) == (length, users * length)


def test_a_prompt_takes_the_pass_of_its_tokens() -> None:
    service = closed(LINEAR, PLAIN, 1, answer(3, [0]), prompt_tokens=50)
    assert service.serve(4).seconds == pytest.approx(4 * (0.050 + 2 * 0.001))


@pytest.mark.parametrize(
    ("name", "table", "confidences", "length"),
    [
        (THRESHOLD, FLAT, [0.9, 0.7, 0.5, 0.9], 2),
        (THRESHOLD, FLAT, [0.5, 0.9, 0.9, 0.9], 0),
        (PREFIX, FLAT, [0.5, 0.1, 0.1, 0.1], BLOCK),  # a token costs nothing
        # 1 ms a token and nothing else: a token must be worth more than the average one, and none is
        (PREFIX, LINEAR, [0.9, 0.9, 0.9, 0.9], 0),
        # 10 ms + 1 ms a token, 3 rows: tau * SPS(B) rises while a token survives more often than tau / (10 + B):
        # 3 + 3 * 0.8 = 5.4 tokens in 16 ms, then 0.32 < 5.4 / 16
        (PREFIX, SpsTable([1, 2], [1 / 0.011, 1 / 0.012]), [0.8, 0.4, 1.0, 1.0], 1),
    ],
)
def test_policies_verify_what_the_confidences_and_the_curve_say(
    name: str, table: SpsTable, confidences: list[float], length: int
) -> None:
    service = closed(table, name, 3, answer(30, [4, 4], confidences))
    figures = figures_of([service.serve(9)])
    assert figures["verified_per_round"] == length
    assert figures["tau"] == pytest.approx(29 / -(-29 // (length + 1)))


def test_the_asynchronous_policy_verifies_blocks_until_it_has_old_confidences() -> None:
    run = server(LINEAR, ASYNCHRONOUS, 1)
    run.submit(answer(40, [0], [0.9] * BLOCK))
    seconds = [run.step()[0] for _ in range(6)]
    assert seconds == pytest.approx([0, 0.005, 0.005, 0.001, 0.001, 0.001])


@pytest.mark.parametrize("name", serving_load.POLICIES)
def test_a_closed_loop_loses_no_request_and_no_token(name: str) -> None:
    generator = np.random.default_rng(0)
    answers = [
        Answer(int(generator.integers(1, 40)), generator.random((5, BLOCK)), generator.integers(0, BLOCK + 1, 5))
        for _ in range(20)
    ]
    users, table = 6, SpsTable([1, 8, 64], [100.0, 80.0, 20.0], [1, 8], [0.001, 0.002])
    run = server(table, name, users)
    service = Service(run, ClosedLoop(users), in_turn({"all": answers}, 0))
    slices = [service.serve(15) for _ in range(4)]
    ended = [length for part in slices for length in part.lengths]
    assert sum(part.tokens for part in slices) == sum(ended) + run.written
    assert sum(part.seconds for part in slices) == pytest.approx(service.now)
    assert sum(part.inside_seconds for part in slices) == pytest.approx(users * service.now)
    assert sum(part.passes for part in slices) == run.passes
    in_rounds = sum(part.emitted for part in slices)
    assert in_rounds == sum(length - 1 for length in ended)
    # whoever ended is one of the first that came, with all that its answer has
    came = [item.tokens for item in islice(in_turn({"all": answers}, 0), len(ended) + users)]
    for length in set(ended):
        assert ended.count(length) <= came.count(length)


def test_the_seed_decides_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    item = Answer(50, generator.random((30, BLOCK)), generator.integers(0, BLOCK + 1, 30))
    first, again, other = (figures_of([closed(LINEAR, THRESHOLD, 4, item, seed=seed).serve(40)]) for seed in (1, 1, 2))
    assert first == again != other


def test_latencies_of_poisson_arrivals_are_those_of_a_queue() -> None:
    rate, needed = 15.0, 0.05  # seconds of service: 5 rounds of 10 ms
    service = Service(server(FLAT, PLAIN, 1), Poisson(rate, seed=3), repeat(answer(6, [0])))
    done = service.serve(200)
    arrivals = np.random.default_rng(3).exponential(1 / rate, 200).cumsum()
    free, expected = 0.0, []
    for arrival in arrivals:
        free = max(arrival, free) + needed
        expected.append(free - arrival)
    assert done.latencies == pytest.approx(expected)
    assert done.seconds == pytest.approx(free)
    assert max(expected) > 2 * needed  # there was a queue


def test_requests_come_of_each_set_in_turn() -> None:
    drawn = list(islice(in_turn({"a": [1, 2, 3], "b": [10]}, seed=0), 12))
    assert drawn[1::2] == [10] * 6
    assert sorted(drawn[:6:2]) == [1, 2, 3]
    assert drawn[:6:2] == drawn[6::2]


def test_the_engine_under_load_writes_what_it_writes_without() -> None:
    target = random_target()
    requests = [Request([3, number], 4 + number, seed=number) for number in range(6)]
    engine = SpeculativeEngine(target, slots=2, max_length=32)
    service = Service(EngineServer(engine), ClosedLoop(3), iter(requests * 2))
    slices = [service.serve(3), service.serve(3)]
    ended = [length for part in slices for length in part.lengths]
    assert sum(part.tokens for part in slices) == sum(ended) + engine.written
    assert set(ended) <= {4 + number for number in range(6)}
    assert all(part.seconds > 0 and part.passes > 0 for part in slices)


def test_a_scheduler_is_compared_with_the_better_fixed_length() -> None:
    def parts(*tokens: int) -> list[Slice]:
        return [Slice(seconds=2.0, tokens=n, latencies=[4.0], lengths=[n]) for n in tokens]

    slices = {FIXED_1: parts(10, 40), FIXED_BLOCK: parts(20, 20), PREFIX: parts(20, 35)}
    found = against_fixed(CLOSED, slices, PREFIX)
    assert found["better"] == FIXED_1
    assert found["ratio"] == pytest.approx(55 / 50)
    assert found["turns"] == pytest.approx({"median": (2 + 35 / 40) / 2, "min": 35 / 40, "max": 2.0})
    assert against_fixed(POISSON, slices, PREFIX)["ratio"] == pytest.approx(55 / 50)


@pytest.mark.parametrize(
    ("ratios", "within", "middle"),
    [([1.0, 1.1, 0.99], True, True), ([1.0, 0.97, 1.2], False, False), ([1.1, 0.99, 1.1], True, False)],
)
def test_verdicts(ratios: list[float], within: bool, middle: bool) -> None:
    results = [
        {"arrivals": CLOSED, "load": 2**n, "against_fixed": {name: {"ratio": ratio} for name in (PREFIX, ASYNCHRONOUS)}}
        for n, ratio in enumerate(ratios)
    ]
    verdict = verdicts(results)[CLOSED][PREFIX]
    assert verdict["within_2_percent_at_every_load"] is within
    assert verdict["better_than_both_in_the_middle"] is middle
    assert verdict["better_than_both_at"] == [2**n for n, ratio in enumerate(ratios) if ratio > 1]


def test_sizes_of_a_table_end_with_the_largest() -> None:
    assert list(sizes_to(20)) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert list(sizes_to(1)) == [1]


def record(folder: Path, *, proposed: int = BLOCK, temperature: float = 1.0) -> Path:
    """An evaluation of two sets; the second round of its answers ends at a stop token."""
    rounds = [
        {"proposed": proposed, "accepted": 2, "emitted": 3, "confidences": [0.9, 0.8, 0.2, 0.1][:proposed]},
        {"proposed": BLOCK, "accepted": 3, "emitted": 4, "confidences": [0.9] * BLOCK},
        {"proposed": 2, "accepted": 2, "emitted": 2, "confidences": [0.9, 0.8]},
    ]
    answers = [
        {"output_ids": list(range(10)), "rounds": rounds, "finish_reason": "stop"},
        {"output_ids": [1, 2, 3], "rounds": rounds[2:], "finish_reason": "stop"},
    ]
    folder.mkdir()
    lines = [
        {"settings": digest, "set_name": name, "temperature": temperature, "speculative": {"completions": answers}}
        for name, digest in (("math", "new"), ("chat", "new"), ("code", "old"))
    ]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    metrics = {"settings_digest": "new", "draft": {"block_size": BLOCK}}
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


def test_answers_are_read_with_their_whole_blocks(tmp_path: Path) -> None:
    answers = read_answers(record(tmp_path / "eval"), 1.0)
    assert list(answers) == ["math", "chat"]
    (only,) = answers["math"]  # the other had no whole block
    assert only.tokens == 10
    assert only.accepted.tolist() == [2, 3]
    assert only.confidences.tolist() == [[0.9, 0.8, 0.2, 0.1], [0.9] * BLOCK]


def test_rounds_that_cannot_stand_for_any_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"temperature=0\.5; others there: 1"):
        read_answers(record(tmp_path / "warm"), 0.5)
    with pytest.raises(DataError, match="a round of 3 tokens where the block has 4"):
        read_answers(record(tmp_path / "cut", proposed=3), 1.0)
    with pytest.raises(DataError, match="give the output_dir of a finished"):
        read_answers(tmp_path / "none", 1.0)


def test_a_computed_sweep_writes_figures_and_pictures(tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    options = LoadOptions(
        model="h200_qwen3_4b",
        rounds=str(record(tmp_path / "eval")),
        users=[4, 1, 300],
        offered=[0.5],
        requests=4,
        repeats=2,
        output=str(output),
    )
    serving_load.main(options)
    written = json.loads(output.read_text(encoding="utf-8"))
    assert [(result["arrivals"], result["load"]) for result in written["results"][:3]] == [
        (CLOSED, 1),
        (CLOSED, 4),
        (CLOSED, 300),
    ]
    last = written["results"][3]
    capacity = max(result["policies"][PLAIN]["requests_per_second"] for result in written["results"][:3])
    assert (last["arrivals"], last["load"]) == (POISSON, 0.5 * capacity)
    for result in written["results"]:
        assert list(result["policies"]) == list(serving_load.POLICIES)
        assert result["policies"][FIXED_BLOCK]["verified_per_round"] == BLOCK
    # few rows leave the pass as fast as it is: all is verified; with many rows only what is likely kept, which is the
    # whole block of one half of the recorded rounds and two tokens of the others
    budgets = [result["policies"][PREFIX]["verified_per_round"] for result in written["results"][:3]]
    assert budgets[:2] == [BLOCK, BLOCK]
    assert budgets[2] == pytest.approx(3, abs=0.1)
    assert written["verdicts"][CLOSED][PREFIX]["within_2_percent_at_every_load"]
    for picture in ("load_throughput.png", "load_budget.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "checkpoint= is missing"),
        ({"model": "h200_qwen3_4b"}, "give rounds=FOLDER"),
        ({"checkpoint": "x", "repeats": 0}, "repeats=0: must be at least 1"),
        ({"checkpoint": "x", "users": [0, 4]}, "users=0: must be at least 1"),
        ({"checkpoint": "x", "offered": [0.0]}, "above 0"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serving_load.main(LoadOptions(**changes))
