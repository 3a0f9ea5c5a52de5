"""One of several processes that compute states together: `python shared_work_cases.py FOLDER CASE ...`."""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import tiny, token_ids
from datasets import Dataset
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import fully_shard

from qtuning_peft import SideTuningConfig, compute_states
from qtuning_peft.eu_plane import dataset as scoring
from qtuning_peft.side_tuning.follow import find_decoder

RANK = int(os.environ.get("RANK", "0"))
write_part = scoring.write_part


def data() -> Dataset:
    """24 rows of several lengths, of which the longest come first."""
    ids = token_ids(24, 40).tolist()
    return Dataset.from_list([{"input_ids": row[: 40 - index]} for index, row in enumerate(ids)])


def states(case: str, folder: Path) -> str:
    """Compute states, writing down which parts this process has written; returns what came of it."""
    folder.mkdir(exist_ok=True)
    count = 0

    def noting(file: Path, table: Any) -> None:
        nonlocal count
        if "RANK" in os.environ and count < 2:  # so that both have something to do
            dist.barrier()
        if case == f"killed {RANK}" and count == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if case == f"error {RANK}" and count == 1:
            raise ValueError("no room")
        write_part(file, table)
        count += 1
        with (folder / "written").open("a") as log:
            log.write(f"{RANK} {file.name}\n")

    scoring.write_part = noting
    model: Any = tiny()
    if case == "sharded":
        for block in find_decoder(model).blocks:
            fully_shard(block)
        fully_shard(model)
    config = SideTuningConfig(reduction_factor=4, layers_to_transform=[0, 2])
    options: dict[str, Any] = {"rows_per_part": 2}
    if "projection" in case or case == "sharded":
        options |= {"states_format": "projection", "channels": 8}
    try:
        return f"{len(compute_states(data(), model, None, config, folder / 'states', **options))} rows"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        scoring.write_part = write_part


def main(folder: Path, cases: list[str]) -> None:
    """Run cases one after the other, each in a folder of its own, and write down what comes of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    distributed_c10d._get_default_store().set_timeout(timedelta(seconds=5 if "killed" in cases[0] else 60))
    for case in cases:
        result = states(case, folder / case)
        (folder / case / f"{RANK}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
