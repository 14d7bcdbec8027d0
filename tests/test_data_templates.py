"""Loss masks under small templates of every kind, and what cannot be told apart."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepspec.config import ConfigError
from deepspec.data.chat import render_prompt, render_samples, tokenize
from deepspec.data.samples import write_samples
from deepspec.data.templates import ChatTemplate, TemplateError
from deepspec.targets import load_tokenizer


def loop(body, opening="<|im_start|>assistant\n"):
    return "{% for m in messages %}" + body + "{% endfor %}{% if add_generation_prompt %}" + opening + "{% endif %}"


CHATML = loop("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n")
TEMPLATES = {  # the template, and what is supervised of TURNS, turn by turn
    "chatml": (CHATML, ["one<|im_end|>", "two<|im_end|>"]),
    "end only between": (
        loop("[{{ m.role }}]{{ m.content }}{% if not loop.last %}<end>{% endif %}", "[assistant]"),
        ["one<end>", "two<end>"],
    ),
    "next header ends": (loop("<{{ m.role }}>{{ m.content }}", "<assistant>"), ["one<user>", "two<user>"]),
    "end of text behind the last": (
        loop("<{{ m.role }}>{{ m.content }}<end>\n", "<assistant>")
        + "{% if not add_generation_prompt %}<eos>{% endif %}",
        None,
    ),
    "plain words": (loop("{{ m.role }}: {{ m.content }}\n\n", "assistant:"), [" one\n\n", " two\n\n"]),
    "stripped": (loop("<{{ m.role }}>{{ m.content | trim }}<end>", "<assistant>"), ["one<end>", "two<end>"]),
    "thought opened": (
        loop("<{{ m.role }}>{{ m.content }}<end>", "<assistant><think>\n"),
        ["one<end>", "two<end>"],
    ),
    "empty thought in the last": (
        loop(
            "<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}<think>\n</think>\n{% endif %}"
            "{{ m.content }}<end>",
            "<assistant>",
        ),
        ["one<end>", "two<end>"],
    ),
    "system in the last question": (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
        + loop(
            "{% if m.role == 'user' %}[Q]{% if loop.last %}{{ s }}{% endif %}{{ m.content }}[/Q]"
            "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}",
            "",
        ),
        ["one</s>", "two</s>"],
    ),
    "channel": (
        loop(
            "<{{ m.role }}>{% if m.role == 'assistant' %}<final>{% endif %}{{ m.content }}"
            "{% if loop.last and m.role == 'assistant' %}<return>{% else %}<end>{% endif %}",
            "<assistant>",
        ),
        ["<final>one<return>", "<final>two<return>"],
    ),
    "question ends otherwise in a prompt": (
        loop(
            "<{{ m.role }}>{{ m.content }}{% if loop.last and m.role == 'user' %}<stop>{% else %}<end>{% endif %}",
            "<a>",
        ).replace("<{{ m.role }}>", "<{{ 'a' if m.role == 'assistant' else m.role }}>"),
        ["one<end>", "two<end>"],
    ),
    "always a prompt": (loop("<{{ m.role }}>{{ m.content }}<end>", "") + "<assistant>", ["one<end>", "two<end>"]),
    "lists of parts": (
        loop(
            "<{{ m.role }}>{% for p in m.content %}{% if p.text %}{{ p.text }}{% endif %}{% endfor %}<end>",
            "<assistant>",
        ),
        ["one<end>", "two<end>"],
    ),
    "markers": (
        loop(
            "<{{ m.role }}>{%generation%}{{ m.content if m.role == 'assistant' }}{%- endgeneration -%} {{ m.content }}."
        ),
        None,
    ),
}
TURNS = [
    {"role": "system", "content": "Be nice."},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "two"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin")


def written(template, messages, tools=None):
    """What is supervised, turn by turn."""
    return [text for sample in write_samples(template, messages, tools) for text, is_written in sample if is_written]


@pytest.mark.parametrize("name", [name for name, (_, expected) in TEMPLATES.items() if expected])
def test_what_is_supervised(tokenizer, name):
    tokenizer.chat_template, expected = TEMPLATES[name]
    assert written(ChatTemplate(tokenizer), TURNS) == expected


def test_end_of_text_behind_the_last_turn_is_not_its_end(tokenizer):
    tokenizer.chat_template, _ = TEMPLATES["end of text behind the last"]
    assert written(ChatTemplate(tokenizer), TURNS) == ["one<end>", "two<end>"]


def test_markers_count_however_they_are_spelled_and_not_in_comments(tokenizer):
    tokenizer.chat_template, _ = TEMPLATES["markers"]
    assert written(ChatTemplate(tokenizer), TURNS) == ["one", "two"]
    tokenizer.chat_template = "{# {% generation %} #}" + CHATML
    assert written(ChatTemplate(tokenizer), TURNS) == ["one<|im_end|>", "two<|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "stripped", "plain words", "always a prompt"])
def test_turns_share_a_sample_where_nothing_is_rewritten(tokenizer, name):
    tokenizer.chat_template, _ = TEMPLATES[name]
    assert len(write_samples(ChatTemplate(tokenizer), TURNS)) == 1


@pytest.mark.parametrize("name", ["empty thought in the last", "system in the last question", "channel"])
def test_a_template_that_rewrites_earlier_turns_makes_a_sample_of_each(tokenizer, name):
    tokenizer.chat_template, _ = TEMPLATES[name]
    first, second = write_samples(ChatTemplate(tokenizer), TURNS)
    assert [is_written for _, is_written in first] == [is_written for _, is_written in second] == [False, True]
    if name != "empty thought in the last":
        prompts = [ChatTemplate(tokenizer).text(TURNS[:n], None, is_prompt=True) for n in (2, 4)]
        assert [first[0][0], second[0][0]] == prompts, "each as the target sees it when it writes that turn"


def test_thoughts_that_the_markers_of_earlier_turns_do_not_show(tokenizer):
    tokenizer.chat_template = loop(
        "<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
        "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}"
    )
    thinking = [{**turn, "reasoning_content": "hm"} if turn["role"] == "assistant" else turn for turn in TURNS]
    assert written(ChatTemplate(tokenizer), TURNS) == ["one<end>", "two<end>"]
    assert len(write_samples(ChatTemplate(tokenizer), TURNS)) == 1
    assert written(ChatTemplate(tokenizer), thinking) == ["<think>hm</think>one<end>", "<think>hm</think>two<end>"]
    assert len(write_samples(ChatTemplate(tokenizer), thinking)) == 2


def test_thoughts_that_a_template_drops_are_kept_as_they_were_written(tokenizer):
    tokenizer.chat_template = loop("<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end>", "<assistant><think>\n")
    turns = [TURNS[1], {"role": "assistant", "content": "<think>\nhm\n</think>\none"}]
    ((context, _), (answer, _)) = write_samples(ChatTemplate(tokenizer), turns)[0]
    assert (context, answer) == ("<user>three<end><assistant><think>\n", "hm\n</think>\none<end>")


def test_what_the_target_wrote_needs_no_template(tokenizer):
    tokenizer.chat_template, _ = TEMPLATES["stripped"]
    raw = {"role": "assistant", "content": "one", "raw": "  <think>hm</think> one<end>"}
    turns = [*TURNS[:2], raw, *TURNS[3:]]
    assert written(ChatTemplate(tokenizer), turns) == [raw["raw"], "two<end>"]
    cut = [*TURNS[:2], {**raw, "raw": "  <think>hm", "finish_reason": "length"}]
    assert written(ChatTemplate(tokenizer), cut) == ["  <think>hm"]


@pytest.mark.parametrize("name", ["chatml", "end only between", "markers of the built-in"])
def test_an_answer_that_was_cut_has_no_end(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name][0] if name in TEMPLATES else load_tokenizer("builtin").chat_template
    cut = [*TURNS[:2], {"role": "assistant", "content": "one", "finish_reason": "length"}]
    assert written(ChatTemplate(tokenizer), cut) == ["one"]
    assert len(written(ChatTemplate(tokenizer), [*cut, *TURNS[3:]])) == 2


def test_system_prompt_goes_where_there_is_none(tokenizer):
    tokenizer.chat_template = CHATML
    template = ChatTemplate(tokenizer, system_prompt="Be short.")
    assert write_samples(template, TURNS) == write_samples(ChatTemplate(tokenizer), TURNS)
    assert write_samples(template, TURNS[1:])[0][0][0].startswith("<|im_start|>system\nBe short.<|im_end|>")
    ids = render_prompt(tokenizer, TURNS[1:2], system_prompt="Be short.")
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe short.<|im_end|>")


def test_tools_choose_among_named_templates(tokenizer):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    tokenizer.chat_template = {"default": CHATML, "tool_use": "TOOLS{{ tools[0].function.name }}" + CHATML}
    template = ChatTemplate(tokenizer)
    assert template.text(TURNS, None).startswith("<|im_start|>")
    assert template.text(TURNS, tools).startswith("TOOLSf<|im_start|>")
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(TemplateError, match=r"chat templates \['rag'\] and none is called 'default'"):
        template.text(TURNS, None)


CALL = {"id": "c", "type": "function", "function": {"name": "look_up", "arguments": {"word": "x"}}}
CALLS = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]


@pytest.mark.parametrize(
    "shown",
    [
        "{% if m.content is not none %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}",
        "{% if 'content' in m %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}({{ c.function.arguments.word }}){% endfor %}",
    ],
)
def test_calls_are_given_as_the_template_reads_them(tokenizer, shown):
    tokenizer.chat_template = loop("<{{ m.role }}>" + shown + "<end>", "<assistant>")
    (call,) = written(ChatTemplate(tokenizer), CALLS)
    assert call.startswith("look_up")
    assert call.endswith("<end>")
    assert "None" not in call


@pytest.mark.parametrize(
    ("source", "messages", "expected"),
    [
        (None, TURNS, "no chat template"),
        ("{% for m in messages %}", TURNS, "no valid Jinja: line 1"),
        (loop("{{ m.nothing.more }}"), TURNS, "cannot render it: .*nothing"),
        ("{{ raise_exception('no systems') }}", TURNS, 'refuses it: "no systems"'),
        (loop("{{ m.role }}"), TURNS, "does not show a question with its answer"),
        (loop("<{{ m.role }}>{{ m.content | upper if m.content == 'one' else m.content }}<end>"), TURNS, "told apart"),
        (CHATML, CALLS, "leaves out a tool call"),
        (CHATML, [TURNS[1], {"role": "assistant", "content": [{"type": "image"}]}], "part of type 'image'"),
        (loop("{% generation %}{% endgeneration %}{{ m.content }}"), TURNS, "markers of the template enclose nothing"),
    ],
)
def test_what_a_template_cannot_do_is_said(tokenizer, source, messages, expected):
    tokenizer.chat_template = source
    with pytest.raises(TemplateError, match=expected):
        write_samples(ChatTemplate(tokenizer, name="the template"), messages)


def test_the_first_difference_is_named(tokenizer):
    tokenizer.chat_template = loop(
        "<{{ m.role }}>{{ m.content[::-1] if m.content == 'two' else m.content }}<end>", "<a>"
    )
    with pytest.raises(
        TemplateError, match=r"my\.jinja does not show the answer 'two'.*'ssistant>owt<end>'.*'>' \(char"
    ):
        write_samples(ChatTemplate(tokenizer, name="my.jinja"), TURNS)


def test_no_token_holds_text_of_both_sides(tokenizer):
    """The prompt ends in a line break, and so does what the answer begins with: alone they would be one token."""
    tokenizer.chat_template = CHATML
    turns = [TURNS[1], {"role": "assistant", "content": "\n\nanswer"}]
    (sample,) = render_samples(tokenizer, turns)
    prompt = render_prompt(tokenizer, turns[:1])
    assert sample.input_ids[: len(prompt)] == prompt, "as the target will read it"
    assert sample.loss_mask == [0] * len(prompt) + [1] * (len(sample.input_ids) - len(prompt))
    whole = tokenizer("".join(text for text, _ in write_samples(ChatTemplate(tokenizer), turns)[0]))["input_ids"]
    assert sample.input_ids != whole, "or this test tests nothing"


parts = st.characters(codec="utf-8") | st.sampled_from(["<|im_end|>", "\n", " ", "{{", "<|im_start|>assistant\n"])
text = st.lists(parts, max_size=12).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(text, min_size=2, max_size=4))
def test_any_text_is_supervised_to_the_letter(texts):
    tokenizer = load_tokenizer("builtin")
    tokenizer.chat_template = CHATML
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(texts)]
    template = ChatTemplate(tokenizer)
    assert written(template, turns) == [content + "<|im_end|>" for content in texts[1::2]]
    for sample, rendered in zip(samples := write_samples(template, turns), tokenize(tokenizer, samples), strict=True):
        pieces = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece, _ in sample]
        assert sum(rendered.loss_mask) >= 1
        if rendered.input_ids == [token for piece in pieces for token in piece]:
            expected = [int(is_written) for ids, (_, is_written) in zip(pieces, sample, strict=True) for _ in ids]
            assert rendered.loss_mask == expected


AGENT = loop(  # shows the thought of a call only as long as no answer follows
    "<{{ m.role }}>{% if m.reasoning_content and (messages[-1].role != 'assistant' or messages[-1].tool_calls) %}"
    "<t>{{ m.reasoning_content }}</t>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}<end>",
    "<assistant>",
)


def test_a_call_and_its_result_before_a_rewritten_turn_are_context(tokenizer):
    tokenizer.chat_template = AGENT
    turns = [CALLS[0], {**CALLS[1], "reasoning_content": "let me"}, {"role": "tool", "content": "RESULT"}]
    turns.append({"role": "assistant", "content": "final answer"})
    assert written(ChatTemplate(tokenizer), turns) == ["<t>let me</t>[look_up]<end>", "final answer<end>"]


def test_short_questions_do_not_hide_that_a_turn_was_rewritten(tokenizer):
    tokenizer.chat_template = loop(
        "<{{ m.role }}>{% if m.thinking and (loop.last or add_generation_prompt) %}<t>{{ m.thinking }}</t>{% endif %}"
        "{{ m.content }}<e>",
        "<assistant>",
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one apple", "thinking": "hm"}]
    turns += [{"role": "user", "content": "a"}, {"role": "assistant", "content": "two"}]
    assert written(ChatTemplate(tokenizer), turns) == ["<t>hm</t>one apple<e>", "two<e>"]


def test_the_end_of_an_empty_answer_is_no_empty_thought(tokenizer):
    tokenizer.chat_template = loop(
        "{% if m.role == 'user' %}[Q]{{ m.content }}[/Q]{% else %}{{ m.content }}</s>{% endif %}", ""
    )
    assert written(ChatTemplate(tokenizer), [TURNS[1], {"role": "assistant", "content": ""}]) == ["</s>"]


def test_what_a_template_adds_to_a_cut_thought_is_not_learned(tokenizer):
    tokenizer.chat_template = loop(
        "<{{ m.role }}>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<end>",
        "<assistant>",
    )
    cut = {"role": "assistant", "content": "", "reasoning_content": "half a thou", "finish_reason": "length"}
    assert written(ChatTemplate(tokenizer), [TURNS[1], cut]) == ["<think>half a thou"]
    tokenizer.chat_template = AGENT
    with pytest.raises(TemplateError, match="cut within a tool call"):
        written(ChatTemplate(tokenizer), [CALLS[0], {**CALLS[1], "finish_reason": "length"}])


def test_a_call_that_is_dropped_is_noticed_though_its_name_is_said(tokenizer):
    tokenizer.chat_template = CHATML
    turns = [CALLS[0], {**CALLS[1], "content": "I call look_up"}]
    with pytest.raises(TemplateError, match="leaves out a tool call"):
        written(ChatTemplate(tokenizer), turns)


def test_a_second_turn_in_a_row_is_learned_without_its_header(tokenizer):
    opening = "{% if messages[-1].role == 'user' %}assistant: {% endif %}"
    tokenizer.chat_template = loop("{{ m.role }}: {{ m.content }}<end>\n", opening)
    turns = [TURNS[1], TURNS[2], {"role": "assistant", "content": "second"}]
    assert written(ChatTemplate(tokenizer), turns) == ["one<end>", "second<end>"]


def test_what_rendering_says_itself_is_no_option(tokenizer):
    with pytest.raises(ConfigError, match=r"data\.template_options\.add_generation_prompt: is not an option"):
        ChatTemplate(tokenizer, {"add_generation_prompt": False})


def test_tokenizers_that_put_a_space_before_a_text(tokenizer):
    pieces = [("<unk>", 0.0), ("\u2581", -3.0), ("\u2581cab", -2.0), *((letter, -4.0) for letter in "abcdefgst:")]
    words = Tokenizer(models.Unigram(pieces, 0))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    spaced = PreTrainedTokenizerFast(tokenizer_object=words)
    spaced.chat_template = loop(
        "{% if m.role == 'user' %}ab: {{ m.content }}ad: {% else %}{{ m.content }}{% endif %}", ""
    )
    (sample,) = render_samples(spaced, [{"role": "user", "content": "c"}, {"role": "assistant", "content": "cab"}])
    assert spaced.decode(sample.input_ids) == "ab: cad: cab"
    assert spaced.decode([token for token, own in zip(sample.input_ids, sample.loss_mask, strict=True) if own]) == "cab"
