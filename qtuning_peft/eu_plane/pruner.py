"""`EUPruner`: what a data set's scores say is kept, as a function for `datasets.map(..., batched=True)`.

Two stages (Q-Tuning, arXiv 2509.23873). Samples: two corners of the Error-Uncertainty plane, topped up to a budget (see
`quadrants` and `strategies`). Tokens: the best share of every misconception (see `tokens`). Both read columns that
`EUScorer` wrote, so that pruning again with other ratios runs no model.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ..loss import IGNORE_INDEX
from ..registry import option
from .copies import Copies
from .scores import SCORES, scores_of, token_columns
from .selection import (
    ASIDE,
    DEGENERATE,
    DUPLICATE,
    KEEP,
    NOISY,
    SAMPLE_STRATEGIES,
    TRIM,
    UNSCORED,
    Budget,
    Pruned,
    SampleStrategy,
)
from .table import Data, check_whole, columns_of, mismatch, names_of, rank_correlation, read_table, require, supervised
from .tokens import TOKEN_STRATEGIES, keep_lowest, protected_tokens, share_of


@dataclass
class EUPruner:
    """Drops samples and trims tokens of scored data: `pruner.fit(scored)`, then `scored.map(pruner, batched=True)`.

    Give exactly one of the budgets `sample_ratio`, `num_samples` and `num_tokens`. YAML blocks and the command line
    take these options from the fields below, each of which has its help.

    Attributes:
        pruned: What `fit` found, a [`Pruned`].
    """

    _: KW_ONLY
    sample_ratio: float | None = option(None, "Share of the samples to keep, in (0, 1], rounded down.")
    num_samples: int | None = option(None, "Number of samples to keep, instead of a share.")
    num_tokens: int | None = option(None, "Number of supervised tokens to keep, instead of a share of the samples.")
    token_ratio: float = option(
        1.0,
        "Share of the supervised tokens to keep in samples that are trimmed, in (0, 1], or more (see trim_above): in "
        "misconceptions, or, with another strategy than the plane, in every kept sample.",
    )
    strategy: str = option("eu_plane", "Which samples are kept.", SAMPLE_STRATEGIES)
    token_strategy: str = option("neighbours", "Which tokens of trimmed samples are kept.", TOKEN_STRATEGIES)
    neighbour_weight: float = option(0.5, "Weight of a token's neighbours, 0 to 1, for token_strategy neighbours.")
    trim_above: float = option(
        0.5,
        "For token_strategy neighbours: a token is trimmed only if its perplexity, and the mean of its neighbours', "
        "exceed this quantile of its row's, 0 to 1.",
    )
    tokenizer: Any = option(None, "The model's tokenizer; special tokens are never trimmed.")
    protect: str | Sequence[str] = option(
        (), "Regular expressions for text that is never trimmed, such as '####.*'; needs the tokenizer."
    )
    deduplicate: bool = option(
        False,
        "Drop rows with the same prompt and answer as an earlier one, before anything else, as duplicate; given the "
        "tokenizer, whitespace and case do not count. In Python, map then needs with_indices=True.",
    )
    max_repetition: float | None = option(
        None, "Drop rows more of whose 4-grams are repeated than this, 0 to 1, before anything else, as degenerate."
    )
    drop_noise: float = option(
        0.0, "Share of the scored rows to drop before anything else, as noisy: those with the highest score noise."
    )
    per_batch: bool = option(
        False, "Find the thresholds anew in every batch that map hands over, as published, instead of in fit."
    )
    keep_dropped: bool = option(False, "Keep every row; column quadrant says what would have become of it.")
    seed: int = option(0, "Seed of strategies that draw.")
    pruned: Pruned | None = field(default=None, init=False, repr=False)
    _fitted: SampleStrategy | None = field(default=None, init=False, repr=False)
    _noise_limit: float | None = field(default=None, init=False, repr=False)
    _copies: Copies | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for names, right, choose in (
            (("sample_ratio", "token_ratio"), lambda value: 0 < value <= 1, "a share in (0, 1]"),
            (("num_samples", "num_tokens"), lambda value: value >= 1, "at least 1"),
            (("neighbour_weight", "trim_above", "max_repetition"), lambda value: 0 <= value <= 1, "from 0 to 1"),
            (("drop_noise",), lambda value: 0 <= value < 1, "a share in [0, 1)"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not right(value):
                    raise ValueError(f"{name} is {value}; choose {choose}.")
        budgets = [n for n in ("sample_ratio", "num_samples", "num_tokens") if getattr(self, n) is not None]
        if len(budgets) != 1:
            given = " and ".join(budgets) + " are" if budgets else "No budget is"
            raise ValueError(f"{given} given; give exactly one of sample_ratio, num_samples and num_tokens.")
        if self.deduplicate and self.per_batch:
            raise ValueError("deduplicate and per_batch are True, but batches do not see each other; leave one out.")
        SAMPLE_STRATEGIES.check(self.strategy)
        TOKEN_STRATEGIES.check(self.token_strategy)
        self.protect = (self.protect,) if isinstance(self.protect, str) else tuple(self.protect)
        for pattern in self.protect:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"protect is {pattern!r}, which is no regular expression: {error}.") from error
        if self.protect and self.tokenizer is None:
            raise ValueError(f"protect is {self.protect[0]!r}, but tokenizer is None; pass the model's tokenizer.")

    @property
    def fitted(self) -> SampleStrategy:
        """The sample strategy that `fit` fitted: what the kept and the dropped rows are divided by."""
        if self._fitted is None:
            raise ValueError("EUPruner has no thresholds yet; call fit(scored), or set per_batch to True.")
        return self._fitted

    @property
    def scores(self) -> tuple[str, ...]:
        """Scores that its strategies read, for `EUScorer(scores=...)`."""
        columns = SAMPLE_STRATEGIES[self.strategy].columns + TOKEN_STRATEGIES[self.token_strategy].columns
        return scores_of({*columns, *(["noise"] if self.drop_noise else [])})

    def fit(self, scored: Data) -> "EUPruner":
        """Find what divides the kept from the dropped in all of `scored`, which has the columns of `EUScorer`."""
        check_whole(scored)
        scored = scored.with_format(None) if hasattr(scored, "with_format") else scored
        self._noise_limit = None
        self._copies = Copies.among(scored, self.tokenizer) if self.deduplicate else None
        rows = self._table(scored)
        if rows["aside"].all():
            raise ValueError(f"None of the {len(rows)} rows can be kept: each is one of {', '.join(ASIDE)}.")
        self._noise_limit = self._limit(rows)
        rows["trimmed"] = self._trimmed(scored, rows)
        self._fitted, _ = self._fit(rows)
        self.pruned = self._summary(rows, self._label(rows, self._fitted))
        for note in self.pruned.notes:
            warnings.warn(note, stacklevel=2)
        return self

    def quadrants(self, rows: Data, indices: Sequence[int] | None = None) -> np.ndarray:
        """What becomes of every row, (rows,): its quadrant, or `kept` or `dropped` with another strategy.

        `indices` number `rows` in the data that `fit` has seen; `deduplicate` needs them if these are not all.
        """
        table = self._table(rows, indices)
        if not self.per_batch:
            return self._label(table, self.fitted)
        if self.num_tokens is not None:
            table["trimmed"] = self._trimmed(rows, table)
        return self._fit(table)[1]

    def _table(self, data: Data, indices: Sequence[int] | None = None) -> pd.DataFrame:
        """The columns that decide, and `aside`: names for rows that are not chosen from, empty for the others."""
        needed = {"error", "uncertainty", "supervised_tokens", *SAMPLE_STRATEGIES[self.strategy].columns}
        needed |= {"repetition"} if self.max_repetition is not None else set()
        rows = read_table(data, needed | ({"noise"} if self.drop_noise else set()))
        repeats = self.max_repetition is not None and rows["repetition"] > self.max_repetition
        none = np.zeros(len(rows), bool)
        rows["duplicate"] = none if self._copies is None else self._copies.of(data, self.tokenizer, indices)
        limit = self._limit(rows) if self.per_batch or self._noise_limit is None else self._noise_limit
        aside = {
            UNSCORED: rows["unscored"],
            DUPLICATE: rows["duplicate"],
            DEGENERATE: np.broadcast_to(repeats, len(rows)),
            NOISY: rows["noise"] > limit if self.drop_noise else none,
        }
        rows["aside"] = np.select([*aside.values()], [*aside], "")
        return rows

    def _limit(self, rows: pd.DataFrame) -> float:
        """The noise above which rows are dropped. Rows without a number are not; of equal ones, none is."""
        if not self.drop_noise:
            return np.inf
        noise = rows["noise"][~(rows["unscored"] | rows["duplicate"])].dropna().sort_values(ascending=False)
        return float(noise.iloc[int(self.drop_noise * len(noise))]) if len(noise) else np.inf

    def _fit(self, rows: pd.DataFrame) -> tuple[SampleStrategy, np.ndarray]:
        """The strategy, fitted on the rows that can be chosen from, and what becomes of all when they are all there is.

        In a batch there may be none to choose from.
        """
        strategy, quadrants = SAMPLE_STRATEGIES[self.strategy](self), rows["aside"].to_numpy(object)
        target, rows = self._target(len(rows)), rows[rows["aside"] == ""]
        if len(rows):
            each = np.ones(len(rows))
            budget = self._in_tokens(rows) if target is None else Budget(min(target, len(rows)), each, each)
            quadrants[quadrants == ""] = strategy.fit(rows, budget)
        return strategy, quadrants.astype(str)

    def _trimmed(self, scored: Data, rows: pd.DataFrame) -> Any:
        """Supervised tokens of every row that would be left if it was trimmed, (rows,)."""
        if self.token_ratio == 1:
            return rows["supervised_tokens"]
        columns = {"labels", *TOKEN_STRATEGIES[self.token_strategy].columns}
        require(columns, names_of(scored))
        return [
            0 if aside else self.kept_tokens(dict(zip(columns, row, strict=True))).sum()
            for aside, *row in zip(rows["aside"], *(scored[name] for name in columns), strict=True)
        ]

    def _label(self, rows: pd.DataFrame, strategy: SampleStrategy) -> np.ndarray:
        quadrants = rows["aside"].to_numpy(object)
        if (choosable := quadrants == "").any():
            quadrants[choosable] = strategy(rows[choosable])
        return quadrants.astype(str)

    def _target(self, rows: int) -> int | None:
        """Samples to keep of `rows`; those without a score count, or the budget would depend on them."""
        if self.sample_ratio is not None:
            return share_of(rows, self.sample_ratio)
        return min(self.num_samples, rows) if self.num_samples is not None else None

    def _in_tokens(self, rows: pd.DataFrame) -> Budget:
        return Budget(self.num_tokens or 0, rows["supervised_tokens"].to_numpy(), rows["trimmed"].to_numpy())

    def _summary(self, rows: pd.DataFrame, quadrants: np.ndarray) -> Pruned:
        found, scored = Counter(quadrants.tolist()), rows[~rows["unscored"]]
        names = SAMPLE_STRATEGIES[self.strategy].quadrants
        kept, target = int(np.isin(quadrants, KEEP).sum()), self._target(len(rows))
        notes, unscored = [], np.flatnonzero(rows["unscored"])
        if len(unscored):
            listed = ", ".join(map(str, unscored[:10])) + (", ..." if len(unscored) > 10 else "")
            notes.append(f"{len(unscored)} rows have no score and are not kept: {listed} (column unscored says why).")
        if target is not None and kept != target:
            few = (choosable := len(rows) - sum(found[name] for name in ASIDE)) < target
            cause = f"only {choosable} can be kept" if few else "samples with equal scores are kept together"
            notes.append(f"{kept} samples are kept instead of {target}: {cause}.")
        others = scored.loc[~scored["duplicate"], ["error", "uncertainty", "supervised_tokens"]]
        if copies := int(others.round(6).duplicated().sum()):
            advice = "deduplicate keeps the first of each"
            notes.append(f"{copies} of {len(rows)} rows score exactly as another one, as copies do; {advice}.")
        counts = {name: found[name] for name in (*names, *ASIDE) if name in names or found[name]}
        return Pruned(
            counts=counts,
            token_counts={name: int(rows["supervised_tokens"][quadrants == name].sum()) for name in counts},
            kept_samples=kept, kept_tokens=int(self._in_tokens(rows).spent(quadrants)),
            samples=len(rows), tokens=int(rows["supervised_tokens"].sum()),
            correlation=rank_correlation(scored["error"], scored["uncertainty"]),
            target_samples=target, target_tokens=self.num_tokens, notes=notes,
        )  # fmt: skip

    def __call__(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """Prune a batch of scored rows: the same columns and `quadrant`, kept rows alone, their `labels` trimmed.

        Where tokens are trimmed, `trimmed_tokens` says how many of a row, as its text does not.
        `indices` are those of `map(..., with_indices=True)`, which `deduplicate` needs.
        """
        columns = columns_of(rows)
        known = {*ASIDE, *(name for strategy in SAMPLE_STRATEGIES.values() for name in strategy.quadrants)}
        if not known.issuperset(map(str, columns.get("quadrant", ()))):
            raise ValueError("The data has a column quadrant of its own, which pruning would replace; rename it.")
        require({"input_ids", "labels", *TOKEN_STRATEGIES[self.token_strategy].columns}, columns)
        counted = ["trimmed_tokens"] if self.token_ratio < 1 else []
        result: dict[str, list[Any]] = {name: [] for name in (*columns, "quadrant", *counted)}
        for index, quadrant in enumerate(self.quadrants(columns, indices)):
            if quadrant not in KEEP and not self.keep_dropped:
                continue
            row = {name: column[index] for name, column in columns.items()} | {"quadrant": str(quadrant)}
            row = dict.fromkeys(counted, 0) | row
            if quadrant in TRIM and self.token_ratio < 1:
                row = self.trim(row)
            for name, value in row.items():
                result[name].append(value)
        return result

    def kept_tokens(self, row: Mapping[str, Any]) -> np.ndarray:
        """Which supervised tokens of `row` are kept when it is trimmed, (supervised tokens,), bool."""
        scores = TOKEN_STRATEGIES[self.token_strategy].scores(row, self)
        tokens = supervised(row["labels"])
        if len(tokens) != len(scores):
            raise mismatch(len(tokens), len(scores))
        return keep_lowest(np.where(self._protected(tokens), -np.inf, scores), self.token_ratio)

    def trim(self, row: dict[str, Any]) -> dict[str, Any]:
        """`row` without labels for the tokens that are not kept, and with the scores of those that are.

        Means of token scores, such as `error`, are means over the kept tokens; other scores are still the whole row's.
        """
        kept = self.kept_tokens(row)
        labels = np.array(row["labels"], np.int64)
        labels[np.flatnonzero(labels != IGNORE_INDEX)[~kept]] = IGNORE_INDEX
        count = row.get("trimmed_tokens", 0) + int((~kept).sum())
        trimmed = dict(row) | {"labels": labels.tolist(), "supervised_tokens": int(kept.sum()), "trimmed_tokens": count}
        for name in token_columns() & row.keys():
            if len(row[name]) != len(kept):
                raise mismatch(len(kept), len(row[name]))
            trimmed[name] = np.asarray(row[name])[kept].tolist()
            if (score := name.removeprefix("token_")) in {*SCORES} & {*row}:
                trimmed[score] = float(np.mean(trimmed[name]))
        return trimmed

    def _protected(self, tokens: Sequence[int]) -> np.ndarray:
        if self.tokenizer is None:
            return np.zeros(len(tokens), bool)
        return protected_tokens(self.tokenizer, tokens, self.protect)
