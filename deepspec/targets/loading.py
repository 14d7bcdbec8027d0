"""Load and freeze a target: plain, quantised or from a GGUF file, on one device or several."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from deepspec.config import ConfigError
from deepspec.targets.adapters import TargetAdapter, adapter_for
from deepspec.targets.probe import probe_family
from deepspec.targets.quantised import explain_failure, make_ends_plain, quantisation_method
from deepspec.targets.source import (
    dtype_name,
    first_line,
    model_class,
    read_config,
    resolve_dtype,
    resolve_path,
    shown_name,
)
from deepspec.targets.target import Target
from deepspec.targets.weights import open_weights
from deepspec.text import some

logger = logging.getLogger(__name__)

GIBIBYTE = 2**30


def load_target(
    path: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    device_map: str | Mapping[str, Any] | None = None,
) -> Target:
    """Load and freeze a target.

    Args:
        path: `builtin`, a folder, or a Hub id.
        gguf_file: the GGUF file there that holds the model; dequantised while it is loaded.
        dtype: computing dtype; "auto" = the checkpoint's own, see `resolve_dtype`.
        device: where the whole target lies.
        device_map: instead, how accelerate spreads its layers over the GPUs: auto, balanced, ... or a mapping.

    Raises:
        FileNotFoundError: no such model, or a weight file is missing.
        ConfigError: what lies there is no causal language model that can be loaded, or one of an unknown family that
            the probe refuses, see `probe_family`; with what to do.
    """
    if isinstance(dtype, str):
        dtype = resolve_dtype(dtype, path, revision=revision, gguf_file=gguf_file)
    config = read_config(path, revision, gguf_file)
    adapter = adapter_for(config)
    weights = open_weights(path, revision, gguf_file)  # refuses what is damaged before anything large is read
    placement = device_map if device_map is not None else {"": device}
    model = _load_model(path, config, adapter, revision, gguf_file, dtype, placement)
    _check_placement(model, device_map)
    _prepare_quantised(path, model, adapter, dtype)
    target = Target(model, shown_name(path, gguf_file), revision, fingerprint=weights.fingerprint)
    probe_family(target)
    return target


def _load_model(
    path: str,
    config: PreTrainedConfig,
    adapter: type[TargetAdapter],
    revision: str | None,
    gguf_file: str | None,
    dtype: torch.dtype,
    device_map: Any,
) -> PreTrainedModel:
    """Raises ConfigError where weights do not fit the config, or cannot be loaded on this machine."""
    named = {} if gguf_file is None else {"gguf_file": gguf_file}
    loader: Any = model_class(config, path)
    try:
        model, report = loader.from_pretrained(
            resolve_path(path, gguf_file),
            config=config,
            revision=revision,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that they are reported like those that are missing
            output_loading_info=True,
            **named,
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"target.path={path}: does not fit in the memory of the device ({first_line(error)}); take a smaller "
            "target.dtype, target.device_map=auto over several GPUs, or features.source=served"
        ) from error
    except Exception as error:  # quantisers and readers of other formats raise what they like
        if (method := quantisation_method(config)) is not None:
            raise explain_failure(path, method, error) from error
        raise ConfigError(
            f"target.path={shown_name(path, gguf_file)}: Transformers cannot load it: {first_line(error)}"
        ) from error
    _check_report(path, model, adapter, report)
    return model


def _check_report(path: str, model: PreTrainedModel, adapter: type[TargetAdapter], report: Mapping[str, Any]) -> None:
    """Transformers gives missing weights random values and drops unknown ones, with a warning at most."""
    mismatched = [
        f"{name} is {list(found)}, expected {list(wanted)}" for name, found, wanted in report["mismatched_keys"]
    ]
    problems = {
        "weights missing": sorted(report["missing_keys"]),
        "weights of another shape": sorted(mismatched),
    }
    layers = adapter.layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    unknown = sorted(report["unexpected_keys"])
    inside = tuple(f"{prefix}.{number}." for number in range(len(layers)))
    problems["weights in its layers that the config does not know"] = [n for n in unknown if n.startswith(inside)]
    for what, names in problems.items():
        if names:
            raise ConfigError(
                f"target.path={path}: {what}: {some(names, 3)}; its config.json and weight files do not belong "
                "together, copy or download them again (adapters are merged into the model first)"
            )
    if unknown:
        logger.warning("target.path=%s: weights that the model does not use: %s", path, some(unknown, 3))


def _check_placement(model: PreTrainedModel, device_map: Any) -> None:
    """Refuse layers that accelerate put aside: each would be copied to the GPU again in every pass."""
    aside = sorted(name for name, weight in model.named_parameters() if weight.is_meta)
    if aside:
        raise ConfigError(
            f"target.device_map={device_map}: the GPUs cannot hold the target, {len(aside)} weights are left outside "
            f"({aside[0]}, ...); give more GPUs, a smaller target.dtype or a quantised target, or serve it elsewhere "
            "with features.source=served"
        )


def _prepare_quantised(path: str, model: PreTrainedModel, adapter: type[TargetAdapter], dtype: torch.dtype) -> None:
    """Make embedding and head plain, and compute one token: kernels that are missing show only now.

    Raises:
        ConfigError: a quantised model that cannot compute on this machine.
    """
    method = quantisation_method(model.config)
    if method is None:
        return
    try:
        make_ends_plain(model, adapter, dtype)
        embedding = adapter.embedding(model).weight
        with torch.no_grad():
            adapter.decoder(model.eval())(input_ids=torch.zeros(1, 1, dtype=torch.long, device=embedding.device))
    except Exception as error:  # kernels raise what they like
        raise explain_failure(path, method, error) from error


def describe_target(target: Target) -> str:
    """Parameters, dtype, memory and devices of a loaded target, in a line."""
    model = target.model
    devices = dict.fromkeys(str(weight.device) for weight in model.parameters())
    method = quantisation_method(model.config)
    quantised = f", quantised with {method}" if method not in (None, "gguf") else ""
    return (
        f"target {target.name_or_path}: {in_millions(model.num_parameters())} parameters, {dtype_name(target.dtype)}"
        f"{quantised}, {model.get_memory_footprint() / GIBIBYTE:.2f} GiB, {', '.join(devices)}"
    )


def in_millions(count: int) -> str:
    """134515008 -> 134.5 M"""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
