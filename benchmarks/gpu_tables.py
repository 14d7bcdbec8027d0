"""The tables of a GPU session in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deepspec.evaluation.markdown import markdown_table

Parts = Mapping[str, Mapping[str, Any]]
GB = 1e9


def markdown(parts: Parts) -> str:
    """All tables for which there are results, and how each part ended."""
    return "\n\n".join(text for text in (*_tables(parts), _endings(parts)) if text) + "\n"


def _tables(parts: Parts) -> Iterator[str]:
    for result in _results(parts, "ceilings"):
        copied, product = result["copy_bandwidth"] / 1e12, result["product_rate"] / 1e12
        yield f"Ceilings: a copy moves {copied:.2f} TB/s, a bf16 product of 8192 runs at {product:.0f} TFLOP/s."
    rounds = [result for name in parts if name.startswith("decoding") for result in _results(parts, name)]
    if rounds:
        yield _rounds(rounds)
        yield _prefill(rounds)
    training = {name: result for name in parts if name.startswith("training") for result in _results(parts, name)}
    if training:
        yield _training(training)
    objective = {name: result for name in parts if name.startswith("objective") for result in _results(parts, name)}
    if objective:
        yield _objective(objective)


def _results(parts: Parts, name: str) -> list[dict[str, Any]]:
    return list(parts[name]["results"]) if name in parts else []


def _rounds(results: list[dict[str, Any]]) -> str:
    header = (
        *("context", "batch", "round, ms", "draft", "verify", "host", "verify of floor", "draft of floor"),
        *("plain step, ms", "heads add", "kernels of draft, verify"),
    )
    rows = []
    for result in results:
        size = [str(result["context"]), str(result["batch"])]
        if "out_of_memory" in result:
            rows.append([*size, "out of memory", *[""] * (len(header) - 3)])
            continue
        kernels = result.get("kernels", {})
        rows.append(
            [
                *size,
                *(f"{result[name]:.2f}" for name in ("wall_ms", "draft_ms", "verify_ms", "host_ms")),
                *(f"{result[f'{part}_of_floor']:.0%}" for part in ("verify", "draft")),
                f"{result['plain']['wall_ms']:.2f}",
                f"{result['head_share']:.1%}" if "head_share" in result else "",
                ", ".join(str(kernels[part]["launches"]) for part in ("draft", "verify") if part in kernels),
            ]
        )
    return markdown_table(header, rows, text_columns=0)


def _prefill(results: list[dict[str, Any]]) -> str:
    header = (
        *("context", "batch", "prefill, tokens/s", "passes", "weights, GB", "draft, GB"),
        *("caches, GB", "graphs, GB", "peak of prefill, GB"),
    )
    rows = []
    for result in results:
        if "out_of_memory" in result:
            continue
        memory = result["memory"]
        held = (result["target_bytes"], result["draft_bytes"], memory["caches"], memory["graphs"])
        rows.append(
            [
                *(str(result["context"]), str(result["batch"]), f"{result['prefill_tokens_per_second']:,.0f}"),
                str(result["prefill_passes"]),
                *(f"{size / GB:.2f}" for size in (*held, memory["prefill_peak"])),
            ]
        )
    return markdown_table(header, rows, text_columns=0)


def _training(results: Mapping[str, dict[str, Any]]) -> str:
    header = (
        *("step", "tokens/s", "of peak FLOP/s", "seconds", "features", "forward", "backward", "optimizer"),
        "peak memory, GB",
    )
    rows = [
        [
            name.removeprefix("training_").replace("_", ", "),
            f"{result['tokens_per_second']:,.0f}",
            f"{result['model_flops_utilization']:.1%}" if "model_flops_utilization" in result else "",
            f"{result['step_seconds']:.3f}",
            *(f"{result[f'{part}_seconds']:.3f}" for part in ("features", "forward", "backward", "optimizer")),
            f"{result['peak_memory_gib'] * 2**30 / GB:.1f}",
        ]
        for name, result in results.items()
    ]
    return markdown_table(header, rows, text_columns=1)


def _objective(results: Mapping[str, dict[str, Any]]) -> str:
    rows = []
    for name, result in results.items():
        if "out_of_memory" in result:
            rows.append([name.removeprefix("objective_"), "out of memory", ""])
            continue
        milliseconds, peak = 1e3 * min(result["seconds"]), result["peak_bytes"] / GB
        rows.append([name.removeprefix("objective_"), f"{milliseconds:.1f}", f"{peak:.2f}"])
    return markdown_table(("losses", "forward and backward, ms", "peak memory, GB"), rows, text_columns=1)


def _endings(parts: Parts) -> str:
    rows = [[name, part["status"], f"{part['seconds']:.0f}"] for name, part in parts.items()]
    tests = "".join(f"\n\nGPU tests: {result['summary']}" for result in _results(parts, "tests"))
    return markdown_table(("part", "ended", "seconds"), rows, text_columns=2) + tests
