"""How an adapter was trained, for its model card: what was done, what was measured, and on what machine."""

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # imported there, not exported

MARKS = ("<!-- training metadata of qtuning-peft -->", "<!-- end of training metadata of qtuning-peft -->")


def _row(name: str, show: Callable[[Any], str] = str) -> Any:
    return field(default=None, metadata={"name": name, "show": show})


@dataclass(frozen=True)
class TrainingMetadata:
    """What a card says of how its adapter was trained: only what is known, and figures only as measured."""

    recipe: str | None = None  # the settings that made it, as YAML; without paths and secrets
    results: tuple[EvalResult, ...] = ()  # go into the card's metadata, too, as do the next three
    datasets: tuple[str, ...] = ()  # names on the Hub of the training data
    language: tuple[str, ...] = ()  # of the training data, as codes
    license: str | None = None  # of the adapter, as the Hub names it
    # Rows of a table.
    pruning: str | None = _row("pruning")
    steps: int | None = _row("steps")
    loss: float | None = _row("last training loss", "{:.4g}".format)
    seconds: float | None = _row("time", "{:.0f} s".format)
    resumed_at: int | None = _row("time counts", "from step {} on".format)
    peak_memory: tuple[int, str] | None = _row("peak memory", lambda peak: f"{peak[0] / 2**20:.0f} MiB {peak[1]}")
    machine: str | None = _row("machine")
    versions: str | None = _row("versions")

    def rows(self) -> dict[str, str]:
        """The table's rows: names and values of what is known."""
        known = ((f.metadata, getattr(self, f.name)) for f in fields(self) if f.metadata)
        return {shown["name"]: shown["show"](value) for shown, value in known if value is not None}


def read_rows(card: str) -> dict[str, str]:
    """The rows of [`TrainingMetadata.rows`] that a card's text has."""
    found = dict(re.findall(r"^\| (\w[\w ]{,30}) \| (.*) \|$", split(card, MARKS)[1], re.MULTILINE))
    names = [f.metadata["name"] for f in fields(TrainingMetadata) if f.metadata]
    return {name: found[name].replace("\\|", "|") for name in names if name in found}


def split(text: str, marks: tuple[str, str]) -> tuple[str, str, str]:
    """What stands before a section of a card, the section with its marks, and what stands after it."""
    before, begin, rest = text.partition(marks[0])
    section, end, after = rest.partition(marks[1])
    return (before, begin + section + end, after) if end else (text, "", "")


def row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def cells_of(result: EvalResult) -> tuple[str, str, str]:
    """A result as it stands in the card's table: data, metric and value."""
    data = ", ".join(str(part) for part in (result.dataset_name, result.dataset_split) if part)
    return data, str(result.metric_name or result.metric_type), str(result.metric_value)


def is_hub_name(name: str) -> bool:
    """Whether `name` can be that of a repository on the Hub, and is nothing on this machine."""
    with suppress(HFValidationError):
        validate_repo_id(name)
        return not os.path.exists(name)
    return False


def peak_memory() -> tuple[int, str] | None:
    """Most bytes at any time so far, and of what: of the GPU if one was used, else of this process."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return peak, "allocated on the GPU"
    resident = peak_resident()
    return None if resident is None else (resident, "resident, of the whole process")


def peak_resident() -> int | None:
    """Most bytes of this process that were in memory at any time so far, where the system reports it."""
    with suppress(ImportError):  # on Windows
        import resource

        # Linux counts in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def machine() -> str:
    """The GPUs if they were used, else the CPU; never the machine's own name."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return f"{torch.distributed.get_world_size() if distributed else 1} {torch.cuda.get_device_name()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {processor()}, no GPU"


def versions() -> str:
    """Of the packages that an adapter depends on."""
    return ", ".join(f"{name} {version(name)}" for name in ("qtuning-peft", "peft", "transformers", "torch"))
