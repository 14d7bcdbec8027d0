"""Request logs to training data: `python -m data_prep.from_logs logs=[requests.jsonl] output_dir=outputs/logs`.

What your target answered to real traffic, as conversations to train a draft on: the logs of an OpenAI-compatible server
or gateway, or input and output files of the batch API. Writes train.jsonl, heldout.jsonl (other chats) and
manifest.json. How the rows come about: docs/data.md.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from deepspec.arguments import run_command
from deepspec.config import ConfigError, near_match
from deepspec.data.conversation import Message
from deepspec.data.formats import content_id
from deepspec.data.jsonl import DataError, RowError
from deepspec.data.logged_chats import CUT, LoggedChats
from deepspec.data.request_logs import Exchange, LogReader
from deepspec.data.sources import read_rows
from deepspec.data.surrogates import mend
from deepspec.files import remove_unfinished, sha256_of, unfinished_name, write_atomically

Row = dict[str, Any]
Filter = Callable[[Row], Row | None]
TRAIN, HELD_OUT, MANIFEST = "train.jsonl", "heldout.jsonl", "manifest.json"
KEPT_COUNTS = ("cut",)  # of answers that are not left out
CHOICES = {"on_cut": ("keep", "drop"), "on_bad_row": ("stop", "skip")}
console = Console(soft_wrap=True, highlight=False, markup=False)


@dataclass
class LogsOptions:
    """Conversations to train on, from logged requests and responses of an OpenAI-compatible server."""

    logs: list[str] = field(default_factory=list)  # files, folders or patterns; JSONL, also .gz or .zst
    output_dir: str = "outputs/logs"
    model: str | None = None  # only answers of this model; needed where the logs hold several
    held_out_fraction: float = 0.05  # of chats, by a hash of how they begin
    filter: str | None = None  # MODULE:FUNCTION or FILE.py:FUNCTION, a row to the row to keep or None
    on_cut: str = "keep"  # answers that did not end (length, a broken stream): keep, without an end of turn, or drop
    on_bad_row: str = "stop"  # a line that cannot be read: stop, or skip and count


def main(options: LogsOptions) -> None:
    """
    Raises:
        ConfigError: an option that cannot work, or several models in the logs and none chosen.
        DataError: a bad line, or no answer in the logs.
    """
    check(options)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    models: Counter[str] = Counter()
    renderings: Counter[str] = Counter()  # chat_template_kwargs of the requests
    chats = LoggedChats()
    with ExitStack() as cleanup:
        spilled, train, held_out = (_unfinished(folder / name, cleanup) for name in ("rows", TRAIN, HELD_OUT))
        with spilled.open("w", encoding="utf-8") as file:
            for row in rows_of(options, counts, models):
                renderings[json.dumps(row.get("chat_template_kwargs", {}), sort_keys=True)] += 1
                chats.add(row)
                _write(file, row)
        check_models(models, options)
        written = _split(spilled, chats, options.held_out_fraction, {TRAIN: train, HELD_OUT: held_out})
        if not sum(written.values()):
            raise DataError(
                f"logs={options.logs}: no answer to train on is left; {_listed(counts) or 'they are empty'}"
            )
        for name, unfinished in ((TRAIN, train), (HELD_OUT, held_out)):
            if written[name]:
                os.replace(unfinished, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    counts |= Counter({"continued in longer chats": chats.continued, "duplicates": chats.duplicates})
    sizes = {name: count for name, count in written.items() if count}
    record = {
        "settings": asdict(options),
        "rows": sizes,
        "models": dict(models),
        "chat_template_kwargs": dict(renderings),
        "left out": {reason: count for reason, count in counts.items() if count and reason not in KEPT_COUNTS},
        "sha256": {name: sha256_of(folder / name) for name in sizes},
    }
    write_atomically(folder / MANIFEST, json.dumps(record, indent=2) + "\n")
    console.print(summary(folder, written, models, counts))
    if set(renderings) != {"{}"}:
        asked = ", ".join(f"{options} ({count} answers)" for options, count in renderings.most_common())
        console.print(
            f"logs: requests asked for chat_template_kwargs {asked}; train with the same data.template_options"
        )


def summary(folder: Path, written: Counter[str], models: Counter[str], counts: Counter[str]) -> str:
    made = f"{written[TRAIN]} rows in {folder / TRAIN}, " + (
        f"{written[HELD_OUT]} in {folder / HELD_OUT}" if written[HELD_OUT] else "none held out"
    )
    left_out = _listed(Counter({reason: n for reason, n in counts.items() if reason not in KEPT_COUNTS}))
    cut = f", {counts['cut']} of them cut" if counts["cut"] else ""
    return f"logs: {models.total()} answers{cut}; {made}" + (f"; left out: {left_out}" if left_out else "")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)


def check(options: LogsOptions) -> None:
    if not options.logs:
        raise ConfigError("logs=[]: name at least one log file")
    for name, allowed in CHOICES.items():
        value = getattr(options, name)
        if value not in allowed:
            raise ConfigError(f"{name}={value}: must be one of {', '.join(allowed)}.{near_match(value, allowed)}")
    if not 0 <= options.held_out_fraction < 1:
        raise ConfigError(f"held_out_fraction={options.held_out_fraction}: must be at least 0 and below 1")


def check_models(models: Counter[str], options: LogsOptions) -> None:
    if len(models) > 1 and options.model is None:
        listed = ", ".join(f"{name} ({count} answers)" for name, count in models.most_common())
        raise ConfigError(
            f"the logs hold answers of several models: {listed}; a draft learns from its own target: model=NAME"
        )


def rows_of(options: LogsOptions, counts: Counter[str], models: Counter[str]) -> Iterator[Row]:
    """The answered requests, filtered, each as a row. What is left out is counted.

    Raises:
        DataError: a bad line, a log that cannot be read, or a filter that fails.
    """
    chosen = load_filter(options.filter) if options.filter else None
    reader = LogReader()
    ids: set[str] = set()

    def unusable(reason: str) -> None:
        counts[reason] += 1

    def bad(error: RowError) -> None:
        if options.on_bad_row == "stop":
            raise DataError(f"{error}; on_bad_row=skip leaves such lines out") from error
        if not counts["bad lines"]:
            console.print(f"left out: {error}")
        counts["bad lines"] += 1

    for log in options.logs:
        for place, logged in read_rows(log, on_bad_row=bad):
            try:
                exchanges = reader.exchanges(place, logged, unusable)
            except RowError as error:
                bad(error)
                continue
            for exchange in exchanges:
                if options.model not in (None, exchange.answer.model, exchange.requested_model):
                    counts["of other models"] += 1
                elif exchange.cut and options.on_cut == "drop":
                    counts["cut answers"] += 1
                elif (row := _filtered(row_of(exchange, ids), chosen, options.filter, place)) is None:
                    counts["by the filter"] += 1
                else:
                    models[exchange.model] += 1
                    counts["cut"] += exchange.cut
                    yield row
    counts["requests without a response"] = len(reader.waiting_requests)
    counts["responses without a request"] = len(reader.waiting_responses)


def row_of(exchange: Exchange, ids: set[str]) -> Row:
    answer = exchange.answer
    # Mended here, not where the log is read: a stream may send the halves of one pair in two pieces.
    messages: list[Message] = mend([*exchange.messages, {**answer.message, **(CUT if exchange.cut else {})}])
    row: Row = {"id": "", "source": "logs", "messages": messages}
    if exchange.tools:
        row["tools"] = mend(exchange.tools)
    row |= {"finish_reason": answer.finish_reason or "aborted", "model": exchange.model}
    if exchange.template_options:
        row["chat_template_kwargs"] = exchange.template_options
    content = content_id(messages, exchange.tools)
    name = answer.id or exchange.name
    row["id"] = f"{name}/{answer.choice}" if name and answer.choice else name or content
    if row["id"] in ids:
        row["id"] = f"{row['id']}-{content[:8]}"
    ids.add(row["id"])
    return row


def load_filter(name: str) -> Filter:
    """The function that MODULE:FUNCTION or FILE.py:FUNCTION names.

    Raises:
        ConfigError: there is none, or the module cannot be imported.
    """
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        raise ConfigError(f"filter={name}: expected MODULE:FUNCTION or FILE.py:FUNCTION")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            assert spec is not None, "a file that ends with .py has a loader"
            assert spec.loader is not None, "as above"
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(
            f"filter={name}: {module_name} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(
            f"filter={name}: {module_name} has no function {function_name}.{near_match(function_name, defined)}"
        )
    return function


def _filtered(row: Row, chosen: Filter | None, name: str | None, place: str) -> Row | None:
    if chosen is None:
        return row
    try:
        kept = chosen(row)
    except Exception as error:  # whatever the user's function raises
        raise DataError(
            f"{place}: filter {name} failed on row {row['id']} ({type(error).__name__}: {error})"
        ) from error
    if kept is None:
        return None
    messages = kept.get("messages") if isinstance(kept, dict) else None
    if not isinstance(messages, list) or not messages or messages[-1].get("role") != "assistant":
        raise DataError(
            f"{place}: filter {name} must return the row, whose messages end with the assistant's, or None; of row "
            f"{row['id']} it returned {kept!r:.80}"
        )
    return kept


def _split(spilled: Path, chats: LoggedChats, fraction: float, files: dict[str, Path]) -> Counter[str]:
    """Write each answer once, to one of the two files. Returns how many rows each got."""
    written: Counter[str] = Counter()
    with ExitStack() as stack, spilled.open(encoding="utf-8") as lines:
        opened = {name: stack.enter_context(path.open("w", encoding="utf-8")) for name, path in files.items()}
        for line in lines:
            row = chats.once(json.loads(line))
            if row is not None:
                name = HELD_OUT if is_held_out(row["messages"], fraction) else TRAIN
                _write(opened[name], row)
                written[name] += 1
        for file in opened.values():
            file.flush()
            os.fsync(file.fileno())
    return written


def is_held_out(messages: list[Message], fraction: float) -> bool:
    """By the first user message, so that all turns and branches of a chat stay on one side, in later logs as well."""
    begins = next((message["content"] for message in messages if message["role"] == "user"), "")
    digest = hashlib.sha256(json.dumps(begins).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _write(file: IO[str], row: Row) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _unfinished(path: Path, cleanup: ExitStack) -> Path:
    """A hidden name beside a file, removed in the end if it still exists."""
    remove_unfinished(path)
    unfinished = unfinished_name(path)
    cleanup.callback(unfinished.unlink, missing_ok=True)
    return unfinished


if __name__ == "__main__":
    run_command(main, LogsOptions)
