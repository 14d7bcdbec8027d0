"""Sources: whatever a conversation is stored in, it is read the same, and what is damaged or missing is named."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import tracemalloc
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.data.formats import read_conversations
from deepspec.data.json_array import read_array
from deepspec.data.jsonl import DataError
from deepspec.data.sources import read_rows, source_digest
from deepspec.files import sha256_of

USER, ANSWER = {"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5 é 🙂"}
TURNS = [USER, ANSWER]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, *rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


def read(source, **options):
    return list(read_conversations([source], **options))


def refused(source, kind=DataError, **options):
    with pytest.raises(kind) as error:
        read(source, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def store(kind, rows):
    """A source that holds the rows. Returns its name."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    contents = {
        "a.jsonl": text,
        "bom.jsonl": b"\xef\xbb\xbf" + text,
        "blanks.jsonl": b"\n" + text.replace(b"\n", b"\r\n \r\n"),
        "lines.json": text,
        "array.json": json.dumps(rows, indent=1).encode(),
        "bom.json": b"\xef\xbb\xbf" + json.dumps(rows, ensure_ascii=False).encode(),
        "a.jsonl.gz": gzip.compress(text),
        "a.json.gz": gzip.compress(json.dumps(rows).encode()),
        "a.jsonl.zst": pa.compress(text, codec="zstd", asbytes=True),
    }
    if kind in contents:
        with open(kind, "wb") as file:
            file.write(contents[kind])
    elif kind == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), kind)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(kind)
    return kind


KINDS = (
    *("a.jsonl", "bom.jsonl", "blanks.jsonl", "lines.json", "array.json", "bom.json"),
    *("a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.parquet", "saved"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_reads_the_same(kind):
    rows = [{"id": str(number), "messages": TURNS} for number in range(5)]
    conversations = read(store(kind, rows))
    assert [(c.id, c.messages, c.tools) for c in conversations] == [(row["id"], TURNS, None) for row in rows]
    assert [c.row for c in conversations] == rows
    assert conversations[2].place.startswith(f"{kind}, ")
    assert [row for _, row in read_rows(kind)] == rows


def test_folders_and_patterns_are_read_in_order():
    os.makedirs("data/deep/.cache")
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden.jsonl", "deep/.cache/d.jsonl"):
        write(f"data/{name}", {"id": name, "messages": TURNS})
    write("data/manifest.json", {"settings": {}})
    (os.mkdir("data/e.jsonl"))
    assert [c.id for c in read("data")] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert [c.id for c in read("data/[ab].jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [c.id for c in read("data/**/*.jsonl")] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert [c.id for c in read_conversations(["data/b.jsonl", "data/deep"])] == ["b.jsonl", "deep/c.jsonl"]
    assert source_digest("data/a.jsonl") == sha256_of("data/a.jsonl")
    before = source_digest("data")
    os.rename("data", "moved")
    assert source_digest("moved") == before
    write("moved/b.jsonl", {"id": "b", "messages": TURNS})
    assert source_digest("moved") != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.json", b"[]", "a.json: the file is empty"),
        ("a.jsonl", b"nonsense\n", "a.jsonl, line 1: malformed JSON (Expecting value: line 1 column 1 (char 0)); mend"),
        ("a.jsonl", b"\n" + b"[" * 100000, "a.jsonl, row 1 (line 2): malformed JSON: maximum recursion depth"),
        ("a.json", b'{\n "prompt": "x"\n}', "expected one JSON object a line, or a single array of objects"),
        ("a.jsonl", '{"prompt": "x"}'.encode("utf-16"), "a.jsonl, line 1: not UTF-8"),
        ("a.json", b'[{"prompt": "\xff"}]', "a.json: not UTF-8"),
        ("a.json", b'[{"prompt": "x"},\n3]', "a.json, row 2 (line 2): expected a JSON object, found int"),
        ("a.json", b'[{"prompt": "x"},\n {"prompt": }]', "row 2 (line 2): malformed JSON: Expecting value at '}]'"),
        ("a.json", b'[{"prompt": "x"}\n {"prompt": "y"}]', "(line 2): malformed JSON: expected , or ], found '{'"),
        ("a.json", b'[{"prompt": "x"},\n]', "row 2 (line 2): malformed JSON: Expecting value at ']'"),
        ("a.json", b'[{"prompt": "x"}', "row 1 (line 1): malformed JSON: the array has no end at the end of the file"),
        ("a.json", b'[{"prompt": "x"}] x', "malformed JSON: text behind the array's end at 'x'"),
        ("a.csv", b"prompt\nx\n", "a.csv: .csv files are not read; convert it to JSONL or Parquet"),
        ("a.parquet", b"PAR1 nothing", "a.parquet: damaged after row 0"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 99)[:-9], "a.jsonl.gz: damaged or cut off"),
        ("a.jsonl.zst", pa.compress(b"{}" * 99, codec="zstd", asbytes=True)[:-3], "a.jsonl.zst: damaged or cut off"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(name, content, message):
    with open(name, "wb") as file:
        file.write(content)
    assert message in refused(name)


def test_what_is_not_there_is_answered_with_what_is():
    write("train.jsonl", {"messages": TURNS})
    assert refused("trian.jsonl") == "trian.jsonl: no such file; there are train.jsonl. Did you mean 'train.jsonl'?"
    assert refused("owner/name") == "owner/name: no such file; a dataset of the Hub is given as hub:owner/name"
    assert refused("*.nothing") == "*.nothing: no file matches this pattern"
    os.mkdir("empty")
    assert refused("empty").startswith("empty: a folder without data files; read are .jsonl")
    os.mkdir("split")
    for part in ("train", "heldout"):
        write(f"split/{part}.jsonl", {"messages": TURNS})
    assert "name the part that you mean: split/train.jsonl or split/heldout.jsonl" in refused("split")
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"messages": TURNS}])}).save_to_disk("splits")
    assert refused("splits") == (
        "splits: a saved dataset with the splits train; name the one to read, for example splits/train"
    )
    assert len(read("splits/train")) == 1


def test_lines_and_elements_that_are_bad_are_skipped_alike():
    skipped = []
    with open("a.jsonl", "wb") as file:
        file.write(b'{"prompt": "x"}\n{"prompt"\n\xff\n3\n{"prompt": "y"}\n')
    with open("a.json", "w") as file:
        file.write('[{"prompt": "x"}, 3, {"prompt": "y"}]')
    for source in ("a.jsonl", "a.json"):
        prompts = [c.messages[0]["content"] for c in read(source, on_bad_row=skipped.append)]
        assert prompts == ["x", "y"]
    assert len(skipped) == 4


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=5), st.sampled_from([None, 1]))
def test_an_array_is_read_as_json_reads_it(rows, indent):
    class Drip:
        """Hands out a few characters at a time, whatever is asked for."""

        def __init__(self, text):
            self.pieces = iter([text[start : start + 3] for start in range(0, len(text), 3)])

        def read(self, size):
            return next(self.pieces, "")

    assert [value for _, _, value in read_array(Drip(json.dumps(rows, indent=indent)), "name")] == rows


def test_memory_does_not_grow_with_the_file():
    row = {"prompt": "x" * 9000}
    for name, rows in (("big.json", 4000), ("big.jsonl", 4000)):
        with open(name, "w") as file:
            lines = itertools.repeat(json.dumps(row), rows)
            file.write("[" + ",".join(lines) + "]" if name.endswith("json") else "\n".join(lines))
        tracemalloc.start()
        assert sum(1 for _ in read_rows(name)) == rows
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12e6  # bytes, of a file of 36e6


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one dataset; `asked` lists what it was asked for."""
    asked = []

    def load_dataset(repo, config, *, split, revision, streaming):
        asked.append((repo, config, split, revision, streaming))
        if repo != "owner/name":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{repo}' doesn't exist on the Hub\nor is private")
        rows = datasets.Dataset.from_list([{"messages": TURNS, "extra": None}] * 2)
        return rows.to_iterable_dataset() if streaming else rows

    def load_dataset_builder(repo, config, *, revision):
        return SimpleNamespace(config=SimpleNamespace(name=config or "default"), hash=revision or "head")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return asked


def test_hub_sources(hub, monkeypatch):
    conversations = read("hub:owner/name")
    assert [c.messages for c in conversations] == [TURNS, TURNS]
    assert conversations[1].place == "hub:owner/name:train, row 2"
    read("hub:owner/name/config@v1:test")
    read("hub:owner/name:train[:10]")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    read("hub:owner/name")
    assert hub == [
        ("owner/name", None, "train", None, True),
        ("owner/name", "config", "test", "v1", True),
        ("owner/name", None, "train[:10]", None, False),
        ("owner/name", None, "train", None, False),
    ]
    digests = [source_digest(f"hub:owner/name{rest}") for rest in ("", ":train", ":test", "@v1", "/config")]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_hub_that_does_not_answer_is_one_line(hub):
    assert refused("hub:owner/other:test") == (
        "hub:owner/other:test: cannot be read from the Hub (DatasetNotFoundError: Dataset 'owner/other' doesn't exist "
        "on the Hub or is private); check the name, the split and the network, or download it and give its folder"
    )
    assert refused("hub:name").startswith("hub:name: expected hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]")


def test_the_hub_switched_off_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert refused("hub:owner/no-such-dataset").startswith(
        "hub:owner/no-such-dataset:train: cannot be read from the Hub"
    )
