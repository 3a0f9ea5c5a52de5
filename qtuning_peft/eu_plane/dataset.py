"""Scoring and pruning a whole data set: with a progress bar, resumable, and in one line.

Data is scored in parts. A part's file is named by a hash of its rows, the model and the settings, appears when it is
complete, and ends in a checksum: started again, scoring computes only what is not there, or damaged, and the result is
the same to the bit.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import xxhash
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import nn
from tqdm.auto import tqdm

from ..atomic import replacing
from .pruner import EUPruner
from .scorer import EUScorer, refuse_own

logger = logging.getLogger(__name__)
CHECKSUM_BYTES = 16
Data = TypeVar("Data", Dataset, DatasetDict, IterableDataset, IterableDatasetDict)


def score(
    dataset: Data, model: nn.Module, tokenizer: Any = None, *, resume_dir: str | os.PathLike[str] | None = None,
    rows_per_part: int = 256, progress: bool = True, **settings: Any,
) -> Data:  # fmt: skip
    """Score a data set; add the columns of [`EUScorer`].

    Args:
        dataset: The data, or several splits of it. Streamed data is scored as it is read.
        model, tokenizer: As in [`EUScorer`].
        resume_dir: Folder that keeps finished parts, so that an interrupted call, in this process or another, goes on
            where it stopped. It may serve several data sets and models, and can be deleted afterwards.
        rows_per_part: Rows scored together, sorted by length among themselves.
        progress: Show a progress bar.
        **settings: Of [`EUScorer`].
    """
    if rows_per_part < 1:
        raise ValueError(f"rows_per_part is {rows_per_part}; choose at least 1.")
    scorer = EUScorer(model, tokenizer, **settings)
    if isinstance(dataset, (IterableDataset, IterableDatasetDict)):
        return dataset.map(scorer, batched=True, batch_size=rows_per_part)
    scored = partial(_score, scorer=scorer, resume_dir=resume_dir, rows_per_part=rows_per_part, progress=progress)
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
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        raise ValueError("prune takes one split, as only training data is pruned; pass dataset['train'].")
    pruner = EUPruner(tokenizer=tokenizer, **pruning)
    if isinstance(dataset, IterableDataset) and not pruner.per_batch:
        raise ValueError("The data is streamed, so thresholds for all of it cannot be found; set per_batch to True.")
    scoring = dict(scoring or {})
    scoring["scores"] = (*pruner.scores, *scoring.get("scores", ()))
    scored = score(dataset, model, tokenizer, **scoring)
    if not pruner.per_batch:
        pruner.fit(scored)
    return scored.map(pruner, batched=True)


def _score(
    dataset: Dataset, scorer: EUScorer, resume_dir: str | os.PathLike[str] | None, rows_per_part: int, progress: bool
) -> Dataset:
    look, dataset = dataset.format, dataset.with_format(None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(resume_dir or temporary)
        if folder.is_file():
            raise ValueError(f"resume_dir is {folder}, which is a file; name a folder.")
        parts = [part for _, part in score_parts(dataset, scorer, folder, rows_per_part, progress)]
    scores = concatenate_datasets(parts)
    others = [name for name in dataset.column_names if name not in scores.column_names]
    scored = concatenate_datasets([dataset.select_columns(others), scores], axis=1) if others else scores
    return scored.with_format(look["type"], **look["format_kwargs"])


def score_parts(
    dataset: Dataset, scorer: EUScorer, folder: Path, rows_per_part: int, progress: bool
) -> Iterator[tuple[Path, Dataset]]:
    """Every part's file in `folder`, and what it holds, in memory; only what is not there, or damaged, is computed."""
    if not len(dataset):
        raise ValueError("The data is empty; there is nothing to score.")
    refuse_own(dataset.column_names)
    scorer.encoder.format_of(dataset.column_names)
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = scorer.fingerprint()
    with tqdm(total=len(dataset), desc="Scoring", unit=" rows", disable=not progress) as bar:
        for start in range(0, len(dataset), rows_per_part):
            indices = range(start, min(start + rows_per_part, len(dataset)))
            rows = dataset[indices.start : indices.stop]
            file = folder / f"{Hasher.hash([fingerprint, rows])}.arrow"
            part = read_part(file)
            if part is None:
                scorer.on_progress = bar.update
                part = Dataset.from_dict(scorer(rows, indices))
                scorer.on_progress = None
                write_part(file, part.data.table)
            else:
                bar.set_postfix_str("resumed")
            # Rows that were not run, or as several samples.
            bar.n = indices.stop
            bar.refresh()
            yield file, part


def write_part(file: Path, table: pa.Table) -> None:
    """Write `table` to `file`, with a checksum behind it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    with replacing(file) as unfinished:
        unfinished.write_bytes(content + _checksum(file, content))


def read_part(file: Path) -> Dataset | None:
    """The finished part in `file`, if there is one that is as it was written, in memory: the folder may be deleted."""
    if not file.is_file():
        return None
    content = file.read_bytes()
    content, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if checksum != _checksum(file, content):
        logger.warning("%s is damaged; its rows are scored again.", file)
        return None
    return Dataset(pa.ipc.open_stream(content).read_all())


def _checksum(file: Path, content: bytes) -> bytes:
    # With its name: a part under another's name holds the scores of other rows.
    return xxhash.xxh3_128_digest(file.stem.encode() + content)
