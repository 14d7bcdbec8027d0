"""Rows of a regeneration: ids that stay, turns that are consistent, texts that are exact, lines that are whole."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from regeneration_world import END, assistant, user
from transformers import AutoTokenizer

from deepspec.config import ConfigError
from deepspec.data.conversation import Conversation
from deepspec.data.jsonl import DataError
from deepspec.regeneration.answers import AnswerReader, calls_of
from deepspec.regeneration.dialogue import Dialogue, Task
from deepspec.regeneration.store import RowStore, cut_torn_line, done_rows
from deepspec.regeneration.tasks import Names, digest_of, share_of, tasks_of
from deepspec.regeneration.text import text_behind
from deepspec.regeneration.writer import Answer

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


def conversation(id: str, *messages, **more) -> Conversation:
    return Conversation(id, list(messages), None, f"file, line of {id}", more)


def dialogue(*messages, system_prompt=None) -> Dialogue:
    talk = conversation("a", *messages)
    return Dialogue(Task("a", digest_of(talk), talk), system_prompt)


def play(talk: Dialogue, *answers) -> list[tuple[str, str]]:
    """Give the answers in turn; (role, content) of what is written in the end."""
    for answer in answers:
        assert talk.next_prompt() is not None
        talk.take({"finish_reason": "stop", **(answer if isinstance(answer, dict) else assistant(answer))})
    assert talk.next_prompt() is None
    return [(message["role"], message["content"]) for message in talk.messages]


class TestTurns:
    def test_assistant_turns_are_replaced_and_the_others_stay(self):
        talk = dialogue(user("1"), assistant("old"), user("2"), assistant("old"), system_prompt="S")
        assert play(talk, "new 1", "new 2") == [
            ("system", "S"),
            ("user", "1"),
            ("assistant", "new 1"),
            ("user", "2"),
            ("assistant", "new 2"),
        ]

    def test_every_user_turn_is_answered_where_there_are_no_answers(self):
        said = play(dialogue({"role": "system", "content": "S"}, user("1"), user("2")), "a", "b")
        assert [content for _, content in said] == ["S", "1", "a", "2", "b"]

    def test_user_turns_in_a_row_stay_together_beside_answers(self):
        said = play(dialogue(user("1"), user("2"), assistant("old"), assistant("older"), user("3")), "a", "b")
        assert [content for _, content in said] == ["1", "2", "a", "3", "b"]

    def test_a_greeting_is_left_out(self):
        assert play(dialogue(assistant("Hello!"), user("1")), "a") == [("user", "1"), ("assistant", "a")]

    def test_nothing_to_answer(self):
        assert dialogue({"role": "system", "content": "S"}, assistant("old")).next_prompt() is None

    def test_a_cut_answer_ends_the_conversation(self):
        talk = dialogue(user("1"), assistant("old"), user("2"))
        said = play(talk, assistant("half", finish_reason="length"))
        assert said[-1] == ("assistant", "half")
        assert talk.row("t")["finish_reason"] == "length"

    @pytest.mark.parametrize(
        ("answer", "goes_on"),
        [
            (assistant("", tool_calls=[CALL]), True),
            (assistant('<tool_call>\n{"name": "add", "arguments": {"b": 2, "a": 1}}\n</tool_call>'), True),
            (assistant('<tool_call>\n{"name": "add", "arguments": {"b": 2, "a": 7}}\n</tool_call>'), False),
            (assistant("It is three."), False),
        ],
    )
    def test_results_of_a_tool_stay_only_behind_the_same_call(self, answer, goes_on):
        talk = dialogue(user("1 + 2?"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "3"})
        said = play(talk, answer, *(["Three."] if goes_on else []))
        assert [role for role, _ in said] == ["user", "assistant", *(["tool", "assistant"] if goes_on else [])]

    def test_arguments_may_be_text(self):
        as_text = {"function": {"name": "add", "arguments": json.dumps({"b": 2, "a": 1})}}
        assert calls_of({"tool_calls": [as_text]}) == calls_of({"tool_calls": [CALL]})


class TestIds:
    def test_more_prompts_in_another_order_keep_theirs(self):
        first = [conversation("a", user("1")), conversation("b", user("2"))]
        names = {task.id: task.digest for task in tasks_of(first, {}, 1)}
        more = [conversation("a", user("other")), *reversed(first), conversation("a", user("1"))]
        ids = [(task.id, task.conversation.messages[0]["content"]) for task in tasks_of(more, names, 1)]
        assert ids[1:3] == [("b", "2"), ("a", "1")]
        assert ids[0][0].startswith("a~") and ids[3][0].startswith("a~")  # noqa: PT018
        assert len({id for id, _ in ids}) == 4

    def test_a_renamed_prompt_keeps_its_name_alone_too(self):
        both = [conversation("a", user("1")), conversation("a", user("2"))]
        second = list(tasks_of(both, {}, 1))[1]
        (alone,) = tasks_of(both[1:], {second.id: second.digest}, 1)
        assert alone.id == second.id

    def test_copies_are_numbered(self):
        names = Names({})
        ids = [names.name("a", "d" * 16) for _ in range(3)]
        assert ids == ["a", "a~dddddddd", "a~dddddddd.2"]
        assert names.renamed == 2

    def test_several_answers(self):
        rows = [conversation("a#x", user("1"))]
        first = list(tasks_of(rows, {}, 2))
        assert [task.id for task in first] == ["a#x#1", "a#x#2"]
        again = tasks_of(rows, {task.id: task.digest for task in first}, 3)
        assert [task.id for task in again] == ["a#x#1", "a#x#2", "a#x#3"]

    def test_shares_are_whole_and_apart(self):
        rows = [conversation(f"r{i}", user(str(i))) for i in range(10)]
        shares = [[t.id for t in share_of(tasks_of(rows, {}, 1), {"r3"}.__contains__, rank, 3)] for rank in range(3)]
        assert sorted(id for share in shares for id in share) == sorted(f"r{i}" for i in range(10) if i != 3)


@pytest.fixture(scope="module")
def tokenizer(training_world):
    return AutoTokenizer.from_pretrained(training_world / "target")


class TestTexts:
    def read(self, tokenizer, raw, finish_reason="stop", prompt="x"):
        reader = AnswerReader(tokenizer, [tokenizer.eos_token_id])
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        message = reader.message_of(Answer(raw, 3, finish_reason), ids)
        assert (message["raw"], message["finish_reason"]) == (raw, finish_reason)
        return message

    def test_only_the_end_of_the_turn_is_taken_off(self, tokenizer):
        assert self.read(tokenizer, f"<think>Hm.</think> Hi.{END}")["content"] == "<think>Hm.</think> Hi."
        assert self.read(tokenizer, "Hi", "length")["content"] == "Hi"

    def test_what_the_template_began_to_think_belongs_to_the_content(self, tokenizer):
        prompt = "<|im_start|>assistant\n<think>\n"
        assert self.read(tokenizer, f"Hm.</think>Hi.{END}", prompt=prompt)["content"] == "<think>\nHm.</think>Hi."
        closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert self.read(tokenizer, f"Hi.{END}", prompt=closed)["content"] == "Hi."

    def test_harmony(self, tokenizer):
        raw = (
            "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
            '<|constrain|>json<|message|>{"a": 1, "b": 2}<|end|>'
            "<|start|>assistant<|channel|>final<|message|>Hi.<|return|>"
        )
        message = self.read(tokenizer, raw)
        assert (message["thinking"], message["content"]) == ("Think.", "Hi.")
        assert calls_of(message) == calls_of({"tool_calls": [CALL]})

    def test_the_tokenizer_s_own_parser(self, tokenizer):
        def parse_response(raw, prefix, tools):
            if "?" in raw:
                raise ValueError("no")
            return {"role": "assistant", "thinking": "T", "content": raw.upper()}

        parsing = SimpleNamespace(decode=tokenizer.decode, response_template={}, parse_response=parse_response)
        parsing.eos_token_id = tokenizer.eos_token_id
        reader = AnswerReader(parsing, [tokenizer.eos_token_id])
        assert reader.message_of(Answer("hi", 1, "stop"), [1])["content"] == "HI"
        assert reader.message_of(Answer("hi", 1, "stop"), [1])["thinking"] == "T"
        assert reader.message_of(Answer(f"hi?{END}", 1, "stop"), [1])["content"] == "hi?"

    def test_no_space_is_lost_behind_the_prompt(self):
        words = {1: "<a>", 2: " Hi", 3: " you"}
        dropping = SimpleNamespace(decode=lambda ids, **_: "".join(words[i] for i in ids).removeprefix(" "))
        assert text_behind(dropping, [1], [2, 3]) == " Hi you"


class TestStore:
    def begin(self, folder, **settings) -> RowStore:
        store = RowStore(folder)
        store.begin({"seed": 0, **settings})
        return store

    def test_a_torn_line_is_cut_away(self, tmp_path):
        with_row = '{"id": "a", "prompt": "x"}\n'
        for text, left in (("", ""), ("{", ""), (with_row, with_row), (with_row + '{"id"', with_row)):
            file = tmp_path / "torn"
            file.write_text(text)
            cut_torn_line(file)
            assert file.read_text() == left
        file.write_bytes(b"a\n" + b"x" * 200_000)
        cut_torn_line(file)
        assert file.read_bytes() == b"a\n"

    def test_rows_of_every_rank_are_known(self, tmp_path):
        for rank in range(3):
            store = RowStore(tmp_path, rank=rank)
            if rank == 0:
                store.begin({"seed": 0})
            store.keep({"id": f"k{rank}", "prompt": "x"})
            store.leave_out({"id": f"o{rank}", "prompt": "x", "reason": "cut" if rank else "failed"})
            store.close()
        (tmp_path / "answers-rank2.jsonl").open("a").write('{"id": "to')
        store = self.begin(tmp_path)
        known, left_out = done_rows(store)
        assert sorted(known) == ["k0", "k1", "k2", "o1", "o2"]
        assert left_out == {"o1": "cut", "o2": "cut"}
        store.close()

    def test_other_settings_are_refused_once_there_are_rows(self, tmp_path):
        self.begin(tmp_path).close()
        store = self.begin(tmp_path, temperature=0.5)
        store.keep({"id": "a", "prompt": "x"})
        store.close()
        with pytest.raises(ConfigError, match=r"made with temperature=0.5 \(now 1.0\); give the same again"):
            self.begin(tmp_path, temperature=1.0)

    def test_two_runs_do_not_write_one_folder(self, tmp_path):
        first, other_rank = self.begin(tmp_path), RowStore(tmp_path, rank=1)
        other_rank.join()
        first.close()
        with pytest.raises(ConfigError, match="another run is writing there"):
            self.begin(tmp_path)
        other_rank.close()
        self.begin(tmp_path).close()

    def test_a_folder_of_other_data_is_refused(self, tmp_path):
        (tmp_path / "train.jsonl").write_text("{}\n")
        with pytest.raises(ConfigError, match=r"holds train.jsonl, which this command has not written"):
            self.begin(tmp_path)

    def test_a_line_that_is_no_row(self, tmp_path):
        (tmp_path / "answers-rank0.jsonl").write_text('{"id": "a", "prompt": "x"}\nnonsense\n')
        with pytest.raises(DataError, match=r"answers-rank0.jsonl, line 2: no row of this command"):
            list(RowStore(tmp_path).kept())
