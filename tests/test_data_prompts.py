"""data_prep.prompts: what is kept, what is removed and why, and that the same settings give the same files."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import prompts
from data_prep.prompts import PUBLISHED_MIX, PromptsOptions
from deepspec.arguments import parse_arguments
from deepspec.config import ConfigError
from deepspec.data.contamination import EvaluationPrompts
from deepspec.data.jsonl import DataError, RowError
from deepspec.data.near_duplicates import Signer, find_near_duplicates
from deepspec.data.prompt_pool import prompt_of
from deepspec.data.words import digest_of, hash_words, ngrams, without_symbols

OUTPUT = Path("outputs/prompts")
SYSTEM_ONLY = {"messages": [{"role": "system", "content": "x"}]}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sentence(seed, words=30):
    chosen = random.Random(seed)
    return " ".join(f"word{chosen.randrange(10**6)}" for _ in range(words))


def write(name, rows):
    """Rows, or texts of prompts, as JSONL. Returns the name."""
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    with open(name, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"prompt": row, "response": "an answer"} if isinstance(row, str) else row) + "\n")
    return name


def lines(name):
    return [json.loads(line) for line in (OUTPUT / name).read_text(encoding="utf-8").splitlines()]


def run(*words):
    prompts.main(parse_arguments(PromptsOptions, words))


def texts(*parts):
    return [row["messages"][-1]["content"] for part in parts for row in lines(f"{part}.jsonl")]


def counts():
    return json.loads((OUTPUT / "manifest.json").read_text())["counts"]


def test_prompts_end_with_the_last_user_turn():
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant", "tool")]
    assert prompt_of(turns) == turns[:4]
    assert prompt_of(turns[:1]) == []


def test_rows_are_what_regeneration_reads():
    tool = {"type": "function", "function": {"name": "f"}}
    turns = [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(("user", "assistant", "user"))]
    answer = {"role": "assistant", "content": "trailing"}
    write("a.jsonl", [{"id": "x", "messages": [*turns, answer], "tools": [tool]}, {"id": 7, "prompt": "hello"}])
    run("sources=[a.jsonl]", "held_out_fraction=0")
    assert {row["id"]: row for row in lines("train.jsonl")} == {
        "x": {"id": "x", "source": "a.jsonl", "messages": turns, "tools": [tool]},
        "7": {"id": "7", "source": "a.jsonl", "messages": [{"role": "user", "content": "hello"}]},
    }


def test_what_is_removed_and_why(capsys):
    base, evaluated = sentence(0, 200), sentence(1, 40)
    near = base.replace(base.split()[100], "changed")
    quoting = f"Please: {', '.join(evaluated.upper().split()[5:20])}"
    write("evals/set.jsonl", [{"turns": [evaluated]}, {"turns": ["Another!", "more"]}])
    write("a.jsonl", [base, f"  {base.upper()}!", near, "Short one?", quoting, "...", {"messages": []}, SYSTEM_ONLY])
    write("b.jsonl", ["short one", "another", "What is 3 + 4?", "What is 3 - 4?"])
    run("sources=[a.jsonl,b.jsonl]", "eval_dir=evals")
    id_of = {
        row["messages"][0]["content"]: row["id"] for part in ("train", "heldout") for row in lines(f"{part}.jsonl")
    }
    assert set(id_of) == {base, "Short one?", "What is 3 + 4?", "What is 3 - 4?"}
    found = [(row["place"], row["reason"], row.get("collides_with")) for row in lines("removed.jsonl")]
    assert found == [
        ("a.jsonl, line 2", "duplicate", id_of[base]),
        ("a.jsonl, line 5", "evaluation_prompt", "evals/set.jsonl, line 1"),
        ("a.jsonl, line 6", "no_user_text", None),
        (None, "bad_row", None),
        ("a.jsonl, line 8", "no_user_text", None),
        ("b.jsonl, line 1", "duplicate", id_of["Short one?"]),
        ("b.jsonl, line 2", "evaluation_prompt", "evals/set.jsonl, line 2"),
        ("a.jsonl, line 3", "near_duplicate", id_of[base]),
    ]
    assert lines("removed.jsonl")[3]["detail"].startswith("a.jsonl, line 7: messages: the list is empty")
    removed = {"bad_row": 1, "duplicate": 1, "evaluation_prompt": 1, "near_duplicate": 1, "no_user_text": 2}
    assert counts()["a.jsonl"]["removed"] == removed
    assert counts()["a.jsonl"]["rows"] == 8
    assert "evaluation sets: 2 prompts of set" in capsys.readouterr().out


def test_no_evaluation_sets_is_said(capsys):
    run(f"sources=[{write('a.jsonl', ['hello'])}]")
    assert "eval_dir=null: no evaluation sets are given" in capsys.readouterr().out


def test_runs_repeat_and_a_valid_folder_is_left_alone(capsys):
    write("a.jsonl", [sentence(n) for n in range(200)])
    run("sources=[a.jsonl]", "count=100")
    first = {file.name: file.read_bytes() for file in OUTPUT.iterdir()}
    assert sorted(first) == ["heldout.jsonl", "manifest.json", "removed.jsonl", "train.jsonl"]
    run("sources=[a.jsonl]", "count=100")
    assert capsys.readouterr().out.endswith("prompts: outputs/prompts is valid, nothing to do\n")
    (OUTPUT / "train.jsonl").write_text("damaged")
    run("sources=[a.jsonl]", "count=100")
    assert {file.name: file.read_bytes() for file in OUTPUT.iterdir()} == first
    run("sources=[a.jsonl]", "count=100", "seed=1")
    assert (OUTPUT / "train.jsonl").read_bytes() != first["train.jsonl"]
    write("a.jsonl", [sentence(n) for n in range(150)])
    capsys.readouterr()
    run("sources=[a.jsonl]", "count=100", "seed=1")
    assert "nothing to do" not in capsys.readouterr().out


def test_a_failed_run_leaves_what_was_there(monkeypatch):
    write("a.jsonl", [sentence(n) for n in range(20)])
    run("sources=[a.jsonl]")
    before = {file.name: file.read_bytes() for file in OUTPUT.iterdir()}
    write("a.jsonl", ["x", {"messages": []}])
    with pytest.raises(RowError, match=r"a\.jsonl, line 2: messages: the list is empty"):
        run("sources=[a.jsonl]", "on_bad_row=error")
    assert {file.name: file.read_bytes() for file in OUTPUT.iterdir()} == before


def test_the_order_of_the_rows_does_not_matter_and_the_split_follows_the_first_turn():
    rows = [sentence(n) for n in range(400)]
    write("a.jsonl", rows)
    run("sources=[a.jsonl]", "held_out_fraction=0.2")
    train, held_out = texts("train"), texts("heldout")
    assert 50 < len(held_out) < 110
    write("a.jsonl", rows[::-1])
    run("sources=[a.jsonl]", "held_out_fraction=0.2")
    assert (texts("train"), texts("heldout")) == (train, held_out)

    def follow_up(first, second):
        turns = [("user", first), ("assistant", "an answer"), ("user", second)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    write("b.jsonl", [follow_up(f"{row.upper()}?", sentence(n + 1000)) for n, row in enumerate(rows)])
    run("sources=[b.jsonl]", "held_out_fraction=0.2")
    firsts = {row["messages"][0]["content"].lower().rstrip("?") for row in lines("heldout.jsonl")}
    assert firsts == set(held_out)


def test_proportions_and_count(capsys):
    write("a.jsonl", [sentence(n) for n in range(90)])
    write("b.jsonl", [sentence(n) for n in range(100, 200)])

    def drawn(*words):
        run("sources=[a.jsonl,b.jsonl]", *words)
        return [counts()[name]["train"] + counts()[name]["heldout"] for name in ("a.jsonl", "b.jsonl")]

    assert drawn() == [90, 100]
    assert drawn("proportions=[3,1]") == [90, 30]
    assert drawn("proportions=[3,1]", "count=40") == [30, 10]
    assert drawn("proportions=[1,2]", "count=10") == [3, 7]
    assert sum(drawn("count=50")) == 50
    assert counts()["a.jsonl"]["not_drawn"] + counts()["b.jsonl"]["not_drawn"] == 140
    assert drawn("limit=5") == [5, 5]
    capsys.readouterr()
    assert drawn("proportions=[1,1]", "count=200") == [90, 100]
    assert "a.jsonl: 90 prompts are left of 100 wanted" in capsys.readouterr().out
    assert drawn("count=500") == [90, 100]
    assert "190 prompts are left of 500 wanted" in capsys.readouterr().out


def test_ids_of_several_sources_do_not_meet():
    for name, text in (("a", "first"), ("b", "second")):
        write(f"{name}.jsonl", [{"id": "1", "prompt": text}])
    run("sources=[a.jsonl,b.jsonl]", "held_out_fraction=0")
    ids = {row["source"]: row["id"] for row in lines("train.jsonl")}
    assert ids["a.jsonl"] == "1"
    assert ids["b.jsonl"].startswith("1-")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sources=[]"], r"sources=\[\]: name at least one"),
        (["sources=a.jsonl"], r"sources=a\.jsonl: expected a list; write sources=\[a\.jsonl\]"),
        (["sources=[*.jsonl]"], r"cannot be read .* put what has special characters in quotes"),
        (["sources=[a.jsonl,a.jsonl]"], r"sources: a\.jsonl is named twice"),
        (["sources=[a.jsonl]", "proportions=[1,2]"], r"proportions=\[1\.0, 2\.0\]: .* each of the 1 sources"),
        (["sources=[a.jsonl]", "proportions=[0]"], r"expected a number above 0"),
        (["sources=[a.jsonl]", "count=0"], "count=0: must be at least 1, or null"),
        (["sources=[a.jsonl]", "near_duplicates=0"], r"near_duplicates=0\.0: a Jaccard similarity"),
        (["sources=[a.jsonl]", "held_out_fraction=1"], r"held_out_fraction=1\.0: a share"),
        (["sources=[a.jsonl]", "on_bad_row=drop"], "on_bad_row=drop: skip or error"),
        (["sources=[a.jsonl]", "eval_dir=absent"], "eval_dir=absent: no such folder"),
    ],
)
def test_wrong_settings_are_refused(words, message):
    write("a.jsonl", ["hello"])
    with pytest.raises(ConfigError, match=message):
        run(*words)


def test_nothing_left_is_refused():
    write("a.jsonl", [SYSTEM_ONLY])
    with pytest.raises(DataError, match=r"a\.jsonl: no prompt is left; removed: 1 no_user_text"):
        run("sources=[a.jsonl]")
    os.mkdir("evals")
    with pytest.raises(DataError, match=r"eval_dir=evals: holds no \.jsonl files"):
        run("sources=[a.jsonl]", "eval_dir=evals")


def test_quoted_patterns_and_the_published_mix():
    write("data/a.jsonl", ["one"])
    write("data/b.jsonl", ["two"])
    run("sources=['data/*.jsonl']", "held_out_fraction=0")
    assert sorted(texts("train")) == ["one", "two"]
    assert parse_arguments(PromptsOptions, []).sources == [PUBLISHED_MIX]


def test_a_hub_that_cannot_be_asked_counts_as_unchanged(monkeypatch):
    def digest(source):
        raise DataError(f"{source}: no network")

    monkeypatch.setattr(prompts, "source_digest", digest)
    options = PromptsOptions(sources=["hub:a/b"])
    assert prompts.inputs_of(options, {"hub:a/b": "known"}) == {"hub:a/b": "known"}
    with pytest.raises(DataError, match="no network"):
        prompts.inputs_of(options, {})


def evaluation(*turns, name="set"):
    return EvaluationPrompts([Path(write(f"{name}.jsonl", [{"turns": [turn]} for turn in turns]))], lambda line: None)


def test_thirteen_words_in_a_row_are_contamination_and_twelve_are_not():
    words = sentence(3, 60).split()
    sets = evaluation(" ".join(words), "Who wrote Faust?")
    for count, found in ((13, True), (12, False)):
        text = f"{sentence(4)} ({'; '.join(words[20 : 20 + count]).upper()}) {sentence(5)}"
        assert (sets.find(hash_words(text)) == "set.jsonl, line 1") is found
    assert sets.find(hash_words("who wrote faust")) == "set.jsonl, line 2"
    assert sets.find(hash_words("Tell me: who wrote Faust?")) is None


def test_the_wording_of_a_set_is_not_its_content():
    wording = sentence(6, 20)
    sets = evaluation(*(f"{sentence(n, 20)} {wording}" for n in range(30)))
    assert sets.find(hash_words(f"{sentence(100)} {wording}")) is None
    assert sets.find(hash_words(f"{sentence(7, 20)} x")) == "set.jsonl, line 8"
    assert sets.find(hash_words(f"{sentence(7, 20)} {wording}")) == "set.jsonl, line 8"


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=80))
def test_words_ignore_case_space_and_punctuation(text):
    words = hash_words(text)
    plain = " ".join(part for part in text.lower().split())
    assert hash_words(f"  {plain}\n. ").tolist() == words.tolist()
    assert set(without_symbols(words).tolist()) <= set(words.tolist())


def test_words_and_symbols():
    assert digest_of(hash_words("What is 3+4?")) == digest_of(hash_words("what is 3 + 4"))
    assert digest_of(hash_words("What is 3+4?")) != digest_of(hash_words("What is 3-4?"))
    assert len(hash_words("機械学習とは")) == 6
    assert len(without_symbols(hash_words("x = y"))) == 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=30), st.integers(1, 15))
def test_ngrams_are_equal_where_the_runs_are(values, n):
    hashes = np.array(values, np.uint64)
    runs = ngrams(hashes, n)
    assert len(runs) == (max(len(values) - n + 1, 1) if values else 0)
    for index, run in enumerate(runs.tolist()):
        assert ngrams(hashes[index : index + n], n).tolist() == [run]


def test_near_duplicates_are_those_of_comparing_all_pairs():
    chosen = random.Random(0)
    documents = []
    for number in range(60):
        words = sentence(number, 120).split()
        for changes in (0, 1, 3, 25, 60):
            version = list(words)
            for place in chosen.sample(range(120), changes):
                version[place] = f"new{chosen.randrange(10**6)}"
            documents.append(" ".join(version))
    chosen.shuffle(documents)
    signer = Signer()
    signatures = np.stack([signer.sign(hash_words(text)) for text in documents])
    shingles = [set(ngrams(hash_words(text), 3).tolist()) for text in documents]

    def jaccard(a, b):
        return len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b])

    found = {near.index: near for near in find_near_duplicates(signatures, 0.8)}
    for near in found.values():
        assert near.earlier < near.index
        assert abs(near.similarity - jaccard(near.index, near.earlier)) < 0.2
    nearest = [max((jaccard(a, b) for b in range(a)), default=0.0) for a in range(len(documents))]
    by_group = Counter((index in found, value > 0.92, value < 0.7) for index, value in enumerate(nearest))
    assert not by_group[True, False, True], "nothing far from all others is removed"
    assert by_group[False, True, False] <= 0.05 * sum(v for k, v in by_group.items() if k[1]), "what is near is found"
    assert find_near_duplicates(signatures[:1], 0.8) == []
