"""Rows that are tokens already: `input_ids`, `labels`, and how they are padded or packed.

Padding is taken away and packed samples are told apart, so that scores depend on neither.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..loss import IGNORE_INDEX


class RowError(ValueError):
    """Why one row cannot be scored; the others can."""


@dataclass
class Sample:
    """One sample of one row: its place among the rows, its tokens and its labels, each (length,)."""

    row: int
    input_ids: list[int]
    labels: list[int]


@dataclass
class EncodedRow:
    """Tokens of one row.

    Attributes:
        input_ids: (length,), padding removed.
        labels: (length,), -100 where a token is not supervised or nothing predicts it.
        bounds: Where its samples begin, and its length at the end: [0, length] unless it is packed.
        before, after: The row's padding, as tokens.
    """

    input_ids: list[int]
    labels: list[int]
    bounds: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bounds = self.bounds or [0, len(self.input_ids)]
        for start in self.bounds[:-1]:
            if start < len(self.labels):
                self.labels[start] = IGNORE_INDEX

    @property
    def all_input_ids(self) -> list[int]:
        """The tokens with the padding, as the row's other columns count them."""
        return [*self.before, *self.input_ids, *self.after]

    @property
    def all_labels(self) -> list[int]:
        """The labels with the padding, which is not supervised."""
        return [IGNORE_INDEX] * len(self.before) + self.labels + [IGNORE_INDEX] * len(self.after)

    def positions(self) -> list[int]:
        """Indices of the supervised tokens."""
        return [index for index, label in enumerate(self.labels) if label != IGNORE_INDEX]

    def samples(self, row: int) -> Iterator[tuple[int, Sample]]:
        """The samples that have supervised tokens and where they begin; the row's place among others is `row`."""
        for start, stop in pairwise(self.bounds):
            if any(label != IGNORE_INDEX for label in self.labels[start:stop]):
                yield start, Sample(row, self.input_ids[start:stop], self.labels[start:stop])


def tokenized(row: Mapping[str, Any]) -> EncodedRow:
    """An already tokenized row without its padding; a RowError if its columns contradict each other."""
    input_ids = _integers(row["input_ids"], "input_ids")
    length = len(input_ids)

    def column(name: str) -> list[int] | None:
        if row.get(name) is None:
            return None
        values = _integers(row[name], name)
        if len(values) != length:
            raise RowError(f"{name} has {len(values)} entries and input_ids {length}")
        return values

    labels = column("labels")
    for mask in ("completion_mask", "assistant_masks"):
        if labels is None and (supervised := column(mask)) is not None:
            labels = [token if on else IGNORE_INDEX for token, on in zip(input_ids, supervised, strict=True)]
    labels = list(input_ids) if labels is None else labels
    position_ids = column("position_ids")

    attention_mask = column("attention_mask")
    start, stop = 0, length
    if attention_mask is not None and not all(attention_mask):
        seen = [index for index, on in enumerate(attention_mask) if on]
        start, stop = (seen[0], seen[-1] + 1) if seen else (0, 0)
        if len(seen) != stop - start:
            raise RowError("attention_mask has a hole; padding must be at one end")
    padding = {"before": input_ids[:start], "after": input_ids[stop:]}
    input_ids, labels = input_ids[start:stop], labels[start:stop]

    if row.get("seq_lengths") is not None:
        bounds = [0]
        for count in _integers(row["seq_lengths"], "seq_lengths"):
            if count < 1:
                raise RowError(f"seq_lengths holds {count}")
            bounds.append(bounds[-1] + count)
        if bounds[-1] != len(input_ids):
            raise RowError(f"seq_lengths add up to {bounds[-1]} tokens and the row has {len(input_ids)}")
        return EncodedRow(input_ids, labels, bounds, **padding)
    if position_ids is not None and input_ids:
        position_ids = position_ids[start:stop]
        bounds = [index for index, position in enumerate(position_ids) if position == 0]
        counted = [p for start, stop in pairwise([*bounds, len(position_ids)]) for p in range(stop - start)]
        if counted != position_ids:
            raise RowError("position_ids do not count up from 0 within each sample")
        return EncodedRow(input_ids, labels, [*bounds, len(input_ids)], **padding)
    return EncodedRow(input_ids, labels, **padding)


def untouched(row: Mapping[str, Any]) -> EncodedRow:
    """A tokenized row that cannot be scored, with the tokens and labels it came with, as far as they are any."""
    try:
        input_ids = _integers(row["input_ids"], "input_ids")
        labels = _integers(row["labels"], "labels") if row.get("labels") is not None else list(input_ids)
    except (RowError, TypeError):
        return EncodedRow([], [])
    result = EncodedRow(input_ids, list(labels))
    result.labels = labels
    return result


def _integers(values: Any, name: str) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if not all(type(value) is int for value in values):
        raise RowError(f"{name} holds something other than integers")
    return values
