"""Which tensors a draft has in DeepSpec's own layout, with their shapes, from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspec.drafts.base import LENT
from deepspec.drafts.building import expected_shapes, shape_problems
from deepspec.drafts.engines import config_of_fields
from deepspec.publishing.errors import WRONG_FIELDS, DamagedDraftError, wrong_field
from deepspec.publishing.weights import AnyTensor

Shapes = dict[str, tuple[int, ...]]
EMBEDDING, HEAD = LENT
DRAFT_TO_TARGET, TARGET_TO_DRAFT = "d2t", "t2d"
CODES = {DRAFT_TO_TARGET: "I64", TARGET_TO_DRAFT: "BOOL"}


def shapes_of_fields(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the tensors that a draft of this config.json has, embedding and head among them.

    Raises:
        DamagedDraftError: a field is missing or of a wrong type.
    """
    try:
        return expected_shapes(config_of_fields(config))
    except (*WRONG_FIELDS, RuntimeError, ArithmeticError) as error:  # the latter two of sizes that no tensor has
        raise DamagedDraftError(f"config.json: {wrong_field(error)}") from error


def tensor_problems(
    tensors: Mapping[str, AnyTensor], expected: Shapes, optional: frozenset[str] = frozenset()
) -> list[str]:
    """`shape_problems`, and mappings of a pruned vocabulary in a number format that readers refuse."""
    problems = shape_problems({name: tensor.shape for name, tensor in tensors.items()}, expected, optional)
    for name, code in CODES.items():
        if name in tensors and tensors[name].dtype != code:
            problems.append(f"{name} is stored as {tensors[name].dtype}, readers want {code}")
    return problems
