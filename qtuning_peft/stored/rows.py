"""Stored rows: as a data set, as batches that a side network learns from, and as a store of the hidden-state cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from safetensors import safe_open
from torch import Tensor, nn

from ..eu_plane.dataset import is_whole
from ..eu_plane.fingerprint import weights_of
from ..eu_plane.pruner import EUPruner
from ..reading import IGNORE_INDEX
from ..states.projection import PROJECTION, format_of
from ..states.stores import key_of
from .manifest import HEAD, MANIFEST, Manifest, checksum_of, read_projection, states_of
from .view import view_rows, write_view

SIXTEEN_BITS = {"BF16": torch.bfloat16, "F16": torch.float16}


def load_states(folder: str | Path) -> Dataset:
    """The rows of a folder of states, or of a view of one, mapped from its files.

    Raises:
        ValueError: when a file is missing or damaged.
    """
    if (states := states_of(folder)) != Path(folder):
        return view_rows(Path(folder), load_states(states))
    folder = states
    manifest = Manifest.read(folder)
    files = [folder / name for name in manifest.parts]
    for file in files:
        if not is_whole(file):
            raise ValueError(f"{file} is missing or damaged; compute the states again, which keeps the other parts.")
    rows = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    if len(rows) != manifest.rows:
        raise ValueError(f"{folder} holds {len(rows)} rows, its manifest says {manifest.rows}; compute them again.")
    return rows


def prune_states(folder: str | Path, pruner: EUPruner, output: str | Path) -> Dataset:
    """Prune stored states: `output` becomes a view of the rows and tokens that are kept, without a copy of the states.

    Args:
        folder: Of states.
        pruner: What to keep. It is fitted here.
        output: The folder to make.

    Returns:
        Its rows, as [`load_states`] reads them.
    """
    folder, rows = Path(folder), load_states(folder)
    if states_of(folder) != folder:
        raise ValueError(f"{folder} is pruned already; prune {states_of(folder)} with other settings.")
    write_view(rows, pruner, folder, checksum_of(folder / MANIFEST), Path(output))
    return load_states(output)


class StoredRows:
    """The rows of a folder of states, for the hidden-state cache of a model that trains on the same rows.

    See `states.stores`. It is read alone: rows that the folder does not hold are computed in every epoch.

    Args:
        folder: Of states, or a view of one.
        base: The model that they must be of.

    Raises:
        ValueError: when they are of another base, or `layers` are not the stored blocks.
    """

    used = 0

    def __init__(self, folder: str | Path, base: nn.Module, layers: Sequence[int]) -> None:
        self.collator, self.rows = StatesCollator(folder), load_states(folder)
        manifest = self.collator.manifest
        if manifest.weights and manifest.weights != weights_of(base):
            raise ValueError(f"The states in {folder} are of {manifest.base}, whose weights are not this base's.")
        if sorted(layers) != sorted(manifest.layers):
            raise ValueError(f"The states in {folder} are of blocks {[*manifest.layers]}, not of {sorted(layers)}.")
        self.places: dict[bytes, int] = {}
        for place, row in enumerate(self.rows.remove_columns("states")):
            read = np.asarray(row["state_tokens"], np.int64) - 1
            self.places[key_of(np.asarray(row["input_ids"], np.int64), read)] = place

    def get(self, key: bytes) -> Tensor | None:
        """The states (N + 2, n, d) of a row."""
        place = self.places.get(key)
        if place is None:
            return None
        manifest = self.collator.manifest
        return self.collator.format.decode(self.rows[place]["states"], len(manifest.layers) + 2, manifest.hidden_size)

    def add(self, key: bytes, states: Tensor) -> None:
        """Nothing: the folder is finished."""


class StatesCollator:
    """Makes a batch of stored rows, one behind the other.

    It has `states` (N + 2, tokens, d) of the N blocks `state_layers` (N,), `labels` (1 + tokens,), and `row_tokens`
    (rows,), how many are of each row. The first label is -100: trainers count labels from the second on, as nothing
    predicts the first of a row.

    Tokens whose label has been taken back, by pruning, are left out.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = states_of(folder)
        self.manifest = Manifest.read(folder)
        projection = read_projection(folder)[0] if self.manifest.format == PROJECTION else None
        self.format = format_of(self.manifest.format, projection)
        with safe_open(folder / HEAD, "pt") as head:
            dtypes = {head.get_slice(name).get_dtype() for name in head.keys()}  # noqa: SIM118
        # As the head computes: what was widened while decoding would be rounded there, and take twice the memory here.
        self.dtype = SIXTEEN_BITS.get(dtypes.pop()) if len(dtypes) == 1 else None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch."""
        states, labels = [], []
        for row in rows:
            own = torch.as_tensor(row["labels"])[torch.as_tensor(row["state_tokens"], dtype=torch.int64)]  # (n,)
            parts = len(self.manifest.layers) + 2
            stored = self.format.decode(row["states"], parts, self.manifest.hidden_size)
            stored = stored if self.dtype is None else stored.to(self.dtype)
            kept = own != IGNORE_INDEX
            states.append(stored if kept.all() else stored[:, kept])
            labels.append(own[kept])
        return {
            "labels": torch.cat([torch.tensor([IGNORE_INDEX]), *labels]), "states": torch.cat(states, dim=1),
            "row_tokens": torch.tensor([len(row) for row in labels]),
            "state_layers": torch.tensor(self.manifest.layers, dtype=torch.int64),
        }  # fmt: skip
