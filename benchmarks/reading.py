"""Reading stored states: rows a second from disk and from memory, as batches that a trainer gets.

    python -m benchmarks.reading --folder FOLDER_ON_THE_DISK_TO_MEASURE

Random states of Llama-3-8B's shape (13 states of 4096 numbers for a supervised token: eleven taps, the embeddings, the
final norm), in every format. "Cold": the files' pages were dropped before, so that they come from the disk; "memory":
the rows are in the process's memory. Batches come in random order from a `DataLoader` with `StatesCollator`, by wall
clock; without workers also by this process's CPU seconds, which others on the machine change less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from datasets import Dataset, concatenate_datasets
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import rows
from benchmarks.bases import shape, skeleton
from benchmarks.document import markdown
from qtuning_peft import EUScorer, SideTuningConfig, StatesCollator, compute_states, load_states
from qtuning_peft.eu_plane.dataset import read_part
from qtuning_peft.eu_plane.engine import Engine
from qtuning_peft.side_tuning.follow import find_decoder
from qtuning_peft.side_tuning.network import BaseShape
from qtuning_peft.states.format import FORMATS
from qtuning_peft.states.projection import CHANNELS, PROJECTION, Projection
from qtuning_peft.stored.manifest import PROJECTED

BASE, WORKERS = "llama-3-8b", (0, 2)


class RandomEngine(Engine):
    """Random states in the shape of a base, and no scores to speak of."""

    name, scores = BASE, ("error", "uncertainty")

    def __init__(self) -> None:
        self.config = shape(BASE)
        self.vocabulary = self.config.vocab_size
        self.generator = torch.Generator().manual_seed(0)

    def run(
        self, samples: Sequence[Any], tokens_per_batch: int, names: Sequence[str] = (),
        on_progress: Callable[[int], object] | None = None, take: Callable[[int, Tensor], object] | None = None,
        layers: Collection[int] = (),
    ) -> dict[str, list[np.ndarray]]:  # fmt: skip
        """See `Engine`."""
        counts = [sum(label != -100 for label in sample.labels) for sample in samples]
        for index, count in enumerate(counts):
            assert take is not None
            take(index, torch.randn(len(layers) + 2, count, self.config.hidden_size, generator=self.generator))
        return {name: [np.ones(count) for count in counts] for name in names}

    def shape(self) -> BaseShape:
        """See `Engine`."""
        return find_decoder(skeleton(BASE, torch.bfloat16)).shape

    def head(self) -> dict[str, Tensor]:
        """See `Engine`; a small one, which is not read here."""
        return {"weight": torch.zeros(1)}

    def add_to(self, digest: xxhash.xxh3_128) -> None:
        """See `Engine`."""


def main() -> None:
    """Measure, and write results and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; by default that of temporary files")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=450, help="tokens of a row that are not supervised")
    parser.add_argument("--answer", type=int, default=150, help="tokens of a row that are")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts, as a shared machine's speed drifts")
    options = parser.parse_args()
    found = []
    torch.set_num_threads(1)
    for name in (*FORMATS, PROJECTION):
        place = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            found.append(measure(name, place / "states", options) | rows.provenance())
        finally:
            shutil.rmtree(place)
        print(found[-1], flush=True)
    rows.replace("reading", found)
    print(table(found))


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One format."""
    ids = torch.randint(0, 1000, (options.rows, options.prompt + options.answer)).tolist()
    labels = [[-100] * options.prompt + row[options.prompt :] for row in ids]
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    config = SideTuningConfig()
    if name == PROJECTION:
        write_projection(folder, config)
    compute_states(data, RandomEngine(), None, config, folder, states_format=name, rows_per_part=16, progress=False)
    size = sum(file.stat().st_size for file in folder.glob("*.arrow"))
    seconds = {}
    for temperature in ("cold", "warm"):
        drop(folder, temperature)
        seconds[f"open_{temperature}"] = timed(lambda: load_states(folder))
        drop(folder, temperature)
        seconds[f"disk_{temperature}"] = timed(lambda: [file.read_bytes() for file in folder.glob("*.arrow")])
    speed: dict[str, float] = {}
    stored = load_states(folder)
    memory = concatenate_datasets([read_part(Path(file["filename"])) for file in stored.cache_files])
    for workers in WORKERS:
        for where, given in (("cold", stored), ("warm", stored), ("memory", memory)):
            spent, cpu = [], []
            for _ in range(options.rounds):
                drop(folder, where)
                started = time.process_time()
                spent.append(timed(lambda given=given, workers=workers: list(read(given, folder, workers, options))))
                cpu.append(time.process_time() - started)
            speed[f"{where}_{workers}_workers"] = options.rows / min(spent)
            if not workers:
                speed[f"{where}_cpu"] = options.rows / min(cpu)
    per_token = size / options.rows / options.answer
    return {
        "format": name, "base": BASE, "rows": options.rows, "supervised_tokens": options.answer,
        "batch_size": options.batch_size, "rounds": options.rounds, "bytes": size, "seconds": seconds,
        "bytes_per_supervised_token": per_token, "rows_per_second": speed,
    }  # fmt: skip


def write_projection(folder: Path, config: SideTuningConfig) -> None:
    """A random projection, which is found and not fitted: that takes minutes, and reading costs the same."""
    base = RandomEngine().shape()
    taps, width = len(config.layers(base)) + 1, base.hidden_size
    basis = torch.linalg.qr(torch.randn(width, CHANNELS))[0].expand(taps, -1, -1).contiguous()
    projection = Projection(torch.zeros(taps, width), basis, torch.ones(taps, CHANNELS))
    folder.mkdir()
    fitted_to = EUScorer(RandomEngine(), states=config, states_format="float32").fingerprint()
    known = {"fingerprint": f"{projection.fingerprint()} {fitted_to}"}
    save_file(projection.tensors(), folder / PROJECTED, known)


def read(data: Dataset, folder: Path, workers: int, options: argparse.Namespace) -> Any:
    """The sizes of all batches."""
    loader = DataLoader(
        data, batch_size=options.batch_size, shuffle=True, collate_fn=StatesCollator(folder), num_workers=workers
    )  # fmt: skip
    for batch in loader:
        yield batch["states"].sum()


def drop(folder: Path, temperature: str) -> None:
    """If it is to be cold, drop what the system has kept in memory of the files."""
    for file in folder.iterdir() if temperature == "cold" else ():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def table(found: Sequence[dict[str, Any]]) -> str:
    """All formats."""
    header = ["format", "bytes a token", "open, cold", "open, warm", "GB/s of the disk"]
    header += [f"rows/s, {name.replace('_', ' ')}" for name in found[0]["rows_per_second"]]
    lines = [
        [
            row["format"], f"{row['bytes_per_supervised_token']:,.0f}", f"{row['seconds']['open_cold']:.2f} s",
            f"{row['seconds']['open_warm']:.2f} s", f"{row['bytes'] / row['seconds']['disk_cold'] / 1e9:.2f}",
            *(f"{speed:.1f}" for speed in row["rows_per_second"].values()),
        ]
        for row in found
    ]  # fmt: skip
    return markdown(header, lines)


if __name__ == "__main__":
    main()
