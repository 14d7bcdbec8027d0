"""Capture the outputs of chosen decoder layers with hooks, so that no other layer's hidden states are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

EMBEDDING_OUTPUT = -1


@contextmanager
def capture_layers(layers: nn.ModuleList, layer_ids: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Within the block, a forward pass fills the yielded dict: layer id -> hidden states [batch, tokens, hidden].

    Layer id -1 is the embedding output, that is the input of layer 0; id i >= 0 is the raw output of decoder layer i.
    """
    captured: dict[int, torch.Tensor] = {}

    def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        captured[EMBEDDING_OUTPUT] = args[0] if args else kwargs["hidden_states"]

    def keep_output(layer_id: int):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            captured[layer_id] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
        if layer_id == EMBEDDING_OUTPUT
        else layers[layer_id].register_forward_hook(keep_output(layer_id))
        for layer_id in layer_ids
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
