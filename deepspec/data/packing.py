"""Documents laid into the rows of a batch: one a row and padded, or several behind one another and packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One conversation ready for training."""

    index: int  # place in the dataset
    epoch: int  # which pass over the data asked for it
    id: str  # the row's own id, for messages
    input_ids: list[int]  # [tokens]
    loss_mask: list[int]  # [tokens], 1 = written by the assistant


@dataclass(frozen=True)
class Document:
    """One sample and its place in a batch."""

    index: int  # place in the dataset
    row: int
    start: int  # its first column
    length: int  # tokens

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of whole documents. Padding stands only at the end of a row and counts on from the last document."""

    input_ids: Tensor  # long [rows, tokens]
    position_ids: Tensor  # long [rows, tokens], 0 at the first token of every document
    loss_mask: Tensor  # bool [rows, tokens], True = written by the assistant
    documents: tuple[Document, ...]

    @property
    def is_packed(self) -> bool:
        """Whether any row holds more than one document."""
        return len(self.documents) > self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(document.length for document in self.documents)

    def to(self, device: torch.device) -> TokenBatch:
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
        )


def lay_out(rows: Sequence[Sequence[Sample]], pad_id: int) -> TokenBatch:
    """Put each inner sequence of samples into one row, in order, and pad the rows on the right to the longest."""
    length = max(sum(len(sample.input_ids) for sample in row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    position_ids = torch.zeros(len(rows), length, dtype=torch.long)
    loss_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    documents = []
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            document = Document(sample.index, number, start, len(sample.input_ids))
            input_ids[number, document.columns] = torch.as_tensor(sample.input_ids)
            position_ids[number, start:] = torch.arange(length - start)
            loss_mask[number, document.columns] = torch.as_tensor(sample.loss_mask, dtype=torch.bool)
            documents.append(document)
            start += document.length
    return TokenBatch(input_ids, position_ids, loss_mask, tuple(documents))


@dataclass(frozen=True)
class Unpacked:
    """Some documents of a packed batch, one a row."""

    batch: TokenBatch
    documents: tuple[Document, ...]  # where each row comes from


def one_document_a_row(packed: TokenBatch) -> Iterator[Unpacked]:
    """The documents of a packed batch in padded batches that hold no more places than it does.

    Neighbours in length share a batch, so little of it is padding.
    """
    places = packed.input_ids.numel()
    group: list[Document] = []
    for document in sorted(packed.documents, key=lambda document: -document.length):
        if group and group[0].length * (len(group) + 1) > places:
            yield _one_a_row(packed, group)
            group = []
        group.append(document)
    yield _one_a_row(packed, group)


def _one_a_row(packed: TokenBatch, documents: Sequence[Document]) -> Unpacked:
    longest = documents[0].length
    input_ids = packed.input_ids.new_zeros(len(documents), longest)
    loss_mask = packed.loss_mask.new_zeros(len(documents), longest)
    for row, document in enumerate(documents):
        input_ids[row, : document.length] = packed.input_ids[document.row, document.columns]
        loss_mask[row, : document.length] = packed.loss_mask[document.row, document.columns]
    positions = torch.arange(longest, device=input_ids.device).expand(len(documents), -1)
    rows = tuple(replace(document, row=row, start=0) for row, document in enumerate(documents))
    return Unpacked(TokenBatch(input_ids, positions, loss_mask, rows), tuple(documents))


def anchor_candidates(loss_mask: Tensor, position_ids: Tensor) -> Tensor:
    """Where a block may start, and where the target's final state can carry loss (DSpark section 4).

    True where the token itself and the next one of the same document are both supervised:
    bool [rows, tokens], long [rows, tokens] -> bool [rows, tokens]
    """
    candidates = torch.zeros_like(loss_mask)
    candidates[:, :-1] = loss_mask[:, :-1] & loss_mask[:, 1:] & (position_ids[:, 1:] > 0)
    return candidates
