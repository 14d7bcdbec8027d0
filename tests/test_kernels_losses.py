"""Chunked and fused losses over the vocabulary against the plain formulation: values, gradients, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import losses_driver
import pytest
import torch
from losses_driver import TRAINED, UPSTREAM, outputs
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepspec.drafts.heads import MARKOV_HEADS, MarkovHead
from deepspec.kernels import losses
from deepspec.kernels.losses import losses_of_rows, vocabulary_losses

Inputs = dict[str, Any]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def random_inputs(rows: int = 10, vocab: int = 61, hidden: int = 6, rank: int = 3, **changes: Any) -> Inputs:
    """Arguments of `vocabulary_losses` in float32, with weights of which some are zero."""
    generator = torch.Generator().manual_seed(rows + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = torch.rand(rows, generator=generator)
    weights[::4] = 0
    inputs = {
        "hidden": normal(rows, hidden),
        "latents": normal(rows, rank),
        "head": normal(vocab, hidden),
        "markov_w2": normal(vocab, rank),
        "targets": torch.randint(0, vocab, (rows,), generator=generator),
        "target_hidden": normal(rows, hidden),
        "weights": weights,
        "ce_scale": 0.1,
        "tv_scale": 0.9,
    }
    return inputs | changes


def in_dtype(inputs: Inputs, dtype: torch.dtype, names: tuple[str, ...] | None = None) -> Inputs:
    """With the named tensors (default: the inputs of matrix products but the trained W2) in another dtype."""
    chosen = names or ("hidden", "latents", "head", "target_hidden")
    return inputs | {name: inputs[name].to(dtype) for name in chosen if inputs[name] is not None}


def in_float32(inputs: Inputs) -> Inputs:
    """The same numbers."""
    return {
        name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def impossible_token() -> Inputs:
    """Its probability is 0 in float32; its cross-entropy is 400."""
    return random_inputs(1) | {
        "hidden": torch.tensor([[200.0]]),
        "head": torch.tensor([[1.0], [-1.0], [-1.0]]),
        "targets": torch.tensor([1]),
        "target_hidden": torch.tensor([[0.0]]),
        "weights": torch.ones(1),
        "latents": None,
        "markov_w2": None,
    }


def likely_at_the_end(inputs: Inputs) -> Inputs:
    """The last token has the largest logit of all, of the draft and of the target."""
    head = inputs["head"].clone()
    head[-1] = 3
    return inputs | {"head": head, "hidden": inputs["hidden"].abs(), "target_hidden": inputs["target_hidden"].abs()}


def pruned(inputs: Inputs, every: int = 3) -> Inputs:
    """Of a draft that knows every so many tokens of the vocabulary; some targets are among the others."""
    head, markov_w2 = inputs["head"], inputs["markov_w2"]
    kept = torch.arange(1, len(head), every)
    targets = inputs["targets"]
    if targets is not None:
        targets = targets % len(kept)
        targets[1::3] = -1
    return inputs | {
        "head": head[kept],
        "markov_w2": None if markov_w2 is None else markov_w2[kept],
        "targets": targets,
        "kept": kept,
        "target_head": head,
    }


NO_MARKOV: Inputs = {"latents": None, "markov_w2": None}
NO_TARGET: Inputs = {"target_hidden": None, "ce_scale": 1.0, "tv_scale": 0.0}
SOFT: Inputs = {"targets": None, "ce_scale": 1.0, "tv_scale": 0.0}
FLOAT32: dict[str, Inputs] = {
    "dspark": random_inputs(),
    "one row": random_inputs(1),
    "total variation only": random_inputs(ce_scale=0.0, tv_scale=1.0),
    "target for the distance only": random_inputs(ce_scale=1.0, tv_scale=0.0),
    "no target": random_inputs(**NO_TARGET),
    "no sequential head": random_inputs(**NO_MARKOV),
    "dflash": random_inputs(**NO_MARKOV, **NO_TARGET),
    "largest logits in the second block": likely_at_the_end(random_inputs(5, 4099, 16)),
    "vocabulary of one block": random_inputs(5, 128),
    "impossible token": impossible_token(),
    "scaled": random_inputs(logit_scale=0.3),
    "capped": random_inputs(softcap=2.0),
    "scaled and capped": random_inputs(5, 4099, 16, logit_scale=0.7, softcap=3.0),
    "capped dflash": random_inputs(**NO_MARKOV, **NO_TARGET, softcap=2.0),
    "eagle3": random_inputs(**NO_MARKOV, **SOFT),
    "soft with distance": random_inputs(targets=None, softcap=2.0, logit_scale=0.7),
    "pruned": pruned(random_inputs()),
    "pruned, scaled and capped": pruned(random_inputs(logit_scale=0.7, softcap=2.0)),
    "pruned, a whole block": pruned(random_inputs(3, 8192, 8), every=2),
    "pruned dflash": pruned(random_inputs(**NO_MARKOV, **NO_TARGET)),
    "almost whole": pruned(random_inputs(5, 17), every=1),
    "pruned eagle3": pruned(random_inputs(targets=None)),
}
BF16 = {
    "dspark bf16": in_dtype(random_inputs(12), torch.bfloat16),
    "eagle3 bf16": in_dtype(random_inputs(12, **NO_MARKOV, **SOFT), torch.bfloat16),
    "dflash bf16": in_dtype(random_inputs(12, **NO_MARKOV, **NO_TARGET), torch.bfloat16),
    "no target bf16": in_dtype(random_inputs(12, **NO_TARGET), torch.bfloat16),
    "states in float32": in_dtype(random_inputs(12), torch.bfloat16, ("head",)),
    "all bf16": in_dtype(
        random_inputs(12), torch.bfloat16, ("hidden", "latents", "head", "markov_w2", "target_hidden")
    ),
    "scaled and capped bf16": in_dtype(random_inputs(12, logit_scale=0.5, softcap=3.0), torch.bfloat16),
    "capped dflash bf16": in_dtype(random_inputs(12, **NO_MARKOV, **NO_TARGET, softcap=3.0), torch.bfloat16),
    "pruned bf16": in_dtype(pruned(random_inputs(12, softcap=3.0)), torch.bfloat16, ("head", "target_head")),
    "head in float32": in_dtype(random_inputs(12), torch.bfloat16, ("hidden", "latents", "target_hidden")),
}
CHUNKS = (1, 3, 100)
FUSED = [("dspark", rows) for rows in CHUNKS] + [(name, 4) for name in FLOAT32 if name != "dspark"]


@dataclass
class Heads:
    """A sequential head with the masked slots of some blocks behind it."""

    head: MarkovHead
    hidden: Tensor  # [blocks, slots, hidden]
    inputs: Inputs  # of `vocabulary_losses`, with the graph through the head

    def gradients(self) -> dict[str, Tensor]:
        found = {name: parameter.grad for name, parameter in self.head.named_parameters()} | {
            "hidden": self.hidden.grad
        }
        assert all(gradient is not None and gradient.any() for gradient in found.values())
        return found  # type: ignore[return-value]


def slots_behind(kind: str) -> Heads:
    generator = torch.Generator().manual_seed(3)
    blocks, slots, vocab, size, rank = 4, 5, 61, 6, 3
    head = MARKOV_HEADS[kind](vocab, size, rank)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(blocks, slots, size, generator=generator).requires_grad_()
    supervised = torch.arange(slots) < torch.tensor([5, 2, 0, 4])[:, None]
    prev_tokens = torch.randint(0, vocab, (blocks, slots), generator=generator)
    rows = int(supervised.sum())
    inputs = random_inputs(rows, vocab, size, rank) | {
        "hidden": hidden[supervised],
        "latents": head.latents(prev_tokens, hidden)[supervised],
        "markov_w2": head.markov_w2.weight,
    }
    return Heads(head, hidden, inputs)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What the Triton implementation gives for all cases, computed on the CPU in a process under its interpreter."""
    folder = tmp_path_factory.mktemp("fused")
    cases = {f"{name}, {rows}": (FLOAT32[name], rows) for name, rows in FUSED}
    cases |= {name: (inputs, 5) for name, inputs in BF16.items()}
    cases |= {kind: (detached(slots_behind(kind).inputs), 4) for kind in MARKOV_HEADS}
    cases["no rows"] = (random_inputs(0), 4)
    torch.save(cases, folder / "cases.pt")
    subprocess.run(
        [sys.executable, losses_driver.__file__, folder / "cases.pt", folder / "results.pt"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=True,
        timeout=240,
    )
    return torch.load(folder / "results.pt")


def detached(inputs: Inputs) -> Inputs:
    return {name: value.detach() if torch.is_tensor(value) else value for name, value in inputs.items()}


def assert_close(ours: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the norm of each tensor; a norm of 0 must be met to 1e-6."""
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        error = torch.linalg.vector_norm(ours[name].float() - expected)
        assert error <= tolerance * torch.linalg.vector_norm(expected) + 1e-6, f"{name}: {error}"
        assert ours[name].isfinite().all(), name


@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("case", FLOAT32)
def test_chunked_equals_the_plain_formulation(case: str, chunk_rows: int) -> None:
    assert_close(outputs(FLOAT32[case], "chunked", chunk_rows), outputs(FLOAT32[case], "reference"), 1e-5)


@pytest.mark.parametrize(
    "case", ["dspark", "scaled and capped", "capped dflash", "pruned", "pruned, scaled and capped", "pruned dflash"]
)
def test_the_plain_formulation_is_the_papers_with_the_targets_scale_and_cap(case: str) -> None:
    inputs = FLOAT32[case]
    exact = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    leaves = {name: exact[name].requires_grad_() for name in TRAINED if exact[name] is not None}
    scale, cap = inputs.get("logit_scale", 1.0), inputs.get("softcap")

    def logits_of(states: Tensor, head: Tensor) -> Tensor:
        logits = scale * states @ head.T
        return logits if cap is None else cap * torch.tanh(logits / cap)

    logits = logits_of(exact["hidden"], exact["head"])
    if exact["latents"] is not None:
        logits = logits + scale * exact["latents"] @ exact["markov_w2"].T
    drafted = logits.softmax(-1)
    cross_entropy = functional.cross_entropy(logits, exact["targets"], reduction="none", ignore_index=-1)
    loss = inputs["ce_scale"] * cross_entropy
    if exact["target_hidden"] is not None:
        wanted = logits_of(exact["target_hidden"], exact.get("target_head", exact["head"])).softmax(-1)
        known = wanted[:, exact.get("kept", slice(None))]
        loss = loss + inputs["tv_scale"] * ((drafted - known).abs().sum(-1) + 1 - known.sum(-1))
    (UPSTREAM * (exact["weights"] * loss).sum()).backward()
    expected = {"loss": (exact["weights"] * loss).sum().detach().float()}
    expected |= {name: leaf.grad.float() for name, leaf in leaves.items()}
    for implementation in ("reference", "chunked"):
        ours = outputs(inputs, implementation, 3)
        assert_close({name: ours[name] for name in expected}, expected, 1e-5)


@needs_triton
@pytest.mark.parametrize(("case", "chunk_rows"), FUSED)
def test_fused_equals_the_plain_formulation(case: str, chunk_rows: int, fused: dict[str, dict[str, Tensor]]) -> None:
    assert_close(fused[f"{case}, {chunk_rows}"], outputs(FLOAT32[case], "reference"), 1e-5)


@pytest.mark.parametrize("case", BF16)
@pytest.mark.parametrize("implementation", ["chunked", pytest.param("triton", marks=needs_triton)])
def test_bf16_is_close_to_float32(case: str, implementation: str, request: pytest.FixtureRequest) -> None:
    ours = (
        request.getfixturevalue("fused")[case] if implementation == "triton" else outputs(BF16[case], implementation, 5)
    )
    assert_close(ours, outputs(in_float32(BF16[case]), "reference"), 1e-2)
    for name, value in ours.items():
        assert value.dtype == (BF16[case][name].dtype if name in TRAINED else torch.float32), name


@pytest.mark.parametrize("case", [name for name in BF16 if name != "head in float32"])
def test_products_in_bf16_as_on_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mm_with_float32_result(left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert (left.dtype, right.dtype, out_dtype, out.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
        return out.copy_(left.float() @ right.float())

    monkeypatch.setattr(losses, "_product_dtype", lambda head: head.dtype)
    monkeypatch.setattr(torch, "mm", mm_with_float32_result)
    assert_close(outputs(BF16[case], "chunked", 5), outputs(in_float32(BF16[case]), "reference"), 1e-2)


@needs_triton
def test_the_kernel_writes_gradients_in_bf16(fused: dict[str, dict[str, Tensor]]) -> None:
    ours = fused["rows in bf16"]
    assert ours["gradient"].dtype == torch.bfloat16
    assert_close(ours, losses_driver.outputs_of_rows(losses_of_rows, torch.float32), 1e-2)


def test_a_bf16_head_is_converted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = outputs(BF16["dspark bf16"], "chunked")
    monkeypatch.setattr(losses, "CONVERTED_ELEMENTS", 20)
    assert_close(outputs(BF16["dspark bf16"], "chunked"), whole, 1e-5)


@pytest.mark.parametrize("kind", MARKOV_HEADS)
@pytest.mark.parametrize("implementation", ["chunked", pytest.param("triton", marks=needs_triton)])
def test_gradients_reach_every_parameter_of_a_sequential_head(
    kind: str, implementation: str, request: pytest.FixtureRequest
) -> None:
    plain, ours = slots_behind(kind), slots_behind(kind)
    (UPSTREAM * vocabulary_losses(**plain.inputs, implementation="reference").loss).backward()
    if implementation == "triton":
        known = request.getfixturevalue("fused")[kind]
        torch.autograd.backward([ours.inputs[name] for name in TRAINED], [known[name] for name in TRAINED])
    else:
        (UPSTREAM * vocabulary_losses(**ours.inputs, implementation=implementation, chunk_rows=4).loss).backward()
    assert_close(ours.gradients(), plain.gradients(), 1e-5)


def test_rows_without_weight_get_no_gradient_and_change_nothing() -> None:
    inputs = random_inputs()
    counted = inputs["weights"] > 0
    assert not counted.all()
    per_row = ("hidden", "latents", "targets", "target_hidden", "weights")
    whole = outputs(inputs, "chunked", 4)
    fewer = outputs(inputs | {name: inputs[name][counted] for name in per_row}, "chunked", 4)
    for name in ("hidden", "latents"):
        assert not whole[name][~counted].any()
        torch.testing.assert_close(whole[name][counted], fewer[name], rtol=1e-5, atol=1e-7)
    for name in ("loss", "markov_w2"):
        torch.testing.assert_close(whole[name], fewer[name], rtol=1e-5, atol=1e-6)


def test_no_rows_give_zero_and_zero_gradients(request: pytest.FixtureRequest) -> None:
    results = [outputs(random_inputs(0), "chunked")]
    if find_spec("triton"):
        results.append(request.getfixturevalue("fused")["no rows"])
    for result in results:
        assert result["loss"] == 0
        assert result["hidden"].shape == (0, 6)
        assert torch.equal(result["markov_w2"], torch.zeros(61, 3))


def test_equal_distributions_have_no_distance() -> None:
    inputs = random_inputs(**NO_MARKOV)
    l1 = vocabulary_losses(**(inputs | {"target_hidden": inputs["hidden"].clone()})).l1
    assert l1 is not None
    assert l1.max() < 1e-6


def test_the_total_variation_needs_target_states() -> None:
    assert vocabulary_losses(**random_inputs(**NO_TARGET)).l1 is None
    with pytest.raises(ValueError, match="target_hidden"):
        vocabulary_losses(**random_inputs(target_hidden=None))


def test_the_cross_entropy_of_an_impossible_token_is_exact() -> None:
    assert vocabulary_losses(**impossible_token()).ce.item() == pytest.approx(400.0)


def test_autocast_changes_nothing() -> None:
    plain = outputs(random_inputs(), "chunked", 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = outputs(random_inputs(), "chunked", 4)
    for name, value in plain.items():
        assert torch.equal(mixed[name], value), name


def test_nothing_is_differentiated_when_nothing_is_trained() -> None:
    inputs = random_inputs()
    frozen = vocabulary_losses(**inputs)
    assert not frozen.loss.requires_grad
    trained = inputs | {name: inputs[name].requires_grad_() for name in TRAINED}
    with torch.no_grad():
        assert torch.equal(vocabulary_losses(**trained).loss, frozen.loss)
    kept = vocabulary_losses(**trained)
    assert torch.equal(kept.loss, frozen.loss)
    assert [value.requires_grad for value in kept if value is not None] == [True, False, False]


def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    inputs = random_inputs()
    hidden = inputs["hidden"].requires_grad_()
    loss = vocabulary_losses(**inputs).loss
    first, second = (torch.autograd.grad(factor * loss, hidden, retain_graph=True)[0] for factor in (3.0, 3.0))
    assert torch.equal(first, second)


class LargestNewTensor(TorchDispatchMode):
    """The bytes of the largest piece of memory that any operation asks for."""

    def __init__(self, known: Inputs):
        super().__init__()
        self.known = {value.untyped_storage().data_ptr() for value in known.values() if torch.is_tensor(value)}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if torch.is_tensor(value) and value.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, NO_MARKOV | NO_TARGET, {"softcap": 2.0}])
@pytest.mark.parametrize("autocast", [False, True])
def test_neither_all_logits_nor_a_copy_of_the_head_ever_exist(
    dtype: torch.dtype, changes: Inputs, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CONVERTED_ELEMENTS", 1000)
    rows, vocab, size, rank, chunk_rows = 64, 301, 40, 5, 8
    inputs = in_dtype(random_inputs(rows, vocab, size, rank, **changes), dtype, ("head",))
    largest: dict[str, int] = {}
    for implementation in ("chunked", "reference"):
        with LargestNewTensor(inputs) as memory, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs(inputs, implementation, chunk_rows)
        largest[implementation] = memory.bytes
    assert largest["reference"] >= 4 * rows * vocab
    assert largest["chunked"] <= 4 * max(2 * chunk_rows * vocab, rows * size, vocab * rank)
    assert largest["chunked"] < inputs["head"].nbytes


@needs_triton
@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter replaces what is compiled here")
@pytest.mark.parametrize("gradient", ["*fp32", "*bf16"])
@pytest.mark.parametrize(("target", "tv"), [(True, True), (True, False), (False, False)])
def test_the_kernel_compiles_for_a_gpu(
    gradient: str, target: bool, tv: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deepspec.kernels.losses_triton import _losses_of_row

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("logits", "target_logits", "weights", "ce", "l1"), "*fp32")
    types |= {"targets": "*i64", "gradient": gradient, "vocab": "i32", "ce_scale": "fp32", "tv_scale": "fp32"}
    constants = {"HAS_TARGET": target, "HAS_TV": tv, "HAS_GRADIENT": True, "BLOCK": 4096}
    signature = {name: types.get(name, "constexpr") for name in _losses_of_row.arg_names}
    compiled = triton.compile(ASTSource(_losses_of_row, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]


@needs_triton
@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter replaces what is compiled here")
@pytest.mark.parametrize("gradient", ["*fp32", "*bf16"])
def test_the_cap_compiles_for_a_gpu(gradient: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deepspec.kernels.losses_triton import _cap, _multiply_by_slope

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"logits": "*fp32", "gradient": gradient, "cap": "fp32", "elements": "i64"}
    for kernel in (_cap, _multiply_by_slope):
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        compiled = triton.compile(ASTSource(kernel, signature, {"BLOCK": 4096}), target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]


def on_gpu(inputs: Inputs) -> Inputs:
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in inputs.items()}


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in tensors.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["chunked", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("case", FLOAT32 | BF16)
def test_on_a_gpu_without_waiting_for_it(case: str, implementation: str) -> None:
    inputs = (FLOAT32 | BF16)[case]
    gpu_inputs = on_gpu(inputs)
    outputs(gpu_inputs, implementation, 4)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = outputs(gpu_inputs, implementation, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(on_cpu(ours), outputs(in_float32(inputs), "reference"), 1e-5 if case in FLOAT32 else 1e-2)


@pytest.mark.gpu
@needs_triton
def test_on_a_gpu_triton_is_the_default_and_agrees_at_full_size() -> None:
    inputs = on_gpu(random_inputs(1500, 151_936, 64, 16))
    ours = outputs(inputs, None)
    fused, chunked = outputs(inputs, "triton"), outputs(inputs, "chunked")
    for name, value in ours.items():
        assert torch.equal(value, fused[name]), name
    assert_close(on_cpu(ours), on_cpu(chunked), 1e-5)


@pytest.mark.gpu
@needs_triton
def test_more_than_two_to_the_31_logits_in_a_chunk() -> None:
    rows, vocab = 16_500, 131_072
    assert rows * vocab > 2**31
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    inputs = on_gpu(random_inputs(rows, vocab, 8, 4, **NO_MARKOV, **NO_TARGET))
    # Sums of 131,072 in another order stay below this; a row that is read or written in a wrong place would not.
    assert_close(on_cpu(outputs(inputs, "triton", rows)), on_cpu(outputs(inputs, "triton", 512)), 1e-4)
