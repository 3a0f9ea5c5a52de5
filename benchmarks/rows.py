"""Result rows: one JSON object a line, with what is needed to trust and to repeat it.

Rows go to `benchmarks/results/NAME.jsonl`, or to the folder that the environment variable QTUNING_RESULTS names.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.common import HERE, environment

Row = dict[str, Any]


def results_file(name: str) -> Path:
    """Where the rows called `name` are."""
    return Path(os.environ.get("QTUNING_RESULTS", HERE / "results")) / f"{name}.jsonl"


def append(name: str, row: Row) -> None:
    """Add one row, in one write: a killed process leaves a torn last line at worst."""
    file = results_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    torn = file.is_file() and file.stat().st_size > 0 and file.read_bytes()[-1:] != b"\n"
    line = ("\n" if torn else "") + json.dumps(row) + "\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(name: str) -> list[Row]:
    """All rows that were written whole, oldest first."""
    file = results_file(name)
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # torn: its run was killed, and is run again
            continue
    return rows


def replace(name: str, found: list[Row]) -> None:
    """Write `found` in place of the last run's rows."""
    file = results_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    os.replace(unfinished, file)


def peak(row: Row) -> int:
    """Bytes at the peak of a step, of the GPU or of the process."""
    return int(row["peak_allocated"] if "peak_allocated" in row else row["peak_resident"])


def provenance() -> Row:
    """Command, commit, date, machine and versions."""
    return {
        "command": command(),
        **commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
    }


def command() -> str:
    """What was typed, without the folder it was typed in."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else f"python {Path(sys.argv[0]).name}"
    return shlex.join([*program.split(), *sys.argv[1:]])


def commit() -> Row:
    """The commit, and whether the code differs from it; QTUNING_COMMIT names it where there is no repository."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        # What benchmarks write changes nothing in what they measure.
        changed = git("status", "--porcelain", "--", ":/", ":!/benchmarks/results", ":!/docs")
        found = git("rev-parse", "--short", "HEAD")
    except FileNotFoundError:  # no git
        changed = found = None
    return {"commit": found or os.environ.get("QTUNING_COMMIT"), "dirty": bool(changed)}
