"""Files and folders that appear, or are replaced, only when they are complete."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to; it takes the place of `path` if the context ends well.

    Args:
        path: Where the result goes; its folder is made.

    Yields:
        Where to write; it ends in what `path` ends in, and does not exist.
    """
    # A link stays one: what it points to is replaced.
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is neither a file nor a folder, and is not replaced.")
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_up_after_killed(path)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield unfinished
        if unfinished.is_dir() and path.exists():
            # A folder cannot be replaced in one step: the old one steps aside, and comes back if the new one cannot.
            former = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, former)
            try:
                os.replace(unfinished, path)
            except OSError:
                os.replace(former, path)
                raise
            shutil.rmtree(former)
        else:
            os.replace(unfinished, path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


def clean_up_after_killed(path: Path) -> None:
    """Remove what processes that were killed left beside `path`, and bring back a folder they had put aside."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}.*"):
        found = re.fullmatch(r"\.(\d+)\.(tmp|old)", left.name.replace(path.suffix, "").removeprefix(f".{path.stem}"))
        if found is None or psutil.pid_exists(int(found[1])):
            continue
        if found[2] == "old" and not path.exists():
            os.replace(left, path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
