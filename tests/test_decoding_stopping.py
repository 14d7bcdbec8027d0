"""Stop strings: found across tokens and rounds and among accepted tokens, by decoding a bounded tail only."""

from __future__ import annotations

from functools import cache

import pytest
from conftest import GOLDENS
from decoding_world import Replay
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepspec import load_draft
from deepspec.data.tokenizer import END, train_tokenizer
from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine
from deepspec.decoding.stopping import MARGIN, StopCondition

TEXTS = ["stop here, then stop there", "é and 漢字 and 🙂🙂", "\n\nUser: hello\n", "aaaa abab aab"]


@cache
def byte_level() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=300)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2: a mark for the space, rare characters as bytes, no leading space in the text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=END)


def decode_with(tokenizer: PreTrainedTokenizerFast):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def first_end(ids: list[int], strings: list[str], decode) -> int | None:
    """The definition: the shortest output whose text contains a stop string."""
    return next((n for n in range(1, len(ids) + 1) if any(s in decode(ids[:n]) for s in strings)), None)


def end_in_rounds(condition: StopCondition, ids: list[int], sizes: list[int]) -> int | None:
    """Give the tokens round by round until one ends the output."""
    done = 0
    for size in sizes:
        end = condition.end(ids[:done], ids[done : done + size])
        if end is not None:
            return done + end
        done += size
    return None


ALPHABET = st.sampled_from([*"ab stopé漢語ß🙂\n", END])


@pytest.mark.parametrize("tokenizer", [byte_level, metaspace])
@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.one_of(ALPHABET, st.sampled_from(TEXTS)), min_size=1, max_size=20),
    strings=st.lists(st.lists(ALPHABET, min_size=1, max_size=6).map("".join), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 8), min_size=200, max_size=200),
)
@example(pieces=["漢🙂", " stop"], strings=[" stop"], sizes=[1] * 200)
@example(pieces=["語", "ß"], strings=["語"], sizes=[4] * 200)
@example(pieces=["語"] * 20 + ["ß"], strings=["ß"], sizes=[1] * 200)
@example(pieces=[END, " stop", END], strings=[f"p{END}"], sizes=[2] * 200)
def test_the_end_is_where_the_whole_text_first_contains_a_string(tokenizer, pieces, strings, sizes):
    ids = tokenizer()("".join(pieces), add_special_tokens=False)["input_ids"]
    decode = decode_with(tokenizer())
    condition = StopCondition((), strings, decode)
    assert end_in_rounds(condition, ids, sizes) == first_end(ids, strings, decode)


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 299), min_size=1, max_size=40),
    place=st.integers(0, 39),
    length=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 8), min_size=40, max_size=40),
)
def test_tokens_that_are_no_text(ids, place, length, sizes):
    """Random bytes, most of them halves of characters, and the text of some of them as the stop string."""
    decode = decode_with(byte_level())
    string = decode(ids[place : place + length]).strip("\ufffd") or "a"
    assert end_in_rounds(StopCondition((), [string], decode), ids, sizes) == first_end(ids, [string], decode)


@pytest.mark.parametrize("sizes", [[1] * 9, [9], [3, 3, 3], [2, 5, 2]])
def test_a_string_over_several_tokens_and_rounds(sizes):
    texts = ["x", "one", " t", "w", "o th", "ree", " four", "y", "z"]

    def decode(ids):
        return "".join(texts[i] for i in ids)

    assert end_in_rounds(StopCondition((), ["two three"], decode), list(range(9)), sizes) == 6
    assert end_in_rounds(StopCondition((), ["two thread"], decode), list(range(9)), sizes) is None
    assert end_in_rounds(StopCondition((), ["four", "two"], decode), list(range(9)), sizes) == 5
    assert end_in_rounds(StopCondition([4], ["e t"], decode), list(range(9)), sizes) == 3
    assert end_in_rounds(StopCondition([2], ["two"], decode), list(range(9)), sizes) == 3
    assert end_in_rounds(StopCondition([8]), list(range(9)), sizes) == 9


def test_only_a_tail_is_decoded_once_a_round():
    sizes = []

    def decode(ids):
        sizes.append(len(ids))
        return "a" * len(ids)

    condition = StopCondition((), ["né!"], decode)
    assert end_in_rounds(condition, list(range(3000)), [3] * 1000) is None
    assert len(sizes) == 1000
    assert max(sizes) == len("né!".encode()) + MARGIN + 3


PROMPT, LIMIT, BLOCK = [292, 259, 249, 496, 228, 137, 150, 417, 450, 112, 111, 416], 24, 4


def numbers(ids: list[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


@pytest.mark.parametrize("verification", ["token", "block"])
def test_every_place_of_a_round_in_one_mixed_batch(golden_target, verification):
    """For each pair of neighbours of the free output, a request that ends where the second one is half written."""
    plain = SpeculativeEngine(golden_target, max_length=64, decode=numbers)
    expected = plain.generate([Request(PROMPT, LIMIT)])[0].output_ids
    replay = Replay([PROMPT], [expected], BLOCK, wrong_every=3)
    engine = SpeculativeEngine(golden_target, replay, slots=5, max_length=64, verification=verification, decode=numbers)
    free = engine.generate([Request(PROMPT, LIMIT)])[0]
    assert free.output_ids == expected
    place_of = {0: None}  # output index -> (round, how many new tokens of it this one completes)
    for number, r in enumerate(free.rounds):
        place_of |= {len(place_of) + k: (number, k + 1) for k in range(r.emitted)}
    requests, ends = [Request(PROMPT, LIMIT)], [None]
    for i in range(LIMIT):
        string = f"{expected[i - 1]}><{expected[i]}" if i else f"<{expected[0]}"
        ends.append(numbers(expected[: i + 1]).endswith(f"{string}>") and first_end(expected, [string], numbers))
        requests.append(Request(PROMPT, LIMIT, stop_strings=("never", string)))
    kinds = set()
    for request, end, completion in zip(requests, ends, engine.generate(requests), strict=True):
        if end is None:
            assert (completion.output_ids, completion.finish_reason) == (expected, "length")
            continue
        assert (completion.output_ids, completion.finish_reason) == (expected[:end], "stop")
        assert plain.generate([request])[0].output_ids == expected[:end]
        if place_of[end - 1] is None:
            kinds.add("prefill")
            assert completion.rounds == []
            continue
        number, count = place_of[end - 1]
        assert completion.rounds[:number] == free.rounds[:number]
        assert len(completion.rounds) == number + 1
        last, whole = completion.rounds[-1], free.rounds[number]
        if count <= whole.accepted:
            kinds.add("across rounds" if count == 1 else "among accepted tokens")
            assert (last.proposed, last.accepted, last.emitted) == (count, count, count)
        else:
            kinds.add("corrected token")
            assert (last.proposed, last.accepted, last.emitted) == (BLOCK, whole.accepted, count)
    assert kinds == {"prefill", "across rounds", "among accepted tokens", "corrected token"}


def test_a_sampled_request_ends_at_its_string_whatever_else_is_in_the_batch(golden_target):
    draft = load_draft(GOLDENS / "ckpt_dspark_vanilla")

    def engine_of(slots):
        proposer = DSparkProposer(draft, golden_target)
        return SpeculativeEngine(golden_target, proposer, slots=slots, max_length=64, decode=numbers)

    free = engine_of(4).generate([Request([7, i], 30, 1.0, seed=i) for i in range(8)])
    requests, expected = [], []
    for i, completion in enumerate(free):
        string = "" if i % 3 == 0 else numbers(completion.output_ids[9 + i : 11 + i])[1:-1]
        requests.append(Request([7, i], 30, 1.0, seed=i, stop_strings=(string,) if string else ()))
        end = first_end(completion.output_ids, [string], numbers) if string else None
        expected.append((completion.output_ids[:end], "stop" if string else "length"))
    for slots in (1, 3, 8):
        completions = engine_of(slots).generate(requests)
        assert [(c.output_ids, c.finish_reason) for c in completions] == expected


def test_the_limit_comes_first_where_the_string_is_completed_after_it(golden_target):
    plain = SpeculativeEngine(golden_target, max_length=64, decode=numbers)
    expected = plain.generate([Request(PROMPT, LIMIT)])[0].output_ids
    engine = SpeculativeEngine(
        golden_target, Replay([PROMPT], [expected], 10, wrong_every=100), max_length=64, decode=numbers
    )
    string = numbers(expected[4:7])
    completions = engine.generate([Request(PROMPT, limit, stop_strings=(string,)) for limit in (6, 7, 8)])
    assert [c.output_ids for c in completions] == [expected[:6], expected[:7], expected[:7]]
    assert [c.finish_reason for c in completions] == ["length", "stop", "stop"]
