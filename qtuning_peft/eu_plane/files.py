"""Data sets as files: JSON lines, Parquet, or a folder that `Dataset.save_to_disk` wrote. The same come out."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ..atomic import replacing

JSON_LINES = (".jsonl", ".json", ".ndjson")


def read_data(path: Path, split: str | None = None) -> Dataset:
    """Read a data set.

    Args:
        path: A file of JSON lines or Parquet, or a folder.
        split: Which split, if the folder holds several.

    Raises:
        ValueError: in one sentence, when there is nothing to read.
    """
    if path.is_dir():
        try:
            data = load_from_disk(str(path))
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} is a folder that datasets did not write; name a file or one made by save_to_disk."
            ) from error
        if isinstance(data, DatasetDict):
            if split not in data:
                raise ValueError(f"{path} holds the splits {', '.join(data)}; choose one with --split.")
            data = data[split]
    elif not path.is_file():
        raise ValueError(f"There is no data at {path}; name a file or a folder.")
    else:
        data = _read_file(path)
    if not len(data):
        raise ValueError(f"{path} has no rows.")
    return data


def _read_file(path: Path) -> Dataset:
    if path.suffix not in (*JSON_LINES, ".parquet"):
        raise ValueError(f"{path.name} ends in {path.suffix or 'nothing'}; it must be .jsonl or .parquet, or a folder.")
    if not path.stat().st_size:
        raise ValueError(f"{path} has no rows.")
    try:
        return Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else Dataset.from_json(str(path))
    except (DatasetGenerationError, ValueError, OSError) as error:
        broken = _broken_line(path) if path.suffix in JSON_LINES else None
        if broken:
            raise ValueError(f"{path}, line {broken} is no JSON object; repair or remove it.") from error
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read: {cause}.") from error


def _broken_line(path: Path) -> int | None:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    if not isinstance(json.loads(line), dict):
                        return number
                except json.JSONDecodeError:
                    return number
    return None


def check_output(path: Path) -> None:
    """Refuse a place that `write_data` could not write to, before any work is done.

    Raises:
        ValueError: when it cannot.
    """
    if path.suffix in (*JSON_LINES, ".parquet"):
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file.")
    elif path.suffix:
        raise ValueError(f"{path.name} ends in {path.suffix}; it must be .jsonl or .parquet, or have no ending.")
    elif path.is_file():
        raise ValueError(f"{path} is a file; name a folder.")
    elif path.is_dir() and any(path.iterdir()) and not (path / "dataset_info.json").is_file():
        raise ValueError(f"{path} holds something other than a data set; name another folder.")
    # The nearest folder that exists decides.
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} is not a folder that can be written to; choose another output.")


def write_data(data: Dataset, path: Path) -> None:
    """Write a data set; `path` appears, or is replaced, when all of it is written.

    Args:
        data: The data.
        path: What it ends in says how: `.jsonl` or `.parquet`, or nothing for a folder.
    """
    check_output(path)
    with replacing(path) as unfinished:
        if path.suffix in JSON_LINES:
            _write_lines(data, unfinished)
        elif path.suffix == ".parquet":
            data.to_parquet(str(unfinished))
        else:
            data.save_to_disk(str(unfinished))


def _write_lines(data: Dataset, path: Path) -> None:
    # Dataset.to_json rounds to ten digits; thresholds are compared with what is read again.
    with path.open("w", encoding="utf-8") as file:
        for row in data.with_format(None):
            file.write(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False, default=str) + "\n")


def _plain(value: Any) -> Any:
    """`value` with NaN, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
