"""An evaluation's metrics.json as the model card needs it, refused when it measured another draft."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepspec.files import sha256_of
from deepspec.publishing.source import DraftSource, PublishError

METRICS_FILE, SAMPLES_FILE, PLOT_FILE = "metrics.json", "samples.jsonl", "tau.png"
# How it was measured, as the card words it: key of the evaluation's config -> title.
CONDITIONS = {
    "decode.max_new_tokens": "At most new tokens",
    "decode.batch_size": "prompts decoded together",
    "decode.verification": "verification by",
    "decode.confidence_threshold": "confidence threshold",
    "target.dtype": "target computed in",
}


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval, if one was computed."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ResultRow:
    """What was measured on one prompt set at one temperature."""

    temperature: float
    set_name: str
    tau: Estimate | None  # tokens emitted per verification round; None = no round was needed
    prompts: int | None = None
    verify_rate: Estimate | None = None
    speedup: Estimate | None = None  # None = no baseline was decoded
    cond_accept: tuple[Estimate | None, ...] = ()  # by slot; None = the slot was never reached


@dataclass(frozen=True)
class Sample:
    """A prompt and what the target and the draft wrote together."""

    set_name: str
    temperature: float
    prompt: str
    output: str


@dataclass(frozen=True)
class Evaluation:
    rows: tuple[ResultRow, ...]
    conditions: dict[str, str] = field(default_factory=dict)  # how it was measured: title -> value
    sample: Sample | None = None
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
    except (ValueError, OSError) as error:
        raise PublishError(f"{file}: damaged ({error}); evaluate again") from error
    if not isinstance(metrics, dict):
        raise PublishError(f"{file}: not an evaluation; give the output_dir of eval.py")
    _check_same_draft(metrics, source, file)
    plot = folder / PLOT_FILE
    return Evaluation(
        rows=_rows(metrics, file),
        conditions=_conditions(metrics),
        sample=_sample(folder / SAMPLES_FILE),
        plot=plot if plot.is_file() else None,
    )


def _check_same_draft(metrics: dict[str, Any], source: DraftSource, file: Path) -> None:
    """By the SHA-256 of the weight files where recorded, else by the folder."""
    draft = metrics.get("draft")
    recorded: dict[str, Any] = draft if isinstance(draft, dict) else {}
    evaluated = recorded.get("path") or metrics.get("checkpoint")
    digests = recorded.get("sha256")
    another = (
        f"{file}: measured another draft ({evaluated or 'unnamed'}) than {source.folder}; evaluate this one with "
        f"eval.py checkpoint={source.folder}, or give the evaluation that belongs to it"
    )
    if isinstance(digests, dict) and digests:
        weights = [name for name in source.files if name.endswith(".safetensors")]
        if digests != {name: sha256_of(source.folder / name) for name in weights}:
            raise PublishError(another)
    elif evaluated:
        if Path(str(evaluated)).expanduser().resolve() != source.folder.resolve():
            raise PublishError(another)
    else:
        raise PublishError(f"{file}: does not say which draft it measured; evaluate again with eval.py")


def _rows(metrics: dict[str, Any], file: Path) -> tuple[ResultRow, ...]:
    rows = []
    try:
        for temperature, sets in metrics["results"].items():
            for set_name, entry in sets.items():
                rows.append(
                    ResultRow(
                        temperature=float(temperature),
                        set_name=set_name,
                        tau=_estimate(entry["tau"]),
                        prompts=entry.get("prompts"),
                        verify_rate=_estimate(entry.get("verify_rate")),
                        speedup=_estimate(entry.get("speedup")),
                        cond_accept=tuple(_estimate(value) for value in entry.get("cond_accept") or ()),
                    )
                )
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise PublishError(
            f"{file}: not the metrics of eval.py ({type(error).__name__}: {error}); expected results by temperature "
            "and set, each with tau; evaluate again"
        ) from error
    if not rows:
        raise PublishError(f"{file}: holds no results; evaluate at least one set")
    return tuple(sorted(rows, key=lambda row: (-row.temperature, row.set_name)))


def _estimate(recorded: Any) -> Estimate | None:
    """A number, or `{"value", "low", "high"}`; null is None."""
    if isinstance(recorded, dict):
        value, low, high = recorded["value"], recorded.get("low"), recorded.get("high")
    else:
        value, low, high = recorded, None, None
    if value is None:
        return None
    return Estimate(float(value), *(None if bound is None else float(bound) for bound in (low, high)))


def _conditions(metrics: dict[str, Any]) -> dict[str, str]:
    found = {"Measured on": str(metrics["device"])} if metrics.get("device") else {}
    for key, title in CONDITIONS.items():
        value: Any = metrics.get("config")
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found[title] = str(value)
    return found


def _sample(file: Path) -> Sample | None:
    """The first sample text, if the evaluation kept any."""
    if not file.is_file():
        return None
    try:
        with file.open(encoding="utf-8") as lines:
            first = json.loads(next(lines))
        return Sample(str(first["set"]), float(first["temperature"]), str(first["prompt"]), str(first["output"]))
    except StopIteration:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise PublishError(f"{file}:1: not a sample of eval.py ({type(error).__name__}: {error})") from error
