"""The public prompt sets that draft models are compared on: where they come from and how their prompts are worded.

The wording is that of the published measurements (the evaluation sets of DSpark and DFlash), word for word: accepted
lengths depend on it. A further set is one more entry of `PUBLIC_SETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Turns = Callable[[Row], list[str]]  # the user turns of a row as it was published

REASONED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
SOLVED = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
PROGRAMMED = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests. You will NOT return anything except "
    "for the program\n\n### Question:\n"
)
WITH_STARTER, WITHOUT_STARTER = "Use the following code structure:", "Write your code in the following format:"
PUBLISHED_SEED = 980406  # with which a set of more prompts than were measured was shuffled before the first were taken


@dataclass(frozen=True)
class PublicSet:
    """A set as its authors publish it, and the prompts that are made of its rows."""

    name: str
    hub: str  # OWNER/NAME[/CONFIG]:SPLIT on the Hub; of a repository of loose files OWNER/NAME
    turns: Turns
    files: tuple[str, ...] = ()  # how the original files are called, the first that is there counts
    hub_files: tuple[str, ...] = ()  # in a repository of loose files
    keep: Callable[[Row], bool] = lambda row: True  # rows of the split, where a file holds others too
    prompts: int = 0  # how many were published
    measured: int = 0  # how many of them the published protocol decodes
    sha256: str | None = None  # of the published prompts, see `deepspec.evaluation.set_building.prompts_digest`


def column(*names: str, before: str = "", after: str = "") -> Turns:
    """One turn: the first of these columns that a row has, with text around it.

    The function raises KeyError where the row has none of them.
    """

    def turns(row: Row) -> list[str]:
        name = next((name for name in names if row.get(name) is not None), None)
        if name is None:
            raise KeyError(" or ".join(names))
        return [f"{before}{row[name]}{after}"]

    return turns


def several_turns(row: Row) -> list[str]:
    """MT-Bench: `turns`, on the Hub `prompt`."""
    turns = row.get("turns", row.get("prompt"))
    if not isinstance(turns, list):
        raise KeyError("turns or prompt")
    return turns


def instruction(row: Row) -> list[str]:
    """Alpaca: the instruction and, where there is one, its input."""
    return [f"{row['instruction']}\n\nInput:\n{row['input']}" if row.get("input") else row["instruction"]]


def program(row: Row) -> list[str]:
    """LiveCodeBench: the question, and code to begin with where there is some."""
    starter = row.get("starter_code")
    form = (
        f"### Format: {WITH_STARTER if starter else WITHOUT_STARTER}\n```python\n{starter or '# YOUR CODE HERE'}\n```"
    )
    return [f"{PROGRAMMED}{row['question_content']}\n\n{form}\n\n### Answer: (use the provided format with backticks)"]


def arena_question(row: Row) -> list[str]:
    """Arena-Hard: `prompt` since v2.0, before it the content of the only turn."""
    return [row["prompt"]] if "prompt" in row else [row["turns"][0]["content"]]


def in_test_split_of_mbpp(row: Row) -> bool:
    """The original files hold all splits; the test split is tasks 11 to 510."""
    return 11 <= int(row["task_id"]) <= 510


PUBLIC_SETS = (
    PublicSet(
        "gsm8k",
        hub="openai/gsm8k/main:test",
        files=("test.jsonl",),
        turns=column("question", after=REASONED),
        prompts=1319,
        measured=500,
        sha256="63330a20a17f416fdfca978ebcd5124f8da5546affb3a079b65a6e8daf42b41f",
    ),
    PublicSet(
        "math500",
        hub="HuggingFaceH4/MATH-500:test",
        files=("test.jsonl",),
        turns=column("problem", after=REASONED),
        prompts=500,
        measured=500,
        sha256="4f530d9d3126dca41c12a96e78ec0dd460b7202052ba86101c4da159cea33aac",
    ),
    PublicSet(
        "aime24",
        hub="HuggingFaceH4/aime_2024:train",
        turns=column("problem", "Problem", "question", after=REASONED),
        prompts=30,
        measured=30,
    ),
    PublicSet(
        "aime25",
        hub="MathArena/aime_2025:train",
        turns=column("problem", "Problem", "question", after=REASONED),
        prompts=30,
        measured=30,
        sha256="b8835996839caa1d982c5bb9ecaeca636424f0b8ed9f33a40b084feb1c1766d0",
    ),
    PublicSet(
        "humaneval",
        hub="openai/openai_humaneval:test",
        files=("HumanEval.jsonl.gz", "HumanEval.jsonl"),
        turns=column("prompt", before=SOLVED, after="\n```"),
        prompts=164,
        measured=164,
        sha256="7aaed6a3987007ecee4851ee4572fde214aa2a36ae83fa21be9c5f443aa71675",
    ),
    PublicSet(
        "mbpp",
        hub="google-research-datasets/mbpp/sanitized:test",
        files=("sanitized-mbpp.json", "mbpp.jsonl"),
        turns=column("prompt", "text"),
        keep=in_test_split_of_mbpp,
        prompts=257,
        measured=256,
        sha256="019b981f7122e39ce58866cf93f4206511c72532cb537bbaf298753a0f128ba7",
    ),
    PublicSet(
        "livecodebench",
        hub="livecodebench/code_generation_lite",
        hub_files=("test.jsonl", *(f"test{part}.jsonl" for part in range(2, 7))),
        files=("test*.jsonl",),
        turns=program,
        prompts=1055,
        measured=500,
        sha256="40ed536492f331ac27b3b68506072366ca1d3a304b92c31d822574e778c87318",
    ),
    PublicSet(
        "mt-bench",
        hub="HuggingFaceH4/mt_bench_prompts:train",
        files=("question.jsonl",),
        turns=several_turns,
        prompts=80,
        measured=80,
        sha256="df05defbcea350dff39f7d2996a7cba8a029e6e06069dfcdab11ceb998d743b0",
    ),
    PublicSet(
        "alpaca",
        hub="tatsu-lab/alpaca:train",
        files=("alpaca_data.json", "alpaca_eval.json"),
        turns=instruction,
        prompts=52002,
        measured=500,
        sha256="c1f1623ac08e4c4f024604bb2689a024963eb7eb9dbbc29e57dda5a11d87e07b",
    ),
    PublicSet(
        "arena-hard",
        hub="lmarena-ai/arena-hard-auto",
        hub_files=("data/arena-hard-v2.0/question.jsonl",),
        files=("question.jsonl",),
        turns=arena_question,
        prompts=750,
        measured=500,
        sha256="e5fcce94ffb1a2ef2082b5c63ac36608f2b7faf00da13ecb94ce2adc649b7b91",
    ),
)
