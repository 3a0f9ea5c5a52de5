"""States computed by two workers of a local Ray: the folder that one process makes, also when workers are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny, token_ids
from datasets import Dataset

import qtuning_peft
from qtuning_peft import SideTuningConfig, load_states
from qtuning_peft.eu_plane import dataset as scoring

# Not ray itself: without the package, that would be the folder of this file.
pytest.importorskip("ray.data", reason="needs Ray: pip install 'ray[data]'")
import ray
from qtuning_peft.integrations.ray import compute_states

CONFIG = SideTuningConfig(reduction_factor=4, layers_to_transform=[0, 2])
OPTIONS: dict[str, Any] = {"states_format": "float32", "rows_per_part": 2}
PARTS = 12


def data() -> Dataset:
    ids = token_ids(24, 40).tolist()
    return Dataset.from_list([{"input_ids": row[: 40 - index]} for index, row in enumerate(ids)])


def load(log: Path | None = None, seconds: float = 0.0) -> tuple[Any, None]:
    """A model; if asked, slow, and with a log of the parts that this worker writes."""
    torch.set_num_threads(1)
    write = scoring.write_part

    def noting(file: Path, table: Any) -> None:
        time.sleep(seconds)
        write(file, table)
        assert log is not None
        with log.open("a") as lines:
            lines.write(f"{os.getpid()} {file.name}\n")

    if log is not None:
        scoring.write_part = noting
    return tiny(), None


def written(log: Path) -> dict[str, int]:
    """The worker that has written each part; none is written twice."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.is_file() else []
    assert not lines or max(Counter(name for _, name in lines).values()) == 1
    return {name: int(worker) for worker, name in lines}


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The folder that one process makes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone") / "states"
    qtuning_peft.compute_states(data(), *load(), CONFIG, folder, progress=False, **OPTIONS)
    return content(folder)


def start() -> None:
    """A Ray of this machine, whose workers find these tests."""
    os.environ["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in Path(__file__).parents[:3])
    ray.init(num_cpus=2, include_dashboard=False)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    start()
    yield
    ray.shutdown()


def slow(folder: Path) -> None:
    """Compute states by two workers, a part in half a second."""
    made = partial(load, folder / "log", 0.5)
    rows = compute_states(data(), made, CONFIG, folder / "states", workers=2, **OPTIONS)
    assert rows[23]["input_ids"] == data()[23]["input_ids"]


def wait_for(parts: int, log: Path) -> dict[str, int]:
    """Until that many parts are there."""
    ends = time.monotonic() + 120
    while len(found := written(log)) < parts:
        assert time.monotonic() < ends
        time.sleep(0.05)
    return found


def test_two_workers_make_the_folder_of_one_process(alone: dict[str, bytes], tmp_path: Path) -> None:
    """One of them is killed on the way, and Ray starts another."""
    killed: list[int] = []

    def kill() -> None:
        killed.extend([*wait_for(4, tmp_path / "log").values()][-1:])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    slow(tmp_path)
    killer.join()
    parts = written(tmp_path / "log")
    assert content(tmp_path / "states") == alone
    assert len(parts) == PARTS
    assert len({*parts.values()}) == 3
    # From where it was, started again: nothing is computed.
    slow(tmp_path)
    assert written(tmp_path / "log") == parts


def test_all_are_killed_and_started_again(alone: dict[str, bytes], tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, __file__, str(tmp_path)], start_new_session=True)
    try:
        before = wait_for(4, tmp_path / "log")
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    with pytest.raises(ValueError, match="holds no finished states"):
        load_states(tmp_path / "states")
    time.sleep(2)  # Ray's own processes end with the one that started them
    slow(tmp_path)
    after = written(tmp_path / "log")
    assert len(after) == PARTS
    assert before.items() <= after.items()
    assert content(tmp_path / "states") == alone


def test_a_projection_is_fitted_once(tmp_path: Path) -> None:
    options = OPTIONS | {"states_format": "projection", "channels": 8}
    compute_states(data(), load, CONFIG, tmp_path / "ray", workers=2, **options)
    qtuning_peft.compute_states(data(), *load(), CONFIG, tmp_path / "alone", progress=False, **options)
    assert content(tmp_path / "ray") == content(tmp_path / "alone")


def test_errors_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The data is empty"):
        compute_states(data().select([]), load, CONFIG, tmp_path / "empty")
    attending = SideTuningConfig(side_attention=True)
    with pytest.raises(Exception, match="side_attention is True, but side blocks that attend"):
        compute_states(data(), load, attending, tmp_path / "states")
    with pytest.raises(ValueError, match="holds no finished states"):
        load_states(tmp_path / "states")


if __name__ == "__main__":
    start()
    slow(Path(sys.argv[1]))
