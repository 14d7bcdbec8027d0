"""The optimizer's file, and the frozen weights that no optimizer sees."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from deepspec.checkpoints import CheckpointError
from deepspec.drafts import load_draft
from deepspec.training.frozen import hold_target_weights_as_buffers
from deepspec.training.optimizer_state import load_optimizer_state, save_optimizer_state, write_float32


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def small_model(accelerator, updates):
    """A model of parameters of several shapes, also a scalar, after some updates."""
    torch.manual_seed(0)
    model = nn.ParameterDict({"matrix": nn.Parameter(torch.randn(3, 5)), "one": nn.Parameter(torch.tensor(2.0))})
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.1))
    for step in range(updates):
        update(model, optimizer, step)
    return model, optimizer


def update(model, optimizer, step):
    loss = sum(((parameter - step) ** 2).sum() for parameter in model.values())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_written_as_the_library_reads_it(tmp_path):
    tensors = {"b.x": torch.randn(3, 5), "a": torch.randn(7), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    file = tmp_path / "f.safetensors"
    write_float32(file, {name: value.shape for name, value in tensors.items()}, tensors.values(), {"updates": "3"})
    stored = load_file(file)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], value) for name, value in tensors.items())
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"updates": "3"}


def test_one_tensor_at_a_time(tmp_path):
    """The next tensor is asked for only after the one before has been written."""
    file = tmp_path / "f.safetensors"

    def tensors():
        for number in range(3):
            assert file.stat().st_size >= 4 * 4096 * (number - 1)
            yield torch.full((4096,), float(number))

    write_float32(file, {str(number): (4096,) for number in range(3)}, tensors(), {})
    assert [float(load_file(file)[str(number)][0]) for number in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("updates", [0, 3])
def test_continues_to_the_bit(accelerator, tmp_path, updates):
    model, optimizer = small_model(accelerator, updates)
    save_optimizer_state(tmp_path / "s" / "optimizer.safetensors", dict(model.items()), optimizer, accelerator)
    other, other_optimizer = small_model(accelerator, 1)  # a state that has to be overwritten
    other.load_state_dict(model.state_dict())
    load_optimizer_state(tmp_path / "s" / "optimizer.safetensors", dict(other.items()), other_optimizer, accelerator)
    with safe_open(tmp_path / "s" / "optimizer.safetensors", framework="pt") as file:
        assert file.metadata() == {"updates": str(updates)}
    for step in range(4):
        update(model, optimizer, step)
        update(other, other_optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(model.values(), other.values(), strict=True))


def test_state_of_another_model(accelerator, tmp_path):
    model, optimizer = small_model(accelerator, 1)
    file = tmp_path / "optimizer.safetensors"
    save_optimizer_state(file, dict(model.items()), optimizer, accelerator)
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: .*matrix.exp_avg is \[3, 5\], not \[5, 3\]"):
        load_optimizer_state(file, {"matrix": nn.Parameter(torch.zeros(5, 3))}, optimizer, accelerator)
    with pytest.raises(CheckpointError, match=r"absent.safetensors: not the optimizer state of this draft"):
        load_optimizer_state(tmp_path / "absent.safetensors", dict(model.items()), optimizer, accelerator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights_are_no_parameters(tiny_draft, tmp_path, dtype):
    """And keep the dtype of the target, in memory and on disk."""
    draft = tiny_draft()
    for module in (draft.embed_tokens, draft.lm_head):
        module.weight.data = module.weight.data.to(dtype).float()
    before = {name: value.clone() for name, value in draft.state_dict().items()}
    trained = [name for name, _ in draft.trainable_parameters()]
    hold_target_weights_as_buffers(draft, dtype)
    assert draft.embed_tokens.weight.dtype == draft.lm_head.weight.dtype == dtype
    assert [name for name, _ in draft.named_parameters()] == trained
    assert {"embed_tokens.weight", "lm_head.weight"} <= dict(draft.named_buffers()).keys()
    assert draft.state_dict().keys() == before.keys()
    draft.save_pretrained(tmp_path)
    stored = load_draft(tmp_path).state_dict()
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == dtype
    assert all(torch.equal(stored[name], value) for name, value in before.items())


def test_frozen_weights_compute_the_same(tiny_draft, tiny_batch):
    inputs = tiny_batch.for_backbone()
    draft = tiny_draft()
    expected = draft.base_logits(draft(**inputs))
    hold_target_weights_as_buffers(draft, torch.float32)
    assert torch.equal(draft.base_logits(draft(**inputs)), expected)
