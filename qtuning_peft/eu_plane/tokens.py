"""Stage 2: which tokens of a sample are kept (Q-Tuning, arXiv 2509.23873).

    s_i = (1 - lambda) PPL_i + lambda (PPL_(i-1) + PPL_(i+1)),      PPL_i = exp(e_i)                  (equation 7)

The lowest scores are kept. The text says "top" and the figure that tokens of high perplexity go; table 5 decides, where
the other end is worse. A token is trimmed only if it is detrimental, its own perplexity and the mean of its neighbours'
both above a percentile of the row's, the paper's example being the median: so a row may keep more than the share. The
text of figure 2 says "average" of the neighbours, equation 7 and Algorithm 1 do not divide, and they count. At both
ends, which the paper leaves open, the missing neighbour is the token itself.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ..registry import Registry
from .selection import Options
from .strategies import perplexities, row_hash

Row = Mapping[str, Any]
Ranking = Callable[[Row, Options], np.ndarray]


@dataclass(frozen=True)
class TokenStrategy:
    """The columns that a ranking reads, and it: from (row, options) to (supervised tokens,).

    The lowest are kept; a token of -inf is never trimmed.
    """

    columns: tuple[str, ...]
    scores: Ranking


TOKEN_STRATEGIES: Registry[TokenStrategy] = Registry("token_strategy")


def token_strategy(name: str, *columns: str) -> Callable[[Ranking], Ranking]:
    """Decorator: register a function of (row, options) that scores a row's supervised tokens, see [`TokenStrategy`].

    Of the `columns` that it reads, those that a score provides are computed for it.
    """

    def register(function: Ranking) -> Ranking:
        TOKEN_STRATEGIES.add(name, TokenStrategy(columns, function), function.__doc__)
        return function

    return register


@token_strategy("neighbours", "token_error")
def neighbours(row: Row, options: Options) -> np.ndarray:
    """Lowest perplexity of a token and its neighbours, those below `trim_above` in any case (Q-Tuning)."""
    return neighbour_scores(row["token_error"], options.neighbour_weight, options.trim_above)


@token_strategy("reversed", "token_error")
def reverse(row: Row, options: Options) -> np.ndarray:
    """Highest perplexity of a token and its neighbours, to compare with (table 5 of Q-Tuning)."""
    return -neighbour_scores(row["token_error"], options.neighbour_weight)


@token_strategy("random", "input_ids", "token_error")
def random(row: Row, options: Options) -> np.ndarray:
    """Any tokens, drawn by a row's tokens and the seed."""
    rng = np.random.default_rng(int(row_hash(row["input_ids"], options.seed) * 2**53))
    return rng.random(len(row["token_error"]))


@token_strategy("rho1", "token_error", "token_reference_error")
def rho1(row: Row, options: Options) -> np.ndarray:
    """Highest excess error over a reference model (Rho-1, Lin et al., NeurIPS 2024)."""
    return np.asarray(row["token_reference_error"], np.float64) - np.asarray(row["token_error"], np.float64)


def neighbour_scores(token_error: Any, neighbour_weight: float, trim_above: float | None = None) -> np.ndarray:
    """Neighbour-aware perplexity s (tokens,) from `token_error` (tokens,), nats, and lambda, `neighbour_weight`.

    With the quantile `trim_above`, it is -inf where a token, or the mean of its neighbours, does not exceed it.
    """
    perplexity = perplexities(token_error)
    if not len(perplexity):
        return perplexity
    padded = np.pad(perplexity, 1, mode="edge")
    neighbours = padded[:-2] + padded[2:]
    scores = (1 - neighbour_weight) * perplexity + neighbour_weight * neighbours
    if trim_above is None:
        return scores
    limit = np.quantile(perplexity, trim_above)
    return np.where((perplexity > limit) & (neighbours / 2 > limit), scores, -np.inf)


def share_of(count: int, ratio: float) -> int:
    """The share `ratio` of `count` samples or tokens, rounded down as in Algorithm 1, but at least one."""
    # As the ratio is written: 0.29 of 100 are 29, whatever a float makes of it.
    return max(1, math.floor(Fraction(str(ratio)) * count))


def keep_lowest(scores: np.ndarray, token_ratio: float) -> np.ndarray:
    """Mark the share `token_ratio` of the tokens with the lowest scores (tokens,), and those of -inf, (tokens,), bool.

    Of equal scores, the earlier are kept.
    """
    kept = np.isneginf(scores)
    kept[np.argsort(scores, kind="stable")[: share_of(len(scores), token_ratio)]] = True
    return kept


def protected_tokens(tokenizer: Any, tokens: Sequence[int], patterns: Sequence[str]) -> np.ndarray:
    """Which of `tokens` are special, or stand for text that one of the regular expressions matches: (tokens,), bool."""
    protected = np.isin(tokens, tokenizer.all_special_ids)
    if patterns:
        pieces = pieces_of(tokenizer, tokens)
        ends = np.cumsum([len(piece) for piece in pieces])
        starts = ends - [len(piece) for piece in pieces]
        for pattern in patterns:
            for match in re.finditer(pattern, "".join(pieces)):
                if match.group():
                    protected |= (starts < match.end()) & (ends > match.start())
    return protected


def pieces_of(tokenizer: Any, tokens: Sequence[int], context: int = 8) -> list[str]:
    """The text each of `tokens` adds to what stands before it.

    Decoded with a few tokens of context, as some tokenizers lose the leading space of a token that stands alone. A
    character that is spread over several tokens belongs to the last of them.
    """
    pieces: list[str] = []
    checked(tokens)
    complete = 0  # tokens whose text is out
    for end in range(1, len(tokens) + 1):
        start = max(0, complete - context)
        text = tokenizer.decode(list(tokens[start:end]))
        if text.endswith("\ufffd") and end < len(tokens) and end - complete < context:
            pieces.append("")
            continue
        pieces.append(text[len(tokenizer.decode(list(tokens[start:complete]))) :])
        complete = end
    return pieces


def checked(tokens: Sequence[int]) -> Sequence[int]:
    """`tokens`, which a tokenizer can be asked about; a `ValueError` for others."""
    if unknown := [token for token in tokens if not 0 <= token < 2**32]:
        raise ValueError(
            f"A row has the token {unknown[0]}, which no tokenizer knows; repair its input_ids and labels."
        )
    return tokens
