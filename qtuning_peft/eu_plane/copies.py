"""Copies among rows: the same prompt with the same answer. Exact ones alone, found by a hash of every row.

Rows that answer different questions alike, as those of a classification do, are no copies.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pandas as pd

from ..loss import IGNORE_INDEX
from .table import Data, names_of, plain, require
from .tokens import checked


@dataclass(frozen=True, eq=False)
class Copies:
    """Which rows of a data set are copies of an earlier one.

    Attributes:
        keys: A hash of what each row says, (rows,), uint64.
        later: Whether an earlier row says the same, (rows,), bool.
    """

    keys: np.ndarray
    later: np.ndarray

    @classmethod
    def among(cls, data: Data, tokenizer: Any) -> "Copies":
        """The copies in all of `data`."""
        keys = keys_of(data, tokenizer)
        return cls(keys, pd.Series(keys).duplicated().to_numpy())

    def of(self, rows: Data, tokenizer: Any, indices: Sequence[int] | None) -> np.ndarray:
        """Which of `rows` are copies, (rows,), bool: those that `indices` number in the data set, or all that it has.

        Raises:
            ValueError: when they are not those of the data set.
        """
        keys, count = keys_of(rows, tokenizer), len(self.keys)
        places = np.arange(len(keys)) if indices is None else np.asarray(indices, np.int64)
        whole = indices is not None or len(keys) == count
        if not whole or places.max(initial=0) >= count or (self.keys[places] != keys).any():
            raise ValueError(
                "deduplicate is True, but these rows are not those that fit has seen, in their order; call "
                "map(pruner, batched=True, with_indices=True) on the data that fit was called with."
            )
        return self.later[places]


def keys_of(data: Data, tokenizer: Any) -> np.ndarray:
    """A hash of what every row says, (rows,), uint64.

    With a tokenizer of its text, whitespace and case apart and without special tokens; else of its tokens.
    """
    require(columns := ("input_ids", "labels"), names_of(data))
    rows = zip(*(data[name] for name in columns), strict=True)
    return np.array([_key(plain(input_ids), plain(labels), tokenizer) for input_ids, labels in rows], np.uint64)


def _key(input_ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> int:
    if tokenizer is None:
        said = [np.asarray(values, np.int64).tobytes() for values in (input_ids, labels)]
    else:
        supervised = np.asarray(labels) != IGNORE_INDEX
        # Nothing predicts the first token, so that it never is; it belongs to what follows.
        supervised[:1] = supervised[1:2]
        said = []
        for answer, run in groupby(zip(supervised.tolist(), checked(input_ids), strict=True), itemgetter(0)):
            text = tokenizer.decode([token for _, token in run], skip_special_tokens=True)
            if words := " ".join(text.casefold().split()):
                said.append(f"{answer:d} {words}".encode("utf-8", "replace"))
    return int.from_bytes(hashlib.blake2b(b"\0".join(said), digest_size=8).digest(), "big")
