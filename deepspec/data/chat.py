"""Chat conversations to token ids and loss mask. The one rendering function of the project.

Training, regeneration and evaluation all render here, so a system prompt or a template switch can never be present in
one of them and absent in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Rendered:
    """Token ids of one conversation and, for each, whether it was written by the assistant (1) or given (0)."""

    input_ids: list[int]
    loss_mask: list[int]


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template_options: Mapping[str, Any] | None = None
) -> Rendered:
    """Render a whole conversation for training.

    The loss mask comes from the template's `{% generation %}` markers. It covers the assistant's text and its
    end-of-turn token, since the draft has to predict where a turn ends.

    Raises:
        ValueError: the template has no generation markers, or the conversation has no assistant turn.
    """
    if not any(message.get("role") == "assistant" for message in messages):
        roles = [message.get("role") for message in messages]
        raise ValueError(
            f"the conversation has no assistant turn to learn from (roles: {roles}); add one or drop the row"
        )
    if "{% generation %}" not in (tokenizer.chat_template or "").replace("{%-", "{%").replace("-%}", "%}"):
        raise ValueError(
            "the tokenizer's chat template has no {% generation %} ... {% endgeneration %} markers, so assistant "
            "tokens cannot be told from the prompt; give one that has them with data.chat_template=FILE.jinja"
        )
    encoded = _apply_template(tokenizer, messages, template_options, return_assistant_tokens_mask=True)
    return Rendered(encoded["input_ids"], encoded["assistant_masks"])


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_options: Mapping[str, Any] | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    system_prompt: str | None = None,
) -> list[int]:
    """Render the turns so far, followed by the opening of the assistant's next turn. Returns token ids.

    Args:
        tools: functions that the assistant may call.
        system_prompt: goes first where the messages have no system message.
    """
    if system_prompt is not None and not any(message.get("role") == "system" for message in messages):
        messages = [{"role": "system", "content": system_prompt}, *messages]
    options = {**(template_options or {}), **({"tools": list(tools)} if tools else {})}
    return _apply_template(tokenizer, messages, options, add_generation_prompt=True)["input_ids"]


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_options: Mapping[str, Any] | None,
    **switches: bool,
) -> dict[str, list[int]]:
    options = {**switches, **(template_options or {})}
    encoded: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=True, return_dict=True, **options
    )
    return {name: list(values) for name, values in encoded.items()}
