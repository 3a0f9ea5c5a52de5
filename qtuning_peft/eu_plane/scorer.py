"""`EUScorer`: error and uncertainty of every sample, as a function for `datasets.map(..., batched=True)`.

    error(x, y) = 1/|T| sum_(t in T) e_t        uncertainty(x, y) = 1/|T| sum_(t in T) u_t

over the supervised positions T alone (Q-Tuning, arXiv 2509.23873; the paper's PPL is exp(error)). Rows are taken to
pieces of one sample each, sorted by length, run in batches of a fixed number of tokens, and put back in order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from ..head import causal_model
from ..loss import IGNORE_INDEX
from .batching import Piece, mean, run
from .fingerprint import fingerprint
from .repetition import repetition
from .rows import RowEncoder
from .tokenized import EncodedRow, RowError, untouched


class EUScorer:
    """Scores rows under a model. Use as `dataset.map(EUScorer(model, tokenizer), batched=True)`.

    Takes rows with messages, prompt and completion, instruction and output, text, or tokens (see `rows`) and adds:

    | column | type | |
    |---|---|---|
    | `input_ids`, `labels` | list of int | the row's tokens, -100 where a token is not supervised |
    | `error` | float64 | mean negative log-likelihood of the supervised tokens, in nats |
    | `uncertainty` | float64 | mean entropy of the model's predictions for them, in nats |
    | `supervised_tokens` | int64 | their number |
    | `token_error`, `token_uncertainty` | list of float32 | one value for each of them |
    | `repetition` | float64 | share of their 4-grams that occurred before, 0 to 1 |
    | `unscored` | string | why the row has no score (then `error` is NaN), else empty |

    Args:
        model: A causal language model of transformers, quantized or not, or a PEFT model around one, which is scored
            under its active adapter.
        tokenizer: The model's tokenizer; may be `None` for rows of tokens.
        columns: The data's own names for the columns, such as `{"prompt": "question", "completion": "answer"}`.
        chat_template: Whether prompts go through the tokenizer's chat template.
        max_length: Longer rows are not scored; by default the model's longest context.
        tokens_per_batch: Tokens in a forward pass, padding included.
        el2n: Also add `el2n`, the mean length of the difference between prediction and target (Paul et al., 2021).
        ifd: Also add `ifd`, instruction-following difficulty (Li et al., 2024): perplexity of the answer after its
            prompt over its perplexity without one. Costs a second pass over the answers.
        reference_model: Also add `token_reference_error`, the tokens' error under this model (Rho-1, Lin et al., 2024).

    Raises:
        ValueError: when the model, the data's columns or the tokenizer cannot be used. A row that cannot be scored does
            not raise: it is warned about, and `unscored` says why.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        columns: Mapping[str, str] | None = None,
        chat_template: bool = True,
        max_length: int | None = None,
        tokens_per_batch: int = 4096,
        el2n: bool = False,
        ifd: bool = False,
        reference_model: nn.Module | None = None,
    ) -> None:
        for name, value in (("max_length", max_length), ("tokens_per_batch", tokens_per_batch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; choose at least 1.")
        base = causal_model(model)
        self.model = model
        self.reference_model = reference_model
        self.encoder = RowEncoder(tokenizer, columns, chat_template)
        self.vocabulary: int = base.get_input_embeddings().weight.shape[0]
        self.max_length = max_length or getattr(base.config.get_text_config(), "max_position_embeddings", None)
        self.tokens_per_batch = tokens_per_batch
        self.el2n = el2n
        self.ifd = ifd
        # Called with the number of rows finished, for a progress bar finer than `map`'s.
        self.on_progress: Callable[[int], None] | None = None

    def __call__(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """Score a batch of rows.

        Args:
            rows: Columns of the data, equally long.
            indices: Numbers of the rows in the data, for messages (`map(..., with_indices=True)`).

        Returns:
            The new columns.
        """
        encoded, unscored = self._encode_rows(rows)
        scorable = [EncodedRow([], []) if reason else row for row, reason in zip(encoded, unscored, strict=True)]
        result = self._score(scorable)
        for index, values in enumerate(result["token_error"]):
            if not unscored[index] and not np.isfinite(values).all():
                unscored[index] = "the model's output is not finite"
        for name in result:
            for index, reason in enumerate(unscored):
                if reason:
                    result[name][index] = np.zeros(0, np.float32)

        columns: dict[str, list[Any]] = {
            "input_ids": [np.asarray(row.all_input_ids, np.int64) for row in encoded],
            "labels": [np.asarray(row.all_labels, np.int64) for row in encoded],
            "error": [mean(values) for values in result["token_error"]],
            "uncertainty": [mean(values) for values in result["token_uncertainty"]],
            "supervised_tokens": [np.int64(len(values)) for values in result["token_error"]],
            "repetition": [np.float64(repetition([row.labels[i] for i in row.positions()])) for row in encoded],
            "unscored": unscored,
        }
        if self.el2n:
            columns["el2n"] = [mean(values) for values in result.pop("token_el2n")]
        if self.ifd:
            columns["ifd"] = self._ifd(scorable, result["token_error"])
        float32 = {name: [values.astype(np.float32) for values in lists] for name, lists in result.items()}
        self._report(unscored, indices)
        return columns | float32

    def _encode_rows(self, rows: Mapping[str, Sequence[Any]]) -> tuple[list[EncodedRow], list[str]]:
        """Every row's tokens, and why it cannot be scored, empty if it can."""
        names = list(rows.keys())
        kind = self.encoder.format_of(names)
        first = rows["input_ids"][:1] if kind == "tokens" else ()
        if any(isinstance(rows[name], str) for name in names) or any(isinstance(value, int) for value in first):
            raise ValueError("A single row came instead of a batch; call map with batched=True.")
        encoded: list[EncodedRow] = []
        unscored = [""] * len(rows[names[0]])
        for index in range(len(unscored)):
            row = {name: rows[name][index] for name in names}
            try:
                encoded.append(self._encode(row, kind))
            except RowError as error:
                encoded.append(untouched(row) if kind == "tokens" else EncodedRow([], []))
                unscored[index] = str(error)
        return encoded, unscored

    def _encode(self, row: Mapping[str, Any], kind: str) -> EncodedRow:
        encoded = self.encoder.encode(row, kind)
        longest = max((stop - start for start, stop in pairwise(encoded.bounds)), default=0)
        supervised = [encoded.labels[index] for index in encoded.positions()]
        if not encoded.input_ids:
            raise RowError("empty: no tokens")
        if not supervised:
            raise RowError("no supervised tokens")
        if self.max_length is not None and longest > self.max_length:
            raise RowError(f"too long: {longest} tokens, and max_length is {self.max_length}")
        if not 0 <= min(*encoded.input_ids, *supervised) <= max(*encoded.input_ids, *supervised) < self.vocabulary:
            raise RowError(f"a token is outside of the model's vocabulary of {self.vocabulary}")
        return encoded

    # -- running the model ---------------------------------------------------------------------------------------------

    def _score(self, encoded: Sequence[EncodedRow]) -> dict[str, list[np.ndarray]]:
        """Scores of every row's supervised tokens, float64, by column."""
        pieces = [
            Piece(index, row.input_ids[start:stop], row.labels[start:stop])
            for index, row in enumerate(encoded)
            for start, stop in pairwise(row.bounds)
            if any(label != IGNORE_INDEX for label in row.labels[start:stop])
        ]
        result = run(self.model, pieces, len(encoded), self.tokens_per_batch, self.el2n, self.on_progress)
        if self.reference_model is not None:
            reference = run(self.reference_model, pieces, len(encoded), self.tokens_per_batch)
            result["token_reference_error"] = reference["token_error"]
        return result

    def _ifd(self, encoded: Sequence[EncodedRow], token_error: Sequence[np.ndarray]) -> list[np.float64]:
        # Nothing predicts an answer's first token once its prompt is gone, so both means leave it out.
        answers = [[row.labels[i] for i in row.positions()] for row in encoded]
        pieces = [Piece(i, answer, [IGNORE_INDEX, *answer[1:]]) for i, answer in enumerate(answers) if answer]
        alone = run(self.model, pieces, len(encoded), self.tokens_per_batch)["token_error"]
        return [
            np.exp(mean(errors[1:]) - mean(without)) if len(errors) > 1 else np.float64("nan")
            for errors, without in zip(token_error, alone, strict=True)
        ]

    def _report(self, unscored: Sequence[str], indices: Sequence[int] | None) -> None:
        bad = [(indices[i] if indices is not None else i, reason) for i, reason in enumerate(unscored) if reason]
        if bad:
            where = "" if indices is not None else " of this batch"
            listed = "; ".join(f"row {index}{where}: {reason}" for index, reason in bad[:20])
            more = f"; and {len(bad) - 20} more" if len(bad) > 20 else ""
            warnings.warn(f"{len(bad)} of {len(unscored)} rows have no score: {listed}{more}.", stacklevel=3)

    # -- identity ------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """A name for what this scorer computes: it changes with weights, adapters, tokenizer and settings."""
        settings = [self.encoder.columns, self.encoder.chat_template, self.max_length, self.tokens_per_batch]
        models = [model for model in (self.model, self.reference_model) if model is not None]
        return fingerprint([*settings, self.el2n, self.ifd], self.encoder.tokenizer, models)

    def __reduce__(self) -> Any:
        # `map` pickles its function to name its cache; copying a whole model for that would cost more than scoring.
        return _refuse_unpickling, (self.fingerprint(),)


def _refuse_unpickling(fingerprint: str) -> EUScorer:
    raise ValueError(
        f"EUScorer {fingerprint} holds a model and cannot be sent to another process; call map without num_proc."
    )
