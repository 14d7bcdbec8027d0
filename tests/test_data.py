"""JSONL, chat rendering, tokenized datasets and the order of the data."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import AutoTokenizer

from deepspec.data.chat import render_conversation, render_prompt
from deepspec.data.dataset import Sample, check_vocabulary, collate, tokenize_conversations
from deepspec.data.jsonl import DataError, read_jsonl
from deepspec.data.sampler import StepSampler, global_batch
from deepspec.data.tokenizer import CHAT_TEMPLATE, MASK, train_tokenizer

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


def test_template_without_generation_markers_is_refused(tokenizer):
    plain = train_tokenizer(["a b c"], 300)
    plain.chat_template = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match="generation"):
        render_conversation(plain, TURNS)


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
        ({"messages": []}, "line 2: expected a non-empty list under 'messages'"),
        ({"text": "x"}, "line 2: expected a non-empty list under 'messages', found the keys ['text']"),
        ({"messages": [{"role": "user"}]}, "line 2: message 0 needs a string under 'role' and under 'content'"),
    ],
)
def test_bad_row_names_file_and_line(tokenizer, tmp_path, row, expected):
    path = written(tmp_path / "a.jsonl", [{"messages": TURNS}, row])
    with pytest.raises(DataError) as error:
        dataset(path, tokenizer, tmp_path)
    assert f"{path}, {expected}" in str(error.value)


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
    with pytest.raises(ValueError, match=f"ids up to {len(tokenizer) - 1}, but the target t has a vocabulary of 100"):
        check_vocabulary(tokenizer, 100, "t")


def test_collate_pads_right():
    batch = collate([Sample(4, 0, "a", [5, 6, 7], [0, 1, 1]), Sample(2, 1, "b", [8], [1])], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert batch["sample_index"].tolist() == [4, 2]
    assert batch["epoch"].tolist() == [0, 1]


def test_each_epoch_visits_every_sample_once():
    keys = [key for step in range(15) for key in global_batch(10, 4, seed=3, step=step)]
    for epoch in range(6):
        assert sorted(index for index, e in keys if e == epoch) == list(range(10))
    assert global_batch(10, 4, seed=3, step=0) != global_batch(10, 4, seed=4, step=0)


def batches(world_size, micro_batch_size, start_step=0):
    samplers = [
        StepSampler(
            23,
            global_batch_size=8,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            seed=1,
            start_step=start_step,
            steps=6,
        )
        for rank in range(world_size)
    ]
    assert len(samplers[0]) == (6 - start_step) * samplers[0].accumulation
    steps = []
    for parts in zip(*samplers, strict=True):
        steps.append([key for part in parts for key in part])
    flat = [key for part in steps for key in part]
    return [flat[i : i + 8] for i in range(0, len(flat), 8)]


def test_order_does_not_depend_on_ranks_or_micro_batches_or_a_resume():
    expected = batches(1, 8)
    assert batches(2, 2) == expected
    assert batches(4, 1) == expected
    assert batches(1, 2, start_step=4) == expected[4:]


def test_indivisible_batch_is_refused():
    with pytest.raises(ValueError, match=r"must be a multiple of train\.micro_batch_size=3 times the 2 ranks"):
        StepSampler(9, global_batch_size=8, micro_batch_size=3, rank=0, world_size=2, seed=0, start_step=0, steps=1)


def test_sampler_survives_a_data_loader_with_workers():
    sampler = StepSampler(
        5, global_batch_size=2, micro_batch_size=2, rank=0, world_size=1, seed=0, start_step=0, steps=3
    )
    rows = [Sample(i, 0, str(i), [i], [1]) for i in range(5)]

    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, key):
            return rows[key[0]]

    loader = torch.utils.data.DataLoader(
        Rows(), batch_sampler=sampler, collate_fn=lambda samples: [s.index for s in samples]
    )
    assert list(loader) == [[index for index, _ in keys] for keys in sampler]
