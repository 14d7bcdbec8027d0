"""An evaluation's files as the model card needs them, refused when they measured another draft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.decoding.recorded_rounds import METRICS_FILE
from deepspec.evaluation.statistics import Estimate
from deepspec.evaluation.summary import SAMPLES_FILE, is_other_target
from deepspec.files import sha256_of
from deepspec.publishing.errors import PublishError
from deepspec.publishing.source import DraftSource

PLOT_FILE, REPORT_FOLDER = "tau.png", "report"
MEAN = "mean of sets"
# How it was measured, as the card words it: key of the evaluation's settings -> title.
CONDITIONS = {
    "decode.max_new_tokens": "New tokens per prompt, at most",
    "decode.batch_size": "Prompts decoded together",
    "decode.verification": "Verification rule",
    "decode.top_k": "Top-k (0 = off)",
    "decode.top_p": "Top-p (1 = off)",
    "decode.min_p": "Min-p (0 = off)",
    "decode.repetition_penalty": "Repetition penalty (1 = off)",
    "decode.stop_strings": "Stop strings",
    "decode.policy": "Verification policy",
    "decode.draft_tokens": "Drafted tokens verified (None = the whole block)",
    "decode.confidence_threshold": "Confidence threshold",
    "target.dtype": "Number format",
    "seed": "Seed",
}


@dataclass(frozen=True)
class ResultRow:
    """What was measured on one prompt set at one temperature, or the mean over the sets."""

    temperature: float
    set_name: str
    tau: Estimate
    speedup: Estimate  # no value = no baseline was decoded
    prompts: int | None = None
    verify_rate: float | None = None
    cond_accept: tuple[float | None, ...] = ()  # by slot; None = the slot was never reached


@dataclass(frozen=True)
class Sample:
    """A prompt and what target and draft wrote together."""

    set_name: str
    temperature: float
    prompt: str
    text: str


@dataclass(frozen=True)
class Evaluation:
    rows: tuple[ResultRow, ...]
    conditions: tuple[tuple[str, str], ...] = ()  # how it was measured: title, value
    samples: tuple[Sample, ...] = ()
    plot: Path | None = None


def read_evaluation(path: str | Path, source: DraftSource) -> Evaluation:
    """Read the `output_dir` of `eval.py`.

    Raises:
        FileNotFoundError: no metrics.json there.
        PublishError: damaged, incomplete, or the evaluation of another draft.
    """
    folder = Path(path).expanduser()
    file = folder / METRICS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"evaluation={path}: no {METRICS_FILE} there; give the output_dir of eval.py, or leave the key out"
        )
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        digests = _digests_of_same_draft(metrics["draft"], source, file)
        rows = tuple(row for result in metrics["results"] for row in _rows_at(result))
        conditions = _conditions(metrics)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PublishError(
            f"{file}: not the metrics of eval.py, or damaged ({type(error).__name__}: {error}); evaluate again"
        ) from error
    if not rows:
        raise PublishError(f"{file}: holds no results; evaluate at least one set")
    return Evaluation(rows, conditions, _samples(folder / SAMPLES_FILE), _find_plot(folder, digests))


def _digests_of_same_draft(draft: Mapping[str, Any], source: DraftSource, file: Path) -> list[str]:
    """SHA-256 of the weight files, which are those that were evaluated."""
    ours = {name: sha256_of(source.folder / name) for name in source.files if name.endswith(".safetensors")}
    evaluated: Mapping[str, str] = draft["weights"]
    if any(evaluated.get(name) != digest for name, digest in ours.items()):
        raise PublishError(
            f"{file}: measured other weights ({draft.get('folder')}) than those of {source.folder}; evaluate these "
            f"with eval.py checkpoint={source.folder}, or give the evaluation that belongs to it"
        )
    return list(ours.values())


def _rows_at(result: Mapping[str, Any]) -> list[ResultRow]:
    temperature = float(result["temperature"])
    rows = [
        ResultRow(
            temperature,
            name,
            _estimate(measured["tau"]),
            _estimate(measured["speedup"]),
            measured["prompts"],
            measured["verify_rate"],
            tuple(measured["cond_accept"]),
        )
        for name, measured in result["sets"].items()
    ]
    if len(rows) > 1:
        mean = result["macro"]
        rows.append(ResultRow(temperature, MEAN, _estimate(mean["tau"]), _estimate(mean["speedup"])))
    return rows


def _estimate(recorded: Mapping[str, float | None] | None) -> Estimate:
    return Estimate(None) if recorded is None else Estimate(recorded["value"], recorded["low"], recorded["high"])


def _conditions(metrics: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    machine, settings = metrics["machine"], metrics["settings"]
    hardware = machine.get("accelerator") or f"{machine['cpu']}, {machine['torch_threads']} threads"
    chosen = [(title, str(settings[key])) for key, title in CONDITIONS.items() if key in settings]
    if is_other_target(metrics):
        target = metrics["target"]
        other = f"{target['path']}, fingerprint `{target['fingerprint'][:12]}`, not the one that it was trained for"
        chosen.insert(0, ("Target", other))
    return (("Measured on", hardware), *chosen)


def _samples(file: Path) -> tuple[Sample, ...]:
    """The first sample of each set at the highest temperature, if the evaluation kept any."""
    if not file.is_file():
        return ()
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [
            Sample(str(line["set"]), float(line["temperature"]), str(line["prompt"]), str(line["text"]))
            for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishError(
            f"{file}: not the samples of eval.py, or damaged ({type(error).__name__}: {error}); evaluate again, or "
            "remove it to publish without sample texts"
        ) from error
    hottest = max((sample.temperature for sample in found), default=0.0)
    first: dict[str, Sample] = {}
    for sample in found:
        if sample.temperature == hottest:
            first.setdefault(sample.set_name, sample)
    return tuple(first.values())


def _find_plot(folder: Path, digests: list[str]) -> Path | None:
    """tau.png of the evaluation, or of a report beside it that was made from this draft's numbers."""
    report = folder.absolute().parent / REPORT_FOLDER
    if (folder / PLOT_FILE).is_file():
        return folder / PLOT_FILE
    if not (report / PLOT_FILE).is_file() or not (report / METRICS_FILE).is_file():
        return None
    reported = (report / METRICS_FILE).read_text(encoding="utf-8", errors="replace")
    return report / PLOT_FILE if all(digest in reported for digest in digests) else None
