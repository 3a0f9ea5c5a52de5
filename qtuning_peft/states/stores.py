"""Where the hidden-state cache keeps rows: in main memory, or in a folder that outlives the process.

A row's states are (N + 2, n, d): the embeddings, N taps and the final norm's output at the n positions that are read.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..atomic import replacing
from .format import FORMATS

CHECKSUM_BYTES = 16


def key_of(tokens: np.ndarray, read: np.ndarray) -> bytes:
    """The key of a row of `tokens` (length,) whose positions `read` (n,) are read: what comes behind is not of it."""
    upto = int(read.max(initial=-1)) + 1
    return tokens[:upto].astype(np.int64).tobytes() + b"|" + read.astype(np.int64).tobytes()


class Store(Protocol):
    """Keeps the states of rows by a key: their tokens, and which positions are read (see `key_of`)."""

    used: int

    def get(self, key: bytes) -> Tensor | None:
        """The states (N + 2, n, d) of a row, if they are kept."""

    def add(self, key: bytes, states: Tensor) -> None:
        """Keep the states (N + 2, n, d) of a row, if there is room."""


class MemoryStore:
    """In main memory, in 16 bits, in `budget` bytes, of which `used` are used."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._rows: dict[bytes, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model computes its own.
        return {"budget": self.budget, "used": 0, "_rows": {}}

    def get(self, key: bytes) -> Tensor | None:
        """See [`Store`]."""
        return self._rows.get(key)

    def add(self, key: bytes, states: Tensor) -> None:
        """See [`Store`]."""
        states = states.to("cpu", states.dtype if states.dtype.itemsize == 2 else torch.bfloat16)
        if key not in self._rows and self.used + states.nbytes <= self.budget:
            self._rows[key] = states.clone()
            self.used += states.nbytes


class FolderStore:
    """In a folder, a file for each row, each ending in a checksum; a damaged one is computed anew.

    Args:
        folder: For the states of one base, its taps and a format, and for no others.
        parts: N + 2.
        width: d.
        states_format: As in `format`.
    """

    def __init__(self, folder: Path, parts: int, width: int, states_format: str = "bfloat16") -> None:
        self.folder, self.parts, self.width, self.used = folder, parts, width, 0
        self.format, self.states_format = FORMATS[states_format], states_format
        folder.mkdir(parents=True, exist_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "format"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, format=FORMATS[state["states_format"]])

    def get(self, key: bytes) -> Tensor | None:
        """See [`Store`]."""
        file = self._file(key)
        if not file.is_file():
            return None
        content = file.read_bytes()
        content, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
        if checksum != xxhash.xxh3_128_digest(content):
            return None
        return self.format.decode(content, self.parts, self.width)

    def add(self, key: bytes, states: Tensor) -> None:
        """See [`Store`]."""
        content = self.format.encode(states)
        with replacing(self._file(key)) as unfinished:
            unfinished.write_bytes(content + xxhash.xxh3_128_digest(content))
        self.used += len(content)

    def _file(self, key: bytes) -> Path:
        return self.folder / f"{xxhash.xxh3_128_hexdigest(key)}.states"
