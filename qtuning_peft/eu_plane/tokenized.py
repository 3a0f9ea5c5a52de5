"""Rows that are tokens already: `input_ids`, `labels`, and how they are padded or packed.

Padding and the samples that are packed together are told apart, so that scores depend on neither.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from ..loss import IGNORE_INDEX


class RowError(ValueError):
    """Why one row cannot be scored; the others can."""


@dataclass
class Sample:
    """One sample of one row: its place among the rows, its tokens and labels, each (length,), and where it begins."""

    row: int
    input_ids: list[int]
    labels: list[int]
    start: int = 0

    @property
    def stop(self) -> int:
        """The column of the row behind its last."""
        return self.start + len(self.labels)


@dataclass
class EncodedRow:
    """Tokens of one row.

    Attributes:
        input_ids: (length,), padding included.
        labels: (length,), -100 where a token is padding, or not supervised, or nothing predicts it.
        bounds: Where its samples begin, and where the last one ends: [0, length] without padding and packing.
    """

    input_ids: list[int]
    labels: list[int]
    bounds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bounds = self.bounds or [0, len(self.input_ids)]
        begin, end = self.bounds[0], self.bounds[-1]
        if len(self.bounds) > 1:
            self.labels = [label if begin <= i < end else IGNORE_INDEX for i, label in enumerate(self.labels)]
        for start, stop in pairwise(self.bounds):
            if start < stop:
                self.labels[start] = IGNORE_INDEX

    def positions(self) -> list[int]:
        """Indices of the supervised tokens."""
        return [index for index, label in enumerate(self.labels) if label != IGNORE_INDEX]

    def samples(self, row: int) -> Iterator[Sample]:
        """The samples that have supervised tokens; the row's place among others is `row`."""
        for start, stop in pairwise(self.bounds):
            if any(label != IGNORE_INDEX for label in self.labels[start:stop]):
                yield Sample(row, self.input_ids[start:stop], self.labels[start:stop], start)


def tokenized(row: Mapping[str, Any]) -> EncodedRow:
    """An already tokenized row; a RowError if its columns contradict each other."""
    input_ids = _integers(row["input_ids"], "input_ids")

    def column(name: str) -> list[int] | None:
        values = None if row.get(name) is None else _integers(row[name], name)
        if values is not None and len(values) != len(input_ids):
            raise RowError(f"{name} has {len(values)} entries and input_ids {len(input_ids)}")
        return values

    labels = column("labels")
    for mask in ("completion_mask", "assistant_masks"):
        if labels is None and (supervised := column(mask)) is not None:
            labels = [token if on else IGNORE_INDEX for token, on in zip(input_ids, supervised, strict=True)]
    position_ids, seen = column("position_ids"), column("attention_mask")

    columns = range(len(input_ids)) if seen is None else [index for index, on in enumerate(seen) if on]
    start, stop = (columns[0], columns[-1] + 1) if columns else (0, 0)
    if len(columns) != stop - start:
        raise RowError("attention_mask has a hole; padding must be at one end")
    bounds = [start, stop]
    if row.get("seq_lengths") is not None:
        counts = _integers(row["seq_lengths"], "seq_lengths")
        if min(counts, default=1) < 1:
            raise RowError(f"seq_lengths holds {min(counts)}")
        if sum(counts) != stop - start:
            raise RowError(f"seq_lengths add up to {sum(counts)} tokens and the row has {stop - start}")
        bounds = list(accumulate(counts, initial=start))
    elif position_ids is not None and columns:
        bounds = [*(index for index in columns if position_ids[index] == 0), stop]
        if [p for begin, end in pairwise(bounds) for p in range(end - begin)] != position_ids[start:stop]:
            raise RowError("position_ids do not count up from 0 within each sample")
    return EncodedRow(input_ids, list(input_ids) if labels is None else labels, bounds)


def untouched(row: Mapping[str, Any]) -> EncodedRow:
    """A row that cannot be scored: no samples, but the tokens and labels it came with, as far as they are any."""
    try:
        input_ids = _integers(row.get("input_ids"), "input_ids")
        labels = input_ids if row.get("labels") is None else _integers(row["labels"], "labels")
    except (RowError, TypeError):
        input_ids = labels = []
    return EncodedRow(input_ids, labels, [0])


def _integers(values: Any, name: str) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if not all(type(value) is int for value in values):
        raise RowError(f"{name} holds something other than integers")
    return values
