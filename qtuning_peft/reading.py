"""Which hidden states a loss reads, declared around a forward pass by whoever computes the loss.

    read[t] = label[t + 1] != -100

Positions that nobody reads need no side network and no states: few-shot examples, for one, cost the base's pass alone,
and a base behind a frozen prompt prefix need not run over it again.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

IGNORE_INDEX = -100


class _Declared:
    def __init__(self) -> None:
        # Counted when asked for, as that waits for the device.
        self.column: Callable[[], int] | None = None
        self.labels: Tensor | None = None


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
    known = labels if isinstance(labels, Tensor) and labels.dim() == 2 else None
    with _declared(lambda: unsupervised_columns(known), known):
        yield


@contextmanager
def reading_from(column: Callable[[], int]) -> Iterator[None]:
    """Declare that in forward passes of this context and thread no hidden state before `column()` - 1 is read."""
    with _declared(column, None):
        yield


@contextmanager
def behind(columns: int) -> Iterator[None]:
    """In forward passes of this context and thread, the first `columns` of what was declared are left out."""
    labels = _threads.declared.labels
    with _declared(None, None if labels is None else labels[:, columns:]):
        yield


@contextmanager
def _declared(column: Callable[[], int] | None, labels: Tensor | None) -> Iterator[None]:
    declared = _threads.declared
    before = declared.column, declared.labels
    declared.column, declared.labels = column, labels
    try:
        yield
    finally:
        declared.column, declared.labels = before


def first_column() -> int | None:
    """The column that was declared to be the first whose prediction is read; `None` if nothing is known."""
    column = _threads.declared.column
    return None if column is None else column()


def read_positions() -> Tensor | None:
    """Where hidden states are read, (batch, length), bool; `None` if that is not known."""
    labels = _threads.declared.labels
    return None if labels is None else positions_that_predict(labels)


def positions_that_predict(labels: Tensor) -> Tensor:
    """Where the next token of `labels` (batch, length) is supervised, (batch, length), bool."""
    read = (labels != IGNORE_INDEX).roll(-1, dims=1)
    read[:, -1] = False
    return read


def unsupervised_columns(labels: Any) -> int:
    """Number of columns at the left of `labels` (batch, length) in which no row is supervised."""
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return 0
    supervised = (labels != IGNORE_INDEX).any(dim=0).nonzero()
    return int(supervised[0]) if len(supervised) else labels.shape[1]
