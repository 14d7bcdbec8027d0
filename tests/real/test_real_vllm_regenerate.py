"""Regeneration by vLLM's server and by our engine, SmolLM2-135M-Instruct on the same prompts, greedily:
`python -m pytest -m real -s tests/real/test_real_vllm_regenerate.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import environments
import pytest
from engines import HERE, run, vllm_server
from regeneration_world import assistant, saved_rows, user, write_rows
from worlds import QUESTIONS

MAX_LENGTH = ("--max-model-len", "1024")

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    with vllm_server(environments.smollm2_weights(), log, "--served-model-name", "smollm2", *MAX_LENGTH) as url:
        yield url


def test_the_same_answers_from_vllm_and_from_our_engine(server: str, tmp_path: Path):
    target = environments.smollm2_weights()
    rows = [{"id": f"q{number}", "messages": [user(text)]} for number, text in enumerate(QUESTIONS)]
    rows.append({"id": "turns", "messages": [user("Hi!"), assistant("-"), user("What can you do?")]})
    rows.append({"id": "long", "messages": [user("word " * 1100)]})
    words = [f"target.path={target}", f"prompts=[{write_rows(tmp_path / 'prompts.jsonl', rows)}]", "temperature=0"]
    words += ["max_new_tokens=64", "max_length=1024", "target.dtype=float32"]
    ways = {"servers": [f"urls=[{server}]"], "engine": ["batch_size=10"]}
    answers, report = {}, {}
    for way, more in ways.items():
        command = ["-m", "data_prep.regenerate", *words, *more, f"output_dir={tmp_path / way}"]
        said, seconds = run(HERE, *command)
        report[way] = {"wall_seconds": round(seconds), "summary": said.strip().splitlines()[-1]}
        answers[way] = {row["id"]: row for row in saved_rows(tmp_path / way)}
        assert len(answers[way]) == 9
        assert "1 refused" in said
    texts = {way: {id: texts_of(row) for id, row in of_way.items()} for way, of_way in answers.items()}
    same = [id for id in texts["engine"] if texts["engine"][id] == texts["servers"][id]]
    report["same"] = f"{len(same)} of 9 rows have the same text"
    report["example"] = answers["servers"]["q0"]["messages"][-1]
    print(json.dumps(report, indent=2))
    assert len(same) >= 7  # rounding may decide between two words that are equally likely


def texts_of(row: dict) -> list[str]:
    """The exact texts of all turns, each complete or cut."""
    written = [message for message in row["messages"] if message["role"] == "assistant"]
    for message in written:
        assert message["raw"].endswith("<|im_end|>") == (message["finish_reason"] == "stop")
        assert message["raw"].removesuffix("<|im_end|>") == message["content"]
    return [message["raw"] for message in written]
