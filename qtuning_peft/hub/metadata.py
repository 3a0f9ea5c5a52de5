"""How an adapter was trained, for its model card: what was done, what was measured, and on what."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import EvalResult
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # imported there, not exported

BEGIN, END = "<!-- training facts of qtuning-peft -->", "<!-- end of training facts of qtuning-peft -->"
# Rows that are read of a card; we write fewer.
LARGEST_TABLE = 32


@dataclass(frozen=True)
class TrainingMetadata:
    """What a card says of how its adapter was trained: only what is known, and figures only as measured.

    Attributes:
        recipe: The settings that made it, as YAML; without paths and secrets.
        pruning: How the training data were pruned, or that they were not.
        results: Evaluations, which also go into the metadata in the Hub's form.
        datasets: Names on the Hub of the training data.
        language: Their languages, as codes.
        license: Of the adapter, as the Hub names it.
        steps: Optimizer steps.
        loss: Training loss that was logged last.
        seconds: Time of training.
        resumed_at: Step from which `seconds` counts.
        peak_memory: Bytes and what they were of, from [`peak_memory`].
        machine: What it was trained on, from [`machine`].
    """

    recipe: str | None = None
    pruning: str | None = None
    results: tuple[EvalResult, ...] = ()
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    license: str | None = None
    steps: int | None = None
    loss: float | None = None
    seconds: float | None = None
    resumed_at: int = 0
    peak_memory: tuple[int, str] | None = None
    machine: str | None = None

    def section(self) -> str:
        """The card's section on training, between its marks; empty when nothing but metadata is known."""
        training = list(self._training())
        if not (training or self.results or self.recipe):
            return ""
        if self.datasets:
            training = [("training data", ", ".join(f"`{name}`" for name in self.datasets)), *training]
        parts = [BEGIN, "## How it was trained"]
        if training:
            parts.append(_table(("", ""), training))
        if self.results:
            results = [cells_of(result) for result in self.results]
            parts += ["## Evaluation", _table(("data", "metric", "value"), results)]
        if self.recipe:
            # Longer than any fence inside.
            fence = "`" * max(3, *(len(run) + 1 for run in ["", *re.findall("`+", self.recipe)]))
            parts += ["## Recipe", f"{fence}yaml\n{self.recipe.strip()}\n{fence}"]
        return "\n\n".join([*parts, END])

    def _training(self) -> Iterator[tuple[str, str]]:
        if self.pruning is not None:
            yield "pruning", self.pruning
        if self.steps is not None:
            yield "steps", str(self.steps)
        if self.loss is not None:
            yield "last training loss", f"{self.loss:.4g}"
        if self.seconds is not None:
            yield "time", f"{self.seconds:.0f} s" + (f" from step {self.resumed_at} on" if self.resumed_at else "")
        if self.peak_memory is not None:
            yield "peak memory", f"{self.peak_memory[0] / 2**20:.0f} MiB {self.peak_memory[1]}"
        if self.machine is not None:
            yield "machine", self.machine


def read_section(text: str) -> Iterator[tuple[str, str]]:
    """Names and values in the first table of a card's section on training."""
    section, end, _ = text.partition(BEGIN)[2].partition(END)
    table = section.partition("## Evaluation")[0].partition("## Recipe")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ") and line.endswith(" |")] if end else []
    for line in lines[:LARGEST_TABLE]:
        name, _, value = line[2:-2].partition(" | ")
        if re.match(r"\w", name) and value:
            yield name, value.replace("\\|", "|").replace("`", "")


def cells_of(result: EvalResult) -> tuple[str, str, str]:
    """A result as it stands in the card's table."""
    data = result.dataset_name + (f", {result.dataset_split}" if result.dataset_split else "")
    return data, result.metric_name or result.metric_type, str(result.metric_value)


def row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _table(head: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    return "\n".join([row(head), row("---" for _ in head), *map(row, rows)])


def is_hub_name(name: str) -> bool:
    """Whether `name` can be that of a repository on the Hub, and is nothing on this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def peak_memory() -> tuple[int, str] | None:
    """Most bytes at any time so far: of the GPU if one was used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated(), "allocated on the GPU"
    resident = peak_resident()
    return None if resident is None else (resident, "resident, of the whole process")


def peak_resident() -> int | None:
    """Most bytes of this process that were in memory at any time so far, where the system tells."""
    # Windows has no such module.
    with contextlib.suppress(ImportError):
        import resource

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Linux counts in KiB.
        return resident if sys.platform == "darwin" else resident * 1024
    return None


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def machine() -> str:
    """The GPUs if they were used, else the CPU; never the machine's own name."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return f"{torch.distributed.get_world_size() if distributed else 1} {torch.cuda.get_device_name()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {processor()}, no GPU"
