"""The pruner against Q-Tuning's selection written out anew, step by step in float64, on many random data sets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qtuning_peft import EUPruner

Rows = dict[str, list[Any]]
SPECIAL = 9


def quadrants_after(error: list[float], uncertainty: list[float], steps: int) -> list[str]:
    """Every sample's quadrant when the four counts have grown `steps` times in all."""
    count = len(error)
    error_low, uncertainty_low, error_high, uncertainty_high = ((steps + 3 - turn) // 4 for turn in range(4))
    middle = float(np.median(error))
    # Rank 0 is the lowest.
    e_ranks, u_ranks = (np.argsort(np.argsort(values)).tolist() for values in (error, uncertainty))
    names = []
    for e, e_rank, u_rank in zip(error, e_ranks, u_ranks, strict=True):
        e_high, u_high = e_rank >= count - error_high, u_rank >= count - uncertainty_high
        e_low, u_low = e_rank < error_low, u_rank < uncertainty_low
        noise, redundant = e_high and u_high, e_low and u_low
        if noise and redundant:
            names.append("noise" if e > middle else "redundant")
        elif noise or redundant:
            names.append("noise" if noise else "redundant")
        else:
            names.append("misconception" if e_high or u_low else "calibration")
    return names


def kept(names: list[str]) -> int:
    return sum(name in ("misconception", "calibration") for name in names)


def expected_quadrants(error: list[float], uncertainty: list[float], budget: int) -> list[str]:
    for steps in range(4 * len(error) + 1):
        names = quadrants_after(error, uncertainty, steps)
        if kept(names) == budget:
            return names
    raise AssertionError(f"no number of steps leaves {budget} of {len(error)}")


def expected_tokens(errors: list[float], ratio: float, weight: float, protected: list[bool]) -> list[bool]:
    """Which of a sample's supervised tokens stay."""
    perplexity, count = [math.exp(e) for e in errors], len(errors)
    scores = []
    for i, own in enumerate(perplexity):
        before = perplexity[i - 1] if i else own
        after = perplexity[i + 1] if i + 1 < count else own
        scores.append((1 - weight) * own + weight * (before + after) / 2)
    room = max(1, math.floor(ratio * count + 0.5)) - sum(protected)
    free = sorted((i for i in range(count) if not protected[i]), key=lambda i: (scores[i], i))
    return [protected[i] or i in free[: max(0, room)] for i in range(count)]


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


def check(rows: Rows, names: list[str], pruner: EUPruner, result: Rows) -> None:
    """`result` is `rows` pruned: the kept ones of `names`, misconceptions trimmed."""
    chosen = [i for i, name in enumerate(names) if name in ("misconception", "calibration")]
    assert result["id"] == chosen
    assert result["quadrant"] == [names[i] for i in chosen]
    for i, found in zip(chosen, result["labels"], strict=True):
        labels = list(rows["labels"][i])
        if names[i] == "misconception":
            protected = [pruner.tokenizer is not None and label == SPECIAL for label in labels[2:]]
            stay = expected_tokens(rows["token_error"][i], pruner.token_ratio, pruner.neighbour_weight, protected)
            labels[2:] = [label if one else -100 for label, one in zip(labels[2:], stay, strict=True)]
        assert list(found) == labels


@pytest.mark.parametrize("correlation", [-1.0, -0.5, 0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(10))
def test_quadrants_and_labels_are_the_reference(correlation: float, seed: int) -> None:
    draw = np.random.default_rng([seed, int(10 * correlation) + 10])
    for ratio in (0.05, 0.125, 0.25, 0.5, 0.7, 0.9, 1.0):
        count = int(draw.integers(1, 61))
        rows = scored_rows(count, correlation, draw)
        pruner = EUPruner(
            sample_ratio=ratio,
            token_ratio=float(draw.choice([0.01, 0.25, 0.5, 0.7, 1.0])),
            neighbour_weight=float(draw.choice([0.0, 0.25, 0.5, 1.0])),
            tokenizer=tokenizer() if draw.random() < 0.5 else None,
        )
        budget = max(1, math.floor(count * ratio + 0.5))
        names = expected_quadrants(rows["error"], rows["uncertainty"], budget)
        pruner.fit(rows)
        assert list(pruner.quadrants(rows)) == names
        assert pruner.pruned.kept_samples == budget
        check(rows, names, pruner, pruner(rows))


@pytest.mark.parametrize("count", range(1, 13))
def test_every_number_of_samples_is_the_reference(count: int) -> None:
    draw = np.random.default_rng(count)
    for correlation in (-0.9, 0.0, 0.9):
        rows = scored_rows(count, correlation, draw)
        for budget in range(1, count + 1):
            pruner = EUPruner(num_samples=budget).fit(rows)
            assert list(pruner.quadrants(rows)) == expected_quadrants(rows["error"], rows["uncertainty"], budget)
    pruner = EUPruner(num_samples=count + 1).fit(rows)
    assert list(pruner.quadrants(rows)) == quadrants_after(rows["error"], rows["uncertainty"], 0)
    assert (pruner.pruned.target_samples, pruner.pruned.notes) == (count, [])


@pytest.mark.filterwarnings("ignore:2 samples are kept instead of 1")
@pytest.mark.parametrize("strategy", ["eu_plane", "highest_perplexity"])
def test_at_a_tie_more_is_kept_and_a_limit_is_no_excess(strategy: str) -> None:
    rows = {name: values * 2 for name, values in scored_rows(1, 0.0, np.random.default_rng(0)).items()}
    pruner = EUPruner(num_samples=1, strategy=strategy, max_repetition=0.0).fit(rows)
    assert pruner.pruned.kept_samples == 2


@pytest.mark.parametrize("seed", range(20))
def test_batches_are_the_reference(seed: int) -> None:
    draw = np.random.default_rng(seed)
    count, ratio = int(draw.integers(3, 61)), float(draw.choice([0.1, 0.25, 0.5, 0.8]))
    rows = scored_rows(count, 0.5, draw)
    per_batch = EUPruner(sample_ratio=ratio, token_ratio=0.5, per_batch=True)
    for start in range(0, count, 7):
        batch = {name: values[start : start + 7] for name, values in rows.items()}
        batch["id"] = list(range(len(batch["id"])))
        budget = max(1, math.floor(len(batch["id"]) * ratio + 0.5))
        check(batch, expected_quadrants(batch["error"], batch["uncertainty"], budget), per_batch, per_batch(batch))


@pytest.mark.parametrize(
    ("strategy", "kept_rows"),
    [("highest_perplexity", {2, 3}), ("lowest_perplexity", {0, 1}), ("entropy", {0, 2}), ("infobatch", {2, 3}),
     ("ifd", {0, 1}), ("el2n", {1, 2}), ("longest", {0, 3})],
)  # fmt: skip
def test_other_strategies_keep_what_their_names_say(strategy: str, kept_rows: set[int]) -> None:
    rows = scored_rows(4, 0.0, np.random.default_rng(0)) | {
        "error": [1.0, 2.0, 4.0, 5.0], "uncertainty": [4.0, 1.0, 3.0, 2.0], "ifd": [0.2, 0.5, 1.5, math.nan],
        "el2n": [0.1, 0.9, 0.8, 0.2], "supervised_tokens": [9, 1, 2, 8],
    }  # fmt: skip
    names = EUPruner(num_samples=2, strategy=strategy).fit(rows).quadrants(rows)
    assert {index for index, name in enumerate(names) if name == "kept"} == kept_rows
