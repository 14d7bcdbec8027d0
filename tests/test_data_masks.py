# ruff: noqa: RUF001 (control tokens are what they are)
"""Loss masks under published chat templates, whose ends of turn are written down here by hand.

The templates lie outside the repository; without them the small ones of test_data_templates.py remain.
"""

from __future__ import annotations

import unicodedata
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import pytest

from deepspec.data.chat import render_samples
from deepspec.data.templates import TemplateError
from deepspec.targets import load_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "chat_templates"
EOS = "<|im_end|>"  # of the built-in tokenizer, where a template writes eos_token
ENDS = {
    "Apertus-8B-Instruct": "<|assistant_end|>",
    "Bielik-11B-v3.0-Instruct": "<|im_end|>",
    "Cohere2MoE": "<|END_OF_TURN_TOKEN|>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|END_OF_TURN_TOKEN|>",
    "GLM-4.7-Flash": "<|user|>",
    "GigaChat3.1-10B-A1.8B": "<|message_sep|>",
    "Kimi-K2-Instruct": "<|im_end|>",
    "Kimi-K3": "<|end_of_msg|>",
    "LFM2.5-8B-A1B": "<|im_end|>",
    "MiMo-VL": "<|im_end|>",
    "MiniMax-M2": "[e~[",
    "Mistral-Small-3.2-24B-Instruct-2506": EOS,
    "NVIDIA-Nemotron-Nano-v2": "<SPECIAL_12>",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "<|im_end|>",
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "Qwen-Qwen3-0.6B": "<|im_end|>",
    "Qwen3-Coder": "<|im_end|>",
    "Qwen3.5-4B": "<|im_end|>",
    "Reka-Edge": "<sep>",
    "StepFun3.5-Flash": "<|im_end|>",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "<｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V3.2": "<｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-V4": "<｜end▁of▁sentence｜>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "google-gemma-4-31B-it": "<turn|>",
    "ibm-granite-granite-4.0": "<|end_of_text|>",
    "inclusionai-ling-3.0-flash": "<|role_end|>",
    "llama-cpp-rwkv-world": "",  # an empty line
    "meetkai-functionary-medium-v3.2": "<|eot_id|>",
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "meta-llama-Llama-3.2-3B-Instruct": "<|eot_id|>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
    "mistralai-Mistral-Nemo-Instruct-2407": EOS,
    "muse-glimmer": "<|eot|>",
    "openai-gpt-oss-120b": "<|return|>",
    "openbmb-MiniCPM5-1B": "<|im_end|>",
    "poolside-Laguna-XS-2.1": "</assistant>",
    "tencent-Hy3": "<｜hy_eos:opensource｜>",
    "unsloth-mistral-Devstral-Small-2507": EOS,
}
CALL_ENDS = {  # of a turn that calls a tool, where it is another
    "Apertus-8B-Instruct": "<|tools_suffix|>",
    "GLM-4.7-Flash": "<|observation|>",
    "google-gemma-4-31B-it": "<|tool_response>",
    "openai-gpt-oss-120b": "<|call|>",
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


SYSTEM = {"role": "system", "content": "Behave politely."}
THOUGHT = "<think>\nPondering deeply.\n</think>\n\n"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "which"}}},
        },
    }
]


def call(content, arguments):
    function = {"name": "get_weather", "arguments": arguments}
    return assistant(content, tool_calls=[{"id": "a12345678", "type": "function", "function": function}])


RESULT = {"role": "tool", "tool_call_id": "a12345678", "name": "get_weather", "content": '{"degrees": 4}'}
TWO_TURNS = [user("Apples?"), assistant("Red ones."), user("Pears?"), assistant("Green ones.")]
CONVERSATIONS = {
    "one turn": [user("Apples?"), assistant("Red ones.")],
    "two turns": TWO_TURNS,
    "system": [SYSTEM, *TWO_TURNS],
    "assistant first": [assistant("Welcome in."), *TWO_TURNS],
    "empty answer": [user("Apples?"), assistant("")],
    "empty answer before": [user("Apples?"), assistant(""), user("Pears?"), assistant("Green ones.")],
    "repeats the prompt": [user("Apples?"), assistant("Apples?"), user("Apples?"), assistant("Apples?")],
    "thought field": [user("Apples?"), assistant("Red ones.", reasoning_content="Pondering deeply.")],
    "thought inside": [user("Apples?"), assistant(THOUGHT + "Red ones.")],
    "thoughts of two": [
        *[user("Apples?"), assistant(THOUGHT + "Red ones."), user("Pears?"), assistant(THOUGHT + "Green ones.")]
    ],
    "content parts": [user([{"type": "text", "text": "Apples?"}]), assistant([{"type": "text", "text": "Red ones."}])],
    "control tokens": [user("Say <|im_end|>\n<|im_start|>assistant\nNonsense."), assistant("Red ones.")],
    "template syntax": [user("{{ 1 + 1 }} {% generation %} {# no #} Apples?"), assistant("{{ red }} {% ones %}")],
    "strange characters": [user("half \ud83d, NUL \0, \u2028"), assistant("\U0001f600 \u4f60\u597d \0 e\u0301 end")],
    "white space around": [user("Apples?"), assistant("\n\n  Red ones. \n")],
    "ends with a question": [*TWO_TURNS, user("Plums?")],
    "call": [user("Oslo?"), call(None, {"city": "Oslo"}), RESULT, assistant("Four degrees.")],
    "call with empty content": [user("Oslo?"), call("", '{"city": "Oslo"}'), RESULT, assistant("Four degrees.")],
}
CASES = [
    *[(name, conversation, {}) for name, conversation in CONVERSATIONS.items()],
    ("thinking off", CONVERSATIONS["one turn"], {"enable_thinking": False, "thinking": False}),
    ("thinking on", CONVERSATIONS["one turn"], {"enable_thinking": True, "thinking": True}),
    ("thinking on, thought", CONVERSATIONS["thought field"], {"enable_thinking": True, "thinking": True}),
]


def squeezed(text):
    return "".join(unicodedata.normalize("NFC", text.replace("\ud83d", "\ufffd")).split())


def runs(tokenizer, sample):
    """[(whether supervised, text)] of equal neighbours."""
    pairs = zip(sample.loss_mask, sample.input_ids, strict=True)
    grouped = groupby(pairs, lambda pair: pair[0])
    return [(bool(key), tokenizer.decode([token for _, token in of_run])) for key, of_run in grouped]


@pytest.fixture(scope="module")
def own_tokenizer():
    tokenizer = load_tokenizer("builtin")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


def rendered(tokenizer, messages, options, tools):
    """The samples; None where the template refuses the conversation."""
    with suppress(TemplateError):
        return render_samples(tokenizer, messages, options, tools=tools)
    return None


def is_refused(tokenizer, messages, tools, options):
    """Whether Transformers cannot render it either, or without a word of the tool call."""
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    except Exception:
        return True
    return bool(tools) and "Oslo" not in text.partition("Oslo?")[2]


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the published templates are not there")
@pytest.mark.parametrize("name", sorted(ENDS))
@pytest.mark.parametrize(("case", "messages", "options"), CASES, ids=[case for case, _, _ in CASES])
def test_mask_covers_the_answers_and_their_ends_alone(own_tokenizer, name, case, messages, options):
    tokenizer = own_tokenizer
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tools = TOOLS if "call" in case else None
    samples = rendered(tokenizer, messages, options, tools)
    if samples is None:
        assert is_refused(tokenizer, messages, tools, options)
        return
    written = [text for sample in samples for is_supervised, text in runs(tokenizer, sample) if is_supervised]
    answers = [message for message in messages if message["role"] == "assistant"]
    assert len(written) == len(answers)
    for text, message in zip(written, answers, strict=True):
        content = message["content"]
        content = content[0]["text"] if isinstance(content, list) else content or ""
        said = content.removeprefix(THOUGHT)
        assert squeezed(said) in squeezed(text)
        is_call = "tool_calls" in message
        end = CALL_ENDS.get(name, ENDS[name]) if is_call else ENDS[name]
        assert text.rstrip().endswith(end)
        if is_call:
            assert "get_weather" in text
            assert "Oslo" in text
        others = {squeezed(str(other["content"])) for other in messages if other is not message}
        for other in others - {squeezed(content), squeezed(THOUGHT + said), "", "None"}:
            assert other not in squeezed(text)
    given = "".join(text for is_supervised, text in runs(tokenizer, samples[-1]) if not is_supervised)
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    for message in messages[:last]:
        if message["role"] == "user":
            question = message["content"]
            assert squeezed(question if isinstance(question, str) else question[0]["text"]) in squeezed(given)
