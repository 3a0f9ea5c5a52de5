"""Files and folders that appear, or are replaced, only when they are complete, and by one process at a time."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from filelock import FileLock, Timeout


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a free path of the same name to write a file or a folder to; it replaces `path` if the context ends well.

    Raises:
        ValueError: when `path` is neither a file nor a folder.
    """
    # A link stays one: what it points to is replaced.
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is neither a file nor a folder, and is not replaced.")
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_up_after_killed(path.parent, re.escape(path.name))
    prefix = f".{path.name}.{os.getpid()}."
    with TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True) as beside:
        unfinished, former = Path(beside) / path.name, Path(beside) / "former"
        yield unfinished
        if unfinished.is_dir() and path.exists():
            # A folder cannot be replaced in one step: the old one steps aside, and comes back if the new one cannot.
            os.replace(path, former)
            try:
                os.replace(unfinished, path)
            except OSError:
                os.replace(former, path)
                raise
        else:
            os.replace(unfinished, path)


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Hold a lock beside `path`, which is about to be made; a `ValueError` when another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    try:
        with FileLock(file, timeout=0):
            yield
            # Who waits for no lock cannot get this one after it is gone.
            file.unlink(missing_ok=True)
    except Timeout as error:
        raise ValueError(f"Another process is at work on {path}; wait for it, or choose another output.") from error


def clean_up_after_killed(folder: Path, names: str = ".+") -> None:
    """Remove what killed processes left in `folder` beside what `names` matches; bring back what they put aside."""
    pattern = re.compile(rf"\.({names})\.(\d+)\.\w+")
    for left in folder.iterdir():
        found = pattern.fullmatch(left.name)
        if found is None or psutil.pid_exists(int(found[2])):
            continue
        path = folder / found[1]
        if (left / "former").exists() and not path.exists():
            os.replace(left / "former", path)
        shutil.rmtree(left, ignore_errors=True)
