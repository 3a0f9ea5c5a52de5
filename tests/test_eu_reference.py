"""The pruner against Q-Tuning's Algorithm 1 and equation 7, written out anew in float64, on many random data sets."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from algorithm_1 import keep_samples, keep_tokens, share
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qtuning_peft import EUPruner

Rows = dict[str, list[Any]]
SPECIAL = 9


ROLES = {"misconception": "Q2", "calibration": "Q4", "topped_up": "top-up"}
RATIOS = [0.01, 0.05, 0.125, 0.25, 0.29, 0.5, 0.7, 0.9, 1.0]


def roles(names: Iterable[str]) -> dict[int, str]:
    """What the kept rows are, in the paper's words."""
    return {index: ROLES[name] for index, name in enumerate(names) if name in ROLES}


def scored_rows(count: int, correlation: float, draw: np.random.Generator) -> Rows:
    """`count` rows as a scorer leaves them; equal tokens within a row are common, equal rows are not."""
    first = draw.normal(size=count)
    second = correlation * first + math.sqrt(1 - correlation**2) * draw.normal(size=count)
    rows: Rows = {
        "id": list(range(count)),
        "error": np.exp(first).tolist(),
        "uncertainty": np.exp(second).tolist(),
    }
    for name in ("input_ids", "labels", "supervised_tokens", "token_error", "token_uncertainty", "unscored"):
        rows[name] = []
    rows["repetition"] = [0.0] * count
    for _ in range(count):
        tokens = int(draw.integers(1, 16))
        answer = draw.integers(3, 12, tokens).tolist()
        errors = draw.exponential(1.5, tokens) if draw.random() < 0.7 else draw.choice([0.0, 1.0, 40.0, 50.0], tokens)
        rows["input_ids"].append([1, 2, *answer])
        rows["labels"].append([-100, -100, *answer])
        rows["supervised_tokens"].append(tokens)
        rows["token_error"].append(errors.astype(np.float32).tolist())
        rows["token_uncertainty"].append(draw.exponential(1.0, tokens).astype(np.float32).tolist())
        rows["unscored"].append("")
    return rows


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(SPECIAL)} | {"<eos>": SPECIAL, "w10": 10, "w11": 11}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="<eos>"
    )


def check(rows: Rows, expected: dict[int, str], pruner: EUPruner, result: Rows) -> None:
    """`result` is `rows` pruned: the rows of `expected`, misconceptions trimmed."""
    assert result["id"] == sorted(expected)
    assert dict(zip(result["id"], map(ROLES.get, result["quadrant"]), strict=True)) == expected
    for i, found in zip(result["id"], result["labels"], strict=True):
        labels = list(rows["labels"][i])
        if expected[i] == "Q2":
            protected = [pruner.tokenizer is not None and label == SPECIAL for label in labels[2:]]
            options = pruner.token_ratio, pruner.neighbour_weight, pruner.trim_above
            stay = keep_tokens(rows["token_error"][i], *options, protected)
            labels[2:] = [label if one else -100 for label, one in zip(labels[2:], stay, strict=True)]
        assert list(found) == labels


def test_a_thousand_random_batches_keep_the_rows_of_algorithm_1() -> None:
    """Of 2 to 64 rows, correlated as errors and uncertainties are, two in three with ties in one score or in both."""
    draw, equal_pairs, topped_up = np.random.default_rng(2509), 0, 0
    for case in range(1000):
        count, correlation = int(draw.integers(2, 65)), float(draw.choice([-0.5, 0.0, 0.6, 0.8, 0.95]))
        first = draw.normal(size=count)
        scores = np.exp([first, correlation * first + math.sqrt(1 - correlation**2) * draw.normal(size=count)])
        if case % 3:
            # Few values, and rows that are there twice.
            scores = np.round(scores, 1)[:, draw.integers(0, count, count)]
        error, uncertainty = scores.round(9).tolist()
        rows = {"error": error, "uncertainty": uncertainty, "supervised_tokens": [3] * count}
        ratio = float(draw.choice(RATIOS))
        expected = keep_samples(error, uncertainty, ratio)
        names = EUPruner(sample_ratio=ratio, per_batch=True).quadrants(rows)
        assert roles(names) == expected, f"batch {case}"
        assert len(expected) == share(count, ratio)
        equal_pairs += len({*zip(error, uncertainty, strict=True)}) < count
        topped_up += "top-up" in expected.values()
    assert equal_pairs > 600
    assert topped_up > 600


@settings(max_examples=int(os.environ.get("FUZZ_CASES", "100")), deadline=None)
@given(
    pairs=st.lists(
        # Not so close that interpolated quantiles round; and ties in one score or in both.
        st.tuples(*[st.integers(0, 12_000).map(lambda thousandth: thousandth / 1000)] * 2)
        | st.tuples(*[st.integers(0, 4).map(float)] * 2),
        min_size=1,
        max_size=40,
    ),
    ratio=st.sampled_from(RATIOS),
)
def test_any_batch_keeps_the_rows_of_algorithm_1(pairs: list[tuple[float, float]], ratio: float) -> None:
    error, uncertainty = map(list, zip(*pairs, strict=True))
    rows = {"error": error, "uncertainty": uncertainty, "supervised_tokens": [3] * len(error)}
    names = EUPruner(sample_ratio=ratio, per_batch=True).quadrants(rows)
    assert roles(names) == keep_samples(error, uncertainty, ratio)


@settings(max_examples=int(os.environ.get("FUZZ_CASES", "100")), deadline=None)
@given(
    errors=st.lists(st.floats(0, 30, width=32) | st.sampled_from([0.0, 1.0, 40.0]), min_size=1, max_size=40),
    ratio=st.sampled_from(RATIOS),
    weight=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    percentile=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
)
def test_any_sample_keeps_the_tokens_of_equation_7(
    errors: list[float], ratio: float, weight: float, percentile: float
) -> None:
    pruner = EUPruner(sample_ratio=1.0, token_ratio=ratio, neighbour_weight=weight, trim_above=percentile)
    row = {"labels": [-100, *range(len(errors))], "token_error": errors}
    assert pruner.kept_tokens(row).tolist() == keep_tokens(errors, ratio, weight, percentile)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8, 1.0])
def test_a_data_set_is_divided_and_trimmed_as_one_batch(correlation: float) -> None:
    draw = np.random.default_rng(int(10 * correlation) + 10)
    for ratio in RATIOS:
        count = int(draw.integers(1, 61))
        rows = scored_rows(count, correlation, draw)
        pruner = EUPruner(
            sample_ratio=ratio,
            token_ratio=float(draw.choice([0.01, 0.25, 0.5, 0.7, 1.0])),
            neighbour_weight=float(draw.choice([0.0, 0.25, 0.5, 1.0])),
            trim_above=float(draw.choice([0.0, 0.5])),
            tokenizer=tokenizer() if draw.random() < 0.5 else None,
        ).fit(rows)
        expected = keep_samples(rows["error"], rows["uncertainty"], ratio)
        assert roles(pruner.quadrants(rows)) == expected
        assert len(expected) == pruner.pruned.kept_samples == share(count, ratio)
        result = pruner(rows)
        check(rows, expected, pruner, result)
        assert pruner.pruned.kept_tokens == sum(label != -100 for labels in result["labels"] for label in labels)


@pytest.mark.filterwarnings("ignore:2 samples are kept instead of 1")
@pytest.mark.parametrize("strategy", ["eu_plane", "highest_perplexity"])
def test_at_a_tie_more_is_kept_and_a_limit_is_no_excess(strategy: str) -> None:
    rows = {name: values * 2 for name, values in scored_rows(1, 0.0, np.random.default_rng(0)).items()}
    pruner = EUPruner(num_samples=1, strategy=strategy, max_repetition=0.0).fit(rows)
    assert pruner.pruned.kept_samples == 2
    # A batch that is divided by itself has a first one.
    alone = EUPruner(num_samples=1, strategy=strategy, per_batch=True)(rows)
    assert len(alone["id"]) == 1


@pytest.mark.parametrize("seed", range(20))
def test_batches_are_the_reference(seed: int) -> None:
    draw = np.random.default_rng(seed)
    count, ratio = int(draw.integers(3, 61)), float(draw.choice([0.1, 0.25, 0.5, 0.8]))
    rows = scored_rows(count, 0.5, draw)
    per_batch = EUPruner(sample_ratio=ratio, token_ratio=0.5, per_batch=True)
    for start in range(0, count, 7):
        batch = {name: values[start : start + 7] for name, values in rows.items()}
        batch["id"] = list(range(len(batch["id"])))
        check(batch, keep_samples(batch["error"], batch["uncertainty"], ratio), per_batch, per_batch(batch))


@pytest.mark.parametrize(
    ("strategy", "kept_rows"),
    [("highest_perplexity", {2, 3}), ("lowest_perplexity", {0, 1}), ("entropy", {0, 2}), ("infobatch", {2, 3}),
     ("ifd", {0, 1}), ("el2n", {1, 2}), ("longest", {0, 3}), ("shortest", {1, 2})],
)  # fmt: skip
def test_other_strategies_keep_what_their_names_say(strategy: str, kept_rows: set[int]) -> None:
    rows = scored_rows(4, 0.0, np.random.default_rng(0)) | {
        "error": [1.0, 2.0, 4.0, 5.0], "uncertainty": [4.0, 1.0, 3.0, 2.0], "ifd": [0.2, 0.5, 1.5, math.nan],
        "el2n": [0.1, 0.9, 0.8, 0.2], "supervised_tokens": [9, 1, 2, 8],
    }  # fmt: skip
    names = EUPruner(num_samples=2, strategy=strategy).fit(rows).quadrants(rows)
    assert {index for index, name in enumerate(names) if name == "kept"} == kept_rows
