"""What the benchmarks share: figures over repeats, and the record that says where and how they were measured."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from typing import Any

from deepspec.environment import command_line, machine, versions
from deepspec.files import write_atomically


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(values: dict[str, float], digits: int) -> str:
    """`median (min to max)`"""
    return "{median:.{d}f} ({min:.{d}f} to {max:.{d}f})".format(**values, d=digits)


def write_record(path: str, results: Any, options: Any, **more: Any) -> None:
    """JSON with the results, the options (a dataclass), the machine, the versions and the command."""
    record = {
        "results": results,
        "settings": asdict(options),
        **more,
        "machine": machine(),
        "versions": versions(),
        "command": command_line(),
    }
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    print(f"written to {path}")
