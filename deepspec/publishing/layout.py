"""Which tensors a draft has in DeepSpec's own layout, with their shapes, from its config.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deepspec.drafts.configuration import GEMMA4
from deepspec.drafts.engines import DraftKind
from deepspec.drafts.families import FAMILIES
from deepspec.publishing.errors import WRONG_FIELDS, DamagedDraftError, wrong_field
from deepspec.publishing.weights import AnyTensor
from deepspec.text import some

Shapes = dict[str, tuple[int, ...]]
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
DRAFT_TO_TARGET, TARGET_TO_DRAFT = "d2t", "t2d"
CODES = {DRAFT_TO_TARGET: "I64", TARGET_TO_DRAFT: "BOOL"}


def expected_shapes(config: Mapping[str, Any], kind: DraftKind) -> Shapes:
    """Names and shapes of the tensors that a draft of this config has, embedding and head among them.

    Args:
        kind: of the same config.

    Raises:
        DamagedDraftError: a field is missing or of a wrong type.
    """
    try:
        return dict(_shapes(config, kind))
    except WRONG_FIELDS as error:
        raise DamagedDraftError(f"config.json: {wrong_field(error)}") from error


def _shapes(config: Mapping[str, Any], kind: DraftKind) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, features = config["hidden_size"], len(kind.target_layer_ids)
    yield EMBEDDING, (kind.vocab_size, hidden)
    yield HEAD, (kind.head_rows, hidden)
    if kind.is_pruned:
        yield DRAFT_TO_TARGET, (kind.head_rows,)
        yield TARGET_TO_DRAFT, (kind.vocab_size,)
    yield "fc.weight", (hidden, features * hidden)
    yield "norm.weight", (hidden,)
    if kind.algorithm != "eagle3":
        yield "hidden_norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        yield from _layer_shapes(config, kind, layer)
    yield from _head_shapes(kind, hidden)


def _layer_shapes(config: Mapping[str, Any], kind: DraftKind, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    if kind.architecture == GEMMA4:  # its draft layers are full ones, whose sizes a config may keep apart
        head_dim = config.get("global_head_dim") or head_dim
        kv_heads = (kind.shares_keys_and_values and config.get("num_global_key_value_heads")) or kv_heads
    is_first_of_eagle = kind.algorithm == "eagle3" and layer == 0
    inputs = 2 * hidden if is_first_of_eagle else hidden
    prefix = f"layers.{layer}"
    yield f"{prefix}.self_attn.q_proj.weight", (heads * head_dim, inputs)
    yield f"{prefix}.self_attn.k_proj.weight", (kv_heads * head_dim, inputs)
    if not (kind.architecture == GEMMA4 and kind.shares_keys_and_values):
        yield f"{prefix}.self_attn.v_proj.weight", (kv_heads * head_dim, inputs)
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, heads * head_dim)
    if FAMILIES[config["model_type"]].query_key_norm:
        yield f"{prefix}.self_attn.q_norm.weight", (head_dim,)
        yield f"{prefix}.self_attn.k_norm.weight", (head_dim,)
    yield f"{prefix}.mlp.gate_proj.weight", (width, hidden)
    yield f"{prefix}.mlp.up_proj.weight", (width, hidden)
    yield f"{prefix}.mlp.down_proj.weight", (hidden, width)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if is_first_of_eagle:
        norms.append("hidden_norm")
    if kind.architecture == GEMMA4:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        yield f"{prefix}.layer_scalar", (1,)
    for norm in norms:
        yield f"{prefix}.{norm}.weight", (hidden,)


def _head_shapes(kind: DraftKind, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of the sequential head and the confidence head."""
    rank = kind.markov_rank
    if rank:
        yield "markov_head.markov_w1.weight", (kind.vocab_size, rank)
        yield "markov_head.markov_w2.weight", (kind.head_rows, rank)
    if rank and kind.markov_head_type == "gated":
        yield "markov_head.gate_proj.weight", (rank, hidden + rank)
        yield "markov_head.gate_proj.bias", (rank,)
    if rank and kind.markov_head_type == "rnn":
        yield "markov_head.joint_proj.weight", (3 * rank, 2 * rank + hidden)
        yield "markov_head.joint_proj.bias", (3 * rank,)
    if kind.confidence_head:
        yield "confidence_head.proj.weight", (1, hidden + (rank if kind.confidence_head_with_markov else 0))
        yield "confidence_head.proj.bias", (1,)


def tensor_problems(
    tensors: Mapping[str, AnyTensor], expected: Mapping[str, tuple[int, ...]], optional: frozenset[str] = frozenset()
) -> list[str]:
    """In what stored tensors differ from the expected ones, a line each; empty if in nothing.

    Args:
        optional: names that may be missing.
    """
    problems = []
    if missing := sorted(expected.keys() - tensors.keys() - optional):
        problems.append(f"tensors missing for its config.json: {some(missing)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        problems.append(f"tensors that its config.json does not know: {some(unknown)}")
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        problems.append(f"shapes do not fit its config.json: {some(wrong)}")
    for name, code in CODES.items():
        if name in tensors and tensors[name].dtype != code:
            problems.append(f"{name} is stored as {tensors[name].dtype}, readers want {code}")
    return problems
