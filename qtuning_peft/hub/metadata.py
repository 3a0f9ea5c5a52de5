"""How an adapter was trained, for its model card: what was done, what was measured, and on what machine."""

import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # imported there, not exported
from peft import PeftModel
from transformers import DynamicCache

from ..evaluation import eval_mode
from ..head import causal_model
from ..states.prefix import cache_name

TOKENS = 32


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
    rows: int | None = _row("training rows")
    tokens: int | None = _row("supervised tokens")
    steps: int | None = _row("steps")
    loss: float | None = _row("last training loss", "{:.4g}".format)
    seconds: float | None = _row("time", "{:.0f} s".format)
    resumed_at: int | None = _row("time counts", "from step {} on".format)
    peak_memory: tuple[int, str] | None = _row("peak memory", lambda peak: f"{peak[0] / 2**20:.0f} MiB {peak[1]}")
    slowdown: tuple[float, str] | None = _row(
        "time per generated token", lambda slowdown: "{:.2f} times the base's ({})".format(*slowdown)
    )
    machine: str | None = _row("machine")
    versions: str | None = _row("versions")

    def table(self) -> dict[str, str]:
        """The table's rows: names and values of what is known."""
        known = ((f.metadata, getattr(self, f.name)) for f in fields(self) if f.metadata)
        return {shown["name"]: shown["show"](value) for shown, value in known if value is not None}


ROWS = [f.metadata["name"] for f in fields(TrainingMetadata) if f.metadata]


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
    with suppress(ImportError):  # on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident, of the whole process"
    return None


def slowdown(model: PeftModel, input_ids: Sequence[int], seconds: float = 1.0) -> tuple[float, str]:
    """How many times the base's time the tuned model takes for a token, and what was timed.

    Both read the first half of at most 32 tokens, and then one token after another with a cache, in turn; the fastest
    step of each counts. The model is left as it was.

    Args:
        model: A side-tuned causal language model, not sharded.
        input_ids: At least four tokens, such as those of a training row.
        seconds: To measure for, if both have read four tokens by then.
    """
    base, frozen = causal_model(model), [p for p in model.parameters() if not p.requires_grad]
    tokens = torch.tensor([list(input_ids[:TOKENS])], device=base.device)  # (1, length)
    prompt = tokens.shape[1] // 2
    # By whether the side network runs.
    caches = {tuned: {cache_name(base.forward): DynamicCache(config=base.config)} for tuned in (True, False)}
    fastest = {True: math.inf, False: math.inf}
    began = time.perf_counter()
    try:
        with torch.no_grad(), eval_mode(model):
            for count, part in enumerate(tokens.tensor_split(tuple(range(prompt, tokens.shape[1])), dim=1)):
                for tuned in fastest:
                    with nullcontext() if tuned else model.disable_adapter():
                        start = time.perf_counter()
                        logits = base(input_ids=part, use_cache=True, **caches[tuned]).logits
                        logits[0, -1, 0].item()  # waits for the device
                        taken = time.perf_counter() - start
                    if count:  # not the prompt's
                        fastest[tuned] = min(fastest[tuned], taken)
                if count >= 4 and time.perf_counter() - began > seconds:
                    break
    finally:
        # PEFT has all of an adapter trained after it was disabled.
        for parameter in frozen:
            parameter.requires_grad_(False)
    timed = f"one row with a cache, fastest of {count} tokens after {prompt} of a training row"
    return fastest[True] / fastest[False], timed


def machine() -> str:
    """The GPUs if they were used, else the CPU; never the machine's own name."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"{os.environ.get('WORLD_SIZE', 1)} {torch.cuda.get_device_name()}"
    linux = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", linux.read_text() if linux.is_file() else "", re.MULTILINE)
    return f"{os.cpu_count()} cores of {(names or [platform.machine()])[0]}, no GPU"
