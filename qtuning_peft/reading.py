"""Which hidden states a loss reads, declared around a forward pass by whoever computes the loss.

Positions that nobody reads need no side network and no states: a base behind a frozen prompt prefix, for one, need not
run over the prefix again.
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


class _Threads(threading.local):
    # Never written to: a compiled frame forgets what it has written to a `threading.local` where its graph breaks.
    def __init__(self) -> None:
        self.declared = _Declared()


_threads = _Threads()


@contextmanager
def reading_from(column: Callable[[], int]) -> Iterator[None]:
    """Declare that in forward passes of this context and thread no hidden state before `column()` - 1 is read."""
    declared = _threads.declared
    before, declared.column = declared.column, column
    try:
        yield
    finally:
        declared.column = before


def first_column() -> int | None:
    """The column that `reading_from` declared; `None` if nothing is known."""
    column = _threads.declared.column
    return None if column is None else column()


def unsupervised_columns(labels: Any) -> int:
    """Number of columns at the left of `labels` (batch, length) in which no row is supervised."""
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return 0
    supervised = (labels != IGNORE_INDEX).any(dim=0).nonzero()
    return int(supervised[0]) if len(supervised) else labels.shape[1]
