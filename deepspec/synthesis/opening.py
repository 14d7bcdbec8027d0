"""Where a user's turn begins and ends, for any chat template: found by rendering one and looking around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from deepspec.config import ConfigError
from deepspec.data.templates import ChatTemplate, TemplateError

SENTINEL = "Qzx7sentinel7xzQ"  # stands for the user's text; no template has it


@dataclass(frozen=True)
class Opening:
    """What the target is given so that it writes a user's text, and where that ends."""

    prompt_ids: list[int]
    stop_token_ids: tuple[int, ...]  # the token behind a user's text, if it is a single special one
    stop_strings: tuple[str, ...]  # else the text there

    def text_of(self, raw: str, ends: tuple[str, ...]) -> str:
        """The user's text of what was written. Args: `ends` texts of the tokens that end it."""
        places = [raw.find(end) for end in (*self.stop_strings, *ends) if end and end in raw]
        return raw[: min(places, default=len(raw))].strip()


def find_opening(
    tokenizer: PreTrainedTokenizerBase, template_options: Mapping[str, Any], system_prompt: str | None = None
) -> Opening:
    """The opening of the first user's turn, behind a system prompt if one is given.

    Raises:
        ConfigError: the template cannot render it, or changes the user's text.
    """
    template = ChatTemplate(tokenizer, template_options, system_prompt)
    turns = template.with_system_prompt([{"role": "user", "content": SENTINEL}])
    try:
        rendered = template.text(template.readable(turns, None), None, is_prompt=True)
    except TemplateError as error:
        what = "" if system_prompt is None else " with a system prompt; leave system_prompts and topics out"
        raise ConfigError(f"no opening of a user's turn{what}: {error}") from error
    before, found, behind = rendered.partition(SENTINEL)
    if not found or SENTINEL in behind:
        raise ConfigError(
            "the chat template does not show a user's text once and as it is, so its opening cannot be found; give "
            "another one with chat_template=FILE.jinja"
        )
    # A tokenizer joins a space with the word behind it, so the target writes that space itself.
    prompt_ids = tokenizer(before.rstrip(" "), add_special_tokens=False)["input_ids"]
    if not prompt_ids:
        raise ConfigError("the chat template puts nothing before a user's text: nothing tells the target to write one")
    token = _special_at_start(tokenizer, behind.lstrip())
    if token is not None:
        return Opening(list(prompt_ids), (token,), ())
    return Opening(list(prompt_ids), (), (behind.rstrip(),) if behind.strip() else ())


def _special_at_start(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    matches = [(len(content), id) for id, content in special.items() if content and text.startswith(content)]
    return max(matches)[1] if matches else None
