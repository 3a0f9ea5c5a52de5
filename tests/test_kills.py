"""`qtuning states`, killed again and again at random moments: nothing is lost, and nothing finished is computed twice.

`python tests/test_kills.py FOLDER KILLS SEED` kills as often, and ends with an error if anything is other than it was.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pico
import pytest
from datasets import Dataset

ROWS_PER_KILL, LENGTH, SECONDS = 192, 100, 4.0


@pytest.mark.parametrize("kills", [int(os.environ.get("KILLS", "5"))])
def test_nothing_is_lost_or_computed_twice(kills: int, tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path), str(kills), "0"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill the command, in a process forked from this one where everything is imported, until it has been enough."""
    draw = random.Random(seed)
    pico.save_model(folder / "model")
    ids = [[draw.randrange(6, 54) for _ in range(LENGTH)] for _ in range(ROWS_PER_KILL * (kills + 4))]
    Dataset.from_dict({"input_ids": ids}).to_parquet(folder / "rows.parquet")
    seen: dict[str, tuple[int, int]] = {}
    made = 0
    # A machine may be so fast that it is finished before.
    while made < kills and not (folder / "killed" / "states.json").is_file():
        process = start(folder, "killed")
        time.sleep(draw.uniform(0, SECONDS))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        made += 1
        parts = found(folder / "killed")
        assert seen.items() <= parts.items(), "a finished part is gone, or was written again"
        seen = parts
    assert made > kills // 2
    start_again = [] if (folder / "killed" / "states.json").is_file() else ["killed"]
    for name in (*start_again, "whole"):
        assert os.waitpid(start(folder, name), 0)[1] == 0
    assert seen.items() <= found(folder / "killed").items(), "a finished part is gone, or was written again"
    killed, whole = (
        {file.name: file.read_bytes() for file in (folder / name).iterdir()} for name in ("killed", "whole")
    )
    assert killed == whole, "the folder is another"
    assert len(seen) >= kills // 2, "killed before there was anything to lose"
    print(f"{made} kills; {len(seen)} of {len(found(folder / 'whole'))} parts were there at the last", flush=True)


def start(folder: Path, name: str) -> int:
    """The command in another process, and its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (to the end of this process)
        arguments = [str(folder / "rows.parquet"), str(folder / "model"), "-o", str(folder / name)]
        status = app(["states", *arguments, "--states-format", "int8"], standalone_mode=False) or 0
    finally:
        os._exit(status)


def found(folder: Path) -> dict[str, tuple[int, int]]:
    """The finished parts, and what would change if one was written again."""
    files = folder.glob("*.arrow") if folder.is_dir() else ()
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


if __name__ == "__main__":
    import torch

    from qtuning_peft.cli import app

    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
