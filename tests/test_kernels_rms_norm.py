"""The fused norm against that of Transformers."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from decoding_world import random_target
from kernels_driver import Case, in_a_process
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from deepspec.kernels.rms_norm import fuse_norms, rms_norm

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
BF16, FLOAT32 = torch.bfloat16, torch.float32
SIZES = {"one row": (1, 8), "odd": (3, 37), "heads": (2, 5, 4, 16), "wide": (2, 2560), "no rows": (0, 16)}
DTYPES = {"float32": (FLOAT32, FLOAT32), "bf16": (BF16, BF16), "float32 weight": (BF16, FLOAT32)}
CASES = {f"{size}, {dtype}": (SIZES[size], *DTYPES[dtype]) for size in SIZES for dtype in DTYPES}


def inputs(name: str) -> dict[str, Tensor | float]:
    shape, dtype, weight_dtype = CASES[name]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(shape, generator=generator), 1 + torch.randn(shape[-1], generator=generator)
    return {"hidden": hidden.to(dtype), "weight": weight.to(weight_dtype), "epsilon": 1e-3}


def expected(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    norm = Qwen3RMSNorm(len(weight), epsilon)
    norm.weight = torch.nn.Parameter(weight)
    return norm(hidden).detach()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, ...]]:
    cases: dict[str, Case] = {name: ("norm", inputs(name)) for name in CASES}
    return in_a_process("interpret", cases, tmp_path_factory.mktemp("rms_norm"))


@pytest.mark.parametrize("name", CASES)
def test_the_plain_one_is_that_of_transformers(name: str) -> None:
    assert torch.equal(rms_norm(**inputs(name), implementation="plain"), expected(**inputs(name)))


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_agrees(name: str, interpreted: dict[str, tuple[Tensor, ...]]) -> None:
    (ours,), right = interpreted[name], expected(**inputs(name))
    exact = name.endswith(", float32")  # the interpreter cuts bf16 off where a GPU rounds, and here twice
    torch.testing.assert_close(ours, right, rtol=1e-5 if exact else 2**-6, atol=1e-6)


@needs_triton
def test_the_kernel_compiles_for_a_gpu(tmp_path) -> None:
    cases: dict[str, Case] = {name: ("norm", inputs(name)) for name in ("heads, bf16", "wide, bf16", "wide, float32")}
    assert in_a_process("compile", cases, tmp_path) == [("_norm_rows", (1, 1, 1))] + [("_norm_rows", (2, 1, 1))] * 2


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("shape", [(8, 2560), (1, 300, 32, 128), (3, 16384)])
@pytest.mark.parametrize("dtype", [BF16, FLOAT32])
def test_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator).to("cuda", dtype)
    weight = torch.randn(shape[-1], generator=generator).to("cuda", dtype)
    ours, right = rms_norm(hidden, weight, 1e-6), rms_norm(hidden, weight, 1e-6, "plain")
    torch.testing.assert_close(ours, right, rtol=2**-7 if dtype == BF16 else 1e-5, atol=1e-6)
    if dtype == BF16:  # the order of the sum turns the rounding of few values
        assert (ours != right).float().mean() < 0.02


def test_norms_are_found_by_what_they_compute() -> None:
    fused = {}
    for family in ("qwen3", "gemma4"):
        model = random_target(family).model
        fuse_norms(model)
        norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
        fused[family] = ["forward" in vars(norm) for norm in norms]
    assert fused["qwen3"]
    assert all(fused["qwen3"])
    assert fused["gemma4"]
    assert not any(fused["gemma4"])


def test_where_a_gradient_is_wanted_the_norm_is_its_own() -> None:
    norm = Qwen3RMSNorm(6)
    fuse_norms(norm)
    hidden = torch.randn(2, 6, requires_grad=True)
    norm(hidden).sum().backward()
    assert hidden.grad is not None
    assert norm.weight.grad is not None
    with torch.no_grad():
        assert torch.equal(norm(hidden), expected(hidden, norm.weight, 1e-6))
