"""Files and folders that appear, or are replaced, only when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to; it takes the place of `path` if the context ends well.

    Args:
        path: Where the result goes; its folder is made.

    Yields:
        Where to write; it ends in what `path` ends in, and does not exist.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
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
