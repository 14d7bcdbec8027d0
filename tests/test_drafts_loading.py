"""Saving and loading drafts, and every way a folder can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import TinyBatch
from safetensors.torch import load_file, save_file

import deepspec
from deepspec.checkpoints import checkpoint_folder, write_checkpoint
from deepspec.drafts import DSparkModel, Qwen3DSparkModel, load_draft
from deepspec.targets import Target

MakeDraft = Callable[..., DSparkModel]


@dataclass(frozen=True)
class FakeTarget:
    name_or_path: str
    fingerprint: str
    embedding_weight: torch.Tensor
    head_weight: torch.Tensor


@pytest.fixture
def folder(goldens: Path, tmp_path: Path) -> Path:
    """A writable copy of a published draft."""
    return Path(shutil.copytree(goldens / "ckpt_dspark_vanilla", tmp_path / "published"))


@pytest.mark.parametrize("family", ["qwen3", "gemma4", "llama"])
@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
def test_roundtrip_is_bitwise(
    tiny_draft: MakeDraft, tiny_batch: TinyBatch, tmp_path: Path, family: str, head_type: str
) -> None:
    window = {} if family == "gemma4" else {"sliding_window": 6}
    draft = tiny_draft(family, markov_head_type=head_type, **window)
    draft.save_pretrained(tmp_path)
    loaded = deepspec.load_draft(tmp_path)
    assert type(loaded) is type(draft)
    assert loaded.settings == draft.settings
    assert not loaded.training
    ours, theirs = draft.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(draft.rotary_emb.inv_freq, loaded.rotary_emb.inv_freq)
    arguments = tiny_batch.for_backbone()
    assert torch.equal(draft(**arguments), loaded(**arguments))


def test_embedding_and_head_stay_frozen_and_apart(tiny_draft: MakeDraft, tmp_path: Path) -> None:
    tiny_draft().save_pretrained(tmp_path)  # its target ties the two
    stored = load_file(tmp_path / "model.safetensors")
    assert not torch.equal(stored["embed_tokens.weight"], stored["lm_head.weight"])
    for draft in (tiny_draft(), load_draft(tmp_path), Qwen3DSparkModel.from_pretrained(tmp_path)):
        frozen = {name for name, parameter in draft.named_parameters() if not parameter.requires_grad}
        assert frozen == {"embed_tokens.weight", "lm_head.weight"}
        assert frozen.isdisjoint(name for name, _ in draft.trainable_parameters())


def test_tied_targets_are_stored_twice(tiny_draft: MakeDraft, tmp_path: Path) -> None:
    draft = tiny_draft()
    weight = torch.randn(61, 32, generator=torch.Generator().manual_seed(0))
    draft.tie_to_target(FakeTarget("t", "f", weight, weight))
    draft.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["embed_tokens.weight"], weight)
    assert torch.equal(stored["lm_head.weight"], weight)
    with pytest.raises(ValueError, match=r"embedding has shape \[60, 32\]"):
        draft.tie_to_target(FakeTarget("t", "f", weight[:60], weight[:60]))


def test_dtype_is_as_stored_or_as_asked(tiny_draft: MakeDraft, tmp_path: Path) -> None:
    tiny_draft().bfloat16().save_pretrained(tmp_path)
    assert load_draft(tmp_path).dtype == torch.bfloat16
    assert load_draft(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert load_draft(tmp_path).rotary_emb.inv_freq.dtype == torch.float32


def test_a_sharded_draft_loads(tiny_draft: MakeDraft, tmp_path: Path) -> None:
    draft = tiny_draft()
    draft.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_draft(tmp_path).fc.weight, draft.fc.weight)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[0].name}: missing weight file"):
        load_draft(tmp_path)


def test_published_configs_lack_our_fields(goldens: Path, golden_target: Target, folder: Path) -> None:
    assert load_draft(folder, target=golden_target).algorithm == "dspark"
    assert load_draft(goldens / "ckpt_dflash", target=golden_target).algorithm == "dflash"


def test_a_published_gemma_draft_keeps_its_sizes_apart_for_full_attention(
    tiny_draft: MakeDraft, tiny_batch: TinyBatch, tmp_path: Path
) -> None:
    draft = tiny_draft("gemma4")
    draft.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Gemma4DSparkModel"]
    assert (config.pop("head_dim"), config.pop("num_key_value_heads")) == (16, 1)
    config.pop("per_layer_config")
    config |= {"head_dim": 8, "global_head_dim": 16, "num_key_value_heads": 2, "num_global_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_draft(tmp_path)
    assert (loaded.config.head_dim, loaded.config.num_key_value_heads) == (16, 1)
    arguments = tiny_batch.for_backbone()
    assert torch.equal(draft(**arguments), loaded(**arguments))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(draft(**arguments), load_draft(tmp_path / "again")(**arguments))


def test_truncated_weights_name_the_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged or incomplete"):
        load_draft(folder)
    file.write_bytes(b"\x00" * 4)
    with pytest.raises(ValueError, match=r"model.safetensors: damaged or incomplete"):
        load_draft(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: missing weight file"):
        load_draft(folder)


def test_missing_unknown_and_misshapen_tensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if name != "fc.weight"}, file)
    with pytest.raises(ValueError, match=r"tensors missing for its config.json: fc.weight"):
        load_draft(folder)
    save_file(tensors | {"surprise.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"does not know: surprise.weight"):
        load_draft(folder)
    save_file(tensors | {"fc.weight": torch.zeros(64, 64)}, file)
    with pytest.raises(ValueError, match=r"fc.weight is \[64, 64\], expected \[64, 192\]"):
        load_draft(folder)


def test_bad_configs(folder: Path, goldens: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM.*expected Qwen3DSparkModel"):
        load_draft(goldens / "target")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "block_size"}))
    with pytest.raises(ValueError, match=r"config.json: .*block_size missing"):
        load_draft(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not a readable config"):
        load_draft(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor checkpoints"):
        load_draft(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_draft(tmp_path / "absent")


def test_a_run_folder_gives_its_newest_complete_checkpoint(tiny_draft: MakeDraft, tmp_path: Path) -> None:
    drafts = {step: tiny_draft(block_size=step) for step in (1, 2, 3)}
    for step, draft in drafts.items():
        write_checkpoint(tmp_path, step, lambda to, draft=draft: draft.save_pretrained(to / "draft"), {"step": step})
    assert load_draft(tmp_path).block_size == 3
    assert load_draft(checkpoint_folder(tmp_path, 1)).block_size == 1
    damaged = checkpoint_folder(tmp_path, 3) / "draft" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert load_draft(tmp_path).block_size == 2
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        load_draft(tmp_path)


def test_another_target_is_refused(tiny_draft: MakeDraft, tmp_path: Path) -> None:
    draft = tiny_draft(target_model_name_or_path="some/target", target_fingerprint="a" * 64)
    draft.save_pretrained(tmp_path)
    embedding, head = draft.embed_tokens.weight, draft.lm_head.weight
    load_draft(tmp_path, target=FakeTarget("same", "a" * 64, embedding, head))
    with pytest.raises(
        ValueError, match=r"trained for target some/target with fingerprint a{12}, but .* other is b{12}"
    ):
        load_draft(tmp_path, target=FakeTarget("other", "b" * 64, embedding, head))
    with pytest.raises(ValueError, match=r"its embedding is \[61, 32\] .* other is \[61, 16\]"):
        load_draft(tmp_path, target=FakeTarget("other", "a" * 64, embedding[:, :16], head[:, :16]))


def test_an_unnamed_target_with_another_embedding_is_logged(
    golden_target: Target, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_draft(folder, target=golden_target)
    assert not caplog.records
    weight = golden_target.embedding_weight + 0.1
    load_draft(folder, target=FakeTarget("other", "f", weight, golden_target.head_weight))
    assert "its embedding differs from that of other" in caplog.text
