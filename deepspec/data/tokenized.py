"""Tokenized samples on disk: an Arrow file, made once for all ranks and runs that need the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from deepspec.data.chat import encode
from deepspec.data.conversation import Conversation
from deepspec.data.formats import read_conversations
from deepspec.data.jsonl import RowError
from deepspec.data.samples import Sample, write_samples
from deepspec.data.sources import source_digest
from deepspec.data.surrogates import mend
from deepspec.data.templates import ChatTemplate
from deepspec.files import unfinished_name
from deepspec.ranks import launched_rank

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.uint8()),
        "truncated": pa.bool_(),
        "tokens": pa.int32(),
        "supervised": pa.int32(),
        "problem": pa.string(),  # why the row cannot be used; "" = it can
    }
)
TOGETHER = 256  # conversations tokenized at once
RENDERING = 2  # to be raised when the same conversation becomes other tokens

Given = TypeVar("Given")
Made = TypeVar("Made")
Texts = tuple[list[str], list[Sample], list[str]]  # ids and samples, and the problems met on the way


def tokenized_rows(
    files: Sequence[str],
    template: ChatTemplate,
    *,
    max_length: int,
    on_bad_row: str = "stop",
    cache_dir: str = "outputs/cache/tokenized",
) -> datasets.Dataset:
    """All samples of the sources, with the columns of `SCHEMA`, and a row with its `problem` for each that is none.

    Memory-mapped from a file under `cache_dir` that is named by a digest of the sources' content, the tokenizer, the
    template, its options, the system prompt and `max_length`: made once, never stale.

    Raises:
        DataError: a source that cannot be read, or a bad row (with `stop`).
    """
    path = Path(cache_dir) / f"{_content_digest(files, template, max_length)}.arrow"
    rows = _opened(path)
    if rows is None:
        _write(path, files, template, max_length, stops=on_bad_row == "stop")
        rows = datasets.Dataset.from_file(str(path))
    if on_bad_row == "stop" and (problem := next(filter(None, rows["problem"]), "")):
        raise RowError(problem)
    return rows


def _opened(path: Path) -> datasets.Dataset | None:
    """What is there, if it is whole: a disk that was full may have cut it."""
    try:
        return datasets.Dataset.from_file(str(path)) if path.is_file() else None
    except (pa.ArrowException, OSError):
        return None


def _write(path: Path, files: Sequence[str], template: ChatTemplate, max_length: int, stops: bool) -> None:
    """Write under a name of its own, since ranks of other machines may be writing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_name(path)
    columns = (SpinnerColumn(), TextColumn("tokenizing: {task.completed:,.0f} samples"), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=launched_rank() != 0)
    try:
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer, bar:
            task = bar.add_task("samples", total=None)
            texts = _texts(files, template, stops)
            for batch in _one_ahead(lambda of: _record_batch(template, *of, max_length=max_length), texts):
                writer.write_batch(batch)
                bar.advance(task, len(batch))
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _one_ahead(make: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Made]:
    """What `make` makes of each, in another thread, while the next is being given: tokenizers work without Python."""
    with ThreadPoolExecutor(1) as worker:
        pending = None
        for one in given:
            following = worker.submit(make, one)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _texts(files: Sequence[str], template: ChatTemplate, stops: bool) -> Iterator[Texts]:
    problems: list[RowError] = []
    conversations = read_conversations(files, on_bad_row=None if stops else problems.append)
    while together := list(islice(conversations, TOGETHER)):
        ids: list[str] = []
        samples: list[Sample] = []
        for conversation in together:
            try:
                of_turns = write_samples(template, conversation.messages, conversation.tools)
            except ValueError as error:
                problems.append(RowError(f"{conversation.place}: {error}"))
                if stops:
                    raise problems[-1] from error
                continue
            samples += of_turns
            ids += _ids(conversation, len(of_turns))
        yield ids, samples, [str(problem) for problem in problems]
        problems.clear()
    yield [], [], [str(problem) for problem in problems]


def _ids(conversation: Conversation, count: int) -> list[str]:
    return [conversation.id] if count == 1 else [f"{conversation.id} {number}" for number in range(count)]


def _record_batch(
    template: ChatTemplate, ids: list[str], samples: list[Sample], problems: list[str], *, max_length: int
) -> pa.RecordBatch:
    encoded = encode(template.tokenizer, samples)
    nothing = [np.zeros(0, dtype=np.int64)] * len(problems)
    input_ids = [tokens[:max_length] for tokens, _ in encoded] + nothing
    loss_masks = [mask[:max_length] for _, mask in encoded] + nothing
    columns = [
        pa.array(ids + [""] * len(problems), pa.string()),
        _lists(input_ids, pa.int32()),
        _lists(loss_masks, pa.uint8()),
        pa.array([len(tokens) > max_length for tokens, _ in encoded] + [False] * len(problems), pa.bool_()),
        pa.array([len(tokens) for tokens in input_ids], pa.int32()),
        pa.array([int(mask.sum()) for mask in loss_masks], pa.int32()),
        pa.array([""] * len(ids) + [mend(problem) for problem in problems], pa.string()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _lists(values: list[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
    flat = np.concatenate(values) if values else np.zeros(0, dtype=np.int64)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(kind.to_pandas_dtype())))


def _content_digest(files: Sequence[str], template: ChatTemplate, max_length: int) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(source_digest(file).encode())
    tokenizer: Any = template.tokenizer
    settings = [
        RENDERING,
        SCHEMA.names,
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items()),
        template.options,
        template.system_prompt,
        max_length,
        list(files),
    ]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]
