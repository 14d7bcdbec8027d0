"""Targets whose weights are quantised: what loading them needs, and plain copies of their embedding and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepspec.config import ConfigError
from deepspec.targets.adapters import TargetAdapter
from deepspec.targets.source import first_line

CHUNK = 1024  # rows of a table that are dequantised at once
# What to install for the methods of config.json, quantization_config, quant_method.
PACKAGES = {
    "aqlm": "aqlm",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "fbgemm_fp8": "fbgemm-gpu",
    "fp_quant": "fp_quant",
    "gptq": "optimum gptqmodel",
    "higgs": "flute-kernel",
    "hqq": "hqq",
    "mxfp4": "kernels",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "spqr": "spqr_quant",
    "torchao": "torchao",
    "vptq": "vptq",
}


def quantisation_method(config: Any) -> str | None:
    """The `quant_method` of a model's config; None = not quantised."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def explain_failure(path: str, method: str, error: Exception) -> ConfigError:
    """An error of loading a quantised target: the package or the device that is missing."""
    package = PACKAGES.get(method)
    reason = first_line(error)
    if isinstance(error, ImportError) and package is not None:
        return ConfigError(
            f"target.path={path}: its weights are quantised with {method}, which needs a package: "
            f"pip install {package} ({reason})"
        )
    if not str(error):
        reason += "; do the files hold the quantised weights that its config.json announces?"
    gpu = "; it may need a GPU, and none is here" if not torch.cuda.is_available() else ""
    return ConfigError(
        f"target.path={path}: its weights are quantised with {method}, and Transformers cannot load them here: "
        f"{reason}{gpu}"
    )


def make_ends_plain(model: PreTrainedModel, adapter: type[TargetAdapter], dtype: torch.dtype) -> None:
    """Put plain copies in place of a quantised embedding or head; a draft is built from them. Layers stay quantised."""
    embedding, head = adapter.embedding(model), adapter.head(model)
    if not _is_plain(embedding):
        table = embedding_table(embedding).to(dtype)
        model.set_input_embeddings(nn.Embedding.from_pretrained(table))
    if not _is_plain(head):
        weight, bias = linear_weights(head, model.config.get_text_config().hidden_size, dtype)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias, requires_grad=False)
        model.set_output_embeddings(plain)


def _is_plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize > 1


@torch.no_grad()
def embedding_table(module: Any) -> Tensor:
    """[vocab, hidden] of a quantised embedding: what it gives for every id."""
    weight = getattr(module, "weight", None)
    if hasattr(weight, "dequantize") and not isinstance(weight, nn.Parameter | None):
        return weight.dequantize()
    ids = torch.arange(module.num_embeddings, device=next(module.parameters()).device)
    return torch.cat([module(chunk) for chunk in ids.split(CHUNK)])


@torch.no_grad()
def linear_weights(module: nn.Module, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight [out, size] and bias [out] of a quantised linear layer: what it makes of unit vectors and of zero.

    Every quantiser has its own storage, but all of them compute; a unit vector is exact in any number format.
    """
    device = next(iter([*module.parameters(), *module.buffers()])).device
    bias = module(torch.zeros(1, size, dtype=dtype, device=device))[0]
    rows = torch.eye(size, dtype=dtype, device=device).split(CHUNK)
    weight = torch.cat([module(chunk) - bias for chunk in rows]).T.contiguous()
    return weight, bias if bias.any() else None
