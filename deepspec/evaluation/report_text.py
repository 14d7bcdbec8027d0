"""The words and tables of a report."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from deepspec.evaluation.markdown import markdown_table
from deepspec.evaluation.plots import confident, result_at, set_at, sets_of, temperatures_of
from deepspec.evaluation.report_inputs import ReportInputs
from deepspec.evaluation.summary import is_other_target, show_estimate, show_number

COMPARABLE_SETTINGS = (
    *("target.path", "decode.", "seed", "eval.limit", "eval.prompts_dir", "eval.first_turn_only"),
    "data.template_options",
)
Metrics = Mapping[str, Any]
LONGEST_SAMPLE = 1500  # characters
_table = partial(markdown_table, text_columns=2)


def report_text(inputs: ReportInputs, pictures: Mapping[str, str], command: str) -> str:
    """The report as Markdown.

    Args:
        pictures: file name -> caption.
        command: that makes this report.
    """
    evaluations = inputs.evaluations
    blocks = [
        f"# {' and '.join(evaluations)}: how much is accepted, how much faster",
        headline(evaluations),
        *_cautions(evaluations),
        "## Accepted length",
        "Tokens emitted per verification round (tau), with 95% bootstrap intervals over prompts. Plain decoding is 1; "
        f"the most is {_most(evaluations)}.",
        _by_set(evaluations, lambda measured: show_estimate(measured["tau"]), lambda m: show_estimate(m["tau"])),
        _picture("tau.png", pictures),
        "## Speed",
        *_speed(evaluations),
        "## Acceptance by position",
        "`cond_accept@k`: how often drafted token k is accepted when all before it were. `survival@k`: how often "
        "tokens 1 to k are all accepted. Verify rate: sum(accepted + 1) / sum(proposed + 1).",
        _acceptance(evaluations),
        _picture("acceptance.png", pictures),
    ]
    if "training.png" in pictures:
        blocks += ["## Training", _training(inputs.runs), _picture("training.png", pictures)]
    if "reliability.png" in pictures:
        blocks += ["## Confidence", _confidence(evaluations), _picture("reliability.png", pictures)]
    blocks += ["## Sample texts", *_samples(inputs), "## Machine", _machine(evaluations)]
    blocks += ["## Commands", _commands(inputs, command)]
    return "\n\n".join(blocks) + "\n"


def headline(evaluations: Mapping[str, Metrics]) -> str:
    """One sentence with the mean accepted length and speed-up of each draft at the first temperature."""
    temperature = temperatures_of(evaluations)[0]
    clauses = []
    for name, metrics in evaluations.items():
        result = result_at(metrics, temperature)
        if result is None or result["macro"]["tau"]["value"] is None:
            continue
        clause = f"**{name}** emits **{show_estimate(result['macro']['tau'])}** tokens per round"
        if result["macro"]["speedup"]:
            clause += f" and decodes **{show_estimate(result['macro']['speedup'], 'x')}** as fast as without a draft"
        clauses.append(clause)
    sets = ", ".join(sets_of(evaluations))
    return f"At temperature {temperature:g}, averaged over {sets}: {'; '.join(clauses) or 'nothing was decoded'}."


def _cautions(evaluations: Mapping[str, Metrics]) -> list[str]:
    """Whatever makes the drafts' numbers not comparable."""
    differing = []
    keys = dict.fromkeys(key for metrics in evaluations.values() for key in metrics["settings"])
    for key in (key for key in keys if key.startswith(COMPARABLE_SETTINGS)):
        values = {name: metrics["settings"].get(key) for name, metrics in evaluations.items()}
        if len({str(value) for value in values.values()}) > 1:
            differing.append(f"`{key}` ({', '.join(f'{name}: {value}' for name, value in values.items())})")
    failed = {
        name: sum(values.get("failed", 0) for result in metrics["results"] for values in result["sets"].values())
        for name, metrics in evaluations.items()
    }
    notes = [f"> {name}: {count} prompts ended early, logits not finite." for name, count in failed.items() if count]
    notes += [
        f"> {name}: {values['skipped']} prompts of {set_name} were too long for the target or a slot: skipped."
        for name, metrics in evaluations.items()
        for set_name, values in metrics["results"][0]["sets"].items()
        if values.get("skipped")
    ]
    notes += [
        f"> {name}: {values['skipped_turns']} later turns of {set_name} became too long at temperature "
        f"{result['temperature']:g} and were not decoded."
        for name, metrics in evaluations.items()
        for result in metrics["results"]
        for set_name, values in result["sets"].items()
        if values.get("skipped_turns")
    ]
    notes += [
        f"> {name}: measured on a target of other weights than those it was trained for."
        for name, metrics in evaluations.items()
        if is_other_target(metrics)
    ]
    if not differing:
        return notes
    return [
        *notes,
        f"> The drafts were measured under different settings, so compare with care: {'; '.join(differing)}.",
    ]


def _most(evaluations: Mapping[str, Metrics]) -> str:
    sizes = {name: metrics["draft"]["block_size"] + 1 for name, metrics in evaluations.items()}
    if len(set(sizes.values())) == 1:
        return str(next(iter(sizes.values())))
    return ", ".join(f"{size} for {name}" for name, size in sizes.items())


def _by_set(evaluations: Mapping[str, Metrics], cell: Callable[[Metrics], str], mean: Callable[[Metrics], str]) -> str:
    """A row per temperature and set, a column per draft, and a row with the mean over sets."""
    rows = []
    for temperature in temperatures_of(evaluations):
        for name in sets_of(evaluations):
            measured = [set_at(metrics, temperature, name) for metrics in evaluations.values()]
            rows.append([f"{temperature:g}", name, *(cell(values) if values else "-" for values in measured)])
        results = [result_at(metrics, temperature) for metrics in evaluations.values()]
        means = [f"**{mean(result['macro'])}**" if result else "-" for result in results]
        rows.append([f"{temperature:g}", "**mean of sets**", *means])
    return _table(["temperature", "set", *evaluations], rows)


def _speed(evaluations: Mapping[str, Metrics]) -> list[str]:
    if not any(r["macro"]["speedup"] for metrics in evaluations.values() for r in metrics["results"]):
        return ["No baseline was decoded (`eval.baseline=false`)."]

    def cell(measured: Metrics) -> str:
        fast, plain = measured["speculative_tokens_per_second"], measured["plain_tokens_per_second"]
        return f"{show_estimate(measured['speedup'], 'x')}, {show_number(fast, 1)} against {show_number(plain, 1)}"

    return [
        "Speed-up over plain decoding with the same engine, with 95% intervals, and tokens per second of one process "
        "with and without the draft. Both were decoded in turns, chunk by chunk, in one run.",
        _by_set(evaluations, cell, lambda macro: show_estimate(macro["speedup"], "x")),
        *_losslessness(evaluations),
    ]


def _losslessness(evaluations: Mapping[str, Metrics]) -> list[str]:
    clauses = []
    for name, metrics in evaluations.items():
        greedy = result_at(metrics, 0)
        shares = [m["identical_to_plain"] for m in greedy["sets"].values()] if greedy else []
        if shares and None not in shares:
            clauses.append(f"{name} {100 * sum(shares) / len(shares):.1f}%")
    if not clauses:
        return []
    return [f"Greedy outputs that are the same, token for token, with and without the draft: {', '.join(clauses)}."]


def _acceptance(evaluations: Mapping[str, Metrics]) -> str:
    positions = max(metrics["draft"]["block_size"] for metrics in evaluations.values())
    rows = []
    for temperature in temperatures_of(evaluations):
        for set_name in sets_of(evaluations):
            for name, metrics in evaluations.items():
                measured = set_at(metrics, temperature, set_name)
                if measured:
                    padding = ["-"] * (positions - len(measured["cond_accept"]))
                    for key in ("cond_accept", "survival"):
                        rates = [show_number(rate) for rate in measured[key]]
                        verified = show_number(measured["verify_rate"]) if key == "cond_accept" else ""
                        title = f"{set_name}, {temperature:g}" if key == "cond_accept" else ""
                        rows.append([title, f"{name} `{key}`", *rates, *padding, verified])
    return _table(["set, temperature", "draft", *(f"@{k}" for k in range(1, positions + 1)), "verify rate"], rows)


def _training(runs: Mapping[str, Sequence[Metrics]]) -> str:
    rows = []
    for name, logged in runs.items():
        measured = next((row for row in reversed(logged) if "eval/loss" in row), {})
        last = next((row for row in reversed(logged) if "loss" in row), {})
        figures = [last.get("loss"), measured.get("eval/loss"), last.get("tau"), measured.get("eval/tau")]
        speed = last.get("tokens_per_second")
        cells = [show_number(figure, 3) for figure in figures]
        rows.append([name, str(logged[-1]["step"]), *cells, "-" if speed is None else f"{speed:,.0f}"])
    header = ["draft", "steps", "loss", "loss, held out", "expected tau", "expected tau, held out", "tokens/s"]
    note = "The losses of different algorithms weigh different terms and cannot be compared with each other."
    return f"{_table(header, rows)}\n\n{note}"


def _confidence(evaluations: Mapping[str, Metrics]) -> str:
    rows = [
        [name, f"{temperature:g}", f"{100 * m['ece']:.1f}%", show_number(m["auc"], 3), f"{m['slots']:,}"]
        for name, temperature, m in confident(evaluations)
    ]
    intro = "How well the confidence head predicts that a token is accepted once all before it were; all sets together."
    table = _table(["draft", "temperature", "calibration error (ECE)", "AUC", "tokens"], rows)
    return "\n\n".join([intro, table, _confidence_by_position(evaluations)])


def _confidence_by_position(evaluations: Mapping[str, Metrics]) -> str:
    """Mean confidence and share accepted, for each position."""
    measured = [(name, temperature, m["positions"]) for name, temperature, m in confident(evaluations)]
    last = max(position["k"] for _, _, positions in measured for position in positions)
    rows = []
    for name, temperature, positions in measured:
        of_k = {position["k"]: position for position in positions}
        for title, key in (("predicted", "predicted"), ("accepted", "observed")):
            rates = [show_number(of_k[k][key]) if k in of_k else "-" for k in range(1, last + 1)]
            rows.append([f"{name}, {temperature:g}", title, *rates])
    return _table(["draft, temperature", "mean", *(f"@{k}" for k in range(1, last + 1))], rows)


def _picture(file: str, pictures: Mapping[str, str]) -> str:
    return f"![{pictures[file]}]({file})"


def _samples(inputs: ReportInputs) -> list[str]:
    """The first prompt of each set at the first temperature, with every draft's text."""
    temperature = temperatures_of(inputs.evaluations)[0]
    blocks = []
    for set_name in sets_of(inputs.evaluations):
        prompt = None
        for name, samples in inputs.samples.items():
            chosen = [s for s in samples if s["set"] == set_name and s["temperature"] == temperature]
            same = [s for s in chosen if prompt in (None, s["prompt"])]
            if not same:
                continue
            if prompt is None:
                prompt = same[0]["prompt"]
                blocks += [f"### {set_name}, temperature {temperature:g}", "Prompt:", _quoted(prompt)]
            blocks += [f"{name}, {show_number(same[0]['tau'])} tokens per round:", _quoted(same[0]["text"])]
    return blocks


def _quoted(text: str) -> str:
    """A code block that the text cannot end."""
    fence = "~~~"
    while fence in text:
        fence += "~"
    cut = "" if len(text) <= LONGEST_SAMPLE else "\n[...]"
    return f"{fence}text\n{text[:LONGEST_SAMPLE]}{cut}\n{fence}"


def _machine(evaluations: Mapping[str, Metrics]) -> str:
    """What it ran on, once if it is the same for all drafts."""
    described: dict[str, list[str]] = {}
    for name, metrics in evaluations.items():
        machine = metrics["machine"]
        hardware = (
            f"{machine['cpu']}, {machine['logical_cores']} logical cores, {machine['torch_threads']} threads used"
        )
        hardware += f", {machine['memory_gib']:g} GiB of memory"
        if machine["accelerator"]:
            hardware += f", {machine['accelerator']}"
        software = ", ".join(f"{package} {version}" for package, version in metrics["versions"].items())
        described.setdefault(f"{hardware}. {software}.", []).append(name)
    return "\n".join(f"- {', '.join(names)}: {text}" for text, names in described.items())


def _commands(inputs: ReportInputs, command: str) -> str:
    training = [_training_command(folder) for folder in inputs.run_folders.values()]
    evaluating = [metrics["command"] for metrics in inputs.evaluations.values()]
    return "~~~bash\n" + "\n".join([*filter(None, training), *evaluating, command]) + "\n~~~"


def _training_command(folder: Path) -> str | None:
    """From the overrides that Hydra records beside a run, if they are there."""
    file = folder / ".hydra" / "overrides.yaml"
    if not file.is_file():
        return None
    overrides = yaml.safe_load(file.read_text(encoding="utf-8")) or []
    return f"accelerate launch train.py {shlex.join(overrides)}"
