"""Let the target write prompts: attempts until enough of them are kept, then a split and a manifest.

train.jsonl, heldout.jsonl, manifest.json    the prompts, as `data_prep.prompts` writes them
.synthesize/attempts-rank0.jsonl, ...        every text as it was written; filters may change without writing anew
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import count as count_from
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState

from deepspec.config import ConfigError
from deepspec.data.corpus import is_held_out
from deepspec.data.formats import content_id
from deepspec.data.jsonl import DataError
from deepspec.data.words import digest_of, hash_words
from deepspec.files import sha256_of, write_atomically
from deepspec.ranks import start_ranks
from deepspec.regeneration.options import WritingOptions, check_options
from deepspec.regeneration.progress import WritingProgress
from deepspec.regeneration.regenerate import PATIENCE
from deepspec.regeneration.setup import Speaker, know_target, open_writer, sampling_settings
from deepspec.regeneration.store import RowStore
from deepspec.regeneration.text import all_text
from deepspec.regeneration.writer import Question, Refusal, Writer, seed_of
from deepspec.synthesis.filters import FilterSettings, PromptFilter
from deepspec.synthesis.opening import Opening, find_opening
from deepspec.synthesis.selection import Attempt, Selection, Selector

HIDDEN, PARTS = ".synthesize", ("train.jsonl", "heldout.jsonl")
EXPECTED_SHARE, LEAST_SHARE = 0.5, 0.05  # of attempts that are kept: before any is made, and at worst
FEWEST_ATTEMPTS = 64  # of a round
ABOUT = "You are a helpful assistant to whom people come with questions about {}."  # system prompt of a topic


@dataclass
class SynthesizeOptions(WritingOptions):
    """The target writes prompts itself, given the opening of a user's turn. Interrupted, the same command goes on."""

    output_dir: str = "outputs/prompts"
    count: int = 1000  # prompts that are kept, of both parts together
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512  # longer texts are left out
    system_prompts: list[str] = field(default_factory=list)  # in turn, before the opening; [] = none
    topics: list[str] = field(default_factory=list)  # likewise: "... people come with questions about TOPIC."
    languages: list[str] = field(default_factory=lambda: ["en"])  # ISO 639-1; [] = any
    min_words: int = 4
    max_words: int = 400
    max_repetition: float = 0.3  # share of runs of four words that were there before
    near_duplicates: float = 0.7  # Jaccard similarity from which the later of two prompts is left out; 1 = exact only
    held_out_fraction: float = 0.05
    max_attempts: int | None = None  # texts written before the run gives up; null = 20 * count


def synthesize(options: SynthesizeOptions) -> dict[str, Any]:
    """Write the prompts. Returns the manifest.

    Raises:
        ConfigError, DataError, FileNotFoundError: bad options, another run in the folder, other settings than before, a
            template without an opening, or too few prompts among `max_attempts` texts.
        WriterError: no server answers any more.
        SystemExit: interrupted from the keyboard; what was written is kept.
    """
    check_synthesize_options(options)
    state = start_ranks(PATIENCE)
    say = WritingProgress(0, is_main=state.is_main_process).say
    store = RowStore(
        options.output_dir, rank=state.process_index, kept=f"{HIDDEN}/attempts", hidden=HIDDEN, results=PARTS
    )
    with closing(store):
        return Synthesis(options, know_target(options), store, state, say).run()


def check_synthesize_options(options: SynthesizeOptions) -> None:
    """Raises ConfigError."""
    check_options(options)
    for name in ("count", "min_words", "max_attempts"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    if options.max_words < options.min_words:
        raise ConfigError(f"max_words={options.max_words}: must be at least min_words={options.min_words}")
    for name in ("max_repetition", "near_duplicates"):
        if not 0 < getattr(options, name) <= 1:
            raise ConfigError(f"{name}={getattr(options, name)}: must be above 0 and at most 1 (off)")
    if not 0 <= options.held_out_fraction < 1:
        raise ConfigError(f"held_out_fraction={options.held_out_fraction}: must be at least 0 and below 1")


class Synthesis:
    """One rank's part in writing, and what all ranks decide alike from what is on disk."""

    def __init__(
        self,
        options: SynthesizeOptions,
        speaker: Speaker,
        store: RowStore,
        state: PartialState,
        say: Callable[[str], None],
    ):
        self._options, self._speaker, self._store, self._state, self._say = options, speaker, store, state, say
        tokenizer = speaker.tokenizer
        prompts: list[str | None] = [*options.system_prompts, *map(ABOUT.format, options.topics)]
        self._openings = [find_opening(tokenizer, options.template_options, prompt) for prompt in prompts or [None]]
        self._ends = tuple(all_text(tokenizer, [token]) for token in speaker.stop_token_ids)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        settings = FilterSettings(
            options.min_words, options.max_words, tuple(options.languages), options.max_repetition
        )
        self._selector = Selector(PromptFilter(settings, special), options.near_duplicates)
        self._most = options.max_attempts or 20 * options.count

    def run(self) -> dict[str, Any]:
        if self._state.is_main_process:
            self._store.begin(self._settings())
        self._state.wait_for_everyone()
        self._store.join()
        attempts = {attempt.number: attempt for attempt in self._read()}
        selection = self._selector.select(attempts.values())
        if attempts:
            self._say(f"{len(attempts):,} texts were written before, {len(selection.kept):,} of them are kept")
        writer: Writer | None = None
        try:
            while len(selection.kept) < self._options.count:
                self._check_progress(len(attempts), selection)
                wanted = self._attempts_of_round(len(attempts), len(selection.kept))
                self._state.wait_for_everyone()  # nobody writes before everybody has read
                writer = writer or open_writer(self._options, self._speaker, self._state.device, self._say)
                self._write(writer, self._share(attempts.__contains__, wanted))
                self._state.wait_for_everyone()
                before = len(attempts)
                attempts |= {attempt.number: attempt for attempt in self._read()}
                selection = self._selector.select(attempts.values())
                self._say(f"{len(attempts):,} texts, {len(selection.kept):,} kept; {_in_words(selection)}")
                if len(attempts) == before:
                    raise DataError(f"none of {wanted} requests was answered; see what the servers say")
        finally:
            if writer:
                writer.close()
        return self._finish(len(attempts), selection)

    def _settings(self) -> dict[str, Any]:
        return {
            **self._speaker.settings(),
            **sampling_settings(self._options),
            "system_prompts": self._options.system_prompts,
            "topics": self._options.topics,
        }

    def _read(self) -> Iterator[Attempt]:
        for row in self._store.kept():
            yield Attempt(row["id"], row["text"], row["finish_reason"] == "length")

    def _check_progress(self, attempts: int, selection: Selection) -> None:
        if attempts >= self._most:
            raise DataError(
                f"{attempts} texts gave {len(selection.kept)} of count={self._options.count} prompts "
                f"({_in_words(selection)}); allow more with max_attempts, or loosen what most are left out for"
            )

    def _attempts_of_round(self, attempts: int, kept: int) -> int:
        share = kept / attempts if attempts else EXPECTED_SHARE
        wanted = math.ceil((self._options.count - kept) / max(share, LEAST_SHARE))
        return min(max(wanted, FEWEST_ATTEMPTS), max(self._most - attempts, 1))

    def _share(self, is_done: Callable[[int], bool], wanted: int) -> list[int]:
        """Numbers of this rank: of the first that are not done, so that gaps of an interrupted run are closed."""
        numbers = islice((number for number in count_from() if not is_done(number)), wanted)
        return list(islice(numbers, self._state.process_index, None, self._state.num_processes))

    def _write(self, writer: Writer, numbers: list[int]) -> None:
        """Let each of these attempts be made, and save it as it ends."""
        waiting, tokens, done, under_way = iter(numbers), 0, 0, 0
        with WritingProgress(len(numbers), what="texts", is_main=self._state.is_main_process) as progress:
            try:
                while done < len(numbers):
                    for number in islice(waiting, max(writer.room, 0)):
                        writer.put(self._question(number, writer.limit))
                    for question, outcome in writer.wait():
                        done += 1
                        if isinstance(outcome, Refusal):
                            if outcome.is_final:
                                raise DataError(f"the opening of a user's turn was refused: {outcome.reason}")
                            continue
                        tokens += outcome.tokens
                        self._save(int(question.key), outcome.raw or "", outcome.finish_reason)
                    under_way = writer.tokens_under_way
                    progress.update(done, tokens + under_way, writer.in_flight)
            except KeyboardInterrupt:
                progress.say("interrupted; what was written is kept: run the command again to go on")
                raise SystemExit(130) from None

    def _question(self, number: int, limit: int) -> Question:
        opening = self._opening(number)
        room = limit - len(opening.prompt_ids)
        if room < 1:
            raise ConfigError(f"a system prompt of {len(opening.prompt_ids)} tokens; there are {limit} positions")
        return Question(
            key=str(number),
            prompt_ids=opening.prompt_ids,
            seed=seed_of(self._options.seed, f"synthetic {number}", 0),
            max_new_tokens=min(self._options.max_new_tokens, room),
            stop_token_ids=tuple(sorted({*opening.stop_token_ids, *self._speaker.stop_token_ids})),
            stop_strings=opening.stop_strings,
        )

    def _opening(self, number: int) -> Opening:
        return self._openings[number % len(self._openings)]

    def _save(self, number: int, raw: str, finish_reason: str) -> None:
        opening = self._opening(number)
        own = tuple(all_text(self._speaker.tokenizer, [token]) for token in opening.stop_token_ids)
        text = opening.text_of(raw, (*own, *self._ends))
        place = number % len(self._openings)
        self._store.keep({"id": number, "prompt": place, "text": text, "finish_reason": finish_reason})

    def _finish(self, attempts: int, selection: Selection) -> dict[str, Any]:
        options, folder = self._options, Path(self._options.output_dir)
        parts: dict[str, list[str]] = {name: [] for name in PARTS}
        for attempt in selection.kept[: options.count]:
            messages = [{"role": "user", "content": attempt.text}]
            is_measured = is_held_out(str(digest_of(hash_words(attempt.text))), options.seed, options.held_out_fraction)
            row = {"id": f"synthetic-{content_id(messages)[:16]}", "source": "synthetic", "messages": messages}
            parts["heldout.jsonl" if is_measured else "train.jsonl"].append(json.dumps(row, ensure_ascii=False) + "\n")
        counts = {name.removesuffix(".jsonl"): len(rows) for name, rows in parts.items()}
        not_needed = max(len(selection.kept) - options.count, 0)
        manifest: dict[str, Any] = {
            "target": self._speaker.short,
            "settings": asdict(options),
            "counts": {"texts": attempts, **counts, "removed": dict(selection.reasons), "not_needed": not_needed},
        }
        if self._state.is_main_process:
            for name, rows in parts.items():
                write_atomically(folder / name, "".join(rows))
            manifest["sha256"] = {name: sha256_of(folder / name) for name in PARTS}
            write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False))
        self._state.wait_for_everyone()
        self._say(
            f"{folder}: {counts['train']:,} prompts to train on, {counts['heldout']:,} held out; {attempts:,} texts; "
            f"{_in_words(selection)}" + (f"; {not_needed} more than count" if not_needed else "")
        )
        return manifest


def _in_words(selection: Selection) -> str:
    """Why texts are left out, the most frequent reason first."""
    listed = ", ".join(f"{reason} {number:,}" for reason, number in selection.reasons.most_common())
    return f"left out: {listed or 'none'}"
