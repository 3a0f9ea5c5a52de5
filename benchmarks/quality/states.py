"""A cache of the frozen base's hidden states: computed once, read by every network beside the base.

    states (31, batch, length, 576):  embeddings, and every block's output before the final norm;  f = norm(state 30)

A forward pass of the base is most of the cost of a step. With a cache, an experiment costs its network only. States are
bfloat16 files of `results/parts/` (about 9 MB a row of GSM8K), read again if the rows are still the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import rows
from benchmarks.common import smollm2
from benchmarks.quality.tasks import Batch, Task

BATCH = 8


def normalized(state: Tensor) -> Tensor:
    """`state` (..., 576) in float32, each position's root mean square one."""
    return F.rms_norm(state.float(), state.shape[-1:], eps=1e-5)


def cached(task: Task, train_rows: int, validation_rows: int) -> tuple[list[Batch], list[Batch]]:
    """Training and validation batches, each with the base's `taps` and `normed`.

    Args:
        task: One whose answers are text.
        train_rows: From its first rows, in the order of the first epoch of seed 0.
        validation_rows: From its first validation rows, shortest first.

    Returns:
        Batches of `taps` (31, batch, length, 576) and `normed` (batch, length, 576), bfloat16, and `input_ids`,
        `attention_mask` and `labels` (batch, length), int64.
    """
    wanted = {
        f"states-{task.name}-train-{train_rows}": [task.batch(part) for part in task.epochs(train_rows, BATCH, 1, 0)],
        f"states-{task.name}-validation-{validation_rows}": task.evaluated(task.validation[:validation_rows], BATCH),
    }
    found = {name: _load(name, batches) for name, batches in wanted.items()}
    missing = [name for name, batches in found.items() if batches is None]
    base = smollm2()[0] if missing else None
    for name in missing:
        found[name] = read(base, tqdm(wanted[name], name, unit="batch"))
        _save(name, found[name])
    train, validation = (batches or [] for batches in found.values())
    return train, validation


@torch.no_grad()
def read(base: Any, batches: Iterable[Batch]) -> list[Batch]:
    """`batches` with the states of `base`, a causal language model of the Llama kind."""
    last: list[Tensor] = []
    # The list of hidden states ends with the norm's output; the last block's own goes nowhere else than into the norm.
    hook = base.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    result = []
    try:
        for batch in batches:
            inputs = {name: batch[name].to(base.device) for name in ("input_ids", "attention_mask")}
            *states, normed = base.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
            taps = torch.stack([state.to("cpu", torch.bfloat16) for state in (*states, last.pop())])
            result.append({**batch, "taps": taps, "normed": normed.to("cpu", torch.bfloat16)})
    finally:
        hook.remove()
    return result


def _load(name: str, batches: list[Batch]) -> list[Batch] | None:
    file = rows.results_file(name).parent / "parts" / f"{name}.pt"
    if not file.is_file():
        return None
    found: list[Batch] = torch.load(file)
    same = len(found) == len(batches) and all(
        torch.equal(mine[name], theirs[name])
        for mine, theirs in zip(found, batches, strict=True)
        for name in ("input_ids", "labels")
    )
    return found if same else None  # of other data in files of the same name


def _save(name: str, batches: list[Batch] | None) -> None:
    file = rows.results_file(name).parent / "parts" / f"{name}.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    torch.save(batches, unfinished)
    os.replace(unfinished, file)


@torch.no_grad()
def dequantized() -> nn.Module:
    """SmolLM2-135M-Instruct with the values that NF4 left it, in float32 and frozen: blocks can be run one by one."""
    quantized, base = smollm2(True)[0], smollm2(False)[0]
    weights = base.state_dict()
    for name, weight in quantized.named_parameters():
        four_bit = isinstance(weight, bnb.nn.Params4bit)
        weights[name].copy_(bnb.functional.dequantize_4bit(weight.data, weight.quant_state) if four_bit else weight)
    frozen: nn.Module = base.requires_grad_(False)
    return frozen
