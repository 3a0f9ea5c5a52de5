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


class _Declared(threading.local):
    def __init__(self) -> None:
        # Counted when asked for, as that waits for the device.
        self.column: Callable[[], int] | None = None


_declared = _Declared()


@contextmanager
def reading_from(column: Callable[[], int]) -> Iterator[None]:
    """Declare that in forward passes of this context and thread no hidden state before `column()` - 1 is read."""
    before, _declared.column = _declared.column, column
    try:
        yield
    finally:
        _declared.column = before


def first_column() -> int | None:
    """The column that `reading_from` declared; `None` if nothing is known."""
    return None if _declared.column is None else _declared.column()


def unsupervised_columns(labels: Any) -> int:
    """Number of columns at the left of `labels` (batch, length) in which no row is supervised."""
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return 0
    supervised = (labels != IGNORE_INDEX).any(dim=0).nonzero()
    return int(supervised[0]) if len(supervised) else labels.shape[1]
