"""SGLang's own readers accept what we write: `python -m pytest -m real -s tests/real/test_real_sglang.py`.

SGLang cannot be run without a GPU. These are the pure Python parts of its wheel: how it reads a draft's config, and the
files of the calibration (STS) and of the measured speeds (SPS). Which tensors its model classes load is not run here.
"""

from __future__ import annotations

import json
from pathlib import Path

import environments
import pytest
import torch
from engines import HERE, drive, run
from worlds import BUILTIN, random_draft

from deepspec.decoding.calibration import CALIBRATION_FILE
from deepspec.decoding.sps import SPS_FILE
from deepspec.targets import load_target

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]
DRAFTS = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "dflash": {"algorithm": "dflash", "sample_from_anchor": False, "markov_rank": 0, "confidence_head": False},
}
TEMPERATURES = [1.1, 0.9, 1.0, 1.2, 1.3, 0.8, 1.05]
POINTS = [{"tokens": 1, "steps_per_second": 40.5}, {"tokens": 8, "steps_per_second": 33.0}]


def test_configs_and_measured_tables(tmp_path: Path):
    target = load_target("builtin", dtype=torch.float32)
    folders = []
    for name, changes in DRAFTS.items():
        draft = random_draft(target, **changes)
        draft.save_pretrained(tmp_path / name)
        if name == "vanilla":
            (tmp_path / name / CALIBRATION_FILE).write_text(json.dumps({"temperatures": TEMPERATURES}))
            (tmp_path / name / SPS_FILE).write_text(json.dumps({"points": POINTS}))
        folders.append(tmp_path / f"sglang-{name}")
        words = [f"checkpoint={tmp_path / name}", "format=sglang", f"output_dir={folders[-1]}", f"target={BUILTIN}"]
        run(HERE, "-m", "deepspec.publishing", "export", *words)

    found = drive(
        environments.vllm(),  # has what the readers need: torch, transformers and msgspec
        "sglang_parsers",
        tmp_path,
        wheel=environments.sglang(),
        drafts=folders,
        sts=folders[0] / "dspark_sts.json",
        sps=folders[0] / "dspark_sps.json",
        vocab_size=target.vocab_size,
    )

    common = {"num_hidden_layers": 2, "num_target_layers": 6, "target_layer_ids": [1, 3, 4], "mask_token_id": 2047}
    heads = {"file": "dspark.py", "gamma": 7, "from_anchor": True, "markov_rank": 32}
    *with_heads, fill_in = found["drafts"]
    assert with_heads == [common | heads | {"markov_head_type": name} for name in ("vanilla", "gated", "rnn")]
    assert fill_in == common | {"file": "dflash.py", "block_size": 7}
    assert found["temperatures"] == TEMPERATURES
    assert found["steps_per_second"] == {str(point["tokens"]): point["steps_per_second"] for point in POINTS}
