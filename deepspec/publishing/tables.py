"""The measured files beside a draft, in our form and in SGLang's: calibration and SPS table.

SGLang 0.5.23 reads an STS file {"temperatures": [one a position], "dataset", "num_samples", "ece_before", "ece_after"}
as sigmoid(c / T), and an SPS file {"sample_batch_tokens": rising, "sample_steps_per_sec", "max_batch_tokens"}. It
ignores other keys, so what of ours it has no key for is kept under `deepspec`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.decoding.calibration import CALIBRATION_FILE
from deepspec.decoding.sps import SPS_FILE, SpsTable
from deepspec.publishing.errors import PublishError

Record = dict[str, Any]
KEPT = "deepspec"


@dataclass(frozen=True)
class TableFile:
    """One measured file of a format."""

    name: str
    from_ours: Callable[[Record], Record]
    to_ours: Callable[[Record], Record]


@dataclass(frozen=True)
class Tables:
    """Where a format keeps calibration and SPS table, and how."""

    calibration: TableFile
    sps: TableFile

    @property
    def files(self) -> tuple[TableFile, TableFile]:
        return (self.calibration, self.sps)

    def any_in(self, folder: Path) -> bool:
        return any((folder / file.name).is_file() for file in self.files)


def sts_of(calibration: Record) -> Record:
    """SGLang's STS file from `calibration.json`."""
    positions = calibration.get("positions") or []
    sets = (calibration.get("source") or {}).get("sets") or {}
    record: Record = {"temperatures": [float(value) for value in calibration["temperatures"]]}
    if any(value <= 0 for value in record["temperatures"]) or not record["temperatures"]:
        raise ValueError(f"temperatures={calibration['temperatures']}: all must be above 0")
    if sets:
        record["dataset"] = ", ".join(sorted(sets))
    if "rounds" in calibration:
        record["num_samples"] = int(calibration["rounds"])
    for key, name in (("ece_before", "before"), ("ece_after", "held_out")):
        if positions:
            record[key] = [float(position[name]["ece"]) for position in positions]
    return record | {KEPT: {name: value for name, value in calibration.items() if name != "temperatures"}}


def calibration_of(sts: Record) -> Record:
    """`calibration.json` from SGLang's STS file."""
    kept = sts.get(KEPT)
    if kept is None:
        kept = {"source": {"sets": {sts["dataset"]: sts.get("num_samples", 0)}}} if sts.get("dataset") else {}
    return {"temperatures": [float(value) for value in sts["temperatures"]], **kept}


def sglang_sps_of(sps: Record) -> Record:
    """SGLang's SPS file from `sps.json`."""
    table = SpsTable(
        [point["tokens"] for point in sps["points"]], [point["steps_per_second"] for point in sps["points"]]
    )
    return {
        "sample_batch_tokens": list(table.tokens),
        "sample_steps_per_sec": [float(value) for value in table.steps_per_second],
        "max_batch_tokens": table.tokens[-1],
        KEPT: sps,
    }


def sps_of(sglang: Record) -> Record:
    """`sps.json` from SGLang's SPS file."""
    if "bias_seconds" in sglang:
        raise ValueError("an additive cost table (bias_seconds); DeepSpec reads tables of sample_batch_tokens")
    pairs = zip(sglang["sample_batch_tokens"], sglang["sample_steps_per_sec"], strict=True)
    points = [{"tokens": tokens, "steps_per_second": speed} for tokens, speed in pairs]
    kept: Record = sglang.get(KEPT) or {}
    measured = [{name: point[name] for name in ("tokens", "steps_per_second")} for point in kept.get("points", [])]
    SpsTable([point["tokens"] for point in points], [point["steps_per_second"] for point in points])
    return kept if measured == points else {"points": points}  # or it was changed since it was written


def _same(record: Record) -> Record:
    return record


OUR_TABLES = Tables(TableFile(CALIBRATION_FILE, _same, _same), TableFile(SPS_FILE, _same, _same))
SGLANG_TABLES = Tables(
    TableFile("dspark_sts.json", sts_of, calibration_of), TableFile("dspark_sps.json", sglang_sps_of, sps_of)
)


def read_tables(folder: Path, tables: Tables) -> dict[str, Record]:
    """Calibration and SPS table of a folder in our form, by our file name; those that are there.

    Raises:
        PublishError: one is damaged.
    """
    found = {}
    for ours, theirs in zip(OUR_TABLES.files, tables.files, strict=True):
        for file in dict.fromkeys((theirs, ours)):
            if (folder / file.name).is_file() and ours.name not in found:
                found[ours.name] = _converted(folder / file.name, file.to_ours)
    return found


def write_tables(folder: Path, records: Mapping[str, Record], tables: Tables) -> None:
    """Write what `read_tables` found under the names and in the form of a format.

    Raises:
        PublishError: a record lacks what the format needs.
    """
    for ours, theirs in zip(OUR_TABLES.files, tables.files, strict=True):
        if ours.name in records:
            try:
                record = theirs.from_ours(records[ours.name])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise PublishError(f"{ours.name}: not a table ({type(error).__name__}: {error})") from error
            (folder / theirs.name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _converted(file: Path, to_ours: Callable[[Record], Record]) -> Record:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        return to_ours(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PublishError(
            f"{file}: not a readable table ({type(error).__name__}: {error}); measure again, or remove it"
        ) from error
