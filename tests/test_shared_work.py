"""Processes that share the base's pass over a data set: one folder, the same to the byte, whatever happens to them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pico
import pytest
import shared_work_cases
from datasets import load_from_disk
from typer.testing import CliRunner

from qtuning_peft import load_states
from qtuning_peft.cli import app

OWN = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2]),
}
PARTS = 12


def launch(folder: Path, *cases: str) -> list[int]:
    """Exit statuses of two processes that nobody but they themselves watches over."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, shared_work_cases.__file__, str(folder), *cases],
            env=os.environ | OWN | place | {"RANK": str(rank)}, stderr=(folder / f"{rank}.log").open("w"),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        return [process.wait(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()


def said(folder: Path, case: str, rank: int) -> str:
    """What came of a case in a process."""
    return json.loads((folder / case / f"{rank}.json").read_text())


def written(folder: Path) -> dict[str, str]:
    """The process that has written each part; none is written twice."""
    lines = [line.split() for line in (folder / "written").read_text().splitlines()]
    assert max(Counter(name for _, name in lines).values()) == 1
    return {name: rank for rank, name in lines}


def content(folder: Path) -> dict[str, bytes]:
    """Every file by its name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, bytes]:
    """The folder that one process makes."""
    assert shared_work_cases.states("alone", tmp_path / "alone") == "24 rows"
    assert len(written(tmp_path / "alone")) == PARTS
    return content(tmp_path / "alone" / "states")


def finish(folder: Path, alone: dict[str, bytes]) -> None:
    """Start again what ended early: parts are kept, and the folder is what one process makes."""
    assert 0 < len(written(folder)) < PARTS
    with pytest.raises(ValueError, match="holds no finished states"):
        load_states(folder / "states")
    assert shared_work_cases.states("again", folder) == "24 rows"
    assert len(written(folder)) == PARTS
    assert content(folder / "states") == alone


def test_two_processes_make_the_folder_of_one(alone: dict[str, bytes], tmp_path: Path) -> None:
    """And end together, with the folder or without, whoever meets an error."""
    assert launch(tmp_path, "whole", "error 0", "error 1", "sharded", "projection", "again") == [0, 0]
    assert said(tmp_path, "projection", 0) == shared_work_cases.states("projection alone", tmp_path / "projected")
    assert content(tmp_path / "projection" / "states") == content(tmp_path / "projected" / "states")
    for case in ("whole", "again"):
        assert said(tmp_path, case, 0) == said(tmp_path, case, 1) == "24 rows"
        assert set(written(tmp_path / case).values()) == {"0", "1"}
        assert len(written(tmp_path / case)) == PARTS
        assert content(tmp_path / case / "states") == alone
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    assert "Scoring: 100%" in logs[0]
    assert "Scoring" not in logs[1]
    for rank in (0, 1):
        assert said(tmp_path, f"error {rank}", rank) == "ValueError: no room"
        other = f"RuntimeError: Process {rank} of 2 failed (ValueError: no room); start again, which keeps"
        assert other in said(tmp_path, f"error {rank}", 1 - rank)
        finish(tmp_path / f"error {rank}", alone)
        assert "ValueError: The model is sharded: its processes run every pass" in said(tmp_path, "sharded", rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_and_started_again(rank: int, alone: dict[str, bytes], tmp_path: Path) -> None:
    """The other process ends by itself, and the parts of both are kept."""
    case = f"killed {rank}"
    statuses = launch(tmp_path, case)
    assert statuses[rank] == -9
    if rank == 1:
        # The first holds the store; without it the other may not get as far as writing this down.
        expected = "RuntimeError: 1 of 2 processes did not come within 5 seconds; start again, which keeps"
        assert expected in said(tmp_path, case, 0)
    finish(tmp_path / case, alone)


@pytest.mark.parametrize("command", ["states", "score"])
def test_from_a_shell(command: str, tmp_path: Path) -> None:
    pico.save_model(tmp_path / "model")
    pico.write_chat(tmp_path / "chat.jsonl", 100)
    arguments = [command, str(tmp_path / "chat.jsonl"), str(tmp_path / "model"), "--output"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    launcher = {
        # On a machine without GPUs accelerate starts several processes only if it is told that there are.
        "states": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        "score": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }[command]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "qtuning_peft.cli", *arguments, str(tmp_path / "two")],
        env=os.environ | OWN, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("100 rows") == 1
    if command == "states":
        assert content(tmp_path / "one") == content(tmp_path / "two")
    else:
        one, two = (load_from_disk(str(tmp_path / name)) for name in ("one", "two"))
        assert one.to_dict() == two.to_dict()
    assert {file.name for file in tmp_path.iterdir()} == {"model", "chat.jsonl", "one", "two"}
