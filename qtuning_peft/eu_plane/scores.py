"""Scores of rows and tokens by name: `@token_score` or `@row_score` on a function adds one.

    error        e_t = -log p(y_t | y_<t)
    uncertainty  u_t = -sum_v p(v | y_<t) log p(v | y_<t)          both in nats (Q-Tuning, arXiv 2509.23873)

A score of tokens is a function of the model's predictions, computed for a chunk of supervised tokens at a time in the
one pass over the data; its mean is the row's score. A score of rows is a function of the rows and their tokens' errors,
and may run passes of its own.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..loss import IGNORE_INDEX
from ..registry import Registry
from .tokenized import Sample

LOOP = 5.0  # nats that a whole answer of repetitions counts for
REPEATED = 4  # the n of n-grams in `repetition`


class Predictions:
    """The model's predictions of some supervised tokens, with what several scores are made of.

    With s_v = logit_v - max logit, w_v = exp(s_v) and Z = sum_v w_v, p_v = w_v / Z.

    Args:
        logits: (tokens, vocabulary), of any floating dtype, overwritten; 16-bit ones are widened to float32.
        targets: (tokens,), int64.

    Attributes:
        shifted: s, (tokens, vocabulary).
        weights: w, (tokens, vocabulary).
        target: s of the target, (tokens,).
        partition, log_partition: Z and log Z, (tokens,).
    """

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        shifted = logits.float() if logits.dtype.itemsize == 2 else logits
        self.shifted = shifted.sub_(shifted.amax(dim=-1, keepdim=True))
        self.weights = self.shifted.exp()
        self.target = self.shifted.gather(-1, targets[:, None]).squeeze(-1)
        self.partition = self.weights.sum(dim=-1)
        self.log_partition = self.partition.log()


@dataclass
class ScoredRows:
    """Rows whose tokens have been scored, as scores of rows read them.

    Attributes:
        samples: The samples of all rows; a packed row has several, and one that cannot be scored has none.
        token_error: For every row (supervised tokens,), float64, nats.
        run: From samples, and a model if not the one that scores, to their tokens' errors by row.
        reference_model: The second model, or its engine, if there is one.
    """

    samples: Sequence[Sample]
    token_error: list[np.ndarray]
    run: Callable[..., list[np.ndarray]]
    reference_model: Any = None

    @cached_property
    def answers(self) -> list[list[int]]:
        """The supervised tokens of every row."""
        answers: list[list[int]] = [[] for _ in self.token_error]
        for sample in self.samples:
            answers[sample.row] += [label for label in sample.labels if label != IGNORE_INDEX]
        return answers

    @cached_property
    def alone(self) -> list[np.ndarray]:
        """The errors of the answers without their prompts, (supervised tokens,) by row: a second pass, run once.

        Nothing predicts an answer's first token once its prompt is gone: what reads these leaves it out.
        """
        return self.run([Sample(i, a, [IGNORE_INDEX, *a[1:]]) for i, a in enumerate(self.answers) if a])


@dataclass(frozen=True)
class Score:
    """One score: `of` [`Predictions`] a value for each token (`per_token`), or of [`ScoredRows`] one for each row."""

    of: Callable[[Any], Any]
    per_token: bool


OfTokens = Callable[[Predictions], Tensor]
OfRows = Callable[[ScoredRows], Sequence[Any]]
SCORES: Registry[Score] = Registry("scores")
# What every row gets.
ALWAYS = ("error", "uncertainty", "repetition")


def token_score(name: str) -> Callable[[OfTokens], OfTokens]:
    """Decorator: register a score of tokens, (tokens,). It gives the columns `token_NAME` and, its mean, `NAME`."""

    def register(of: OfTokens) -> OfTokens:
        SCORES.add(name, Score(of, per_token=True), of.__doc__)
        return of

    return register


def row_score(name: str) -> Callable[[OfRows], OfRows]:
    """Decorator: register a score of rows, for each a number, or an array (supervised tokens,), as column `NAME`."""

    def register(of: OfRows) -> OfRows:
        SCORES.add(name, Score(of, per_token=False), of.__doc__)
        return of

    return register


def scores_of(columns: Collection[str]) -> tuple[str, ...]:
    """The scores that give some of `columns`, those that every row gets excepted."""
    return tuple(
        name
        for name, score in SCORES.items()
        if name not in ALWAYS and (name in columns or (score.per_token and f"token_{name}" in columns))
    )


def token_columns() -> set[str]:
    """Columns with one value for each supervised token."""
    return {f"token_{name}" for name, score in SCORES.items() if score.per_token} | {"token_reference_error"}


@token_score("error")
def error(predictions: Predictions) -> Tensor:
    """Negative log-likelihood in nats: log Z - s_y."""
    return predictions.log_partition - predictions.target


@token_score("uncertainty")
def uncertainty(predictions: Predictions) -> Tensor:
    """Entropy of the prediction in nats: log Z - (w . s) / Z."""
    mean = torch.linalg.vecdot(predictions.weights, predictions.shifted) / predictions.partition
    return (predictions.log_partition - mean).clamp_min(0)


@token_score("el2n")
def el2n(predictions: Predictions) -> Tensor:
    """Length of the difference between predicted distribution and one-hot target (Paul et al., NeurIPS 2021)."""
    squares = torch.linalg.vecdot(predictions.weights, predictions.weights) / predictions.partition.square()
    target = (predictions.target - predictions.log_partition).exp()  # p_y
    return (squares - 2 * target + 1).clamp_min(0).sqrt()


@row_score("repetition")
def repetition(rows: ScoredRows) -> list[float]:
    """Share of the 4-grams of the supervised tokens that occurred before, 0 to 1."""
    return [repeated(answer) for answer in rows.answers]


@row_score("ifd")
def ifd(rows: ScoredRows) -> list[Any]:
    """Instruction-following difficulty: perplexity after the prompt over perplexity without it; a second pass.

    (Li et al., NAACL 2024.)
    """
    return [np.exp(given - alone) for given, alone in _with_and_without_prompt(rows)]


@row_score("noise")
def noise(rows: ScoredRows) -> list[Any]:
    """E * e / a + 5 * `repetition`: error e after the prompt, in nats, times its ratio to the error a without it.

    High where an answer is not one: words in the wrong order and typos raise e, answers to other questions the ratio,
    as the prompt does not make them likelier, and loops, which look perfect to any likelihood, the repetition. Takes
    the pass of `ifd`. Ours; chosen on two data sets, tried on two others (docs/pruning.md).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        products = [given * given / alone for given, alone in _with_and_without_prompt(rows)]
    return [value + LOOP * repeated for value, repeated in zip(products, repetition(rows), strict=True)]


def _with_and_without_prompt(rows: ScoredRows) -> list[tuple[np.float64, np.float64]]:
    """Mean errors of every answer after its prompt and alone, its first token left out; NaN where there is no other."""
    return [(mean(errors[1:]), mean(alone)) for errors, alone in zip(rows.token_error, rows.alone, strict=True)]


@row_score("token_reference_error")
def token_reference_error(rows: ScoredRows) -> list[np.ndarray]:
    """The tokens' error under a reference model, which has to be given (Rho-1, Lin et al., NeurIPS 2024)."""
    return rows.run(rows.samples, rows.reference_model)


def repeated(tokens: Sequence[int]) -> float:
    """Share of the 4-grams of `tokens` that occurred before, 0 to 1; 0 for fewer than 5 tokens.

    Text that repeats itself looks perfect to error and uncertainty alike: a loop is easy to predict. No model is needed
    to see it. (seq-rep-n of Welleck et al., 2020.)
    """
    grams = [tuple(tokens[start : start + REPEATED]) for start in range(len(tokens) - REPEATED + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mean(values: np.ndarray) -> np.float64:
    """Mean in float64, NaN of nothing."""
    return np.float64(values.mean(dtype=np.float64)) if len(values) else np.float64("nan")
