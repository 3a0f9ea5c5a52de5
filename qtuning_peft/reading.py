"""Which hidden states a loss reads, declared around a forward pass by whoever computes the loss.

    read[t] = label[t + 1] != -100        or, by a classifier of rows, their last token

Positions that nobody reads need no side network and no states: few-shot examples, for one, cost the base's pass alone,
and a base behind a frozen prompt prefix need not run over it again.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


class _Declared:
    def __init__(self) -> None:
        # Counted when asked for, as that waits for the device.
        self.column: Callable[[], int] | None = None
        self.positions: Callable[[], Tensor] | None = None  # (batch, length), bool


class _Threads(threading.local):
    # Never written to: a compiled frame forgets what it has written to a `threading.local` where its graph breaks.
    def __init__(self) -> None:
        self.declared = _Declared()


_threads = _Threads()


@contextmanager
def reading_labels(labels: Any) -> Iterator[None]:
    """Declare that in forward passes of this context and thread the states that predict `labels` are read alone.

    `labels` are (batch, length), -100 where a token is not supervised; nothing is declared by anything else.
    """
    known = (lambda: positions_that_predict(labels)) if isinstance(labels, Tensor) and labels.dim() == 2 else None
    with _declared(lambda: unsupervised_columns(labels if known else None), known):
        yield


@contextmanager
def reading_last(input_ids: Tensor, padding: int | None) -> Iterator[None]:
    """Declare that in forward passes of this context and thread each row is read at its last token alone.

    `input_ids` are (batch, length); the last token is the last that is not `padding`, as transformers' classifiers
    have it.
    """

    def first() -> int:
        return int(last_tokens(input_ids, padding).int().argmax(-1).min()) + 1

    with _declared(first, lambda: last_tokens(input_ids, padding)):
        yield


@contextmanager
def behind(columns: int) -> Iterator[None]:
    """In forward passes of this context and thread, the first `columns` of what was declared are left out."""
    positions = _threads.declared.positions
    with _declared(None, None if positions is None else lambda: positions()[:, columns:]):
        yield


@contextmanager
def _declared(column: Callable[[], int] | None, positions: Callable[[], Tensor] | None) -> Iterator[None]:
    declared = _threads.declared
    before = declared.column, declared.positions
    declared.column, declared.positions = column, positions
    try:
        yield
    finally:
        declared.column, declared.positions = before


def first_column() -> int | None:
    """The column that was declared to be the first whose prediction is read; `None` if nothing is known."""
    column = _threads.declared.column
    return None if column is None else column()


def read_positions() -> Tensor | None:
    """Where hidden states are read, (batch, length), bool; `None` if that is not known."""
    positions = _threads.declared.positions
    return None if positions is None else positions()


def positions_that_predict(labels: Tensor) -> Tensor:
    """Where the next token of `labels` (batch, length) is supervised, (batch, length), bool."""
    read = (labels != IGNORE_INDEX).roll(-1, dims=1)
    read[:, -1] = False
    return read


def last_tokens(input_ids: Tensor, padding: int | None) -> Tensor:
    """Where each row of `input_ids` (batch, length) has its last token that is not `padding`, (batch, length), bool."""
    columns = torch.arange(input_ids.shape[-1], device=input_ids.device)
    kept = columns if padding is None else columns * (input_ids != padding)
    return columns == kept.expand_as(input_ids).argmax(-1, keepdim=True)


def unsupervised_columns(labels: Any) -> int:
    """Number of columns at the left of `labels` (batch, length) in which no row is supervised."""
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return 0
    supervised = (labels != IGNORE_INDEX).any(dim=0).nonzero()
    return int(supervised[0]) if len(supervised) else labels.shape[1]
