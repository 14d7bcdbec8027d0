"""`python -m data_prep.inspect`: samples, counts and reasons as the trainer will see them."""

from __future__ import annotations

import json

from data_prep.inspect import CLOSE, OPEN, as_text, main
from deepspec.config import DataConfig, InspectRun
from deepspec.data.chat import render_conversation
from deepspec.targets import load_tokenizer

TURNS = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5, I \U0001f600 think."},
]


def test_token_borders_and_what_is_supervised_are_visible():
    tokenizer = load_tokenizer("builtin")
    rendered = render_conversation(tokenizer, TURNS)
    text = as_text(tokenizer, rendered.input_ids, rendered.loss_mask).plain
    assert text.count(OPEN) == text.count(CLOSE) == 1
    inside = text.partition(OPEN)[2].partition(CLOSE)[0]
    assert inside.startswith("I·t· is·")
    assert inside.endswith("·<|im_end|>")
    assert "\ufffd" not in text, "bytes of a character are shown as the tokenizer spells them"


def test_counts_reasons_and_histogram(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": TURNS}] * 3 + [{"messages": TURNS[:1]}, {"messages": TURNS[:1]}, {"text": "x"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = DataConfig(train_files=["train.jsonl"], max_length=20, min_supervised_tokens=50)
    main(InspectRun(data=data, samples=1))
    said = " ".join(capsys.readouterr().out.split())
    assert "20 tokens, 0 supervised, cut at data.max_length, dropped: fewer than data.min_supervised_tokens=50" in said
    assert "samples 3" in said
    assert "rows that cannot be used 3" in said
    assert "2 x train.jsonl, line 4: the conversation has no assistant turn" in said
    assert "1 x train.jsonl, line 6: no known format" in said
    assert (tmp_path / "outputs/inspect/lengths.png").stat().st_size > 1000
