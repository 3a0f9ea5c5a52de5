"""Columns of scored data as a table of pandas, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from ..loss import IGNORE_INDEX
from .scores import SCORES, scores_of, token_columns

Data: TypeAlias = Dataset | Mapping[str, Sequence[Any]]


def names_of(data: Data) -> Collection[str]:
    """Names of the columns of `data`."""
    return getattr(data, "column_names", None) or data.keys()


def check_whole(data: Any, streamed: bool = False) -> None:
    """Refuse several splits, and, unless it may be `streamed`, data that nobody sees all of."""
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        raise ValueError("The data has several splits, and only training data is pruned; pass dataset['train'].")
    if isinstance(data, IterableDataset) and not streamed:
        raise ValueError("The data is streamed, so thresholds for all of it cannot be found; set per_batch to True.")


def require(needed: Collection[str], given: Collection[str]) -> None:
    """Refuse data without some of the columns `needed`, naming the scores to compute."""
    missing = sorted({*needed} - {*given})
    if missing:
        scores = scores_of(missing)
        advice = f" and scores={scores}" if scores else ""
        command = " ".join(["qtuning score", *(f"--score {name}" for name in scores)])
        raise ValueError(
            f"The data has no column {', '.join(missing)}; score the data with EUScorer{advice} first, from a shell "
            f"with {command}."
        )


def read_table(data: Data, needed: Collection[str]) -> pd.DataFrame:
    """The columns `needed` of scored data, scores checked to be finite, and `unscored`, whether a row has no score."""
    require(needed, names_of(data))
    check_lists(data)
    scores = {*needed} & {"supervised_tokens", *SCORES}
    rows = pd.DataFrame({n: numbers(data, n) if n in scores else plain(data[n][:]) for n in sorted(needed)})
    if rows.empty:
        raise ValueError("The data is empty; there is nothing to prune.")
    rows["unscored"] = list(map(bool, data["unscored"][:])) if "unscored" in names_of(data) else False
    # Scores of rows may be undefined for some, as `ifd` is for answers of one token.
    for name in sorted(name for name in scores if name not in SCORES or SCORES[name].per_token):
        broken = np.flatnonzero(~np.isfinite(rows[name]) & ~rows["unscored"])
        if len(broken):
            advice = "score the data again, in a wider dtype if the model's output overflowed"
            raise ValueError(f"{name} of row {broken[0]} is {rows[name][broken[0]]}; {advice}.")
    return rows


def numbers(data: Data, name: str) -> np.ndarray:
    """The column `name` in float64, (rows,), NaN where there is no value."""
    try:
        return np.array(pd.to_numeric(pd.Series(plain(data[name][:]))), np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"Column {name} holds something other than numbers; score the data again.") from error


def check_lists(data: Data) -> None:
    """Refuse a data set whose tokens or scores of tokens, which files may hold in any type, are no lists of numbers."""
    look: Any = data.with_format("arrow") if hasattr(data, "with_format") else {}
    for name in sorted({"input_ids", "labels", *token_columns()} & {*names_of(look)}):
        integers = name in ("input_ids", "labels")
        try:
            given = look[name][:]
            column = given.cast(pa.list_(pa.int64() if integers else pa.float64()))
            broken = column.null_count or pc.list_flatten(column).null_count
            # Text and truth values can be cast, too.
            right = (pa.types.is_integer, pa.types.is_null, *([] if integers else [pa.types.is_floating]))
            broken = broken or not any(check(given.type.value_type) for check in right)
        except pa.ArrowException:
            broken = True
        if broken:
            kind = "integers" if integers else "numbers"
            raise ValueError(f"Column {name} holds something other than lists of {kind}; score the data again.")


def rank_correlation(first: Any, second: Any) -> float:
    """Spearman's rank correlation of two arrays (samples,); NaN if one is constant."""
    # Of ranks by hand: pandas' own "spearman" needs SciPy.
    return float(pd.Series(first).rank().corr(pd.Series(second).rank()))


def mismatch(tokens: int, scores: int) -> ValueError:
    """The error for a row whose labels changed after it was scored."""
    return ValueError(f"A row has {tokens} supervised tokens and {scores} token scores; score the data again.")


def plain(column: Any) -> Any:
    """A column of any of `datasets`' formats as a list."""
    if isinstance(column, (str, bytes, dict, float, int)) or column is None:
        return column
    if hasattr(column, "to_pylist"):
        return column.to_pylist()
    column = column.tolist() if hasattr(column, "tolist") else list(column)
    return [value.tolist() if hasattr(value, "tolist") else value for value in column]


def columns_of(rows: Any, wanted: Collection[str] | None = None) -> dict[str, list[Any]]:
    """The columns of a batch that `map` hands over, of any of `datasets`' formats, as lists; all, or those `wanted`."""
    columns = {name: plain(rows[name]) for name in names_of(rows) if wanted is None or name in wanted}
    # Of a single row, text and numbers are no lists, tokens are numbers, and turns are mappings.
    whole = [columns[name] for name in ("input_ids", "messages", "conversations", "prompt") if name in columns]
    if not all(isinstance(column, list) for column in columns.values()) or any(
        isinstance(value, (int, dict)) for column in whole for value in column[:1]
    ):
        raise ValueError("A single row came instead of a batch; call map with batched=True.")
    return columns


def supervised(labels: Sequence[int]) -> list[int]:
    """The supervised tokens among `labels`."""
    return [label for label in labels if label != IGNORE_INDEX]
