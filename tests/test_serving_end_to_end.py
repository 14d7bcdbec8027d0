"""From training to another engine's layout and back: train, export, check, import, decode, compare."""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors.torch import load_file
from training_world import tiny_run

from deepspec import load_draft
from deepspec.decoding import Request, SpeculativeEngine, proposer_of
from deepspec.publishing.__main__ import main as publishing
from deepspec.targets import Target, load_target
from deepspec.training import train

NO_HEADS: dict[str, Any] = {"markov_rank": 0, "confidence_head": False}
FILL_IN = NO_HEADS | {"algorithm": "dflash", "sample_from_anchor": False}
EAGLE3 = NO_HEADS | {"algorithm": "eagle3", "architecture": "Qwen3Eagle3Model", "ttt_length": 3}
LLAMA_EAGLE3 = EAGLE3 | {"architecture": "LlamaEagle3Model", "target_layer_ids": [0, 1, 2]}
# Draft, format, and the engine that would serve it.
WAYS = {
    "dspark for vllm": ({}, "speculators", "vllm"),
    "dspark of few words": ({"vocab_size": 60}, "speculators", "vllm"),
    "dspark for sglang": ({"markov_head_type": "gated"}, "sglang", "sglang"),
    "dflash": (FILL_IN, "zlab", "vllm"),
    "dflash for transformers": (FILL_IN, "transformers", "transformers"),
    "eagle3": (EAGLE3, "speculators", "vllm"),
    "eagle3 of llama shape": (LLAMA_EAGLE3, "eagle3", "sglang"),
    "eagle3 of llama shape and few words": (LLAMA_EAGLE3 | {"vocab_size": 60}, "eagle3", "vllm"),
}


@pytest.mark.parametrize(("draft", "layout", "engine"), WAYS.values(), ids=WAYS)
def test_a_trained_draft_goes_to_an_engine_and_back(
    draft, layout, engine, training_world, tmp_path, in_temporary_folder, capsys
):
    trained = train(tiny_run(training_world, tmp_path / "run", draft=draft, steps=2, save_steps=2)).checkpoint
    there, back, target_path = tmp_path / "there", tmp_path / "back", training_world / "target"

    publishing(["check", f"path={tmp_path / 'run'}"])
    assert f"{trained / 'draft'}:" in capsys.readouterr().out
    assert publishing(["export", f"checkpoint={tmp_path / 'run'}", f"format={layout}", f"output_dir={there}"]) == 0
    assert publishing(["check", f"path={there}", f"engine={engine}"]) == 0
    assert "would fail: nothing" in capsys.readouterr().out
    assert publishing(["import", f"path={there}", f"output_dir={back}", f"target={target_path}"]) == 0

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (trained / "draft", back))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    fingerprints = {read(folder)["target_fingerprint"] for folder in (trained / "draft", back)}
    assert len(fingerprints) == 1

    target = load_target(str(target_path))
    assert decoded(target, back) == decoded(target, trained / "draft")


def read(folder) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def decoded(target: Target, draft) -> list[Any]:
    """Tokens and rounds, sampled and greedy."""
    proposer = proposer_of(load_draft(draft, target=target), target)
    engine = SpeculativeEngine(target, proposer, slots=2, max_length=48)
    requests = [Request([5, 9, 200, 33], 16, temperature=temperature, seed=3) for temperature in (0.0, 1.0)]
    return [(completion.output_ids, completion.rounds) for completion in engine.generate(requests)]
