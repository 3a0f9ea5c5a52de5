"""Data sets as files: JSON lines, Parquet, or a folder that `Dataset.save_to_disk` wrote. The same come out."""

import json
import math
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_from_disk

from ..atomic import replacing

JSON_LINES = (".jsonl", ".json", ".ndjson")


def read_data(path: Path, split: str | None = None) -> Dataset:
    """The data set in a file of JSON lines or Parquet or in a folder, of which `split` names one split of several."""
    if path.is_dir():
        try:
            data = load_from_disk(str(path))
        except Exception as error:
            # Whatever datasets and Arrow make of files that are damaged, or not theirs.
            advice = "name a file, or a folder made by save_to_disk"
            raise ValueError(f"{path} is a folder that datasets cannot read ({cause(error)}); {advice}.") from error
        if isinstance(data, DatasetDict):
            if split not in data:
                raise ValueError(f"{path} holds the splits {', '.join(data)}; choose one with --split.")
            data = data[split]
    elif not path.is_file():
        raise ValueError(f"There is no data at {path}; name a file or a folder.")
    elif split is not None:
        raise ValueError(f"--split is {split}, but {path} is a file; leave --split out.")
    else:
        data = _read_file(path)
    if not len(data):
        raise ValueError(f"{path} has no rows.")
    return data


def _read_file(path: Path) -> Dataset:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            return Dataset(pq.read_table(path))
        except Exception as error:
            raise ValueError(f"{path} is no Parquet file, or a damaged one: {cause(error)}.") from error
    if suffix not in JSON_LINES:
        raise ValueError(f"{path.name} ends in {path.suffix or 'nothing'}; it must be .jsonl or .parquet, or a folder.")
    rows = list(json_rows(path))
    # In order of appearance; a row may lack some.
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except Exception as error:
        raise ValueError(f"{path} has a column of several types, or of values too large: {cause(error)}.") from error


def cause(error: Exception) -> str:
    """The first line of an error of another library, shortened."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0].rstrip(".") if lines else type(error).__name__, 200)


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of JSON lines, or of one array, as they are written: other readers take a string like a date for one."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"["):
        try:
            rows = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON array: {cause(error)}.") from error
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} is an array of something other than objects; make every entry a row.")
        yield from rows
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is no JSON object; repair or remove it.")
            yield row


def check_output(path: Path, overwrite: bool = True) -> None:
    """Refuse, with a ValueError, a place that `write_data` could not, or should not, write to, before work is done."""
    suffix = path.suffix.lower()
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is neither a file nor a folder; choose another output.")
    if suffix in (*JSON_LINES, ".parquet"):
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file.")
    elif suffix:
        raise ValueError(f"{path.name} ends in {path.suffix}; it must be .jsonl or .parquet, or have no ending.")
    elif path.is_file():
        raise ValueError(f"{path} is a file; name a folder.")
    elif path.is_dir() and any(path.iterdir()) and not (path / "dataset_info.json").is_file():
        raise ValueError(f"{path} holds something other than a data set; name another folder.")
    if not overwrite and (path.is_file() or (path / "dataset_info.json").is_file()):
        raise ValueError(f"{path} is there already; choose another output, or give --overwrite.")
    # The nearest folder that exists decides.
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} is not a folder that can be written to; choose another output.")


def write_data(data: Dataset, path: Path, overwrite: bool = True) -> None:
    """Write `data` as the ending of `path` says: `.jsonl`, `.parquet`, or none for a folder; replaced when complete."""
    check_output(path, overwrite)
    with replacing(path) as unfinished:
        if path.suffix.lower() in JSON_LINES:
            # Dataset.to_json rounds to ten digits; thresholds are compared with what is read again.
            with unfinished.open("w", encoding="utf-8") as file:
                for row in data.with_format(None):
                    file.write(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False, default=str) + "\n")
        elif path.suffix.lower() == ".parquet":
            data.to_parquet(str(unfinished))
        else:
            data.save_to_disk(str(unfinished))


def _plain(value: Any) -> Any:
    """`value` with NaN, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
