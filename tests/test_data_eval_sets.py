"""Public prompt sets: wording, where the original files lie, what is said and recorded."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import eval_sets
from data_prep.eval_sets import KNOWN, EvalSetsOptions, main, shared_names
from deepspec.arguments import parse_arguments
from deepspec.config import ConfigError
from deepspec.data.jsonl import DataError, read_jsonl
from deepspec.evaluation import set_building
from deepspec.evaluation.public_sets import PUBLISHED_SEED, REASONED, SOLVED
from deepspec.evaluation.set_building import build_set, prompts_digest
from deepspec.files import sha256_of

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "eval_sets"  # outside the repository, to compare with
LCB = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests. You will NOT return anything except "
    "for the program\n\n### Question:\nAdd.\n\n"
)
# set -> file in its folder, a row as it is published, the id and the turns that come of it
ROWS: dict[str, tuple[str, dict[str, Any], str, list[str]]] = {
    "gsm8k": ("test.jsonl", {"question": "1+1?", "answer": "2\n#### 2"}, "1", ["1+1?" + REASONED]),
    "math500": (
        "test.jsonl",
        {"problem": "$x$?", "solution": "s", "answer": "1", "subject": "a", "level": 1, "unique_id": "test/1.json"},
        "test/1.json",
        ["$x$?\nPlease reason step by step, and put your final answer within \\boxed{}."],
    ),
    "aime24": ("aime.jsonl", {"id": 60, "problem": "p", "answer": "1"}, "60", ["p" + REASONED]),
    "aime25": ("aime.parquet", {"ID": "I-1", "Problem": "p", "Answer": 1}, "I-1", ["p" + REASONED]),
    "humaneval": (
        "HumanEval.jsonl.gz",
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "", "test": "", "entry_point": "f"},
        "HumanEval/0",
        [SOLVED + "def f():\n\n```"],
    ),
    "mbpp": (
        "sanitized-mbpp.json",
        {"task_id": 11, "prompt": "Write it.", "code": "", "test_list": [], "source_file": ""},
        "11",
        ["Write it."],
    ),
    "livecodebench": (
        "test.jsonl",
        {"question_title": "t", "question_content": "Add.", "question_id": "q1", "starter_code": "", "platform": "x"},
        "q1",
        [
            LCB + "### Format: Write your code in the following format:\n```python\n# YOUR CODE HERE\n```\n\n"
            "### Answer: (use the provided format with backticks)"
        ],
    ),
    "mt-bench": ("question.jsonl", {"question_id": 81, "category": "writing", "turns": ["a", "b"]}, "81", ["a", "b"]),
    "alpaca": ("alpaca_eval.json", {"instruction": "Say", "output": "", "generator": "g"}, "1", ["Say"]),
    "arena-hard": ("question.jsonl", {"uid": "u", "category": "c", "prompt": "ask"}, "u", ["ask"]),
}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
        return
    text = json.dumps(rows) if file.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(file)]


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    for name, (file, row, _, _) in ROWS.items():
        write_rows(tmp_path / "originals" / name / file, [row])
    return tmp_path / "originals"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_sets, "sources_on_hub", lambda wanted: pytest.fail("the Hub was asked"))


@pytest.mark.usefixtures("no_hub")
def test_every_set_from_its_original_file(originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(EvalSetsOptions(files_dir=str(originals), output_dir=str(out)))
    for name, (_, _, row_id, turns) in ROWS.items():
        assert rows_of(out / f"{name}.jsonl") == [{"id": row_id, "turns": turns}], name
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(KNOWN) == len(ROWS)
    assert lines[0] == f"gsm8k: 1 prompts in {out}/gsm8k.jsonl; warning: 1 prompts where 1319 were published"
    manifest = json.loads((out / "manifest.json").read_text())["sets"]
    assert {name: entry["sha256"] for name, entry in manifest.items()} == {
        name: sha256_of(out / f"{name}.jsonl") for name in KNOWN
    }
    assert manifest["mbpp"]["sources"] == [str(originals / "mbpp" / "sanitized-mbpp.json")]


def test_other_forms_of_the_same_sets() -> None:
    def turns(name: str, row: dict[str, Any]) -> list[str]:
        return KNOWN[name].turns(row)

    with_starter = turns("livecodebench", {"question_content": "Add.", "starter_code": "class Solution:"})
    assert with_starter[0].startswith(LCB + "### Format: Use the following code structure:\n```python\nclass Solution:")
    assert turns("alpaca", {"instruction": "Say", "input": "this"}) == ["Say\n\nInput:\nthis"]
    assert turns("alpaca", {"instruction": "Say", "input": ""}) == ["Say"]
    assert turns("arena-hard", {"turns": [{"content": "ask"}]}) == ["ask"]
    assert turns("mt-bench", {"prompt": ["a", "b"], "prompt_id": 1}) == ["a", "b"]
    assert turns("mbpp", {"text": "Write it.", "task_id": 11}) == ["Write it."]
    assert turns("aime25", {"question": "q", "answer": "1"}) == ["q" + REASONED]


def test_mbpp_keeps_its_test_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "mbpp.jsonl", [{"task_id": n, "text": f"Task {n}."} for n in (1, 10, 11, 510, 511, 974)])
    built = build_set(KNOWN["mbpp"], [str(tmp_path / "mbpp.jsonl")])
    assert [row["id"] for row in built.rows] == ["11", "510"]


def test_where_original_files_are_found(tmp_path: Path) -> None:
    def found(name: str, *wanted: str) -> list[str]:
        sources = set_building.sources_on_disk(KNOWN[name], tmp_path, shared_names([name, *wanted]))
        return [str(Path(source).relative_to(tmp_path)) for source in sources]

    with pytest.raises(DataError, match=r"has no gsm8k\.jsonl .*test\.jsonl into .*files=\{gsm8k: PATH\}"):
        found("gsm8k")
    write_rows(tmp_path / "test.jsonl", [])
    assert found("gsm8k") == ["test.jsonl"]
    assert found("livecodebench") == ["test.jsonl"]
    for other in ("math500", "livecodebench"):
        with pytest.raises(DataError, match="has no gsm8k"):
            found("gsm8k", other)
    write_rows(tmp_path / "gsm8k.parquet", [{"question": "x"}])
    assert found("gsm8k", "math500") == ["gsm8k.parquet"]
    write_rows(tmp_path / "gsm8k" / "data" / "rows.jsonl", [])
    assert found("gsm8k", "math500") == ["gsm8k"]
    write_rows(tmp_path / "gsm8k" / "test.jsonl", [])
    write_rows(tmp_path / "gsm8k" / "train.jsonl", [])
    assert found("gsm8k", "math500") == ["gsm8k/test.jsonl"]
    for part in ("test3.jsonl", "test.jsonl", "test2.jsonl"):
        write_rows(tmp_path / "livecodebench" / part, [])
    names = ["test.jsonl", "test2.jsonl", "test3.jsonl"]
    assert found("livecodebench", "gsm8k") == [f"livecodebench/{name}" for name in names]


def test_what_is_missing_or_wrong_is_said_and_the_rest_is_made(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (originals / "math500" / "test.jsonl").unlink()
    (originals / "math500").rmdir()
    write_rows(originals / "gsm8k" / "test.jsonl", [{"turns": ["x"]}])
    write_rows(originals / "mt-bench" / "question.jsonl", [{"turns": ["x", " "]}])
    options = EvalSetsOptions(
        ["gsm8k", "math500", "mt-bench", "mbpp"], str(originals), output_dir=str(tmp_path / "out")
    )
    with pytest.raises(DataError, match=r"3 of 4 sets were not made: gsm8k, math500, mt-bench; see above"):
        main(options)
    gsm8k, math500, mt_bench, mbpp = capsys.readouterr().out.splitlines()
    assert "gsm8k/test.jsonl, line 1: not a row of gsm8k as it is published: no usable 'question'; found" in gsm8k
    assert f"math500: not made: {originals} has no math500.jsonl" in math500
    assert "line 1: turn 2 must be a non-empty text" in mt_bench
    assert mbpp.startswith("mbpp: 1 prompts in ")
    with pytest.raises(ConfigError, match=r"sets: no public set 'gsm'; there are gsm8k.*Did you mean 'gsm8k'"):
        main(EvalSetsOptions(["gsm"]))


@pytest.mark.usefixtures("no_hub")
def test_a_set_by_its_path(originals: Path, tmp_path: Path) -> None:
    file = originals / "gsm8k" / "test.jsonl"
    words = [f"files={{gsm8k: {file}}}", f"output_dir={tmp_path / 'out'}"]
    main(parse_arguments(EvalSetsOptions, words))
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["gsm8k.jsonl", "manifest.json"]


def test_from_the_hub_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def read_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
        asked.append(source)
        yield f"{source}, row 1", ROWS["gsm8k"][1]

    monkeypatch.setattr(set_building, "read_rows", read_rows)
    options = EvalSetsOptions(["gsm8k"], output_dir=str(tmp_path))
    main(options)
    main(options)
    assert asked == ["hub:openai/gsm8k/main:test"]
    assert f"gsm8k: 1 prompts in {tmp_path}/gsm8k.jsonl, nothing to do" in capsys.readouterr().out
    (tmp_path / "gsm8k.jsonl").write_text("changed")
    main(options)
    assert len(asked) == 2


def test_without_the_hub_it_is_said_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(wanted: Any) -> list[str]:
        raise DataError("no network, download it")

    monkeypatch.setattr(eval_sets, "sources_on_hub", unreachable)
    with pytest.raises(DataError, match="1 of 1 sets were not made: mbpp"):
        main(EvalSetsOptions(["mbpp"], output_dir=str(tmp_path)))
    said = capsys.readouterr().out.strip()
    assert said == (
        "mbpp: not made: no network, download it; then give files_dir=DIR with its sanitized-mbpp.json or mbpp.jsonl "
        "in DIR/mbpp"
    )


def test_the_order_of_published_numbers(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?"} for n in range(600)]
    write_rows(tmp_path / "rows.jsonl", rows)
    built = build_set(KNOWN["gsm8k"], [str(tmp_path / "rows.jsonl")], published_order=True)
    order = list(range(600))
    random.Random(PUBLISHED_SEED).shuffle(order)
    assert [row["id"] for row in built.rows] == [str(n + 1) for n in order]
    write_rows(tmp_path / "rows.jsonl", rows[:500])
    built = build_set(KNOWN["gsm8k"], [str(tmp_path / "rows.jsonl")], published_order=True)
    assert [row["id"] for row in built.rows] == [str(n) for n in range(1, 501)]


def without(before: str, after: str) -> Callable[[str], str]:
    return lambda turn: turn.removeprefix(before).removesuffix(after)


ORIGINAL_ROWS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "gsm8k": lambda turns: {"question": without("", REASONED)(turns[0])},
    "math500": lambda turns: {"problem": without("", REASONED)(turns[0])},
    "humaneval": lambda turns: {"prompt": without(SOLVED, "\n```")(turns[0])},
    "mbpp": lambda turns: {"task_id": 11, "prompt": turns[0]},
    "mt-bench": lambda turns: {"turns": turns},
}


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published prompt sets are not there")
@pytest.mark.parametrize("name", ORIGINAL_ROWS)
def test_published_prompts_word_for_word(name: str, tmp_path: Path) -> None:
    published = PUBLISHED / f"{name}.jsonl"
    rows = [ORIGINAL_ROWS[name](row["turns"]) for row in rows_of(published)]
    write_rows(tmp_path / "rows.jsonl", rows)
    built = build_set(KNOWN[name], [str(tmp_path / "rows.jsonl")])
    text = "".join(json.dumps({"turns": row["turns"]}, ensure_ascii=False) + "\n" for row in built.rows)
    assert text.encode() == published.read_bytes()
    assert built.warning is None
    assert prompts_digest(built.rows) == KNOWN[name].sha256
