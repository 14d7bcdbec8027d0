"""JSONL, chat rendering, tokenized datasets and the order of the data."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from deepspec.data.chat import render_conversation, render_prompt
from deepspec.data.dataset import check_vocabulary, tokenize_conversations
from deepspec.data.jsonl import DataError, check_file, read_jsonl
from deepspec.data.packing import Document, Sample, anchor_candidates, lay_out
from deepspec.data.sampler import BatchSplit, StepSampler, global_batch
from deepspec.data.tokenizer import CHAT_TEMPLATE, MASK, train_tokenizer
from deepspec.targets import load_tokenizer

TURNS = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "2 + 3 = 5."}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        ["What is 2 + 3?", "2 + 3 = 5.", "Complete this function: def add(a, b): return a + b"] * 3, 300
    )


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "a.jsonl: the file is empty"),
        (b"\n \n", "a.jsonl: the file is empty"),
        (b'{"a": 1}\n{"a": \n', "a.jsonl, line 2: malformed JSON"),
        (b"[1]\n", "a.jsonl, line 1: expected a JSON object, found list"),
        (b'{"a": "\xff"}\n', "a.jsonl, line 1: not UTF-8"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, content, expected):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_jsonl(path))
    assert expected in str(error.value)


def test_missing_jsonl(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_jsonl(tmp_path / "absent.jsonl"))


def test_loss_mask_covers_the_answer_and_its_end(tokenizer):
    rendered = render_conversation(tokenizer, TURNS)
    supervised = [i for i, on in zip(rendered.input_ids, rendered.loss_mask, strict=True) if on]
    assert tokenizer.decode(supervised) == "2 + 3 = 5.<|im_end|>"


def test_prompt_is_a_prefix_of_the_conversation(tokenizer):
    prompt = render_prompt(tokenizer, TURNS[:1])
    rendered = render_conversation(tokenizer, TURNS)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert not any(rendered.loss_mask[: len(prompt)])
    assert rendered.loss_mask[len(prompt)] == 1


def test_template_without_generation_markers_gives_the_same_mask(tokenizer):
    plain = load_tokenizer("builtin")
    marked = render_conversation(plain, TURNS)
    plain.chat_template = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    rendered = render_conversation(plain, TURNS)
    length = len(rendered.input_ids)  # without what stands behind the last turn
    assert rendered.input_ids == marked.input_ids[:length]
    assert rendered.loss_mask == marked.loss_mask[:length]
    assert not any(marked.loss_mask[length:])


def test_tokenizer_round_trip_and_mask_token(tokenizer, tmp_path):
    text = "def add(a, b):\n    return a + b  # é ü 漢 123\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.mask_token == MASK
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.mask_token_id == tokenizer.mask_token_id
    assert render_conversation(loaded, TURNS) == render_conversation(tokenizer, TURNS)
    prompt = loaded.decode(render_prompt(loaded, TURNS[:1]), skip_special_tokens=True)
    assert "<|im_start|>" not in prompt


def dataset(path, tokenizer, tmp_path, **changes):
    options = {"max_length": 64, "min_supervised_tokens": 2, "cache_dir": str(tmp_path / "cache"), **changes}
    return tokenize_conversations([path], tokenizer, **options)


def test_dataset_rows_equal_rendering(tokenizer, tmp_path):
    path = written(tmp_path / "a.jsonl", [{"id": "first", "messages": TURNS}])
    samples = dataset(path, tokenizer, tmp_path)
    rendered = render_conversation(tokenizer, TURNS)
    assert samples[0, 7] == Sample(0, 7, "first", rendered.input_ids, rendered.loss_mask)


def test_dataset_is_made_anew_when_the_file_changes(tokenizer, tmp_path):
    path = written(tmp_path / "a.jsonl", [{"messages": TURNS}])
    assert len(dataset(path, tokenizer, tmp_path)) == 1
    written(tmp_path / "a.jsonl", [{"messages": TURNS}] * 3)
    assert len(dataset(path, tokenizer, tmp_path)) == 3


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TURNS[:1]}, "line 2: the conversation has no assistant turn"),
        ({"messages": []}, "line 2: messages: the list is empty"),
        ({"text": "x"}, "line 2: no known format: found the columns text. Plain text has no turns"),
        ({"messages": [{"role": "user"}]}, "line 2: messages[0] (user): no content; the keys are role"),
    ],
)
def test_bad_row_names_file_and_line(tokenizer, tmp_path, row, expected):
    path = written(tmp_path / "a.jsonl", [{"messages": TURNS}, row])
    with pytest.raises(DataError) as error:
        dataset(path, tokenizer, tmp_path)
    assert f"{path}, {expected}" in str(error.value)


def test_bad_rows_are_skipped_and_counted_if_asked(tokenizer, tmp_path, caplog):
    """Rows that cannot be read, of no format, and that the template refuses; also from the file made before."""
    tokenizer = load_tokenizer("builtin")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no systems') }}{% endif %}"
    tokenizer.chat_template = refusing + CHAT_TEMPLATE
    system = {"role": "system", "content": "Be brief."}
    path = written(tmp_path / "a.jsonl", [{"messages": TURNS}, {"messages": [system, *TURNS]}, {"text": "x"}])
    (tmp_path / "a.jsonl").open("a").write("{\n")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(dataset(path, tokenizer, tmp_path, on_bad_row="skip", template_name="the template t.jinja")) == 1
        assert "3 rows cannot be used and were skipped, the first" in caplog.text
    with pytest.raises(DataError, match=r"a\.jsonl, line"):
        dataset(path, tokenizer, tmp_path)
    path = written(tmp_path / "b.jsonl", [{"messages": TURNS}, {"messages": [system, *TURNS]}])
    with pytest.raises(DataError, match=r'b\.jsonl, line 2: the template t\.jinja refuses it: "no systems"'):
        dataset(path, tokenizer, tmp_path, template_name="the template t.jinja")


def test_a_damaged_file_of_tokens_is_made_again(tokenizer, tmp_path):
    path = written(tmp_path / "a.jsonl", [{"messages": TURNS}])
    before = dataset(path, tokenizer, tmp_path)[0, 0]
    (made,) = tmp_path.rglob("*.arrow")
    made.write_bytes(made.read_bytes()[:100])
    assert dataset(path, tokenizer, tmp_path)[0, 0] == before


def test_long_samples_are_cut_and_counted(tokenizer, tmp_path, caplog):
    path = written(tmp_path / "a.jsonl", [{"messages": TURNS}] * 2)
    length = len(render_conversation(tokenizer, TURNS).input_ids) - 2
    with caplog.at_level(logging.WARNING):
        samples = dataset(path, tokenizer, tmp_path, max_length=length)
    assert len(samples[0, 0].input_ids) == length
    assert f"2 of 2 samples are longer than data.max_length={length} and were cut" in caplog.text


def test_short_samples_are_dropped_and_none_left_is_an_error(tokenizer, tmp_path, caplog):
    short = [TURNS[0], {"role": "assistant", "content": "5"}]
    path = written(tmp_path / "a.jsonl", [{"messages": TURNS}, {"messages": short}])
    with caplog.at_level(logging.WARNING):
        assert len(dataset(path, tokenizer, tmp_path, min_supervised_tokens=5)) == 1
    assert "1 of 2 samples have fewer than data.min_supervised_tokens=5" in caplog.text
    with pytest.raises(DataError, match=r"no sample is left: all 2 have fewer than data\.min_supervised_tokens=60"):
        dataset(path, tokenizer, tmp_path, min_supervised_tokens=60)


def test_vocabulary_mismatch(tokenizer):
    check_vocabulary(tokenizer, len(tokenizer), "target")
    with pytest.raises(ValueError, match=f"ids up to {len(tokenizer) - 1}, but the target has a vocabulary of 100"):
        check_vocabulary(tokenizer, 100, "t")


SAMPLES = [Sample(4, 0, "a", [5, 6, 7], [0, 1, 1]), Sample(2, 1, "b", [8], [1]), Sample(3, 1, "c", [2, 1], [1, 1])]


def test_rows_are_padded_on_the_right():
    batch = lay_out([[sample] for sample in SAMPLES[:2]], pad_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.loss_mask.tolist() == [[False, True, True], [True, False, False]]
    assert batch.documents == (Document(4, 0, 0, 3), Document(2, 1, 0, 1))
    assert (batch.tokens, batch.is_packed) == (4, False)


def test_documents_of_a_packed_row_follow_one_another():
    batch = lay_out([SAMPLES], pad_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 2, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.documents == (Document(4, 0, 0, 3), Document(2, 0, 3, 1), Document(3, 0, 4, 2))
    assert (batch.tokens, batch.is_packed) == (6, True)
    candidates = anchor_candidates(batch.loss_mask, batch.position_ids)
    assert candidates.tolist() == [[False, True, False, False, True, False]], (
        "no candidate looks into the next document"
    )


def test_each_epoch_visits_every_sample_once():
    keys = [key for step in range(15) for key in global_batch(10, 4, seed=3, step=step)]
    for epoch in range(6):
        assert sorted(index for index, e in keys if e == epoch) == list(range(10))
    assert global_batch(10, 4, seed=3, step=0) != global_batch(10, 4, seed=4, step=0)


def sampler(split, rank=0, start_step=0, num_samples=23):
    return StepSampler(split, num_samples, rank=rank, seed=1, start_step=start_step, steps=6)


def batches(world_size, micro_batch_size, start_step=0):
    split = BatchSplit(8, world_size, micro_batch_size)
    samplers = [sampler(split, rank, start_step) for rank in range(world_size)]
    flat = [key for parts in zip(*samplers, strict=True) for part in parts for key in part]
    return [flat[i : i + 8] for i in range(0, len(flat), 8)]


def test_order_does_not_depend_on_ranks_or_micro_batches_or_a_resume():
    expected = batches(1, 8)
    assert batches(2, 2) == expected
    assert batches(4, 1) == expected
    assert batches(1, 2, start_step=4) == expected[4:]


def test_indivisible_batch_is_refused():
    with pytest.raises(ValueError, match=r"must be a multiple of train\.micro_batch_size=3 times the 2 ranks"):
        BatchSplit(8, 2, 3)
    with pytest.raises(ValueError, match=r"global_batch_size=9: must be a multiple of the 2 ranks"):
        BatchSplit(9, 2, 3, tokens_per_batch=64)


@given(
    st.lists(st.integers(1, 50), min_size=24, max_size=24),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(50, 400),
    st.integers(0, 5),
)
def test_token_budget(lengths, world_size, budget, step):
    """The same samples as without one, whole, within the budget, as many micro-batches on every rank, none empty."""
    split = BatchSplit(12, world_size, 1, budget, np.array(lengths))
    ranks = [sampler(split, rank, num_samples=24).micro_batches(step) for rank in range(world_size)]
    assert len({len(groups) for groups in ranks}) == 1
    groups = [group for rank in ranks for group in rank]
    assert sorted(key for group in groups for key in group) == sorted(global_batch(24, 12, 1, step))
    tokens = [sum(lengths[index] for index, _ in group) for group in groups]
    assert all(0 < count <= budget for count in tokens)
    assert ranks == [sampler(split, rank, num_samples=24).micro_batches(step) for rank in range(world_size)]


def test_token_budget_packs_tightly():
    lengths = np.array([1000, 900, 100, 100, 50, 50, 400, 400, 300, 200])
    groups = BatchSplit(10, 1, 1, 1200, lengths)([(index, 0) for index in range(10)])[0]
    assert len(groups) == 3  # 3500 tokens
    assert [group == sorted(group) for group in groups] == [True] * 3


def test_sampler_survives_a_data_loader_with_workers():
    order = sampler(BatchSplit(2, 1, 2), num_samples=5)
    rows = [Sample(i, 0, str(i), [i], [1]) for i in range(5)]

    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, key):
            return rows[key[0]]

    loader = torch.utils.data.DataLoader(
        Rows(), batch_sampler=order, collate_fn=lambda samples: [s.index for s in samples]
    )
    assert list(loader) == [[index for index, _ in keys] for keys in order]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "*.jsonl",
            r"\*\.jsonl: no such file; a pattern is not filled in; name .*: \[.*a\.jsonl,.*b\.jsonl\]$",
        ),
        ("", r": a folder; name its files one by one, in the order to read them: \[.*a\.jsonl,.*b\.jsonl\]$"),
        ("empty", r"empty: a folder without JSONL files$"),
        ("c.jsonl", r"c\.jsonl: no such file$"),
    ],
)
def test_what_is_no_file_is_answered_with_the_files_to_name(tmp_path, given, message):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        check_file(tmp_path / given)
