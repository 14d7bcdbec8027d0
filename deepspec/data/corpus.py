"""The built-in corpus: real text that every Python installation carries, as chat conversations.

Three sets, the same three kinds that the paper evaluates on:
  chat  prose of the language reference (`pydoc_data.topics`) and docstrings, as questions and answers;
  code  functions of the standard library, as complete-this-function tasks;
  math  arithmetic word problems with worked solutions (`deepspec.data.word_problems`).

The train / held-out split goes by document (a topic, a source file, a problem) and by a hash of the document's name,
so it depends on the seed alone: two Python versions with different files still agree on every document they share.
"""

from __future__ import annotations

import ast
import hashlib
import json
import pydoc_data.topics
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepspec.data.word_problems import word_problems
from deepspec.files import write_atomically

SETS = ("math", "code", "chat")
SKIPPED_PARTS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
MAX_ANSWER_CHARS = 900
MIN_ANSWER_CHARS = 80


@dataclass(frozen=True)
class Conversation:
    """One user question with its answer; `document` is what the split goes by."""

    id: str
    set: str
    document: str
    question: str
    answer: str

    def row(self) -> dict:
        messages = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]
        return {"id": self.id, "set": self.set, "messages": messages}


def is_held_out(document: str, seed: int, fraction: float) -> bool:
    """Whether a document belongs to the held-out part: a hash of (seed, name), uniform in [0, 1), under `fraction`."""
    digest = hashlib.sha256(f"{seed}:{document}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def math_conversations(count: int, seed: int) -> Iterator[Conversation]:
    for index, (question, solution) in enumerate(word_problems(count, seed)):
        yield Conversation(f"math-{index:05d}", "math", f"math:{question}", question, solution)


def _library_files() -> Iterator[tuple[str, Path]]:
    """(dotted module name, path) of the standard library's own source files, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_PARTS & set(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            yield ".".join(part for part in parts if part != "__init__"), path


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(qualified name, node) of module-level functions and of methods, in source order."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield f"{node.name}.{member.name}", member


def _dedented_source(lines: list[str], node: ast.FunctionDef) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    body = lines[first - 1 : node.end_lineno]
    return "\n".join(line[node.col_offset :] if not line[: node.col_offset].strip() else line for line in body)


def _code_conversation(module: str, name: str, source: str) -> Conversation | None:
    """A complete-this-function task: the signature is given, the whole is the answer."""
    header = source.split("):", 1)[0] + "):" if "):" in source else source.split("\n", 1)[0]
    if not MIN_ANSWER_CHARS <= len(source) <= MAX_ANSWER_CHARS or header.count("\n") > 4:
        return None
    question = f"Complete this function of the module {module}:\n```python\n{header}\n```"
    return Conversation(f"code-{module}.{name}", "code", f"file:{module}", question, f"```python\n{source}\n```")


def _docstring_conversation(module: str, name: str, docstring: str) -> Conversation | None:
    text = docstring.strip()[:MAX_ANSWER_CHARS]
    if len(text) < MIN_ANSWER_CHARS or not text.isascii():
        return None
    question = f"What does {name} in the module {module} do?"
    return Conversation(f"chat-{module}.{name}", "chat", f"file:{module}", question, text)


def library_conversations() -> Iterator[Conversation]:
    """Code tasks and docstring questions of every readable module, duplicates (by answer) left out."""
    seen: set[str] = set()
    for module, path in _library_files():
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        lines = text.split("\n")
        for name, node in _functions(tree):
            docstring = ast.get_docstring(node)
            candidates = [_code_conversation(module, name, _dedented_source(lines, node))]
            if docstring:
                candidates.append(_docstring_conversation(module, name, docstring))
            for conversation in candidates:
                if conversation is not None and conversation.answer not in seen:
                    seen.add(conversation.answer)
                    yield conversation


def _passages(text: str) -> Iterator[list[str]]:
    """Runs of whole paragraphs, at most MAX_ANSWER_CHARS characters each."""
    run: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.rstrip()[:MAX_ANSWER_CHARS]
        if run and sum(map(len, run)) + len(paragraph) > MAX_ANSWER_CHARS:
            yield run
            run = []
        if paragraph:
            run.append(paragraph)
    if run:
        yield run


def topic_conversations() -> Iterator[Conversation]:
    """Questions about the language reference: each passage of a topic answers one question that names its start.

    Topics share passages; the first topic keeps them, so that no answer stands on both sides of the split.
    """
    seen: set[str] = set()
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        for index, passage in enumerate(_passages(text)):
            answer = "\n\n".join(passage)
            start = " ".join(answer.split()[:6])
            question = f'What does the Python reference say about "{topic}", beginning with "{start}"?'
            if len(answer) >= MIN_ANSWER_CHARS and answer not in seen:
                seen.add(answer)
                yield Conversation(f"chat-topic-{topic}-{index}", "chat", f"topic:{topic}", question, answer)


def build_corpus(
    folder: Path, *, seed: int = 0, held_out_fraction: float = 0.05, math_problems: int = 6000
) -> dict[str, dict[str, int]]:
    """Write `train.jsonl` and `heldout.jsonl` (rows `{"id", "set", "messages"}`) and return the counts per set.

    Rows are shuffled with the seed. A file that exists is complete.
    """
    conversations = [*math_conversations(math_problems, seed), *library_conversations(), *topic_conversations()]
    random.Random(seed).shuffle(conversations)
    counts: dict[str, dict[str, int]] = {}
    for split in ("train", "heldout"):
        rows = [c for c in conversations if is_held_out(c.document, seed, held_out_fraction) == (split == "heldout")]
        lines = [json.dumps(c.row(), ensure_ascii=False) + "\n" for c in rows]
        write_atomically(folder / f"{split}.jsonl", "".join(lines))
        counts[split] = dict(Counter(c.set for c in rows))
    return counts
