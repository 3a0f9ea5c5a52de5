"""A view of stored states: which rows of a folder, with which labels. Pruning is one, and copies no states.

A folder of a view holds `view.json`, which names the folder of the states and the checksum of its manifest, and one
part: `row`, an index into the folder's rows, and every column but the states, as pruning has left them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from ..atomic import replacing
from ..eu_plane.dataset import read_part, write_part
from ..eu_plane.pruner import EUPruner

VIEW, ROWS = "view.json", "rows.arrow"
STATES = ("states", "state_tokens")
ROW = "row"


def pruned_view(rows: Dataset, pruner: EUPruner, among: Sequence[int] | None = None) -> Dataset:
    """`rows` of stored states as `pruner`, fitted here to those of them `among`, prunes these, in the same files."""
    return _joined(rows, _pruned(rows, pruner, among))


def write_view(rows: Dataset, pruner: EUPruner, states: Path, checksum: str, folder: Path) -> None:
    """Write the view that `pruner`, fitted here, makes of `rows`, the stored rows of the folder `states`, to `folder`.

    `checksum` is that of the folder's manifest.
    """
    small = _pruned(rows, pruner)
    content = {"states": os.path.relpath(states, folder), "manifest": checksum}
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        write_part(unfinished / ROWS, small.data.table)
        (unfinished / VIEW).write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_view(folder: Path) -> tuple[Path, str]:
    """The folder of the states that the view in `folder` is of, and the checksum of its manifest."""
    try:
        content: Mapping[str, Any] = json.loads((folder / VIEW).read_text(encoding="utf-8"))
        states, checksum = str(content["states"]), str(content["manifest"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder / VIEW} is damaged ({error!s:.100}); prune the states again.") from error
    return (folder / states).resolve(), checksum


def view_rows(folder: Path, rows: Dataset) -> Dataset:
    """The rows of the view in `folder`, of the stored `rows` that it is of."""
    small = read_part(folder / ROWS)
    if small is None or not {*small[ROW]} <= {*range(len(rows))}:
        raise ValueError(f"{folder / ROWS} is missing or damaged; prune the states again.")
    return _joined(rows, small)


def _pruned(rows: Dataset, pruner: EUPruner, among: Sequence[int] | None = None) -> Dataset:
    small = rows.remove_columns(list(STATES)).add_column(ROW, np.arange(len(rows)))
    small = small if among is None else small.select(among)
    options = {"keep_in_memory": True, "load_from_cache_file": False, "desc": "Pruning"}
    return small.map(pruner.fit(small), batched=True, with_indices=True, **options)


def _joined(rows: Dataset, small: Dataset) -> Dataset:
    """The states of `rows` beside the columns of `small`, for the rows that it names."""
    # Beside all rows, and chosen afterwards: chosen before, they would be copied.
    places: list[int | None] = [None] * len(rows)
    for place, row in enumerate(small[ROW]):
        places[row] = place
    spread = small.flatten_indices().data.table.drop_columns([ROW]).take(pa.array(places, pa.int64()))
    whole = concatenate_datasets([rows.select_columns(list(STATES)), Dataset(spread)], axis=1)
    return whole.select(small[ROW])
