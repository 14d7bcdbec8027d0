"""A whole evaluation with a tiny target and draft: results, resume, ranks, mistakes."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_target_config
from evaluation_world import small_evaluation
from transformers import Qwen3ForCausalLM

from deepspec.config import ConfigError, DecodeConfig, EvalConfig, EvalRun
from deepspec.data.chat import render_prompt
from deepspec.data.jsonl import DataError
from deepspec.decoding import Completion, Request, SpeculativeEngine
from deepspec.drafts import DSparkModel
from deepspec.evaluation import decoder, evaluate, report, runner
from deepspec.evaluation.plan import stop_tokens
from deepspec.targets import load_target, load_tokenizer

PROMPTS = {"math": ["two plus two", "two", "What is two?"], "chat": ["What?", "plus is plus"]}


@pytest.fixture
def config(tmp_path: Path, tiny_draft: Callable[..., DSparkModel]) -> EvalRun:
    """An evaluation of a random draft on two sets at two temperatures; the draft proposes 3 tokens a round."""
    sets = {name: [{"turns": [text]} for text in texts] for name, texts in PROMPTS.items()}
    return small_evaluation(tmp_path, tiny_draft, sets)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that engines decode while the test runs, warm-up left out."""
    sizes: list[int] = []
    original = SpeculativeEngine.generate

    def generate(self: SpeculativeEngine, requests: list[Request], **options: Any) -> list[Completion]:
        if requests[0].max_new_tokens != decoder.WARM_UP_TOKENS:
            sizes.append(len(requests))
        return original(self, requests, **options)

    monkeypatch.setattr(SpeculativeEngine, "generate", generate)
    return sizes


def test_results_are_complete_and_consistent(config: EvalRun) -> None:
    metrics = evaluate(config)
    out = Path(config.output_dir)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert [result["temperature"] for result in metrics["results"]] == [1.0, 0.0]
    hot, greedy = metrics["results"]
    assert list(hot["sets"]) == ["math", "chat"]
    math = hot["sets"]["math"]
    assert math["prompts"] == 3
    assert 1 <= math["tau"]["low"] <= math["tau"]["value"] <= math["tau"]["high"] <= 4
    assert math["output_tokens"] == round(math["tau"]["value"] * math["rounds"]) + 3  # 3 tokens came from prefill
    assert len(math["cond_accept"]) == len(math["survival"]) == 3
    assert math["cond_accept"][0] == math["survival"][0]
    assert [at["value"] for at in math["cond_accept_estimates"]] == math["cond_accept"]
    assert math["cond_accept_estimates"][0]["rounds"] == math["rounds"]
    assert math["speedup"]["value"] == pytest.approx(
        math["speculative_tokens_per_second"] / math["plain_tokens_per_second"]
    )
    assert math["reliability"]["slots"] > 0
    assert math["identical_to_plain"] is None
    assert [values["identical_to_plain"] for values in greedy["sets"].values()] == [1.0, 1.0]
    taus = [values["tau"]["value"] for values in hot["sets"].values()]
    assert hot["macro"]["tau"]["value"] == pytest.approx(sum(taus) / 2)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 5
    assert {row["prompt"] for row in samples} == {text for texts in PROMPTS.values() for text in texts}
    assert not list(out.glob("rounds-rank*"))


def test_a_finished_evaluation_decodes_nothing(
    config: EvalRun, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(config)
    assert sorted(decoded) == [1] * 4 + [2] * 8
    decoded.clear()
    monkeypatch.setattr(runner, "machine", lambda: {"cpu": "another"})
    assert evaluate(config) == first
    assert decoded == []


def test_prompts_without_finite_logits_are_reported(
    config: EvalRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.eval.temperatures, config.eval.sets, config.eval.baseline = [1.0], ["math"], False
    original = SpeculativeEngine.generate

    def generate(self: SpeculativeEngine, requests: list[Request]) -> list[Completion]:
        completions = original(self, requests)
        return [Completion([], [], "error"), *completions[1:]]

    monkeypatch.setattr(SpeculativeEngine, "generate", generate)
    metrics = evaluate(config)
    assert metrics["results"][0]["sets"]["math"]["failed"] == 2
    assert "2 prompts ended early because their logits were not finite" in capsys.readouterr().out


def test_an_interrupted_evaluation_goes_on(
    config: EvalRun, decoded: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = evaluate(dataclass_with(config, output_dir=config.output_dir + "_whole"))
    decode, finished = runner.Decoder.decode, []

    def stop_after_three(self: Any, chunk: Any, **options: Any) -> Any:
        if len(finished) == 3:
            raise KeyboardInterrupt
        finished.append(chunk)
        return decode(self, chunk, **options)

    monkeypatch.setattr(runner.Decoder, "decode", stop_after_three)
    with pytest.raises(SystemExit):
        evaluate(config)
    assert "run the command again" in capsys.readouterr().out
    part = Path(config.output_dir) / "rounds-rank0.jsonl"
    with part.open("a") as file:
        file.write('{"settings": "torn')
    monkeypatch.setattr(runner.Decoder, "decode", decode)
    decoded.clear()
    resumed = evaluate(config)
    assert len(decoded) == 2 * (6 - 3)
    for ours, theirs in zip(resumed["results"], reference["results"], strict=True):
        for name in PROMPTS:
            for key in ("tau", "cond_accept", "survival", "output_tokens", "rounds"):
                assert ours["sets"][name][key] == theirs["sets"][name][key]


def dataclass_with(config: EvalRun, **changes: Any) -> EvalRun:
    copied = deepcopy(config)
    for name, value in changes.items():
        setattr(copied, name, value)
    return copied


@pytest.mark.parametrize("change", ["seed", "top_k", "min_p", "repetition_penalty", "stop_strings", "weights"])
def test_other_settings_start_over(
    config: EvalRun, decoded: list[int], capsys: pytest.CaptureFixture[str], change: str
) -> None:
    config.eval.temperatures = [1.0]
    evaluate(config)
    decoded.clear()
    if change == "seed":
        config.seed = 1
    elif change != "weights":
        value = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "stop_strings": ["two"]}[change]
        setattr(config.decode, change, value)
    else:
        model = Qwen3ForCausalLM.from_pretrained(config.target.path)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.1)
        model.save_pretrained(config.target.path)
    evaluate(config)
    assert len(decoded) == 6
    assert "3 chunks were decoded under other settings" in capsys.readouterr().out


def records_of(config: EvalRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output_dir) / "rounds.jsonl").read_text().splitlines()]


def test_answers_end_with_a_stop_string(config: EvalRun) -> None:
    config.eval.temperatures = [0.0]
    evaluate(config)
    decode = load_tokenizer(config.target.path).decode
    free = [completion["output_ids"] for record in records_of(config) for completion in record["plain"]["completions"]]
    texts = [decode(ids) for ids in free]
    config.decode.stop_strings = [text[4:6] for text in texts[:3]]
    metrics = evaluate(config)
    ended = [completion for record in records_of(config) for completion in record["speculative"]["completions"]]
    assert [completion["finish_reason"] for completion in ended][:3] == ["stop"] * 3
    for completion, whole in zip(ended, free, strict=True):
        ids = completion["output_ids"]
        assert ids == whole[: len(ids)]
        assert not any(string in decode(ids[:-1]) for string in config.decode.stop_strings)
        assert (completion["finish_reason"] == "stop") == any(s in decode(ids) for s in config.decode.stop_strings)
    assert [values["identical_to_plain"] for values in metrics["results"][0]["sets"].values()] == [1.0, 1.0]


def test_min_p_and_repetition_penalty_reach_both_ways_of_decoding(config: EvalRun) -> None:
    config.eval.temperatures = [0.0]
    config.decode.repetition_penalty = 5.0
    metrics = evaluate(config)
    assert [values["identical_to_plain"] for values in metrics["results"][0]["sets"].values()] == [1.0, 1.0]
    for record in records_of(config):
        for completion in record["plain"]["completions"]:
            assert len(set(completion["output_ids"])) == len(completion["output_ids"])
    greedy = outputs_of(config)
    config.eval.temperatures, config.decode.min_p = [1.0], 1.0  # leaves the likeliest token alone
    evaluate(config)
    assert outputs_of(config) == greedy


SPS = {"points": [{"tokens": 1, "steps_per_second": 100.0}, {"tokens": 8, "steps_per_second": 20.0}]}


@pytest.mark.parametrize("policy", ["threshold", "prefix", "asynchronous"])
def test_policies_verify_less_and_leave_greedy_answers_alone(config: EvalRun, policy: str) -> None:
    config.eval.temperatures = [0.0]
    evaluate(config)
    whole, outputs = proposed_in(config), outputs_of(config)
    config.decode.policy = policy
    if policy == "threshold":
        config.decode.confidence_threshold = 0.6
    else:
        (Path(config.checkpoint) / "sps.json").write_text(json.dumps(SPS))
    evaluate(config)
    assert sum(proposed_in(config)) < sum(whole)
    assert outputs_of(config) == outputs


def proposed_in(config: EvalRun) -> list[int]:
    return [
        one_round["proposed"]
        for record in records_of(config)
        for completion in record["speculative"]["completions"]
        for one_round in completion["rounds"]
    ]


def test_the_calibration_beside_the_draft_counts(config: EvalRun, decoded: list[int]) -> None:
    """Its temperatures change what a threshold lets through, so chunks decoded under others do not count."""
    config.eval.temperatures, config.eval.baseline = [0.0], False
    config.decode.policy, config.decode.confidence_threshold = "threshold", 0.6
    evaluate(config)
    (Path(config.checkpoint) / "calibration.json").write_text(json.dumps({"temperatures": [1e-3, 1e-3, 1e-3]}))
    before = proposed_in(config)
    decoded.clear()
    evaluate(config)
    assert len(decoded) == 3
    assert proposed_in(config) != before


def outputs_of(config: EvalRun) -> list[list[int]]:
    return [
        completion["output_ids"]
        for record in records_of(config)
        for way in ("speculative", "plain")
        for completion in record[way]["completions"]
    ]


def test_two_ranks_share_the_prompts_and_agree(config: EvalRun, tmp_path: Path) -> None:
    config.decode.batch_size, config.eval.temperatures = 1, [1.0]
    alone = evaluate(dataclass_with(config, output_dir=config.output_dir + "_alone"))
    (tmp_path / "run.pickle").write_bytes(pickle.dumps(config))
    script = tmp_path / "both.py"
    script.write_text(
        "import pickle, sys\n"
        "from deepspec.evaluation import evaluate, runner\n"
        "decode = runner._decode\n"
        "def shown(config, plan, chunks, store, state):\n"
        "    print(f'rank {state.process_index} decodes {len(chunks)} chunks', flush=True)\n"
        "    return decode(config, plan, chunks, store, state)\n"
        "runner._decode = shown\n"
        "evaluate(pickle.load(open(sys.argv[1], 'rb')))\n",
        encoding="utf-8",
    )
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    finished = subprocess.run(
        [*command, str(tmp_path / "run.pickle")], capture_output=True, text=True, env=environment, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert "rank 0 decodes 3 chunks" in finished.stdout
    assert "rank 1 decodes 2 chunks" in finished.stdout
    assert finished.stdout.count("mean of sets") == 1
    both = json.loads((Path(config.output_dir) / "metrics.json").read_text())
    for name in PROMPTS:
        ours, theirs = both["results"][0]["sets"][name], alone["results"][0]["sets"][name]
        for key in ("prompts", "output_tokens", "tau", "survival"):
            assert ours[key] == theirs[key]
        assert ours["reliability"]["slots"] == theirs["reliability"]["slots"]
        for ours_bin, theirs_bin in zip(ours["reliability"]["bins"], theirs["reliability"]["bins"], strict=True):
            assert ours_bin == pytest.approx(theirs_bin, abs=1e-6)  # another process may round differently
    assert not list(Path(config.output_dir).glob("rounds-rank*"))


def test_another_set_keeps_what_is_there(config: EvalRun, decoded: list[int]) -> None:
    config.eval.temperatures, config.eval.sets = [1.0], ["math"]
    before = evaluate(config)
    decoded.clear()
    config.eval.sets = ["chat", "math"]
    after = evaluate(config)
    assert decoded == [2, 2]
    assert after["results"][0]["sets"]["math"]["rounds"] == before["results"][0]["sets"]["math"]["rounds"]


def test_outputs_do_not_depend_on_the_batch(config: EvalRun) -> None:
    config.eval.temperatures, config.eval.baseline = [1.0], False
    together = evaluate(config)
    assert together["results"][0]["sets"]["math"]["speedup"] is None
    config.decode.batch_size = 1
    alone = evaluate(config)
    for name in PROMPTS:
        assert alone["results"][0]["sets"][name]["cond_accept"] == together["results"][0]["sets"][name]["cond_accept"]


def test_a_fine_tuned_target_is_measured_on_purpose(
    config: EvalRun, decoded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Refused unless asked for; both fingerprints are recorded, also where nothing is decoded again."""
    fingerprint = load_target(config.target.path).fingerprint
    file = Path(config.checkpoint) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_fingerprint": fingerprint}))
    model = Qwen3ForCausalLM.from_pretrained(config.target.path)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    model.save_pretrained(config.target.path)
    with pytest.raises(ConfigError, match=r"on this one on purpose with eval.allow_other_target=true"):
        evaluate(config)
    config.eval.allow_other_target = True
    for _ in range(2):
        metrics = evaluate(config)
        assert metrics["draft"]["target_fingerprint"] == fingerprint
        assert metrics["target"]["fingerprint"] == load_target(config.target.path).fingerprint != fingerprint
        assert metrics["settings"]["eval.allow_other_target"] is True
    assert len(decoded) == 12  # of the first time
    assert "fewer drafted tokens may be accepted" in caplog.text
    assert "measured on a target of other weights" in report_of(config)


@pytest.mark.parametrize("max_length", [None, 60])
def test_prompts_that_are_too_long_are_skipped_and_counted(
    config: EvalRun, max_length: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the target's positions, or by what a slot holds; the others keep their random streams and their samples."""
    config.eval.sets, config.eval.temperatures = ["math"], [1.0]
    whole = evaluate(config)
    file = Path(config.eval.prompts_dir) / "math.jsonl"
    _, *rest = file.read_text().splitlines()
    too_long = "two " * (200 if max_length is None else 40)
    long = json.dumps({"turns": [too_long]})
    file.write_text("\n".join([long, *rest, long]))
    config.output_dir += "_skipped"
    config.decode.max_length = max_length
    metrics = evaluate(config)
    measured = metrics["results"][0]["sets"]["math"]
    assert (measured["prompts"], measured["skipped"]) == (2, 2)
    assert whole["results"][0]["sets"]["math"]["skipped"] == 0
    printed = capsys.readouterr().out
    assert "math: 2 prompts are too long and are skipped" in printed
    assert "2 (+2 too long)" in printed
    samples = [json.loads(line) for line in (Path(config.output_dir) / "samples.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (Path(whole["settings"]["output_dir"]) / "samples.jsonl").open()]
    assert [(row["prompt"], row["text"]) for row in samples] == [(row["prompt"], row["text"]) for row in before[1:]]
    assert "2 prompts of math were too long" in report_of(config)


def test_answers_without_a_round(config: EvalRun, capsys: pytest.CaptureFixture[str]) -> None:
    config.decode.max_new_tokens = 1
    metrics = evaluate(config)
    assert "NaN" not in json.dumps(metrics)
    values = metrics["results"][0]["sets"]["math"]
    assert (values["rounds"], values["output_tokens"], values["verify_rate"]) == (0, 3, None)
    assert values["tau"]["value"] is None
    assert re.search(r"math +│ +3 │ +- │ +- │", capsys.readouterr().out)
    assert "| 1 | math | - |" in report_of(config)


def report_of(config: EvalRun) -> str:
    folder = Path(config.output_dir).parent / "report"
    assert report.main([str(folder), "--eval", f"Draft={config.output_dir}"]) == 0
    return (folder / "report.md").read_text()


def write_target_config(config: EvalRun, **changes: Any) -> None:
    """Change config.json of the target; generation_config.json goes."""
    folder = Path(config.target.path)
    (folder / "generation_config.json").unlink(missing_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "generation", "expected"),
    [
        ({"eos_token_id": [7, 9]}, None, {7, 9}),
        ({"eos_token_id": 7}, None, {7}),
        ({"eos_token_id": None, "text_config": {"eos_token_id": [8]}}, None, {8}),
        ({"eos_token_id": [7, 9]}, {"eos_token_id": [9, 11]}, {9, 11}),  # as `generate`: the file of its own decides
        ({"eos_token_id": None}, None, set()),
    ],
)
def test_every_stop_token_that_generate_honours(
    config: EvalRun, changes: dict[str, Any], generation: dict[str, Any] | None, expected: set[int]
) -> None:
    write_target_config(config, **changes)
    if generation is not None:
        (Path(config.target.path) / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = load_tokenizer(config.target.path)
    stops = stop_tokens(config.target.path, None, tokenizer)
    assert set(stops) == expected | {tokenizer.eos_token_id}


def test_answers_end_where_generate_ends_by_config_json(config: EvalRun) -> None:
    """The list in config.json alone; its second token is what greedy decoding writes first."""
    prompt = render_prompt(load_tokenizer(config.target.path), [{"role": "user", "content": PROMPTS["math"][0]}], {})
    target = load_target(config.target.path)
    first = SpeculativeEngine(target, max_length=96).generate([Request(prompt, 12)])[0].output_ids[0]
    write_target_config(config, eos_token_id=[2, first])
    model = Qwen3ForCausalLM.from_pretrained(config.target.path)
    written = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
    assert written == [first]
    config.eval.temperatures, config.eval.sets, config.eval.limit = [0.0], ["math"], 1
    evaluate(config)
    (line,) = (Path(config.output_dir) / "rounds.jsonl").read_text().splitlines()
    assert json.loads(line)["speculative"]["completions"][0]["output_ids"] == written


def test_generation_ends_with_the_targets_positions(config: EvalRun) -> None:
    config.eval.temperatures, config.eval.sets, config.decode.max_new_tokens = [1.0], ["chat"], 5000
    evaluate(config)
    rows = [json.loads(line) for line in (Path(config.output_dir) / "rounds.jsonl").read_text().splitlines()]
    lengths = [len(completion["output_ids"]) for row in rows for completion in row["plain"]["completions"]]
    assert max(lengths) <= 96


def test_what_cannot_work_is_refused_before_weights_are_read(
    config: EvalRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "load_target", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=r"decode\.max_length=20: no prompt of 'math' fits: .*needs \d+"):
        evaluate(dataclass_with(config, decode=DecodeConfig(max_new_tokens=12, max_length=20)))
    with pytest.raises(ConfigError, match=r"eval\.sets=\[\]"):
        evaluate(dataclass_with(config, eval=EvalConfig()))
    with pytest.raises(ConfigError, match=r"decode.policy=prefix: needs an SPS table; measure one with python -m deep"):
        evaluate(dataclass_with(config, decode=DecodeConfig(policy="prefix")))
    (tmp_path / "prompts" / "math.jsonl").write_text(json.dumps({"turns": ["two " * 200]}), encoding="utf-8")
    with pytest.raises(DataError, match=r"no prompt of 'math' fits: the shortest has \d+ tokens, .* at most 96 with"):
        evaluate(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            "decode.batch_size=100000000",
            "decode.batch_size=100000000: the caches of .* would fit: lower",
        ),
        (
            "target.path={other}",
            r"draft: its embedding is \[\d+, 32\] \[vocab, hidden\], but that of .* is \[300, 32\]",
        ),
    ],
)
def test_the_command_line_answers_a_mistake_with_one_message(
    config: EvalRun, tmp_path: Path, changes: str, message: str
) -> None:
    other = tmp_path / "other"
    Qwen3ForCausalLM(tiny_target_config(vocab_size=300, max_position_embeddings=96)).save_pretrained(other)
    load_tokenizer(config.target.path).save_pretrained(other)
    root = Path(__file__).resolve().parent.parent
    words = [
        f"checkpoint={config.checkpoint}",
        f"target.path={config.target.path}",
        f"eval.prompts_dir={config.eval.prompts_dir}",
        f"output_dir={config.output_dir}",
        "eval.sets=[math]",
        "decode.max_new_tokens=4",
        changes.format(other=other),
    ]
    finished = subprocess.run(
        [sys.executable, str(root / "eval.py"), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert finished.returncode == 2, finished.stderr
    assert re.search(f"^error: .*{message}", finished.stderr, re.MULTILINE), finished.stderr
    assert "Traceback" not in finished.stderr
