"""Prompts that the target writes: openings of any template, filters, selection, and the command as a whole."""

from __future__ import annotations

import json

import pytest
from regeneration_world import END, Scripted, StandIn
from transformers import AutoTokenizer

from deepspec.config import ConfigError
from deepspec.data.formats import read_conversations
from deepspec.data.jsonl import DataError
from deepspec.regeneration.setup import TargetOptions
from deepspec.regeneration.writer import Answer, Refusal
from deepspec.synthesis import synthesize as synthesis
from deepspec.synthesis.filters import FilterSettings, PromptFilter
from deepspec.synthesis.opening import find_opening
from deepspec.synthesis.selection import Attempt, Selector
from deepspec.synthesis.synthesize import SynthesizeOptions, synthesize

SETTINGS = FilterSettings(min_words=4, max_words=60, languages=("en",), max_repetition=0.3)
WORDS = ["apple", "river", "stone", "cloud", "engine", "violin", "harbour", "pepper", "marble", "lantern", "saddle"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BE_KIND = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}{{ 'assistant:' }}"
TRIMMING = CHATML.replace("m.content +", "m.content | trim +")


@pytest.fixture
def tokenizer(training_world):
    return AutoTokenizer.from_pretrained(training_world / "target")


class TestOpenings:
    @pytest.mark.parametrize(
        ("template", "system_prompt", "before"),
        [
            (CHATML, None, "<|im_start|>user\n"),
            (TRIMMING, None, "<|im_start|>user\n"),
            (CHATML, "You add.", "<|im_start|>system\nYou add.<|im_end|>\n<|im_start|>user\n"),
            (BE_KIND + CHATML, None, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"),
        ],
    )
    def test_a_special_token_ends_the_turn(self, tokenizer, template, system_prompt, before):
        tokenizer.chat_template = template
        opening = find_opening(tokenizer, {}, system_prompt)
        assert tokenizer.decode(opening.prompt_ids) == before
        assert opening.stop_token_ids == (tokenizer.convert_tokens_to_ids(END),)
        assert opening.stop_strings == ()
        assert opening.text_of(f"  What is it?{END}\n", (END,)) == "What is it?"

    def test_a_text_ends_the_turn(self, tokenizer):
        tokenizer.chat_template = PLAIN
        opening = find_opening(tokenizer, {})
        assert tokenizer.decode(opening.prompt_ids) == "user:"  # the target writes the space
        assert opening.stop_strings == ("\n\nassistant:",)
        assert opening.text_of(" What is it?\n\nassistant: It", ()) == "What is it?"

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ messages[0].content | upper }}", "does not show a user's text once and as it is"),
            ("{{ messages[0].content }}", "puts nothing before a user's text"),
            ("{{ raise_exception('no') }}", "no opening of a user's turn: .*no"),
        ],
    )
    def test_templates_without_an_opening(self, tokenizer, template, message):
        tokenizer.chat_template = template
        with pytest.raises(ConfigError, match=message):
            find_opening(tokenizer, {})


@pytest.fixture(scope="module")
def prompt_filter():
    return PromptFilter(SETTINGS, ["<|weird|>", "[CTRL]"])


class TestFilters:
    @pytest.mark.parametrize(
        "text",
        [
            "What is the capital of Australia?",
            "Write a Python function that returns the n-th Fibonacci number.",
            "Solve x^2 - 3x + 2 = 0 and show each step",
            "How do I boil an egg?",
            "In Spain it hardly rains. Which plants like that?",
            "Calculate 3 + 4 * 5",
            "Can you help me write a letter to my landlord about the heating?",
        ],
    )
    def test_prompts(self, prompt_filter, text):
        assert prompt_filter.reason_against(text) is None

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "empty"),
            ("?!", "empty"),
            ("Hello there", "short"),
            ("word " * 61, "long"),
            ("Tell me <|im_start|> about the sea please", "control_token"),
            ("Tell me [CTRL] about the sea please", "control_token"),
            ("Sure, here is a story about a dragon.", "assistant_like"),
            ("I'm sorry, but I cannot help with that.", "assistant_like"),
            ("Here are five tips for a good night's sleep.", "assistant_like"),
            ("Hello! How can I help you today?", "assistant_like"),
            ("Well, as an AI language model I have no feelings.", "assistant_like"),
            ("Tell me about cats. " * 8, "repetitive"),
            ("List:\n" + "- one more thing\n" * 6, "repetitive"),
            ("Comment faire une bonne omelette aux champignons ?", "language"),
            ("Wie geht es dir heute?", "language"),
        ],
    )
    def test_no_prompts(self, prompt_filter, text, reason):
        assert prompt_filter.reason_against(text) == reason

    def test_languages(self):
        french = FilterSettings(4, 60, ("fr", "de"), 0.3)
        assert PromptFilter(french).reason_against("Comment faire une bonne omelette aux champignons ?") is None
        anything = FilterSettings(4, 60, (), 0.3)
        assert PromptFilter(anything).reason_against("Comment faire une bonne omelette aux champignons ?") is None
        with pytest.raises(ConfigError, match="languages: unknown 'english'"):
            PromptFilter(FilterSettings(4, 60, ("english",), 0.3))


def test_selection_does_not_depend_on_when_attempts_were_made(prompt_filter):
    long = "Explain how the old stone bridge over the river was built by hand in nine months"
    texts = [
        "What is the highest mountain in Africa?",
        long,
        "what is the highest mountain in Africa",
        f"{long} and days",
    ]
    attempts = [Attempt(number, text, False) for number, text in enumerate(texts)] + [Attempt(9, "Why is it", True)]
    whole = Selector(prompt_filter, 0.7).select(attempts)
    assert [attempt.number for attempt in whole.kept] == [0, 1]
    assert whole.reasons == {"duplicate": 1, "near_duplicate": 1, "cut": 1}
    growing = Selector(prompt_filter, 0.7)
    growing.select(attempts[2:])
    assert growing.select(reversed(attempts)) == whole
    exact = Selector(prompt_filter, 1.0).select(attempts)
    assert [attempt.number for attempt in exact.kept] == [0, 1, 3]


def text_for(number: int) -> str:
    """Every fifth text is no prompt, every seventh a copy."""
    if number % 5 == 4:
        return f"Sure, here is answer {number}.{END}"
    number = number - 1 if number % 7 == 6 else number
    return f"Why does the {WORDS[number % 11]} like the {WORDS[number // 11 % 11]} of {number} towns?{END}"


def options_for(world, output_dir, **changes) -> SynthesizeOptions:
    settings = {"max_new_tokens": 24, "max_length": 128, "count": 60, "held_out_fraction": 0.2}
    target = TargetOptions(path=str(world / "target"))
    return SynthesizeOptions(target=target, output_dir=str(output_dir), **(settings | changes))


@pytest.fixture
def run(training_world, tmp_path, monkeypatch):
    """`run("folder", **options)`: the manifest; texts come from `text_for`, those of `failing` numbers not at all."""

    def make(name: str, failing=(), **changes):
        def texts(question):
            number = int(question.key)
            return Refusal("no", is_final=False) if number in failing else Answer(text_for(number), 9, "stop")

        monkeypatch.setattr(synthesis, "open_writer", lambda *_: Scripted(texts))
        return synthesize(options_for(training_world, tmp_path / name, **changes))

    return make


def files_of(folder) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in ("train.jsonl", "heldout.jsonl")}


def test_writes_what_data_prep_prompts_writes(run, tmp_path, capsys):
    manifest = run("out")
    counts = manifest["counts"]
    assert counts["train"] + counts["heldout"] == 60
    assert 4 <= counts["heldout"] <= 20
    assert counts["texts"] == 60 + sum(counts["removed"].values()) + counts["not_needed"]
    assert set(counts["removed"]) == {"assistant_like", "duplicate"}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    rows = [json.loads(line) for text in files_of(tmp_path / "out").values() for line in text.splitlines()]
    assert len({row["id"] for row in rows}) == 60
    assert rows[0].keys() == {"id", "source", "messages"}
    assert rows[0]["messages"][0]["role"] == "user"
    assert len(list(read_conversations([str(tmp_path / "out" / "train.jsonl")]))) == counts["train"]
    assert "prompts to train on" in capsys.readouterr().out


def test_an_interrupted_run_gives_the_same_prompts(run, tmp_path, capsys):
    run("whole")
    run("out", count=20, failing=(3, 7, 8))
    run("out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    capsys.readouterr()
    run("out", min_words=5)  # filters may change, and nothing is written anew
    assert "texts were written before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"made with temperature=1.0 \(now 0.5\)"):
        run("out", temperature=0.5)


def test_too_few_prompts(run):
    with pytest.raises(DataError, match=r"100 texts gave \d+ of count=90 prompts \(left out: .*assistant_like"):
        run("out", count=90, max_attempts=100, languages=["fr"])
    with pytest.raises(DataError, match=r"none of \d+ requests was answered"):
        run("none", failing=range(1000))


def test_on_servers(training_world, tmp_path):
    with StandIn(
        text_of=lambda body: f"Where do the {body['seed'] % 9973} birds of {body['seed']} go?{END}"
    ).running() as s:
        manifest = synthesize(
            options_for(training_world, tmp_path / "out", urls=[s.url], count=12, topics=["birds", "fish"])
        )
    assert manifest["counts"]["train"] + manifest["counts"]["heldout"] == 12
    assert len({tuple(body["prompt"]) for body in s.bodies}) == 2
    assert s.bodies[0]["stop_token_ids"]
    assert s.bodies[0]["temperature"] == 1.0


def test_servers_that_only_chat_cannot(training_world, tmp_path):
    with StandIn(chat_only=True).running() as server, pytest.raises(ConfigError, match="needed to begin a user's turn"):
        synthesize(options_for(training_world, tmp_path / "out", urls=[server.url]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count=0: must be at least 1"),
        ({"min_words": 9, "max_words": 3}, "max_words=3: must be at least min_words=9"),
        ({"near_duplicates": 0.0}, "near_duplicates=0.0"),
        ({"held_out_fraction": 1.0}, "held_out_fraction=1.0"),
    ],
)
def test_bad_options(run, changes, message):
    with pytest.raises(ConfigError, match=message):
        run("out", **changes)
