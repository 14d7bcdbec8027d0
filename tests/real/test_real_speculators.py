"""speculators and we read each other's drafts: `python -m pytest -m real -s tests/real/test_real_speculators.py`.

What we export gives our logits there; what it saves, random or trained by its own trainer, gives its logits here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import environments
import pytest
import torch
from engines import DRIVERS, HERE, drive, run
from safetensors.torch import load_file, save_file
from torch import Tensor
from worlds import BUILTIN, EVERY_FIFTH, random_draft, texts

from deepspec.data.packing import Sample, lay_out
from deepspec.drafts import load_draft
from deepspec.drafts.base import DraftModel
from deepspec.drafts.eagle3 import Eagle3Model
from deepspec.targets import Target, TargetFeatures, load_target

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
HEADLESS = {"markov_rank": 0, "confidence_head": False}
EAGLE3 = {"algorithm": "eagle3", "architecture": "Qwen3Eagle3Model", "num_layers": 1} | HEADLESS
KINDS: dict[str, dict[str, Any]] = {
    "dspark": {},
    "dspark_gated": {"markov_head_type": "gated"},
    "dspark_rnn": {"markov_head_type": "rnn", "confidence_head_with_markov": False},
    "dspark_pruned": {"kept_tokens": EVERY_FIFTH},
    "dflash": {"algorithm": "dflash", "sample_from_anchor": False} | HEADLESS,
    "eagle3": EAGLE3,
    "eagle3_pruned": EAGLE3 | {"kept_tokens": EVERY_FIFTH},
    "eagle3_llama": EAGLE3 | {"architecture": "LlamaEagle3Model"},
}
LENGTH, ANCHORS, STEPS = 64, [1, 7, 20, 45], 7
LAYERS = [1, 3, 4]
THEIR_LAYERS = [layer + 1 for layer in LAYERS]
PUBLISHING = ("-m", "deepspec.publishing")


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("builtin", dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.tensor(texts(BUILTIN)[0][:LENGTH])[None]


def features_of(target: Target, ids: Tensor, layer_ids: tuple[int, ...]) -> TargetFeatures:
    batch = lay_out([[Sample(0, 0, "0", ids[0].tolist(), [1] * ids.shape[1])]], pad_id=0)
    return target.features(batch, layer_ids)


def before_the_norm(target: Target, ids: Tensor) -> Tensor:
    """The target's last state as speculators has it: before the final norm."""
    return features_of(target, ids, (target.num_layers - 1,)).context


def their_logits(draft: DraftModel, target: Target, ids: Tensor, path: Path, folder: Path) -> dict[str, Tensor]:
    features, last = features_of(target, ids, draft.target_layer_ids).context, before_the_norm(target, ids)
    given = {"input_ids": ids, "hidden_states": features, "verifier_last_hidden_states": last}
    if isinstance(draft, Eagle3Model):  # reads a token with the state before it: `shift_batch` there
        given = {"input_ids": ids[:, 1:], "hidden_states": features[:, :-1], "verifier_last_hidden_states": last[:, 1:]}
    given["anchors"] = torch.tensor(ANCHORS)
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, folder / "given.safetensors")
    request = {"path": path, "tensors": folder / "given.safetensors", "result": folder / "theirs.safetensors"}
    print(drive(environments.speculators(), "speculators_drafts", folder, what="logits", **request))
    return load_file(folder / "theirs.safetensors")


def our_logits(draft: DraftModel, target: Target, ids: Tensor) -> dict[str, Tensor]:
    """[anchors, slots, vocab], and confidence logits [anchors, slots] where there are any."""
    anchors = torch.tensor(ANCHORS)[None]
    features = features_of(target, ids, draft.target_layer_ids).context
    with torch.no_grad():
        positions = torch.arange(ids.shape[1])[None]
        hidden = draft(ids, positions, features, anchors, torch.ones_like(anchors, dtype=torch.bool))[0]
        logits, ours = draft.base_logits(hidden), {}
        if getattr(draft, "markov_head", None) is not None:
            previous = ids[0, torch.tensor(ANCHORS)[:, None] + torch.arange(hidden.shape[1])]
            logits = logits + draft.markov_head.bias(draft.markov_head.latents(previous, hidden))
            if draft.confidence_head is not None:
                ours["confidence"] = draft.confidence_head(hidden, draft.markov_head.embed(previous))
    return ours | {"logits": logits}


def compare(draft: DraftModel, target: Target, ids: Tensor, path: Path, folder: Path) -> None:
    theirs, ours = their_logits(draft, target, ids, path, folder), our_logits(draft, target, ids)
    if isinstance(draft, Eagle3Model):  # theirs: a chain from every token at once
        steps = [theirs[f"logits{step}"][0, torch.tensor(ANCHORS) - 1] for step in range(STEPS)]
        found = {"logits": torch.stack(steps, dim=1)}
    else:
        found = {"logits": theirs["logits0"].unflatten(1, (len(ANCHORS), -1))[0]}
    if "confidence" in ours:
        found["confidence"] = theirs["confidence"].view(len(ANCHORS), -1)
    for name, here in ours.items():
        there = found[name][:, -here.shape[1] :]  # without the first slot, where that predicts nothing
        print(f"{draft.algorithm} {name}: spread {here.std():.2f}, largest difference {(here - there).abs().max():.1e}")
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_gives_our_logits(kind: str, target: Target, ids: Tensor, tmp_path: Path):
    draft = random_draft(target, **KINDS[kind])
    draft.save_pretrained(tmp_path / "draft")
    words = [f"checkpoint={tmp_path / 'draft'}", "format=speculators", f"output_dir={tmp_path / 'export'}"]
    run(HERE, *PUBLISHING, "export", *words, f"target={BUILTIN}")
    compare(draft, target, ids, tmp_path / "export", tmp_path)


def imported(path: Path, folder: Path) -> DraftModel:
    run(HERE, *PUBLISHING, "import", f"path={path}", f"output_dir={folder / 'imported'}", f"target={BUILTIN}")
    return load_draft(folder / "imported", dtype=torch.float32)


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3"])
def test_a_random_draft_of_theirs_gives_its_logits(kind: str, target: Target, ids: Tensor, tmp_path: Path):
    request = {"kind": kind, "target": BUILTIN, "output_dir": tmp_path / "random"}
    decoder = {"num_layers": 2, "draft_arch": "qwen3", "hidden_act": None, "sliding_window": 2048}
    arguments = {"draft_vocab_size": target.vocab_size, "target_layer_ids": THEIR_LAYERS, "block_size": 8}
    arguments |= {"mask_token_id": target.vocab_size - 1, "markov_rank": 32}
    if kind == "eagle3":  # ours has one layer, and none of its norms
        decoder["num_layers"] = 1
        arguments |= {"ttt_steps": STEPS, "norm_before_residual": False}
    decoder["full_attention_indices"] = list(range(decoder["num_layers"]))
    drive(
        environments.speculators(),
        "speculators_drafts",
        tmp_path,
        what="random",
        **request,
        arguments=arguments | {"decoder": decoder},
    )
    compare(imported(tmp_path / "random", tmp_path), target, ids, tmp_path / "random", tmp_path)


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3"])
def test_a_draft_of_their_trainer_gives_its_logits(kind: str, target: Target, ids: Tensor, tmp_path: Path):
    write_their_data(target, tmp_path / "data")
    layers = 1 if kind == "eagle3" else 2
    options = {
        "speculator-type": kind,
        "verifier-name-or-path": BUILTIN,
        "draft-arch": "qwen3",
        "num-layers": layers,
        "full-attention-indices": range(layers),
        "target-layer-ids": THEIR_LAYERS,
        "mask-token-id": target.vocab_size - 1,
        "block-size": 8,
        "markov-rank": 32,
        "max-anchors": 8,
        "ttt-steps": STEPS,
        "draft-attn-impl": "eager",
        "loss-implementation": "eager",
        "data-path": tmp_path / "data",
        "total-seq-len": 128,
        "hidden-states-dtype": "float32",
        "num-workers": 1,
        "on-missing": "raise",
        "epochs": 1,
        "max-steps": 5,
        "save-path": tmp_path / "trained",
        "log-dir": tmp_path / "logs",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", *worded(value))]
    if kind == "eagle3":
        words += ["--no-norm-before-residual", "--no-norm-before-fc", "--no-norm-output"]
    run(environments.speculators(), DRIVERS / "speculators_train.py", *words)
    saved = min(path.parent for path in (tmp_path / "trained").rglob("config.json"))
    compare(imported(saved, tmp_path), target, ids, saved, tmp_path)


def worded(value: Any) -> list[str]:
    return list(map(str, value)) if isinstance(value, list | range) else [str(value)]


def write_their_data(target: Target, folder: Path) -> None:
    """Documents of 64 tokens and the target's states of them, in the files that their trainer reads."""
    documents = torch.tensor([ids[:LENGTH] for ids in texts(BUILTIN)] * 4)
    rows = {"input_ids": documents.tolist(), "loss_mask": torch.ones_like(documents).tolist()}
    rows["seq_len"] = [LENGTH] * len(documents)
    datasets.Dataset.from_dict(rows).with_format("torch").save_to_disk(folder)
    (folder / "hidden_states").mkdir()
    for number, ids in enumerate(documents):
        states = features_of(target, ids[None], (*LAYERS, target.num_layers - 1)).context[0]
        tensors = {"hidden_states": states.unflatten(-1, (len(LAYERS) + 1, -1)).contiguous(), "token_ids": ids}
        save_file(tensors, folder / "hidden_states" / f"hs_{number}.safetensors")
