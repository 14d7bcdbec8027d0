"""The built-in corpus and target: real text, a split by document, a recipe that trains."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter

import pytest

from data_prep.corpus import CorpusOptions
from data_prep.corpus import main as make_corpus
from deepspec.data.corpus import SETS, is_held_out, library_conversations, topic_conversations
from deepspec.data.jsonl import read_jsonl
from deepspec.data.word_problems import word_problems
from deepspec.targets import BUILTIN_WEIGHTS, load_target, load_tokenizer
from deepspec.targets.builtin import TargetRecipe, held_out_loss, is_valid_target, load_builtin, train_builtin_target


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(CorpusOptions(output_dir=str(folder)))
    return folder


def test_word_problem_solutions_are_right():
    for _, solution in word_problems(200, seed=5):
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", solution)
        assert steps
        for left, operator, right, result in steps:
            values = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            values["/"] = int(left) // int(right)
            assert values[operator] == int(result), solution
        assert solution.endswith(f"The answer is \\boxed{{{steps[-1][3]}}}.")


def test_word_problems_repeat_with_the_seed():
    assert list(word_problems(20, seed=1)) == list(word_problems(20, seed=1))
    assert list(word_problems(20, seed=1)) != list(word_problems(20, seed=2))


def test_code_answers_are_python():
    answers = [c.answer for c in library_conversations() if c.set == "code"]
    assert len(answers) > 2000
    for answer in answers[::100]:
        compile(answer.removeprefix("```python\n").removesuffix("\n```"), "answer", "exec")


def test_no_document_is_on_both_sides(corpus):
    document_of = {c.id: c.document for c in [*library_conversations(), *topic_conversations()]}
    sides = {}
    for split in ("train", "heldout"):
        rows = [row for _, row in read_jsonl(corpus / f"{split}.jsonl") if row["set"] != "math"]
        sides[split] = {document_of[row["id"]] for row in rows}, {row["messages"][1]["content"] for row in rows}
    assert not sides["train"][0] & sides["heldout"][0]
    assert not sides["train"][1] & sides["heldout"][1]


def test_split_goes_by_seed_and_name_alone():
    names = [f"file:{i}" for i in range(4000)]
    held_out = [is_held_out(name, 0, 0.05) for name in names]
    assert 0.035 < sum(held_out) / len(names) < 0.065
    assert held_out == [is_held_out(name, 0, 0.05) for name in names]
    assert held_out != [is_held_out(name, 1, 0.05) for name in names]


def test_corpus_has_all_sets_and_prompts(corpus):
    counts = Counter(row["set"] for _, row in read_jsonl(corpus / "heldout.jsonl"))
    for name in SETS:
        prompts, for_calibration = (
            [row["turns"][0] for _, row in read_jsonl(corpus / "prompts" / f"{file}.jsonl")]
            for file in (name, f"calibration_{name}")
        )
        assert not set(prompts) & set(for_calibration)
        assert len({*prompts, *for_calibration}) > 5
        assert 0.9 * counts[name] <= len(prompts) + len(for_calibration) <= counts[name]
        assert 0.15 < len(for_calibration) / counts[name] < 0.35


def test_corpus_is_reused_and_repaired(corpus, capsys, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(corpus, folder)
    options = CorpusOptions(output_dir=str(folder))
    stale = json.loads((folder / "manifest.json").read_text())
    stale["settings"]["output_dir"] = str(folder)
    (folder / "manifest.json").write_text(json.dumps(stale))
    make_corpus(options)
    assert "nothing to do" in capsys.readouterr().out.replace("\n", " ")
    train = (folder / "train.jsonl").read_bytes()
    (folder / "train.jsonl").write_bytes(train[:1000])
    make_corpus(options)
    assert (folder / "train.jsonl").read_bytes() == train


def test_target_recipe_trains_and_resumes(corpus, tmp_path):
    """A few steps of the recipe lower the loss; a second call goes on from the checkpoint of a run that was cut off."""
    tokenizer = load_tokenizer("builtin")
    tokenizer.save_pretrained(tmp_path)
    train_builtin_target(tmp_path, corpus, TargetRecipe(steps=8, batch_size=4, length=128), save_steps=4)
    assert is_valid_target(tmp_path)
    record = json.loads((tmp_path / "recipe.json").read_text())
    assert record["held_out_loss"] < 7.3  # an untrained model starts at ln(2048) = 7.62
    (tmp_path / "recipe.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-8")
    assert not is_valid_target(tmp_path)
    train_builtin_target(tmp_path, corpus, TargetRecipe(steps=8, batch_size=4, length=128), save_steps=4)
    again = json.loads((tmp_path / "recipe.json").read_text())
    assert again["held_out_loss"] == pytest.approx(record["held_out_loss"], abs=0.01)


def test_committed_target_is_what_its_recipe_records(corpus):
    assert is_valid_target(BUILTIN_WEIGHTS)
    record = json.loads((BUILTIN_WEIGHTS / "recipe.json").read_text())
    assert 3e6 < record["parameters"] < 8e6
    assert (BUILTIN_WEIGHTS / "model.safetensors").stat().st_size < 16 * 2**20
    model, tokenizer = load_builtin(BUILTIN_WEIGHTS)
    assert held_out_loss(model, tokenizer, corpus) < record["held_out_loss"] + 0.3
    assert load_target("builtin").vocab_size == len(tokenizer)
