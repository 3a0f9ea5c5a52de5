"""Other ways to choose samples and tokens, behind the same interface, to compare with.

A sample strategy gives every row a priority; those with the highest are kept, as many as the budget allows:

    random               none: a hash of the row's tokens and the seed
    longest              most supervised tokens
    highest_perplexity   highest error                   lowest_perplexity   lowest error
    entropy              highest uncertainty
    el2n                 highest mean distance of prediction and target (Paul et al., NeurIPS 2021)
    infobatch            above the mean error first, then at random (Qin et al., ICLR 2024, without its rescaling of
                         gradients, for which no trainer has a column)
    ifd                  highest instruction-following difficulty below 1 (Li et al., NAACL 2024)

A token strategy scores tokens, and the lowest are kept: `neighbours` (Q-Tuning), `random`, and `rho1`, the excess error
over a reference model, highest kept (Lin et al., NeurIPS 2024).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .tokens import neighbour_scores

Columns = Mapping[str, Any]


def row_hash(input_ids: Sequence[int], seed: int) -> float:
    """A number in [0, 1) that depends on nothing but a row's tokens and the seed, wherever the row stands."""
    data = np.asarray([seed, *input_ids], np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64


def _random(rows: Columns, seed: int, mean_error: float) -> np.ndarray:
    return np.array([row_hash(input_ids, seed) for input_ids in rows["input_ids"]])


def _infobatch(rows: Columns, seed: int, mean_error: float) -> np.ndarray:
    return (np.asarray(rows["error"]) >= mean_error) + _random(rows, seed, mean_error)


def _ifd(rows: Columns, seed: int, mean_error: float) -> np.ndarray:
    # At 1 and above the prompt does not help: answer and prompt do not belong together.
    ifd = np.nan_to_num(np.asarray(rows["ifd"], np.float64), nan=np.inf)
    return np.where(ifd < 1, ifd, -ifd)


# name: (columns it reads, priority of (rows, seed, mean error))
SAMPLE_STRATEGIES: dict[str, tuple[tuple[str, ...], Callable[[Columns, int, float], np.ndarray]]] = {
    "random": (("input_ids",), _random),
    "longest": (("supervised_tokens",), lambda rows, *_: np.asarray(rows["supervised_tokens"], np.float64)),
    "highest_perplexity": (("error",), lambda rows, *_: np.asarray(rows["error"])),
    "lowest_perplexity": (("error",), lambda rows, *_: -np.asarray(rows["error"])),
    "entropy": (("uncertainty",), lambda rows, *_: np.asarray(rows["uncertainty"])),
    "el2n": (("el2n",), lambda rows, *_: np.asarray(rows["el2n"])),
    "infobatch": (("input_ids", "error"), _infobatch),
    "ifd": (("ifd",), _ifd),
}

# name: (columns it reads, scores of (one row, lambda, seed))
TOKEN_STRATEGIES: dict[str, tuple[tuple[str, ...], Callable[[Columns, float, int], np.ndarray]]] = {
    "neighbours": (("token_error",), lambda row, weight, _: neighbour_scores(np.asarray(row["token_error"]), weight)),
    "random": (
        ("input_ids", "token_error"),
        lambda row, _, seed: np.random.default_rng(int(row_hash(row["input_ids"], seed) * 2**53)).random(
            len(row["token_error"])
        ),
    ),
    "rho1": (
        ("token_error", "token_reference_error"),
        lambda row, *_: (
            np.asarray(row["token_reference_error"], np.float64) - np.asarray(row["token_error"], np.float64)
        ),
    ),
}
