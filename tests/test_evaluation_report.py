"""The report: what it says, what it draws, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from deepspec.decoding import Completion, Round
from deepspec.evaluation.records import Decoding, Record
from deepspec.evaluation.report import main
from deepspec.evaluation.summary import results_of, write_results

BLOCK = 5
RATES = {"math": 0.9, "code": 0.8, "chat": 0.6}


def synthetic_records(seed: int, skill: float, *, temperatures: list[float], confident: bool) -> list[Record]:
    """Six prompts a set, whose tokens are accepted with probability `skill` times the set's rate."""
    rng = np.random.default_rng(seed)
    records = []
    for temperature in temperatures:
        for name, rate in RATES.items():
            for start in range(6):
                p = skill * rate * rng.uniform(0.8, 1.1)
                rounds = [_round(rng, p, confident) for _ in range(30)]
                tokens = list(range(1 + sum(r.emitted for r in rounds)))
                fast = Decoding(len(rounds) * rng.uniform(0.9, 1.1), [Completion(tokens, rounds, "stop")])
                slow = Decoding(0.7 * len(tokens) * rng.uniform(0.9, 1.1), [Completion(tokens, [], "stop")])
                records.append(Record(name, temperature, start, "digest", speculative=fast, plain=slow))
    return records


def _round(rng: np.random.Generator, p: float, confident: bool) -> Round:
    confidences = np.clip(rng.normal(p, 0.15, BLOCK), 0.01, 0.99)
    accepted = int((rng.uniform(size=BLOCK) < confidences).cumprod().sum())
    return Round(BLOCK, accepted, accepted + 1, confidences.tolist() if confident else None)


def write_evaluation(folder: Path, seed: int, skill: float, confident: bool, **settings: Any) -> None:
    temperatures = [1.0, 0.0]
    results = results_of(
        synthetic_records(seed, skill, temperatures=temperatures, confident=confident),
        sets=list(RATES),
        temperatures=temperatures,
        block_size=BLOCK,
        baseline=True,
        bootstrap_samples=200,
        skipped=dict.fromkeys(RATES, 0),
        seed=0,
    )
    metrics = {
        "draft": {"name": folder.name, "algorithm": "dspark", "block_size": BLOCK},
        "target": {"path": "builtin"},
        "results": results,
        "settings": {"target.path": "builtin", "decode.top_p": 1.0, "eval.limit": 6} | settings,
        "machine": {"cpu": "A CPU", "logical_cores": 8, "torch_threads": 4, "memory_gib": 16.0, "accelerator": None},
        "versions": {"torch": "2.9"},
        "command": f"python eval.py checkpoint={folder.name}",
    }
    samples = [
        {"set": name, "temperature": 1.0, "prompt": f"Tell me of {name}", "text": "~~~\nA fence", "tau": 3.21}
        for name in RATES
    ]
    write_results(folder, metrics, samples)


def write_training(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for step in range(10, 210, 10):
        falling = np.exp(-step / 60)
        row = {
            "step": step,
            "loss": 1 + 2 * falling,
            "ce": 2 + 5 * falling,
            "tv": 0.7 + falling,
            "tau": 4 - 3 * falling,
        }
        row = {key: value + (0 if key == "step" else rng.normal(0, 0.03)) for key, value in row.items()}
        if step % 100 == 0:
            row |= {f"eval/{key}": row[key] + 0.1 for key in ("loss", "ce", "tv", "tau")}
        rows.append(row)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text("- recipes=smoke\n- train.steps=200\n", encoding="utf-8")


def make_report(folder: Path, **settings: Any) -> tuple[int, list[str]]:
    """Two drafts, the second without confidences. Returns the exit status and the arguments."""
    words = [str(folder / "report")]
    for seed, (name, skill) in enumerate({"DSpark": 1.0, "DFlash": 0.85}.items()):
        write_evaluation(folder / f"eval_{name}", seed, skill, confident=seed == 0, **(settings if seed else {}))
        write_training(folder / name, seed)
        words += ["--train", f"{name}={folder / name}", "--eval", f"{name}={folder / f'eval_{name}'}"]
    return main(words), words


def test_report_says_what_was_measured(tmp_path: Path) -> None:
    status, _ = make_report(tmp_path)
    assert status == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())["evaluations"]
    hot, greedy = metrics["DSpark"]["results"]
    tau = hot["sets"]["math"]["tau"]
    assert f"{tau['value']:.2f} ({tau['low']:.2f} to {tau['high']:.2f})" in text
    headline = text.split("\n\n")[1]
    assert f"**DSpark** emits **{hot['macro']['tau']['value']:.2f} (" in headline
    assert f"**{hot['macro']['speedup']['value']:.2f}x (" in headline
    assert "**DFlash** emits" in headline
    assert f"| {greedy['sets']['chat']['cond_accept'][4]:.2f} | " in text
    assert f"| DSpark | 1 | {100 * hot['reliability']['ece']:.1f}% | {hot['reliability']['auc']:.3f} |" in text
    predicted = " | ".join(f"{position['predicted']:.2f}" for position in hot["reliability"]["positions"])
    assert f"| DSpark, 1 | predicted | {predicted} |" in text
    assert "the most is 6" in text
    assert "DSpark 100.0%, DFlash 100.0%" in text
    assert "accelerate launch train.py recipes=smoke train.steps=200" in text
    assert "python eval.py checkpoint=eval_DFlash" in text
    assert "~~~~text\n~~~\nA fence\n~~~~" in text
    assert "different settings" not in text
    for picture in ("tau", "acceptance", "training", "reliability"):
        assert f"({picture}.png)" in text
        pixels = imread(tmp_path / "report" / f"{picture}.png")
        assert min(pixels.shape[:2]) > 400
        assert pixels[..., :3].std() > 0.05


def test_different_settings_are_pointed_out(tmp_path: Path) -> None:
    make_report(tmp_path, **{"decode.top_p": 0.8})
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "`decode.top_p` (DSpark: 1.0, DFlash: 0.8)" in text


def test_only_what_exists_is_drawn(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "eval", 0, 1.0, confident=False)
    assert main([str(tmp_path / "report"), "--eval", f"DFlash={tmp_path / 'eval'}"]) == 0
    assert sorted(file.name for file in (tmp_path / "report").glob("*.png")) == ["acceptance.png", "tau.png"]


def test_missing_and_damaged_inputs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*words: str) -> str:
        assert main([str(tmp_path / "report"), *words]) == 2
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    write_evaluation(tmp_path / "eval", 0, 1.0, confident=True)
    good = f"DSpark={tmp_path / 'eval'}"
    assert "empty/metrics.json: no such file; run eval.py" in error("--eval", f"DSpark={tmp_path / 'empty'}")
    assert "empty/metrics.jsonl: no such file" in error("--eval", good, "--train", f"DSpark={tmp_path / 'empty'}")
    assert "--eval outputs: expected NAME=DIR" in error("--eval", "outputs")
    assert "the name DSpark was given before" in error("--eval", good, "--eval", good)
    assert "no evaluation to report" in error()
    (tmp_path / "eval" / "metrics.json").write_text('{"results": [', encoding="utf-8")
    assert "eval/metrics.json: damaged" in error("--eval", good)
    assert not (tmp_path / "report").exists()
