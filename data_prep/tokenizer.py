"""Train, or verify, the built-in tokenizer: `python -m data_prep.tokenizer [folder=...] [corpus=outputs/corpus]`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich import print
from transformers import AutoTokenizer

from deepspec.arguments import run_command
from deepspec.data.jsonl import read_jsonl
from deepspec.data.tokenizer import train_tokenizer
from deepspec.targets import BUILTIN_WEIGHTS
from deepspec.targets.builtin import texts_of


@dataclass
class TokenizerOptions:
    """A byte-level BPE with chat template and mask token. A folder that has one keeps it, after a round-trip check."""

    folder: str = str(BUILTIN_WEIGHTS)
    corpus: str = "outputs/corpus"
    vocab_size: int = 2048


def main(options: TokenizerOptions) -> None:
    folder, corpus = Path(options.folder), Path(options.corpus)
    if not (folder / "tokenizer.json").is_file():
        trained = train_tokenizer(texts_of(corpus / "train.jsonl"), options.vocab_size)
        folder.mkdir(parents=True, exist_ok=True)
        trained.save_pretrained(folder)
        print(f"tokenizer: trained {len(trained)} tokens into {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    characters = tokens = 0
    for place, row in read_jsonl(corpus / "heldout.jsonl"):
        for message in row["messages"]:
            ids = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
            if tokenizer.decode(ids) != message["content"]:
                raise ValueError(
                    f"{place}: the tokenizer in {folder} does not give this text back; delete the folder's files"
                )
            characters, tokens = characters + len(message["content"]), tokens + len(ids)
    print(f"tokenizer: {folder} is valid, {len(tokenizer)} tokens, {characters / tokens:.2f} characters a token")


if __name__ == "__main__":
    run_command(main, TokenizerOptions)
