"""Let the target answer prompts: reads what is left to do, keeps the writer busy, saves each row as it ends."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from omegaconf import MISSING

from deepspec.config import ConfigError
from deepspec.data.formats import read_conversations
from deepspec.ranks import start_ranks
from deepspec.regeneration.dialogue import Dialogue, Task
from deepspec.regeneration.options import WritingOptions, check_choice, check_options
from deepspec.regeneration.progress import WritingProgress
from deepspec.regeneration.setup import Speaker, know_target, open_writer, sampling_settings
from deepspec.regeneration.store import RowStore, done_rows
from deepspec.regeneration.tasks import share_of, tasks_of
from deepspec.regeneration.writer import Answer, Question, Refusal, Writer, seed_of

logger = logging.getLogger(__name__)

LEAST_ROOM = 16  # tokens: a prompt that leaves less for an answer is refused
PATIENCE = timedelta(days=30)  # of ranks that are done with those that are not


@dataclass
class RegenerateOptions(WritingOptions):
    """The target answers prompts. Interrupted, the same command goes on; several ranks share the work."""

    prompts: list[str] = MISSING  # rows with `messages`; assistant turns in them are written anew
    answers: int = 1  # of each prompt, drawn independently
    limit: int | None = None  # the first that many prompts; null = all
    system_prompt: str | None = None  # goes first where a prompt has no system turn
    on_cut: str = "keep"  # rows whose answer reached max_new_tokens: keep or drop


def regenerate(options: RegenerateOptions) -> Counter[str]:
    """Write OUTPUT/answers-rankR.jsonl. Returns what happened on all ranks: `rows` written, `tokens`, `cut`, ...

    Raises:
        ConfigError, DataError, FileNotFoundError: bad options or prompts, another run in the folder, or other settings.
        WriterError: no server answers any more.
        SystemExit: interrupted from the keyboard; finished rows are kept.
    """
    check_regenerate_options(options)
    state = start_ranks(PATIENCE)
    progress = WritingProgress(0, is_main=state.is_main_process)
    with closing(RowStore(options.output_dir, rank=state.process_index)) as store:
        return _regenerate(options, know_target(options), store, state, progress.say)


def _regenerate(
    options: RegenerateOptions, speaker: Speaker, store: RowStore, state: PartialState, say: Callable[[str], None]
) -> Counter[str]:
    if state.is_main_process:
        store.begin(settings_of(options, speaker))
    state.wait_for_everyone()
    store.join()
    known, left_out = done_rows(store)
    state.wait_for_everyone()  # nobody writes before everybody has read

    def tasks(counts: Counter[str], on_format: Callable[[str], None] = logger.debug) -> Iterator[Task]:
        prompts = islice(read_conversations(options.prompts, on_format=on_format), options.limit)
        return tasks_of(prompts, known, options.answers, counts)

    counts: Counter[str] = Counter()
    wanted = {task.id for task in tasks(counts, say)}
    done = wanted & known.keys()
    say(_plan(options, counts, len(wanted), len(done), {id: left_out[id] for id in done & left_out.keys()}))
    share = share_of(tasks(Counter()), done.__contains__, state.process_index, state.num_processes)
    mine = len(range(state.process_index, len(wanted) - len(done), state.num_processes))
    result: Counter[str] = Counter()
    started = time.monotonic()
    if mine:
        with closing(open_writer(options, speaker, state.device, say)) as writer:
            started = time.monotonic()  # whoever writes is ready
            run = Regeneration(options, speaker, store, writer, result)
            with WritingProgress(mine, is_main=state.is_main_process) as bar:
                try:
                    run.work(share, bar.update)
                except KeyboardInterrupt:
                    bar.say(f"interrupted; {result['rows']} new rows are kept: run the command again to go on")
                    raise SystemExit(130) from None
    total: Counter[str] = Counter()
    for each in gather_object([result]):
        total.update(each)
    say(summary(options, total, len(done), max(gather_object([time.monotonic() - started]))))
    return total


def check_regenerate_options(options: RegenerateOptions) -> None:
    """Raises ConfigError."""
    check_options(options)
    check_choice("on_cut", options.on_cut, ("keep", "drop"))
    if not options.prompts:
        raise ConfigError("prompts=[]: name at least one file")
    if options.answers < 1:
        raise ConfigError(f"answers={options.answers}: must be at least 1")
    if options.answers > 1 and options.temperature == 0:
        raise ConfigError(f"answers={options.answers}: at temperature=0 all answers of a prompt are the same")


def settings_of(options: RegenerateOptions, speaker: Speaker) -> dict[str, Any]:
    """What rows depend on. More answers may be asked for later; one answer has another id than the first of several."""
    return {
        **speaker.settings(),
        **sampling_settings(options),
        "system_prompt": options.system_prompt,
        "on_cut": options.on_cut,
        "answers": "1" if options.answers == 1 else "several",
    }


@dataclass
class Regeneration:
    """The work of one rank."""

    options: RegenerateOptions
    speaker: Speaker
    store: RowStore
    writer: Writer
    counts: Counter[str]  # rows, tokens, cut, dropped, refused, failed, shortened
    dialogues: dict[str, Dialogue] = field(default_factory=dict)  # under way, by id

    def work(self, tasks: Iterable[Task], report: Callable[[int, int, int], None]) -> None:
        """Until all tasks have ended; `report(rows done, tokens, rows under way)` is called all the time."""
        waiting = iter(tasks)
        has_more = True
        while has_more or self.dialogues:
            while has_more and self.writer.room > 0:
                task = next(waiting, None)
                has_more = task is not None
                if task is not None:
                    self._begin(task)
            for question, outcome in self.writer.wait() if self.dialogues else ():
                self._take(self.dialogues[question.key], question, outcome)
            done = sum(self.counts[each] for each in ("rows", "dropped", "refused", "failed"))
            report(done, self.counts["tokens"] + self.writer.tokens_under_way, self.writer.in_flight)

    def _begin(self, task: Task) -> None:
        self.dialogues[task.id] = dialogue = Dialogue(task, self.options.system_prompt)
        self._ask(dialogue)

    def _ask(self, dialogue: Dialogue) -> None:
        """Its next turn, if it has one that fits; else it is finished."""
        messages = dialogue.next_prompt()
        if messages is None:
            self._finish(dialogue)
            return
        try:
            prompt_ids = self.speaker.prompt(messages, dialogue.tools)
        except ValueError as error:
            self._refuse(dialogue, Refusal(str(error)))
            return
        room = self.writer.limit - len(prompt_ids)
        if room < min(LEAST_ROOM, self.options.max_new_tokens):
            self._refuse(dialogue, Refusal(f"a prompt of {len(prompt_ids)} tokens; {self.writer.limit} positions"))
            return
        self.writer.put(
            Question(
                key=dialogue.task.id,
                prompt_ids=prompt_ids,
                seed=seed_of(self.options.seed, dialogue.task.id, dialogue.turn),
                max_new_tokens=min(self.options.max_new_tokens, room),
                stop_token_ids=self.speaker.stop_token_ids,
                messages=messages,
                tools=dialogue.tools,
            )
        )

    def _take(self, dialogue: Dialogue, question: Question, outcome: Answer | Refusal) -> None:
        if isinstance(outcome, Refusal):
            self._refuse(dialogue, outcome)
            return
        self.counts["tokens"] += outcome.tokens
        dialogue.take(self.speaker.reader.message_of(outcome, question.prompt_ids, dialogue.tools))
        self._ask(dialogue)

    def _refuse(self, dialogue: Dialogue, refusal: Refusal) -> None:
        """A later turn that cannot be asked ends the conversation before it; what was answered is kept."""
        if dialogue.turn and refusal.is_final:
            self.counts["shortened"] += 1
            dialogue.end()
            self._finish(dialogue)
        else:
            self._leave_out(dialogue, "refused" if refusal.is_final else "failed", refusal.reason)

    def _finish(self, dialogue: Dialogue) -> None:
        if not dialogue.turn:
            self._leave_out(dialogue, "refused", "no turn of a user to answer")
            return
        self.counts["cut"] += dialogue.is_cut
        if dialogue.is_cut and self.options.on_cut == "drop":
            self._leave_out(dialogue, "cut", f"longer than max_new_tokens={self.options.max_new_tokens} or the slot")
            return
        del self.dialogues[dialogue.task.id]
        self.store.keep(dialogue.row(self.speaker.short))
        self.counts["rows"] += 1

    def _leave_out(self, dialogue: Dialogue, reason: str, detail: str) -> None:
        task = dialogue.task
        del self.dialogues[task.id]
        place = {"place": task.conversation.place, "detail": detail}
        self.store.leave_out({"id": task.id, "prompt": task.digest, "reason": reason, **place})
        self.counts["dropped" if reason == "cut" else reason] += 1


def _plan(options: RegenerateOptions, counts: Counter[str], wanted: int, done: int, left_out: dict[str, str]) -> str:
    parts = [f"{counts['prompts']:,} prompts"]
    if options.answers > 1:
        parts.append(f"{wanted:,} rows")
    if done:
        parts.append(f"{done:,} are done")
    if left_out:
        named = Counter(left_out.values())
        parts.append(", ".join(f"{count} of them left out ({reason})" for reason, count in sorted(named.items())))
    if counts["renamed"]:
        parts.append(f"{counts['renamed']} with the id of another prompt get one of their own (ID~DIGEST)")
    return "; ".join(parts)


def summary(options: RegenerateOptions, total: Counter[str], skipped: int, seconds: float) -> str:
    """What happened, in a line."""
    rate = total["tokens"] / max(seconds, 1e-3)
    parts = [
        f"{options.output_dir}: {total['rows']:,} rows, {total['tokens']:,} tokens, {total['cut']} cut"
        + (f" (of them {total['dropped']} dropped)" if total["dropped"] else ""),
        f"{total['refused']} refused",
        f"{skipped:,} done before",
        f"{rate:,.0f} tokens/s",
    ]
    if total["shortened"]:
        parts.append(f"{total['shortened']} end before a turn that did not fit")
    if total["failed"]:
        parts.append(f"{total['failed']} failed, run the command again")
    if total["refused"] or total["failed"]:
        parts.append(f"see {options.output_dir}/.regenerate/left-out-*.jsonl")
    return "; ".join(parts)
