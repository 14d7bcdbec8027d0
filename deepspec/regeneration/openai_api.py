"""What is asked of servers with the OpenAI API, as vLLM and SGLang understand it, and what they answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from deepspec.regeneration.answers import shown
from deepspec.regeneration.text import all_text, text_behind
from deepspec.regeneration.writer import Answer, Question, Sampling

COMPLETIONS, CHAT, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"
ENDINGS = {"stop": "stop", "tool_calls": "stop", "length": "length"}
SEEDS = 2**31  # what every server takes


class BadAnswer(Exception):
    """An answer that is none."""


def completion_body(question: Question, sampling: Sampling, model: str, max_tokens: int) -> dict[str, Any]:
    """Of a request for the exact text behind a prompt of token ids, control tokens and the end of the turn included."""
    body = _sampling_body(question, sampling, model, max_tokens) | {
        "prompt": question.prompt_ids,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
        "no_stop_trim": True,  # SGLang's word for the same
        "return_token_ids": True,
        "stop_token_ids": list(question.stop_token_ids),
    }
    return body | ({"stop": list(question.stop_strings)} if question.stop_strings else {})


def chat_body(
    question: Question, sampling: Sampling, model: str, max_tokens: int, template_options: dict[str, Any]
) -> dict[str, Any]:
    """Of a request in which the server renders the turns itself."""
    messages = [shown(message) for message in question.messages or ()]
    body = _sampling_body(question, sampling, model, max_tokens) | {"messages": messages}
    if template_options:
        body["chat_template_kwargs"] = template_options
    if question.tools:
        body["tools"] = [dict(tool) for tool in question.tools]
    return body


def _sampling_body(question: Question, sampling: Sampling, model: str, max_tokens: int) -> dict[str, Any]:
    """Every setting is written out: a server would take what it leaves open from the model's generation config."""
    return {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "seed": question.seed % SEEDS,
    }


def read_completion(content: bytes, question: Question, tokenizer: PreTrainedTokenizerBase) -> Answer:
    """Raises BadAnswer."""
    choice, used = _choice(content)
    text, ids = choice.get("text"), _ids(choice.get("token_ids"))
    if not isinstance(text, str):
        raise BadAnswer("a choice without a text")
    if ids:
        text, used = text_behind(tokenizer, question.prompt_ids, ids), len(ids)
    reason = ENDINGS[choice["finish_reason"]]
    if not text and not used:
        raise BadAnswer("an empty text")
    if reason == "stop" and not question.stop_strings:
        text = _with_end(text, choice, question, tokenizer)
    return Answer(text, used, reason)


def _ids(value: Any) -> list[int]:
    """Token ids, where a server tells them."""
    return value if isinstance(value, list) and all(isinstance(each, int) for each in value) else []


def _with_end(text: str, choice: dict[str, Any], question: Question, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with the token that ended it, also where the server has cut it off."""
    if any(text.endswith(all_text(tokenizer, [token])) for token in question.stop_token_ids):
        return text
    named = choice.get("stop_reason", choice.get("matched_stop"))
    token = named if named in question.stop_token_ids else tokenizer.eos_token_id
    return text + all_text(tokenizer, [token if token in question.stop_token_ids else question.stop_token_ids[0]])


def read_chat(content: bytes) -> Answer:
    """Raises BadAnswer."""
    choice, tokens = _choice(content)
    message = choice.get("message")
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | None):
        raise BadAnswer("a choice without a message")
    said = {key: message[key] for key in ("reasoning_content", "tool_calls") if message.get(key)}
    if "reasoning_content" not in said and message.get("reasoning"):
        said["reasoning_content"] = message["reasoning"]
    if not said and not message.get("content"):
        raise BadAnswer("an empty message")
    return Answer(None, tokens, ENDINGS[choice["finish_reason"]], {"content": message.get("content") or "", **said})


def _choice(content: bytes) -> tuple[dict[str, Any], int]:
    """The only choice, and how many tokens it has."""
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
        if choice["finish_reason"] not in ENDINGS:
            raise BadAnswer(f"finish_reason {choice['finish_reason']!r:.40}")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadAnswer(f"not an answer of this API: {content[:80]!r}") from error
    return choice, tokens


def read_models(content: bytes) -> list[tuple[str, int | None]]:
    """Name and positions of the models that a server has, adapters of others left out. Raises BadAnswer."""
    try:
        models = [model for model in json.loads(content)["data"] if not model.get("parent")]
        return [(str(model["id"]), model.get("max_model_len")) for model in models]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadAnswer(f"no list of models: {content[:80]!r}") from error


def error_message(content: bytes) -> str:
    """What a server says about a request that failed, in one line."""
    text = content[:2000].decode(errors="replace").strip()
    try:
        error = json.loads(text)
        for key in ("error", "message", "detail"):
            if isinstance(error, dict) and key in error:
                error = error[key]
        text = error if isinstance(error, str) else json.dumps(error)
    except ValueError:
        pass
    return " ".join(text.split())[:300]


def names_of(models: Sequence[tuple[str, int | None]]) -> list[str]:
    return [name for name, _ in models]
