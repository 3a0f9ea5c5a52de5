"""`EUPruner`: what a data set's scores say is kept, as a function for `datasets.map(..., batched=True)`.

Two stages (Q-Tuning, arXiv 2509.23873). Samples: the quadrants of the Error-Uncertainty plane, with thresholds that
meet a budget (see `quadrants`). Tokens: the best share of every misconception (see `tokens`). Both read columns that
`EUScorer` wrote, so that pruning again with other ratios runs no model.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..loss import IGNORE_INDEX
from .quadrants import QUADRANTS
from .selection import (
    DEGENERATE,
    DROPPED,
    EU_PLANE,
    KEEP,
    KEPT,
    TRIM,
    UNSCORED,
    Budget,
    Columns,
    Cut,
    Pruned,
    find_cut,
    spearman,
)
from .strategies import SAMPLE_STRATEGIES, TOKEN_STRATEGIES
from .tokens import keep_lowest, protected_tokens, without_tokens

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class EUPruner:
    """Drops samples and trims tokens of scored data: `pruner.fit(scored)`, then `scored.map(pruner, batched=True)`.

    Give exactly one of the three budgets.

    Args:
        sample_ratio: Share of the samples to keep, in (0, 1].
        token_ratio: Share of the supervised tokens to keep in samples that are trimmed: the misconceptions, or, with
            another strategy than the plane, every kept sample. In (0, 1].
        num_samples: Number of samples to keep, at least 1.
        num_tokens: Number of supervised tokens to keep, at least 1.
        strategy: `"eu_plane"`, or one to compare with (see `strategies`).
        token_strategy: `"neighbours"` (Q-Tuning), `"random"` or `"rho1"`.
        neighbour_weight: Weight lambda of a token's neighbours, 0 to 1.
        keep_tokens: Which end of the tokens' ranking is kept, `"lowest"` or `"highest"`.
        remove_tokens: Take trimmed tokens out of the input, and count positions anew, instead of masking them from the
            loss (`labels = -100`).
        tokenizer: Protects its special tokens from trimming, and is needed for `protect`.
        protect: Regular expressions; supervised tokens of text that one of them matches are never trimmed, such as
            `r"####.*"`.
        stratum_column: Meet the budget in every group of rows that have the same value in this column.
        max_repetition: Drop rows whose `repetition` exceeds this, before anything else, as `degenerate`.
        per_batch: Find the thresholds anew in every batch that `map` hands over, as published, instead of in `fit`.
        keep_dropped: Keep every row; `quadrant` says what would have become of it.
        seed: For strategies that draw.

    Attributes:
        pruned: What `fit` found, a [`Pruned`].

    Raises:
        ValueError: in one sentence, when an argument or the data cannot be used.
    """

    _: KW_ONLY
    sample_ratio: float | None = None
    token_ratio: float = 1.0
    num_samples: int | None = None
    num_tokens: int | None = None
    strategy: str = EU_PLANE
    token_strategy: str = "neighbours"
    neighbour_weight: float = 0.5
    keep_tokens: str = "lowest"
    remove_tokens: bool = False
    tokenizer: Any = None
    protect: str | Sequence[str] = ()
    stratum_column: str | None = None
    max_repetition: float | None = None
    per_batch: bool = False
    keep_dropped: bool = False
    seed: int = 0
    pruned: Pruned | None = field(default=None, init=False, repr=False)
    _cuts: dict[Any, Cut] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("sample_ratio", "token_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 < ratio <= 1:
                raise ValueError(f"{name} is {ratio}; choose a share in (0, 1].")
        for name in ("num_samples", "num_tokens"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}; choose at least 1.")
        budgets = [n for n in ("sample_ratio", "num_samples", "num_tokens") if getattr(self, n) is not None]
        if len(budgets) != 1:
            raise ValueError(
                f"{' and '.join(budgets) if budgets else 'No budget'} is given; give exactly one of sample_ratio, "
                "num_samples and num_tokens."
            )
        strategies = (EU_PLANE, *SAMPLE_STRATEGIES)
        for name, allowed in (
            ("strategy", strategies),
            ("token_strategy", tuple(TOKEN_STRATEGIES)),
            ("keep_tokens", ("lowest", "highest")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}.")
        for name in ("neighbour_weight", "max_repetition"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; choose from 0 to 1.")
        if self.stratum_column is not None and self.sample_ratio is None:
            raise ValueError("stratum_column is given without sample_ratio; budgets of strata are shares of samples.")
        self.protect = (self.protect,) if isinstance(self.protect, str) else tuple(self.protect)
        for pattern in self.protect:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"protect is {pattern!r}, which is no regular expression: {error}.") from error
        if self.protect and self.tokenizer is None:
            raise ValueError(f"protect is {self.protect[0]!r}, but tokenizer is None; pass the model's tokenizer.")

    @property
    def cuts(self) -> dict[Any, Cut]:
        """What `fit` divides the rows of every stratum by; under the key `None` without strata."""
        if self._cuts is None:
            raise ValueError("EUPruner has no thresholds yet; call fit(scored), or set per_batch to True.")
        return self._cuts

    @property
    def _budget(self) -> Budget:
        return Budget(self.sample_ratio, self.num_samples, self.num_tokens, self.token_ratio)

    # -- samples -------------------------------------------------------------------------------------------------------

    def fit(self, scored: Dataset | Mapping[str, Sequence[Any]]) -> EUPruner:
        """Find what divides the kept from the dropped in all of `scored`.

        Args:
            scored: Data with the columns that `EUScorer` adds.

        Returns:
            This pruner.
        """
        if getattr(scored, "column_names", None) and not hasattr(scored, "__len__"):
            raise ValueError(
                "The data is streamed, so thresholds for all of it cannot be found; set per_batch to True."
            )
        scored = scored.with_format(None) if hasattr(scored, "with_format") else scored
        rows = self._columns(scored)
        if self.tokenizer is not None and self.token_ratio < 1:
            rows["protected"] = np.array([self._protected(supervised(labels)).sum() for labels in scored["labels"]])
        self._cuts, quadrants, notes = self._divide(rows)
        self.pruned = self._summary(rows, quadrants, notes)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return self

    def quadrants(self, rows: Dataset | Mapping[str, Sequence[Any]]) -> np.ndarray:
        """Quadrant of every row, (rows,); `kept` or `dropped` with another strategy than the plane."""
        columns = self._columns(rows)
        if self.per_batch:
            aside = self._set_aside(columns)
            return self._divide(columns)[1] if (aside == "").any() else aside
        return self._label(columns, self.cuts)

    def _columns(self, rows: Dataset | Mapping[str, Sequence[Any]]) -> Columns:
        """The columns that choosing samples reads, checked."""
        given = list(getattr(rows, "column_names", None) or rows.keys())
        needed = {"error", "uncertainty", "supervised_tokens"}
        if self.strategy != EU_PLANE:
            needed.update(SAMPLE_STRATEGIES[self.strategy][0])
        if self.max_repetition is not None:
            needed.add("repetition")
        if self.stratum_column is not None:
            needed.add(self.stratum_column)
        missing = sorted(needed - set(given))
        if missing:
            advice = "score the data with EUScorer first"
            advice += f" and {missing[0]}=True" if missing[0] in ("el2n", "ifd") else ""
            raise ValueError(f"The data has no column {', '.join(missing)}; {advice}.")
        columns: Columns = {name: rows[name][:] for name in needed}
        for name in needed - {"input_ids", self.stratum_column}:
            try:
                columns[name] = np.array([np.nan if v is None else v for v in columns[name]], np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"Column {name} holds something other than numbers; score the data again.") from error
        count = len(columns["error"])
        if not count:
            raise ValueError("The data is empty; there is nothing to prune.")
        unscored = rows["unscored"][:] if "unscored" in given else [""] * count
        columns["unscored"] = np.array([bool(reason) for reason in unscored])
        for name in sorted(needed & {"error", "uncertainty", "supervised_tokens", "el2n", "repetition"}):
            broken = np.flatnonzero(~np.isfinite(columns[name]) & ~columns["unscored"])
            if len(broken):
                raise ValueError(
                    f"{name} of row {broken[0]} is {columns[name][broken[0]]}; score the data again, in a wider dtype "
                    "if the model's output overflowed."
                )
        return columns

    def _divide(self, rows: Columns) -> tuple[dict[Any, Cut], np.ndarray, list[str]]:
        """Cuts by stratum, the quadrant of every row, and what should be known."""
        count = len(rows["error"])
        choosable = np.flatnonzero(self._set_aside(rows) == "")
        if not len(choosable):
            raise ValueError(f"None of the {count} rows can be kept: all are without a score or degenerate.")
        groups = self._groups(rows, choosable)
        targets = self._budget.of_groups({value: len(members) for value, members in groups.items()}, count)
        cuts = {
            value: find_cut(take(rows, members), self.strategy, self._budget, targets[value], self.seed)
            for value, members in groups.items()
        }
        quadrants = self._label(rows, cuts)

        notes = []
        unscored = np.flatnonzero(rows["unscored"])
        if len(unscored):
            listed = ", ".join(map(str, unscored[:10])) + (", ..." if len(unscored) > 10 else "")
            notes.append(f"{len(unscored)} rows have no score and are not kept: {listed} (column unscored says why).")
        kept, target = int(np.isin(quadrants, KEEP).sum()), self._budget.samples(count)
        if target is not None and kept != target:
            cause = f"only {len(choosable)} can be" if len(choosable) < target else "samples with equal scores are"
            notes.append(f"{kept} samples are kept instead of {target}: {cause} kept{' together' * (cause[0] == 's')}.")
        return cuts, quadrants, notes

    def _set_aside(self, rows: Columns) -> np.ndarray:
        """Names for rows that are not chosen from, (rows,), empty for the others."""
        aside = np.where(rows["unscored"], UNSCORED, "").astype("<U16")
        if self.max_repetition is not None:
            aside[(rows["repetition"] > self.max_repetition) & ~rows["unscored"]] = DEGENERATE
        return aside

    def _groups(self, rows: Columns, choosable: np.ndarray) -> dict[Any, list[int]]:
        """The rows `choosable`, by stratum."""
        groups: dict[Any, list[int]] = {}
        for index in choosable.tolist():
            groups.setdefault(self._stratum(rows, index), []).append(index)
        return groups

    def _stratum(self, rows: Columns, index: int) -> Any:
        if self.stratum_column is None:
            return None
        value = rows[self.stratum_column][index]
        if isinstance(value, (list, dict)):
            raise ValueError(f"{self.stratum_column} is a {type(value).__name__} in row {index}; name a simple column.")
        # NaN is not equal to itself; such rows are one stratum, with those that have no value.
        return value if value == value else None

    def _label(self, rows: Columns, cuts: dict[Any, Cut]) -> np.ndarray:
        quadrants = self._set_aside(rows)
        for value, members in self._groups(rows, np.flatnonzero(quadrants == "")).items():
            if value not in cuts:
                raise ValueError(f"{self.stratum_column} is {value!r} in a row, a value that fit has not seen.")
            quadrants[members] = cuts[value].quadrants(take(rows, members))
        return quadrants

    def _summary(self, rows: Columns, quadrants: np.ndarray, notes: list[str]) -> Pruned:
        found = Counter(quadrants.tolist())
        names = QUADRANTS if self.strategy == EU_PLANE else (KEPT, DROPPED)
        scored, tokens = ~rows["unscored"], rows["supervised_tokens"]
        return Pruned(
            counts={name: found[name] for name in (*names, DEGENERATE, UNSCORED) if name in names or found[name]},
            kept_samples=int(np.isin(quadrants, KEEP).sum()),
            kept_tokens=self._budget.kept_tokens(quadrants, rows),
            samples=len(quadrants),
            tokens=int(tokens.sum()),
            correlation=spearman(rows["error"][scored], rows["uncertainty"][scored]),
            target_samples=self._budget.samples(len(quadrants)),
            target_tokens=self.num_tokens,
            notes=notes,
        )

    # -- tokens --------------------------------------------------------------------------------------------------------

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Prune a batch of scored rows.

        Args:
            rows: Columns, those of `EUScorer` among them.

        Returns:
            The same columns and `quadrant`, with the kept rows alone, their `labels` trimmed.
        """
        columns = {name: plain(rows[name]) for name in rows.keys()}  # noqa: SIM118 (lazy batches iterate otherwise)
        if not all(isinstance(column, list) for column in columns.values()):
            raise ValueError("A single row came instead of a batch; call map with batched=True.")
        missing = sorted({"input_ids", "labels", *TOKEN_STRATEGIES[self.token_strategy][0]} - columns.keys())
        if missing:
            raise ValueError(f"The data has no column {', '.join(missing)}; score the data with EUScorer first.")
        result: dict[str, list[Any]] = {name: [] for name in (*columns, "quadrant")}
        for index, quadrant in enumerate(self.quadrants(columns)):
            if quadrant not in KEEP and not self.keep_dropped:
                continue
            row = {name: column[index] for name, column in columns.items()} | {"quadrant": str(quadrant)}
            if quadrant in TRIM and self.token_ratio < 1:
                row = self.trim(row)
            for name, value in row.items():
                result[name].append(value)
        return result

    def kept_tokens(self, row: Mapping[str, Any]) -> np.ndarray:
        """Which supervised tokens of `row` stay when it is trimmed, (supervised tokens,), bool."""
        scores = TOKEN_STRATEGIES[self.token_strategy][1](row, self.neighbour_weight, self.seed)
        tokens = supervised(row["labels"])
        if len(tokens) != len(scores):
            raise ValueError(
                f"A row has {len(tokens)} supervised tokens and {len(scores)} token scores; score the data again."
            )
        return keep_lowest(
            scores if self.keep_tokens == "lowest" else -scores, self.token_ratio, self._protected(tokens)
        )

    def trim(self, row: dict[str, Any]) -> dict[str, Any]:
        """`row` without the tokens that are not kept."""
        kept = self.kept_tokens(row)
        labels = np.array(row["labels"], np.int64)
        positions = np.flatnonzero(labels != IGNORE_INDEX)
        labels[positions[~kept]] = IGNORE_INDEX
        trimmed_row = dict(row) | {"labels": labels.tolist(), "supervised_tokens": int(kept.sum())}
        for name in ("token_error", "token_uncertainty", "token_reference_error"):
            if name in row:
                trimmed_row[name] = np.asarray(row[name])[kept].tolist()
        if self.remove_tokens:
            stays = np.ones(len(labels), bool)
            stays[positions[~kept]] = False
            trimmed_row |= without_tokens(trimmed_row, stays)
        return trimmed_row

    def _protected(self, tokens: Sequence[int]) -> np.ndarray:
        if self.tokenizer is None:
            return np.zeros(len(tokens), bool)
        return protected_tokens(self.tokenizer, tokens, self.protect)


def supervised(labels: Sequence[int]) -> list[int]:
    """The supervised tokens among `labels`."""
    return [label for label in labels if label != IGNORE_INDEX]


def plain(column: Any) -> Any:
    """A column of any of `datasets`' formats as a list."""
    if isinstance(column, (str, bytes, dict, float, int)) or column is None:
        return column
    column = column.tolist() if hasattr(column, "tolist") else list(column)
    return [value.tolist() if hasattr(value, "tolist") else value for value in column]


def take(rows: Columns, members: Sequence[int]) -> Columns:
    """The columns with the rows `members` alone."""
    return {
        name: column[members] if isinstance(column, np.ndarray) else [column[index] for index in members]
        for name, column in rows.items()
    }
