"""From a target folder to a draft that decodes: train a few steps, packed, save, load, and say what `generate` says."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from family_world import tiny_model
from training_world import tiny_run
from transformers import AutoTokenizer

from deepspec import load_draft
from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine, check_decodable
from deepspec.targets import load_target
from deepspec.training import train

# Architecture of the draft by family of the target: scale and cap around embedding and head; experts and sinks; latent
# attention; states; a wrapper; Gemma 4's own flavour.
CHOSEN = dict.fromkeys(
    ("gemma2", "granite", "gpt_oss", "deepseek_v3", "qwen3_5_text", "nemotron_h", "mistral3"), "Qwen3DSparkModel"
) | {"gemma4_text": "Gemma4DSparkModel"}


@pytest.mark.parametrize(("family", "architecture"), CHOSEN.items())
def test_from_a_folder_to_a_draft_that_decodes(family, architecture, training_world, tmp_path, in_temporary_folder):
    world = tmp_path / "world"
    shutil.copytree(training_world, world, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    vocabulary = len(AutoTokenizer.from_pretrained(training_world / "target"))
    tiny_model(family, vocab_size=vocabulary).save_pretrained(world / "target")
    shape = {"architecture": architecture}
    run = tiny_run(world, tmp_path / "run", draft=shape, steps=2, save_steps=2, eval_steps=2, tokens_per_batch=64)
    result = train(run, check_target=check_decodable)
    assert result.metrics["eval/tau"] > 1

    target = load_target(str(world / "target"))
    draft = load_draft(tmp_path / "run", target=target)
    stored = json.loads((result.checkpoint / "draft" / "config.json").read_text(encoding="utf-8"))
    assert stored["architectures"] == [architecture]
    assert stored["model_type"] == ("gemma4_text" if architecture == "Gemma4DSparkModel" else "qwen3")
    assert stored.get("final_logit_softcapping") == (4.0 if family.startswith("gemma") else None)
    prompt = [5, 9, 200, 33]
    engine = SpeculativeEngine(target, DSparkProposer(draft, target), max_length=32)
    expected = target.model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert engine.generate([Request(prompt, 12)])[0].output_ids == expected[0, len(prompt) :].tolist()
