"""Scoring and pruning a whole data set: with a progress bar, resumable, and in one line.

Data is scored in parts. A part's file is named by a hash of its rows, the model and the settings, appears when it is
complete, and ends in a checksum: started again, scoring computes only what is not there, or damaged, and the result is
the same to the bit.
"""

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import nn
from tqdm.auto import tqdm

from ..atomic import replacing
from ..processes import SharedWork
from .engine import Engine
from .pruner import EUPruner
from .scorer import EUScorer, refuse_own
from .table import check_whole

logger = logging.getLogger(__name__)
CHECKSUM_BYTES, CHUNK_BYTES = 16, 2**22
STATES = "states"
Data = TypeVar("Data", Dataset, DatasetDict, IterableDataset, IterableDatasetDict)


def score(
    dataset: Data, model: nn.Module, tokenizer: Any = None, *, resume_dir: str | os.PathLike[str] | None = None,
    rows_per_part: int = 256, progress: bool = True, work: SharedWork | None = None, **settings: Any,
) -> Data:  # fmt: skip
    """Score a data set; add the columns of [`EUScorer`].

    Args:
        dataset: The data, or several splits of it. Streamed data is scored as it is read.
        model, tokenizer: As in [`EUScorer`].
        resume_dir: Folder that keeps finished parts, so that an interrupted call, in this process or another, goes on
            where it stopped. It may serve several data sets and models, and can be deleted afterwards.
        rows_per_part: Rows scored together, sorted by length among themselves.
        progress: Show a progress bar.
        work: Processes that share the scoring, all of which make this call and get the result; `resume_dir` is where
            they find each other's parts.
        **settings: Of [`EUScorer`].
    """
    if rows_per_part < 1:
        raise ValueError(f"rows_per_part is {rows_per_part}; choose at least 1.")
    scorer = EUScorer(model, tokenizer, **settings)
    if isinstance(dataset, (IterableDataset, IterableDatasetDict)):
        if resume_dir is not None:
            raise ValueError(f"resume_dir is {resume_dir}, but streamed data is not kept; leave it out.")
        return dataset.map(scorer, batched=True, batch_size=rows_per_part)
    work = work or SharedWork(shared=False)
    refuse_shards(scorer.engines, work)
    scored = partial(
        _score, scorer=scorer, resume_dir=resume_dir, rows_per_part=rows_per_part, progress=progress, work=work
    )
    if isinstance(dataset, DatasetDict):
        return DatasetDict({name: scored(split) for name, split in dataset.items()})
    return scored(dataset)


def prune(
    dataset: Dataset, model: nn.Module, tokenizer: Any = None, *, scoring: dict[str, Any] | None = None, **pruning: Any
) -> Dataset:
    """Score and prune in one line: `prune(dataset, model, tokenizer, sample_ratio=0.25, token_ratio=0.5)`.

    Args:
        dataset: The training data.
        model, tokenizer: As in [`EUScorer`]; the tokenizer's special tokens are not trimmed.
        scoring: Arguments of [`score`], such as `{"resume_dir": "scores"}`.
        **pruning: Arguments of [`EUPruner`].

    Returns:
        The kept rows, with `input_ids` and `labels` that any trainer takes.
    """
    pruner = EUPruner(tokenizer=tokenizer, **pruning)
    check_whole(dataset, streamed=pruner.per_batch)
    scoring = dict(scoring or {})
    scoring["scores"] = (*pruner.scores, *scoring.get("scores", ()))
    scored = score(dataset, model, tokenizer, **scoring)
    if not pruner.per_batch:
        pruner.fit(scored)
    return scored.map(pruner, batched=True, with_indices=True)


def _score(
    dataset: Dataset, scorer: EUScorer, resume_dir: str | os.PathLike[str] | None, rows_per_part: int, progress: bool,
    work: SharedWork,
) -> Dataset:  # fmt: skip
    look, dataset = dataset.format, dataset.with_format(None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(resume_dir or temporary)
        if folder.is_file():
            raise ValueError(f"resume_dir is {folder}, which is a file; name a folder.")
        if resume_dir is None and work.count > 1:
            raise ValueError("resume_dir is None, but processes share the work; name a folder that all of them see.")
        files = score_parts(dataset, Parts(scorer, folder), rows_per_part, progress, work)
        scores = concatenate_datasets([_required(file) for file in files])
    others = [name for name in dataset.column_names if name not in scores.column_names]
    scored = concatenate_datasets([dataset.select_columns(others), scores], axis=1) if others else scores
    # As map does: what is shown stays shown, and new columns are.
    shown = [name for name in scored.column_names if name in look["columns"] or name not in dataset.column_names]
    return scored.with_format(look["type"], shown, look["output_all_columns"], **look["format_kwargs"])


def refuse_shards(engines: Sequence[Engine], work: SharedWork) -> None:
    """Refuse to share work where the processes have to run every pass of a model together."""
    if work.count > 1 and any(engine.together for engine in engines):
        raise ValueError(
            "The model is sharded: its processes run every pass together, and cannot share the rows; load it whole in "
            "each process, or run one process."
        )


@dataclass
class Parts:
    """Parts of a data set as files in `folder`, each computed by `scorer` when it is not there, or damaged."""

    scorer: EUScorer
    folder: Path

    @cached_property
    def fingerprint(self) -> str:
        """The scorer's, which reads all weights."""
        return self.scorer.fingerprint()

    def file(self, rows: Mapping[str, Sequence[Any]]) -> Path:
        """Where the scores of `rows` are, or will be."""
        return self.folder / f"{Hasher.hash([self.fingerprint, rows])}.arrow"

    def compute(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Path:
        """The file of `rows`, which `indices` number in messages, finished."""
        file = self.file(rows)
        if not is_whole(file):
            write_part(file, table_of(self.scorer(rows, indices)))
        return file


def score_parts(dataset: Dataset, parts: Parts, rows_per_part: int, progress: bool, work: SharedWork) -> list[Path]:
    """The files of all parts of `dataset`, which the processes of `work` compute."""
    if not len(dataset):
        raise ValueError("The data is empty; there is nothing to score.")
    refuse_own(dataset.column_names)
    parts.scorer.encoder.format_of(dataset.column_names)
    bounds = [range(start, min(start + rows_per_part, len(dataset))) for start in range(0, len(dataset), rows_per_part)]
    files: dict[int, Path] = {}
    with tqdm(total=len(dataset), desc="Scoring", unit=" rows", disable=not (progress and work.main)) as bar:
        parts.scorer.on_progress = bar.update
        for index in work.pieces(len(bounds)):
            indices = bounds[index]
            bar.n = indices.start
            files[index] = parts.compute(dataset[indices.start : indices.stop], indices)
            # Rows that were not run, or as several samples.
            bar.n = indices.stop
            bar.refresh()
        parts.scorer.on_progress = None
        work.meet()
        bar.n = len(dataset)
        bar.refresh()
    for index, indices in enumerate(bounds):
        if index not in files:
            rows = dataset[indices.start : indices.stop]
            files[index] = parts.file(rows)
            if not files[index].is_file():  # as in processes that see another folder
                parts.compute(rows, indices)
    return [files[index] for index in range(len(bounds))]


def table_of(columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """Columns that a scorer has made as a table of `datasets`; states, which may be large, are copied once."""
    small = {name: values for name, values in columns.items() if name != STATES}
    table = Dataset.from_dict(small).data.table
    if STATES in columns:
        ends = np.cumsum([0, *map(len, columns[STATES])], dtype=np.int64)
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(columns[STATES]))]
        states = pa.Array.from_buffers(pa.large_binary(), len(ends) - 1, buffers)
        table = table.replace_schema_metadata(None).append_column(STATES, states)
    return table


def write_part(file: Path, table: pa.Table) -> None:
    """Write `table` to `file`, with a checksum behind it."""
    with replacing(file) as unfinished:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        checksum = _checksum(unfinished, unfinished.stat().st_size)
        with unfinished.open("ab") as end:
            end.write(checksum)


def is_whole(file: Path) -> bool:
    """Whether `file` is a finished part, and as it was written."""
    if not file.is_file():
        return False
    length = file.stat().st_size - CHECKSUM_BYTES
    with file.open("rb") as content:
        content.seek(max(length, 0))
        whole = length > 0 and content.read() == _checksum(file, length)
    if not whole:
        logger.warning("%s is damaged; its rows are scored again.", file)
    return whole


def read_part(file: Path) -> Dataset | None:
    """The finished part in `file`, if there is one that is as it was written, in memory: the folder may be deleted."""
    if not is_whole(file):
        return None
    # Named, as datasets would hash all of it for a name.
    return Dataset(pa.ipc.open_stream(file.read_bytes()).read_all(), fingerprint=file.stem)


def _required(file: Path) -> Dataset:
    if (part := read_part(file)) is None:
        raise ValueError(f"{file} has been changed or removed since it was written; score again.")
    return part


def _checksum(file: Path, length: int) -> bytes:
    # With its name: a part under another's name holds the scores of other rows.
    digest = xxhash.xxh3_128(file.stem.encode())
    chunk = memoryview(bytearray(min(length, CHUNK_BYTES)))
    with file.open("rb", buffering=0) as content:
        while length > 0 and (got := content.readinto(chunk[:length])):
            digest.update(chunk[:got])
            length -= got
    return digest.digest()
