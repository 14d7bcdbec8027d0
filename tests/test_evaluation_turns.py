"""Prompts with several turns: what is decoded, counted, recorded and shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from evaluation_world import small_evaluation
from rich.console import Console

from deepspec.config import EvalRun
from deepspec.data.chat import render_prompt
from deepspec.decoding import Completion, Request, SpeculativeEngine
from deepspec.decoding.recorded_rounds import read_source
from deepspec.drafts import DSparkModel
from deepspec.evaluation import decoder, evaluate, report
from deepspec.evaluation.decoder import Decoder
from deepspec.evaluation.plan import stop_tokens
from deepspec.evaluation.summary import print_table
from deepspec.targets import load_tokenizer

ROWS: list[dict[str, Any]] = [
    {"turns": ["What is two?", "plus two?"], "system": "two"},
    {"turns": ["two"]},
    {"turns": ["What?", "plus?", "two?"]},
]


@pytest.fixture
def config(tmp_path: Path, tiny_draft: Callable[..., DSparkModel]) -> EvalRun:
    return small_evaluation(tmp_path, tiny_draft, {"chat": ROWS}, positions=256, temperatures=[0.0])


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, list[Request]]]:
    """Whether with the draft, and the requests, of every batch that engines decode while the test runs."""
    batches: list[tuple[bool, list[Request]]] = []
    original = SpeculativeEngine.generate

    def generate(self: SpeculativeEngine, requests: list[Request], **options: Any) -> list[Completion]:
        if requests[0].max_new_tokens != decoder.WARM_UP_TOKENS:
            batches.append((self.proposer is not None, requests))
        return original(self, requests, **options)

    monkeypatch.setattr(SpeculativeEngine, "generate", generate)
    return batches


def records_of(config: EvalRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output_dir) / "rounds.jsonl").read_text().splitlines()]


def changed(config: EvalRun, **changes: Any) -> EvalRun:
    copied = deepcopy(config)
    for name, value in changes.items():
        group, _, key = name.partition("__")
        setattr(getattr(copied, group) if key else copied, key or group, value)
    return copied


def test_later_prompts_hold_the_answers_of_the_draft_for_both_ways(
    config: EvalRun, requests: list[tuple[bool, list[Request]]]
) -> None:
    metrics = evaluate(config)
    measured = metrics["results"][0]["sets"]["chat"]
    assert (measured["prompts"], measured["turns"], measured["skipped_turns"]) == (3, 6, 0)
    assert measured["identical_to_plain"] == 1.0
    first, second = records_of(config)
    assert (first["turns"], second["turns"]) == ([2, 1], [3])
    for record in (first, second):
        assert len(record["plain"]["completions"]) == len(record["speculative"]["completions"]) == sum(record["turns"])
    drafted = [request.prompt_ids for with_draft, batch in requests if with_draft for request in batch]
    plain = [request.prompt_ids for with_draft, batch in requests if not with_draft for request in batch]
    assert sorted(drafted) == sorted(plain)
    tokenizer = load_tokenizer(config.target.path)
    stops = stop_tokens(config.target.path, None, tokenizer)
    output = first["speculative"]["completions"][0]["output_ids"]
    answer = tokenizer.decode(output[:-1] if output[-1] in stops else output, skip_special_tokens=False)
    messages = [
        {"role": "system", "content": "two"},
        {"role": "user", "content": "What is two?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "plus two?"},
    ]
    assert render_prompt(tokenizer, messages) in drafted


def test_all_turns_of_a_prompt_count_and_are_one_unit(config: EvalRun) -> None:
    metrics = evaluate(config)
    measured = metrics["results"][0]["sets"]["chat"]
    completions = [completion for record in records_of(config) for completion in record["speculative"]["completions"]]
    rounds = [one_round for completion in completions for one_round in completion["rounds"]]
    assert measured["rounds"] == len(rounds) == measured["cond_accept_estimates"][0]["rounds"]
    assert measured["tau"]["value"] == pytest.approx(sum(r["emitted"] for r in rounds) / len(rounds))
    alone = changed(config, output_dir=config.output_dir + "_one", eval__limit=1)
    estimate = evaluate(alone)["results"][0]["sets"]["chat"]
    assert (estimate["prompts"], estimate["turns"]) == (1, 2)
    assert estimate["tau"]["value"] is not None
    assert estimate["tau"]["low"] is None  # two turns of one prompt say nothing about how prompts differ


def test_the_first_turn_only(config: EvalRun) -> None:
    whole = evaluate(config)
    first_only = changed(config, eval__first_turn_only=True, output_dir=config.output_dir + "_first")
    metrics = evaluate(first_only)
    measured = metrics["results"][0]["sets"]["chat"]
    assert (measured["prompts"], measured["turns"], measured["skipped_turns"]) == (3, 3, 0)
    samples = [json.loads(line) for line in (Path(first_only.output_dir) / "samples.jsonl").open()]
    everything = [json.loads(line) for line in (Path(config.output_dir) / "samples.jsonl").open()]
    assert samples == [row for row in everything if "turn" not in row]
    assert [row.get("turn") for row in everything] == [None, 2, None, None, 2, 3]
    assert [row["prompt"] for row in everything] == [turn for row in ROWS for turn in row["turns"]]
    assert whole["results"][0]["sets"]["chat"]["turns"] == 6


def test_later_turns_that_are_too_long_are_counted(config: EvalRun, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"turns": ["two", "two " * 300, "two"]}
    file = Path(config.eval.prompts_dir) / "chat.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [*ROWS, long]), encoding="utf-8")
    metrics = evaluate(config)
    measured = metrics["results"][0]["sets"]["chat"]
    assert (measured["prompts"], measured["turns"], measured["skipped"], measured["skipped_turns"]) == (4, 7, 0, 2)
    print_table(metrics, Console(width=200))
    assert "4 (7 turns, +2 turns too long)" in capsys.readouterr().out
    folder = Path(config.output_dir).parent / "report"
    assert report.main([str(folder), "--eval", f"Draft={config.output_dir}"]) == 0
    assert "2 later turns of chat became too long at temperature 0" in (folder / "report.md").read_text()


def test_a_slot_decides_what_is_too_long(config: EvalRun, requests: list[Any]) -> None:
    """With decode.max_length; another one decodes such prompts again, and leaves sets of one turn as they are."""
    config.decode.max_length = 60
    metrics = evaluate(config)
    measured = metrics["results"][0]["sets"]["chat"]
    assert measured["skipped"] == 0
    assert measured["skipped_turns"] > 0
    requests.clear()
    config.decode.max_length = 200
    assert evaluate(config)["results"][0]["sets"]["chat"]["skipped_turns"] == 0
    assert requests


def test_records_of_earlier_turns_count_only_for_the_same_later_ones(
    config: EvalRun, requests: list[tuple[bool, list[Request]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(config)
    requests.clear()
    assert evaluate(config) == first
    assert requests == []
    file = Path(config.eval.prompts_dir) / "chat.jsonl"
    file.write_text(file.read_text().replace("plus two?", "two plus?"), encoding="utf-8")
    evaluate(config)
    assert {len(batch) for _, batch in requests} == {1, 2}
    assert len(requests) == 2 * 2  # of the first chunk alone: two turns, both ways


def test_an_interrupted_evaluation_goes_on(
    config: EvalRun, requests: list[tuple[bool, list[Request]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config.eval.temperatures = [1.0]
    reference = evaluate(changed(config, output_dir=config.output_dir + "_whole"))
    original = Decoder._following

    def interrupt(self: Decoder, chunk: Any, turns: Any, decoded: Any) -> Any:
        if chunk.start:
            raise KeyboardInterrupt
        return original(self, chunk, turns, decoded)

    with monkeypatch.context() as context:
        context.setattr(Decoder, "_following", interrupt)
        with pytest.raises(SystemExit):
            evaluate(config)
    requests.clear()
    resumed = evaluate(config)
    assert len(requests) == 3 * 2
    for key in ("tau", "cond_accept", "turns", "output_tokens"):
        assert resumed["results"][0]["sets"]["chat"][key] == reference["results"][0]["sets"]["chat"][key]


def test_a_failed_answer_ends_its_conversation(config: EvalRun, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SpeculativeEngine.generate

    def generate(self: SpeculativeEngine, requests: list[Request]) -> list[Completion]:
        completions = original(self, requests)
        return [Completion([], [], "error"), *completions[1:]] if self.proposer else completions

    monkeypatch.setattr(SpeculativeEngine, "generate", generate)
    measured = evaluate(config)["results"][0]["sets"]["chat"]
    assert (measured["prompts"], measured["turns"], measured["failed"], measured["skipped_turns"]) == (3, 3, 2, 0)


def test_calibration_reads_turns_as_one_prompt(config: EvalRun) -> None:
    prompts = Path(config.eval.prompts_dir)
    (prompts / "chat.jsonl").rename(prompts / "calibration_chat.jsonl")
    other = {"messages": [{"role": "system", "content": "two"}, {"role": "user", "content": "Is this another?"}]}
    (prompts / "chat.jsonl").write_text(json.dumps(other) + '\n{"question": "no prompt"}\n', encoding="utf-8")
    config.eval.sets, config.eval.baseline = ["calibration_chat"], False
    evaluate(config)
    source = read_source(config.output_dir, Path(config.checkpoint))
    assert source.description["sets"] == {"calibration_chat": 3}
    assert sorted(set(source.rounds.prompts.tolist())) == [0, 1, 2]
    counts = [sum(len(c["rounds"]) for c in record["speculative"]["completions"]) for record in records_of(config)]
    assert sum(counts) >= len(source.rounds.prompts)
