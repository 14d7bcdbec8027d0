"""Embedding, head and fingerprint read from a target's files equal those of the loaded target."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_draft_config, tiny_target_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import deepspec.targets.head as head_module
from deepspec.drafts import build_draft
from deepspec.targets import load_target, load_target_head

MODELS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "llama untied": {"family": "llama", "tie_word_embeddings": False},
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path) -> Path:
    return save_model(tmp_path / "target", **MODELS[request.param])


def save_model(folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "50GB", **changes) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_target_config(**changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def assert_same(path, **options):
    whole, head = load_target(str(path), **options), load_target_head(str(path), **options)
    assert head.fingerprint == whole.fingerprint
    for name in ("embedding_weight", "head_weight"):
        assert torch.equal(getattr(head, name), getattr(whole, name))
        assert getattr(head, name).dtype == getattr(whole, name).dtype
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_loaded_target(folder, dtype):
    head = assert_same(folder, dtype=dtype)
    assert head.name_or_path == str(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_builtin_target(dtype):
    head = assert_same("builtin", dtype=dtype)
    assert head.head_weight is head.embedding_weight


def test_several_files_with_an_index_and_stored_in_bfloat16(tmp_path):
    folder = save_model(tmp_path / "target", dtype=torch.bfloat16, shard="20KB", tie_word_embeddings=False)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(folder)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002.*missing weight file"):
        load_target_head(str(folder))


def test_tied_file_that_stores_only_the_head_or_both(tmp_path):
    folder = save_model(tmp_path / "target", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    expected = load_target(str(folder)).fingerprint
    save_file(weights | {"lm_head.weight": embedding.clone()}, file, {"format": "pt"})
    assert_same(folder)
    del weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding}, file, {"format": "pt"})
    head = load_target_head(str(folder))
    assert head.fingerprint == expected
    assert torch.equal(head.embedding_weight, embedding)


def test_layers_are_loaded_only_when_asked_for(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "target", tie_word_embeddings=False)
    target = load_target(str(folder))
    loads = []
    monkeypatch.setattr(head_module, "load_target", lambda *a, **k: (loads.append(a), load_target(*a, **k))[1])
    head = load_target_head(str(folder))
    config = tiny_draft_config(target.config)
    drafts = [build_draft(config, of) for of in (head, target)]
    assert not loads
    for draft, of in zip(drafts, (head, target), strict=True):
        draft.start_from_target(of)
    assert len(loads) == 1
    for (name, mine), (_, theirs) in zip(drafts[0].named_parameters(), drafts[1].named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_missing_or_reshaped_weight_and_damaged_file(tmp_path):
    folder = save_model(tmp_path / "target", tie_word_embeddings=False)
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if name != "lm_head.weight"}, file)
    with pytest.raises(ValueError, match=r"has no weight lm_head.weight \[61, 32\].*save_pretrained"):
        load_target_head(str(folder))
    save_file(weights | {"lm_head.weight": torch.zeros(60, 32)}, file)
    with pytest.raises(ValueError, match=r"has the shape \[60, 32\] for lm_head.weight \[61, 32\]"):
        load_target_head(str(folder))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged or incomplete"):
        load_target_head(str(folder))
    with pytest.raises(FileNotFoundError, match=r"no such folder"):
        load_target_head(str(tmp_path / "absent"))


def test_snapshot_of_a_hub_model_without_a_network(tmp_path):
    """The Hub's cache as huggingface_hub lays it out: links into a folder of blobs."""
    saved = save_model(tmp_path / "saved")
    expected = load_target(str(saved)).fingerprint
    repo = tmp_path / "home" / "hub" / "models--me--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for file in saved.iterdir():
        shutil.copy(file, repo / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
    code = "from deepspec.targets import load_target_head; print(load_target_head('me/tiny').fingerprint)"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == expected
