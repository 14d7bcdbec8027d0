"""DFlash that fills in, as z-lab and engines have it: masks predict what they stand for, the anchor's slot nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyBatch, tiny_draft_config
from decoding_world import generated, random_draft, random_target
from lossless_world import ACCEPTABLE, engine_of, p_values, sampled, tiny_target
from safetensors.torch import load_file, save_file
from torch.nn import functional
from training_world import assert_same_end, changed, tiny_run

from deepspec.checkpoints import checkpoint_folder
from deepspec.config import ConfigError, LossConfig
from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine
from deepspec.drafts import DFlashDraftModel, DSparkModel, build_draft, load_draft
from deepspec.targets import load_target
from deepspec.training import train
from deepspec.training.metrics import summarize
from deepspec.training.objective import DraftTrainingModule

FILL_IN: dict[str, Any] = {
    "algorithm": "dflash",
    "markov_rank": 0,
    "confidence_head": False,
    "sample_from_anchor": False,
}
LENT = ("embed_tokens.weight", "lm_head.weight")


def as_published_by_zlab(draft: Path, folder: Path) -> Path:
    """The same draft with its fields in dflash_config alone, and without embedding and head."""
    folder.mkdir()
    config = json.loads((draft / "config.json").read_text())
    ours = ("mask_token_id", "target_layer_ids", "sample_from_anchor", "draft_algorithm", "markov_rank")
    kept = {name: value for name, value in config.items() if name not in ours and not name.startswith("target_")}
    kept.pop("enable_confidence_head")
    (folder / "config.json").write_text(json.dumps(kept | {"tie_word_embeddings": True}))
    weights = {k: v for k, v in load_file(draft / "model.safetensors").items() if k not in LENT}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_it_is_saved_as_engines_read_it(tmp_path: Path) -> None:
    draft = build_draft(tiny_draft_config(**FILL_IN))
    draft.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["dflash_config"] == {"mask_token_id": 60, "target_layer_ids": [0, 2, 4], "causal": False}
    names = ("model_type", "block_size", "mask_token_id", "target_layer_ids", "sample_from_anchor", "draft_algorithm")
    assert [config[name] for name in names] == ["qwen3", 5, 60, [0, 2, 4], False, "dflash"]
    loaded = load_draft(tmp_path)
    assert type(loaded) is DFlashDraftModel
    assert loaded.settings == draft.settings
    assert (loaded.block_size, loaded.draft_length) == (5, 4)


def test_the_convention_is_what_the_config_says(tmp_path: Path) -> None:
    """A DFlashDraftModel fills in, whatever the algorithm's default, unless it says that it samples from the anchor."""
    build_draft(tiny_draft_config(**FILL_IN)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["sample_from_anchor"]
    file.write_text(json.dumps(config))
    assert load_draft(tmp_path).draft_length == 4
    for fields in (
        {"sample_from_anchor": True},
        {"dflash_config": config["dflash_config"] | {"sample_from_anchor": True}},
    ):
        file.write_text(json.dumps(config | fields))
        draft = load_draft(tmp_path)
        assert (draft.draft_length, type(draft).__name__) == (5, "Qwen3DSparkModel")


def test_masks_predict_what_they_stand_for(tiny_draft: Callable[..., DSparkModel], tiny_batch: TinyBatch) -> None:
    """Its slots are the later ones of a draft of the same weights that samples from the anchor."""
    draft, other = tiny_draft(**FILL_IN), tiny_draft(**FILL_IN | {"sample_from_anchor": True})
    with torch.no_grad():
        hidden, all_slots = (each(**tiny_batch.for_backbone()) for each in (draft, other))
    assert torch.equal(hidden, all_slots[:, :, 1:])


def test_the_loss_is_over_the_masks(tiny_draft: Callable[..., DSparkModel], tiny_batch: TinyBatch) -> None:
    draft, decay = tiny_draft(**FILL_IN), 2.0
    sums = DraftTrainingModule(draft, LossConfig(ce=1.0, tv=0.0))(**tiny_batch.for_objective(draft.draft_length, decay))
    with torch.no_grad():
        logits = draft.base_logits(draft(**tiny_batch.for_backbone()))
    expected = weight = torch.tensor(0.0)
    for row, columns in enumerate(tiny_batch.anchor_columns.tolist()):
        for block, anchor in enumerate(columns):
            for k in range(1, 5):
                place = anchor + k
                alive = tiny_batch.block_mask[row, block] and place < 24
                if not alive or not tiny_batch.loss_mask[row, anchor + 1 : place + 1].all():
                    break
                of_slot = torch.exp(torch.tensor(-(k - 1) / decay))
                expected = expected + of_slot * functional.cross_entropy(
                    logits[row, block, k - 1], tiny_batch.input_ids[row, place]
                )
                weight = weight + of_slot
    torch.testing.assert_close(sums["loss"], expected)
    torch.testing.assert_close(sums["weight_sum"], weight)
    assert [name for name in summarize(sums) if name.startswith("accept_rate")] == [
        f"accept_rate@{k}" for k in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("algorithm", ["dflash", "dspark"])
def test_greedy_text_is_the_targets(algorithm: str) -> None:
    target = random_target()
    heads = FILL_IN if algorithm == "dflash" else {"sample_from_anchor": False}
    draft = random_draft(target, **heads)
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    engine = SpeculativeEngine(target, DSparkProposer(draft, target), slots=2, max_length=64)
    completions = engine.generate([Request(prompt, 20) for prompt in prompts])
    assert [completion.output_ids for completion in completions] == [generated(target, p, 20) for p in prompts]
    assert {r.proposed for completion in completions for r in completion.rounds} <= {1, 2, 3, 4}


@pytest.mark.parametrize("rule", ["token", "block"])
def test_sampled_text_follows_the_target(rule: str) -> None:
    target = tiny_target()
    shape = {"num_layers": 1, "block_size": 3, "target_layer_ids": (0, 1), "mask_token_id": 0}
    draft = random_draft(target, **FILL_IN | shape, seed=1, scale=0.5)
    engine = engine_of(DSparkProposer(draft, target), verification=rule)
    values = p_values(sampled(engine, {"temperature": 1.0}), {"temperature": 1.0})
    assert min(values) > ACCEPTABLE, values


def test_a_folder_of_zlab_loads_with_the_target(tmp_path: Path) -> None:
    target = random_target(hidden_size=32)
    draft = random_draft(target, **FILL_IN)
    draft.save_pretrained(tmp_path / "ours")
    folder = as_published_by_zlab(tmp_path / "ours", tmp_path / "zlab")
    with pytest.raises(ValueError, match=r"zlab: embed_tokens.weight, lm_head.weight not in its files.*target="):
        load_draft(folder)
    loaded = load_draft(folder, target=target, dtype=torch.bfloat16)
    assert loaded.rotary_emb.inv_freq.dtype == torch.float32
    loaded = load_draft(folder, target=target)
    assert type(loaded) is DFlashDraftModel
    assert loaded.settings.target_layer_ids == (0, 2, 4)
    loaded.save_pretrained(tmp_path / "again")
    again = load_draft(tmp_path / "again").state_dict()
    assert again.keys() == draft.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in draft.state_dict().items())
    with pytest.raises(ValueError, match=r"the target's embedding has shape \[60, 32\]"):
        load_draft(folder, target=random_target(hidden_size=32, vocab_size=60))
    (folder / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"mask_embedding.pt: DeepSpec has no draft with an embedding beside"):
        load_draft(folder, target=target)


@pytest.mark.usefixtures("in_temporary_folder")
def test_it_trains_resumes_and_is_a_start(training_world: Path, tmp_path: Path) -> None:
    whole = train(tiny_run(training_world, tmp_path / "whole", draft=FILL_IN, steps=4))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(checkpoint_folder(tmp_path / "cut", 4))
    resumed = train(tiny_run(training_world, tmp_path / "cut", draft=FILL_IN, steps=4))
    assert_same_end(whole.checkpoint, resumed.checkpoint)
    folder = as_published_by_zlab(whole.checkpoint / "draft", tmp_path / "zlab")
    start = tiny_run(training_world, tmp_path / "next", draft=FILL_IN, steps=1, lr=0.0, start_from=str(folder))
    after = train(start).checkpoint / "draft"
    before = load_file(whole.checkpoint / "draft" / "model.safetensors")
    assert all(torch.equal(before.pop(name), weight) for name, weight in load_file(after / "model.safetensors").items())
    assert not before
    target = load_target(str(training_world / "target"))
    assert load_draft(after, target=target).draft_length == 3
    other = tiny_run(training_world, tmp_path / "other", draft=FILL_IN | {"sample_from_anchor": True}, steps=1)
    with pytest.raises(ConfigError, match=r"Give draft.sample_from_anchor=false"):
        train(changed(other, train={"start_from": str(folder)}))
