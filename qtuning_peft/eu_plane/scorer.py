"""`EUScorer`: error and uncertainty of every sample, as a function for `datasets.map(..., batched=True)`.

    error(x, y) = 1/|T| sum_(t in T) e_t        uncertainty(x, y) = 1/|T| sum_(t in T) u_t

over the supervised positions T alone (Q-Tuning, arXiv 2509.23873; the paper's PPL is exp(error)). What other scores
there are is in `scores`.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..registry import option
from ..side_tuning.network import NetworkSettings
from ..states.format import FORMATS
from ..states.projection import Projection, format_of
from .batching import PLANE
from .engine import Engine, engine_of
from .fingerprint import fingerprint
from .rows import RowEncoder
from .scores import ALWAYS, SCORES, ScoredRows, mean
from .table import columns_of, names_of
from .tokenized import EncodedRow, RowError, Sample, untouched

REFERENCE = "token_reference_error"
# Columns that vision-language models would read.
PICTURES = {"image", "images", "pixel_values"}


@dataclass(eq=False, repr=False)
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
    | `unscored` | string | why the row has no score (then its scores are NaN), else empty |

    Args:
        model: A causal language model of transformers, quantized or not, or a PEFT model around one, which is scored
            under its active adapter; or another [`Engine`].
        tokenizer: The model's tokenizer; may be `None` for rows of tokens.
        columns, chat_template, max_length, tokens_per_batch, scores, reference_model: Each has its help below, and is
            an option of `qtuning score`.

        states: Also add the base's hidden states that this side network would read, as column `states` (bytes, see
            `states.format`) of the tokens `state_tokens`, indices into `input_ids`.
        states_format: How they are stored: bfloat16, float16, float32 or int8.
        projection: Or with this projection, in 8 bits.

    A row that cannot be scored does not raise: it is warned about, and `unscored` says why.
    """

    model: nn.Module | Engine
    tokenizer: Any = None
    _: KW_ONLY
    columns: Mapping[str, str] | None = option(
        None, "The data's own names for the columns, such as prompt=question (in Python, {'prompt': 'question'})."
    )
    chat_template: bool = option(True, "Put prompts through the model's chat template.")
    max_length: int | None = option(None, "Longer rows get no score; by default the model's longest context.")
    tokens_per_batch: int = option(4096, "Tokens in a forward pass, padding included.")
    scores: Sequence[str] = option((), f"More scores to add, beside {', '.join(ALWAYS)}.", SCORES)
    reference_model: nn.Module | Engine | None = option(
        None, f"A second model: also add {REFERENCE}, the tokens' error under it."
    )

    states: NetworkSettings | None = None
    states_format: str = "bfloat16"
    projection: Projection | None = None

    def __post_init__(self) -> None:
        FORMATS.check(self.states_format)
        for name in ("max_length", "tokens_per_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; choose at least 1.")
        self.engine = engine_of(self.model)
        for name in self.scores:
            SCORES.check(name)
            if SCORES[name].per_token and name not in self.engine.scores:
                known = ", ".join(sorted(self.engine.scores))
                raise ValueError(f"scores names {name}, but {type(self.engine).__name__} computes {known} alone.")
        if REFERENCE in self.scores and self.reference_model is None:
            raise ValueError(f"scores names {REFERENCE}, but reference_model is None; pass a second model.")
        self.encoder = RowEncoder(self.tokenizer, self.columns, self.chat_template)
        settings = self.engine.config.get_text_config()
        self.max_length = self.max_length or getattr(settings, "max_position_embeddings", None)
        wanted = {*ALWAYS, *self.scores, *([REFERENCE] if self.reference_model is not None else [])}
        self.scores = [name for name in SCORES if name in wanted]
        self.layers = () if self.states is None else tuple(self.states.layers(self.engine.shape()))
        # Called with the number of samples scored, for a progress bar finer than `map`'s.
        self.on_progress: Callable[[int], object] | None = None

    def __call__(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """The new columns of a batch of rows; `indices` number them in messages (`map(..., with_indices=True)`)."""
        encoded, unscored = self._encode_rows(rows)
        scores = self._score(encoded)
        for index, value in enumerate(scores["token_error"]):
            if not unscored[index] and not np.isfinite(value).all():
                unscored[index] = "the model's output is not finite"
        columns = {
            name: [_stored(value, bool(why)) for value, why in zip(values, unscored, strict=True)]
            for name, values in scores.items()
        }
        if self.states is not None:
            columns["state_tokens"] = [np.asarray(row.positions(), np.int64) for row in encoded]
        self._report(unscored, indices)
        return {
            "input_ids": [np.asarray(row.input_ids, np.int64) for row in encoded],
            "labels": [np.asarray(row.labels, np.int64) for row in encoded],
            "supervised_tokens": [np.int64(len(values)) for values in columns["token_error"]],
            "unscored": unscored,
            **columns,
        }

    def _encode_rows(self, rows: Mapping[str, Sequence[Any]]) -> tuple[list[EncodedRow], list[str]]:
        """Every row's tokens, and why it cannot be scored, empty if it can."""
        refuse_own(names := list(names_of(rows)))
        config = self.engine.config
        if config.get_text_config() is not config and (pictures := sorted(PICTURES & {*names})):
            raise ValueError(f"Rows have pictures (column {pictures[0]}), which scoring does not read; leave them out.")
        kind = self.encoder.format_of(names)
        columns = columns_of(rows, self.encoder.known)
        encoded: list[EncodedRow] = []
        unscored = [""] * len(next(iter(columns.values())))
        for index in range(len(unscored)):
            row = {name: column[index] for name, column in columns.items()}
            try:
                encoded.append(self._encode(row, kind))
            except RowError as error:
                encoded.append(untouched(row if kind == "tokens" else {}))
                unscored[index] = str(error)
        return encoded, unscored

    def _encode(self, row: Mapping[str, Any], kind: str) -> EncodedRow:
        encoded = self.encoder.encode(row, kind)
        tokens = encoded.input_ids[encoded.bounds[0] : encoded.bounds[-1]]
        longest = max((stop - start for start, stop in pairwise(encoded.bounds)), default=0)
        supervised = [encoded.labels[index] for index in encoded.positions()]
        if not tokens:
            raise RowError("empty: no tokens")
        if not supervised:
            raise RowError("no supervised tokens")
        if self.max_length is not None and longest > self.max_length:
            raise RowError(f"too long: {longest} tokens, and max_length is {self.max_length}")
        if not 0 <= min(*tokens, *supervised) <= max(*tokens, *supervised) < self.engine.vocabulary:
            raise RowError(f"a token is outside of the model's vocabulary of {self.engine.vocabulary}")
        return encoded

    def _score(self, encoded: Sequence[EncodedRow]) -> dict[str, Sequence[Any]]:
        """Columns of scores; those of tokens are (supervised tokens,) for each row, float64."""
        samples = [sample for index, row in enumerate(encoded) for sample in row.samples(index)]

        def by_row(samples: Sequence[Sample], values: Sequence[np.ndarray]) -> list[np.ndarray]:
            rows = [[np.zeros(0)] for _ in encoded]
            for sample, value in zip(samples, values, strict=True):
                rows[sample.row].append(value)
            return [np.concatenate(parts) for parts in rows]

        def errors(samples: Sequence[Sample], model: nn.Module | Engine | None = None) -> list[np.ndarray]:
            engine = self.engine if model is None else engine_of(model)
            return by_row(samples, engine.run(samples, self.tokens_per_batch)["error"])

        of_tokens = [name for name in self.scores if SCORES[name].per_token]
        states: dict[int, Tensor] = {}
        take = None if self.states is None else states.__setitem__
        found = self.engine.run(samples, self.tokens_per_batch, of_tokens, self.on_progress, take, self.layers)
        joined = {name: by_row(samples, values) for name, values in found.items()}
        rows = ScoredRows(samples, joined["error"], errors, self.reference_model)
        columns: dict[str, Sequence[Any]] = {}
        for name in self.scores:
            if name in joined:
                columns |= {name: [mean(values) for values in joined[name]], f"token_{name}": joined[name]}
            else:
                columns[name] = SCORES[name].of(rows)
        if self.states is not None:
            of_rows: list[list[Tensor]] = [[] for _ in encoded]
            for index, sample in enumerate(samples):
                of_rows[sample.row].append(states[index])
            encode = format_of(self.states_format, self.projection).encode
            columns["states"] = [encode(torch.cat(parts, dim=1)) if parts else b"" for parts in of_rows]
        return columns

    def _report(self, unscored: Sequence[str], indices: Sequence[int] | None) -> None:
        bad = [(indices[i] if indices is not None else i, reason) for i, reason in enumerate(unscored) if reason]
        if bad:
            where = "" if indices is not None else " of this batch"
            listed = "; ".join(f"row {index}{where}: {reason}" for index, reason in bad[:20])
            more = f"; and {len(bad) - 20} more" if len(bad) > 20 else ""
            warnings.warn(f"{len(bad)} of {len(unscored)} rows have no score: {listed}{more}.", stacklevel=3)

    def fingerprint(self) -> str:
        """Fingerprint of what this scorer computes: it changes with weights, adapters, tokenizer and settings."""
        settings = [self.encoder.columns, self.chat_template, self.max_length, self.tokens_per_batch]
        settings += [self.layers, self.states_format] if self.states is not None else []
        settings += [self.projection.fingerprint()] if self.projection is not None else []
        return fingerprint([*settings, self.scores], self.tokenizer, self.engines)

    @property
    def engines(self) -> list[Engine]:
        """What runs the model, and the reference model if there is one."""
        return [self.engine, *([] if self.reference_model is None else [engine_of(self.reference_model)])]

    def __reduce__(self) -> Any:
        # `map` pickles its function to name its cache; copying a whole model for that would cost more than scoring.
        # Another process gets what says so when it is called: one that cannot load its function dies without a word.
        return partial, (_refuse, self.fingerprint())


def _stored(value: Any, unscored: bool) -> Any:
    """A score as it is stored: a number in float64, those of tokens in float32; NaN, or none of them, if unscored."""
    if isinstance(value, bytes):
        return b"" if unscored else value
    value = np.asarray(value, np.float64)
    if value.ndim:
        return (value[:0] if unscored else value).astype(np.float32)
    return np.float64("nan") if unscored else value[()]


def refuse_own(names: Sequence[str]) -> None:
    """Refuse data whose columns `names` are some that scoring adds, unless it has been scored before."""
    added = {"supervised_tokens", "unscored", *ALWAYS, *(f"token_{name}" for name in PLANE)}
    if own := sorted(added & {*names}) if not {*names} >= {*PLANE, "supervised_tokens"} else []:
        raise ValueError(f"The data has a column {own[0]} of its own, which scoring would replace; rename it.")


def _refuse(fingerprint: str, *rows: Any) -> None:
    raise ValueError(
        f"EUScorer {fingerprint} holds a model and cannot be sent to another process; call map without num_proc."
    )
