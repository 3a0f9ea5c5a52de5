"""Samples of all lengths through the model: sorted by length, in batches of a fixed number of tokens, back in order.

Sorting leaves little padding; a budget in tokens keeps memory the same for short and long samples. Results depend on
neither beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..head import causal_model
from ..loss import IGNORE_INDEX
from .scores import TokenScores, token_scores

# Of the scores in `TokenScores`, in its order.
COLUMNS = ("token_error", "token_uncertainty", "token_el2n")


@dataclass
class Piece:
    """One sample of one row: its place among the rows, its tokens and its labels."""

    row: int
    input_ids: list[int]
    labels: list[int]


def run(
    model: nn.Module,
    pieces: Sequence[Piece],
    num_rows: int,
    tokens_per_batch: int,
    el2n: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, list[np.ndarray]]:
    """Scores of the supervised tokens of `pieces`, joined by row, in their order.

    Args:
        model: The model.
        pieces: Samples.
        num_rows: Number of rows.
        tokens_per_batch: Tokens in a forward pass, padding included.
        el2n: Whether to compute `token_el2n`.
        on_progress: Called with the number of pieces of each batch.

    Returns:
        `token_error`, `token_uncertainty` and `token_el2n`, for each row an array (supervised tokens,) of float64.
    """
    # Longest first, so that a batch that does not fit in memory is the first one.
    order = sorted(range(len(pieces)), key=lambda index: -len(pieces[index].input_ids))
    device = causal_model(model).get_input_embeddings().weight.device
    found: list[list[np.ndarray]] = [[] for _ in pieces]
    with torch.inference_mode(), eval_mode(model):
        for batch in batches([len(pieces[index].input_ids) for index in order], tokens_per_batch):
            chosen = [order[index] for index in batch]
            tensors = right_padded([pieces[index] for index in chosen], device)
            scores = token_scores(model, *tensors, el2n)
            for index, parts in zip(chosen, by_piece(scores, [pieces[index] for index in chosen]), strict=True):
                found[index] = list(parts)
            if on_progress is not None:
                on_progress(len(chosen))
    names = COLUMNS[: 2 + el2n]
    collected: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in range(num_rows)] for name in names}
    for piece, columns in zip(pieces, found, strict=True):
        for name, column in zip(names, columns, strict=True):
            collected[name][piece.row].append(column)
    return {
        name: [np.concatenate(parts) if parts else np.zeros(0) for parts in columns]
        for name, columns in collected.items()
    }


def by_piece(scores: TokenScores, pieces: Sequence[Piece]) -> list[np.ndarray]:
    """Scores that follow each other piece after piece, taken apart: for each (scores, supervised tokens), float64."""
    stacked = torch.stack([values for values in scores if values is not None]).double().cpu().numpy()
    ends = np.cumsum([sum(label != IGNORE_INDEX for label in piece.labels) for piece in pieces])
    return np.split(stacked, ends[:-1], axis=1)


def batches(lengths: Sequence[int], tokens_per_batch: int) -> list[range]:
    """Consecutive runs of descending `lengths`, each of at most `tokens_per_batch` padded tokens or a single one."""
    runs, start = [], 0
    for index in range(len(lengths)):
        if index > start and (index - start + 1) * lengths[start] > tokens_per_batch:
            runs.append(range(start, index))
            start = index
    return [*runs, range(start, len(lengths))] if lengths else []


def right_padded(pieces: Sequence[Piece], device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """`input_ids`, `attention_mask` (`None` without padding) and `labels`, each (samples, longest), int64."""
    longest = max(len(piece.input_ids) for piece in pieces)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    # Any token will do for padding: it is masked, and no tokenizer needs to have one.
    input_ids = torch.tensor([padded(piece.input_ids, 0) for piece in pieces], device=device)
    labels = torch.tensor([padded(piece.labels, IGNORE_INDEX) for piece in pieces], device=device)
    if all(len(piece.input_ids) == longest for piece in pieces):
        return input_ids, None, labels
    mask = torch.tensor([padded([1] * len(piece.input_ids), 0) for piece in pieces], device=device)
    return input_ids, mask, labels


def mean(values: np.ndarray) -> np.float64:
    """Mean in float64, NaN of nothing."""
    return np.float64(values.mean(dtype=np.float64)) if len(values) else np.float64("nan")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
