"""Figures of a load sweep: what each policy reached at each load, and how the schedulers compare with fixed lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.load_serving import Slice
from benchmarks.summary import spread, summary

PLAIN, FIXED_1, FIXED_BLOCK = "plain", "fixed 1", "fixed block"
THRESHOLD, PREFIX, ASYNCHRONOUS = "threshold", "prefix scheduler", "asynchronous"
SCHEDULERS = (PREFIX, ASYNCHRONOUS)
CLOSED, POISSON = "closed loop", "poisson"
PERCENTILES = (50, 90, 99)
WITHIN = 0.98  # of the better fixed length: wanted at every load


def figures_of(slices: Sequence[Slice]) -> dict[str, Any]:
    """What one policy reached at one load."""
    latencies = [latency for part in slices for latency in part.latencies]
    lengths = [length for part in slices for length in part.lengths]
    seconds, rounds = sum(part.seconds for part in slices), sum(part.rounds for part in slices)
    proposed, passes = sum(part.proposed for part in slices), sum(part.passes for part in slices)
    per_token = [latency / length for latency, length in zip(latencies, lengths, strict=True)]
    return {
        "tokens_per_second": summary([part.tokens / part.seconds for part in slices]),
        "tokens_per_second_per_user": sum(lengths) / sum(latencies),
        "requests_per_second": len(latencies) / seconds,
        "concurrency": sum(part.inside_seconds for part in slices) / seconds,
        "verified_per_round": proposed / rounds if rounds else 0.0,  # of one request: the verification budget
        "verified_per_pass": proposed / passes if passes else 0.0,  # of all requests in it
        "tau": sum(part.emitted for part in slices) / rounds if rounds else None,
        "latency_seconds": _percentiles(latencies),
        "seconds_per_token": _percentiles(per_token),
        "requests": len(latencies),
        "slices": [{"seconds": part.seconds, "tokens": part.tokens} for part in slices],
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def load_result(kind: str, load: float, slices: Mapping[str, Sequence[Slice]]) -> dict[str, Any]:
    """One load.

    Args:
        kind: of arrivals.
        load: users, or requests per second.
        slices: of each policy, in the order in which they took turns.
    """
    return {
        "arrivals": kind,
        "load": load,
        "policies": {name: figures_of(parts) for name, parts in slices.items()},
        "against_fixed": {name: against_fixed(kind, slices, name) for name in SCHEDULERS},
    }


def against_fixed(kind: str, slices: Mapping[str, Sequence[Slice]], scheduler: str) -> dict[str, Any]:
    """A scheduler's speed over that of the better fixed length: of all turns together, and turn by turn.

    The speed is throughput in a closed loop. Poisson arrivals set the throughput, so there it is tokens/s per user.
    """
    better = max((FIXED_1, FIXED_BLOCK), key=lambda name: _speed(kind, slices[name]))
    pairs = zip(slices[scheduler], slices[better], strict=True)
    return {
        "better": better,
        "ratio": _speed(kind, slices[scheduler]) / _speed(kind, slices[better]),
        "turns": summary([_speed(kind, [ours]) / _speed(kind, [theirs]) for ours, theirs in pairs]),
    }


def _speed(kind: str, slices: Sequence[Slice]) -> float:
    if kind == CLOSED:
        return sum(part.tokens for part in slices) / sum(part.seconds for part in slices)
    return sum(sum(part.lengths) for part in slices) / sum(sum(part.latencies) for part in slices)


def verdicts(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether each scheduler is within 2% of the better fixed length at every load, and above both in the middle: at
    some load other than the lowest and the highest."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(result["arrivals"] for result in results):
        of_kind = [result for result in results if result["arrivals"] == kind]
        for name in SCHEDULERS:
            ratios = [result["against_fixed"][name]["ratio"] for result in of_kind]
            loads = [result["load"] for result in of_kind]
            found.setdefault(kind, {})[name] = {
                "smallest_ratio": min(ratios),
                "largest_ratio": max(ratios),
                "within_2_percent_at_every_load": min(ratios) >= WITHIN,
                "better_than_both_at": [load for load, ratio in zip(loads, ratios, strict=True) if ratio > 1],
                "better_than_both_in_the_middle": any(ratio > 1 for ratio in ratios[1:-1]),
            }
    return found


def table_of(results: Sequence[Mapping[str, Any]], kind: str) -> Table:
    """All loads of one kind of arrivals."""
    is_closed = kind == CLOSED
    table = Table(title="Closed loop" if is_closed else "Poisson arrivals")
    for column in (
        "users" if is_closed else "requests/s",
        "policy",
        "tokens/s",
        "per user",
        "verified",
        "in a pass",
        "tau",
        "latency p50, p99 (s)",
        "/ better fixed",
    ):
        table.add_column(column, no_wrap=True, justify="left" if column == "policy" else "right")
    for result in results:
        if result["arrivals"] != kind:
            continue
        table.add_section()
        for place, (name, figures) in enumerate(result["policies"].items()):
            latency, against = figures["latency_seconds"], result["against_fixed"].get(name)
            table.add_row(
                "" if place else f"{result['load']:.4g}",
                name,
                spread(figures["tokens_per_second"], 0),
                f"{figures['tokens_per_second_per_user']:.1f}",
                f"{figures['verified_per_round']:.2f}",
                f"{figures['verified_per_pass']:.1f}",
                f"{figures['tau']:.2f}" if figures["tau"] else "",
                f"{latency['p50']:.3g}, {latency['p99']:.3g}",
                f"{against['ratio']:.3f} ({against['turns']['min']:.3f} to {against['turns']['max']:.3f})"
                if against
                else "",
            )
    return table


def verdict_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for kind, of_kind in found.items():
        for name, verdict in of_kind.items():
            within = "yes" if verdict["within_2_percent_at_every_load"] else "no"
            at = ", ".join(f"{load:.4g}" for load in verdict["better_than_both_at"]) or "no load"
            lines.append(
                f"{kind}, {name}: {verdict['smallest_ratio']:.3f} to {verdict['largest_ratio']:.3f} of the better "
                f"fixed length; within 2% at every load: {within}; better than both at {at}"
            )
    return lines
