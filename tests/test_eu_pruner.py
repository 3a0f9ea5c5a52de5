"""Which samples and tokens are kept, by every strategy and budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from algorithm_1 import keep_tokens
from conftest import word_tokenizer
from datasets import Dataset
from qtuning_peft.integrations.llamafactory import register

from qtuning_peft import EUPruner
from qtuning_peft.eu_plane.files import write_data
from qtuning_peft.eu_plane.scores import repeated
from qtuning_peft.eu_plane.selection import SAMPLE_STRATEGIES
from qtuning_peft.eu_plane.tokens import keep_lowest, neighbour_scores, pieces_of, protected_tokens

KEPT = ("misconception", "calibration", "topped_up", "kept")


def scored_data(count: int = 40, seed: int = 0) -> Dataset:
    """Rows as a scorer leaves them: two tokens of prompt, then 1 to 20 supervised ones."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        tokens = int(draw.integers(1, 21))
        token_error = draw.exponential(1.5, tokens).astype(np.float32)
        answer = draw.integers(10, 100, tokens).tolist()
        rows.append(
            {
                "id": index,
                "group": "abc"[index % 3],
                "input_ids": [1, 2, *answer],
                "labels": [-100, -100, *answer],
                "error": float(token_error.astype(np.float64).mean()),
                "uncertainty": float(draw.exponential(1.0)),
                "supervised_tokens": tokens,
                "token_error": token_error.tolist(),
                "token_uncertainty": draw.exponential(1.0, tokens).astype(np.float32).tolist(),
                "token_reference_error": draw.exponential(1.0, tokens).astype(np.float32).tolist(),
                "repetition": 0.9 if index == 3 else 0.0,
                "el2n": float(draw.random()),
                "ifd": float(draw.random() * 1.2),
                "noise": index * 37 % 101 / 50 if index % 7 else float("nan"),
                "unscored": "",
            }
        )
    return Dataset.from_list(rows)


def supervised(row: dict[str, Any]) -> list[int]:
    return [label for label in row["labels"] if label != -100]


@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("strategy", [*SAMPLE_STRATEGIES])
def test_share_of_samples_is_met(strategy: str, ratio: float) -> None:
    scored = scored_data(41)
    if strategy in ("longest", "shortest"):
        # Lengths repeat: rows of equal length share their fate, and the nearest count is said.
        scored = scored.remove_columns("supervised_tokens").add_column("supervised_tokens", list(range(1, 42)))
    pruner = EUPruner(sample_ratio=ratio, strategy=strategy).fit(scored)
    kept = scored.map(pruner, batched=True, batch_size=7)
    assert len(kept) == pruner.pruned.kept_samples == math.floor(41 * ratio)
    assert pruner.pruned.notes == []


@pytest.mark.parametrize("strategy", ["eu_plane", "random", "highest_perplexity"])
@pytest.mark.parametrize("token_ratio", [0.3, 1.0])
def test_budget_of_tokens_is_met_to_one_sample(strategy: str, token_ratio: float) -> None:
    scored = scored_data(200)
    pruner = EUPruner(num_tokens=400, token_ratio=token_ratio, strategy=strategy).fit(scored)
    kept = scored.map(pruner, batched=True)
    tokens = sum(len(supervised(row)) for row in kept)
    assert tokens == pruner.pruned.kept_tokens == sum(kept["supervised_tokens"])
    assert abs(tokens - 400) <= 10


def test_number_of_samples_is_met() -> None:
    assert EUPruner(num_samples=11).fit(scored_data()).pruned.kept_samples == 11
    assert EUPruner(num_samples=1000).fit(scored_data()).pruned.kept_samples == 40


def test_kept_rows_are_whole_or_trimmed_misconceptions() -> None:
    scored = scored_data(200)
    kept = scored.map(EUPruner(sample_ratio=0.5, token_ratio=0.5).fit(scored), batched=True)
    assert set(kept["quadrant"]) == {"misconception", "calibration", "topped_up"}
    for row in kept:
        before = scored[row["id"]]
        assert row["input_ids"] == before["input_ids"]
        if row["quadrant"] != "misconception":
            assert row["labels"] == before["labels"]
            continue
        assert len(supervised(row)) >= max(1, before["supervised_tokens"] // 2)
        assert len(row["token_error"]) == len(row["token_uncertainty"]) == len(supervised(row))
        stays = [label != -100 for label in row["labels"][2:]]
        assert stays == keep_tokens(before["token_error"], 0.5, 0.5, 0.5)


def test_neighbour_aware_score_is_its_equation() -> None:
    error = np.log([2.0, 8.0, 1.0, 4.0])
    for weight in (0.0, 0.5, 1.0):
        expected = [
            (1 - weight) * own + weight * (left + right)
            for own, left, right in ((2, 2, 8), (8, 2, 1), (1, 8, 4), (4, 1, 4))
        ]
        np.testing.assert_allclose(neighbour_scores(error, weight), expected)
    assert np.isfinite(neighbour_scores(np.array([1e6, 0.0]), 0.5)).all()


def test_protected_tokens_stay_and_count() -> None:
    scores = np.array([-np.inf, 1.0, 2.0, -np.inf, 3.0])
    assert keep_lowest(scores, 0.6).tolist() == [True, True, False, True, False]
    assert keep_lowest(scores, 0.2).tolist() == [True, False, False, True, False]
    assert keep_lowest(np.ones(4), 0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize("pattern", ["", r"\d*", "x?"])
def test_an_empty_match_protects_nothing(pattern: str) -> None:
    tokens = [5, 6, 7]
    assert not protected_tokens(word_tokenizer(), tokens, (pattern,))[1:].all() or pattern == r"\d*"
    assert not protected_tokens(word_tokenizer(), [10, 11], ("z*",)).any()


def test_protected_tokens_are_counted_where_they_exceed_the_share() -> None:
    scored = scored_data()
    options = {"token_ratio": 0.3, "strategy": "longest", "tokenizer": word_tokenizer(), "protect": r"w\d+"}
    pruner = EUPruner(num_tokens=100, **options).fit(scored)
    kept = scored.map(pruner, batched=True)
    assert sum(kept["supervised_tokens"]) == pruner.pruned.kept_tokens
    assert abs(pruner.pruned.kept_tokens - 100) <= 20


@pytest.mark.parametrize("strategy", ["eu_plane", "longest", "random"])
def test_something_is_always_kept(strategy: str) -> None:
    assert EUPruner(num_tokens=1, strategy=strategy).fit(scored_data()).pruned.kept_samples >= 1
    equal = scored_data(10).map(lambda row: {"error": 1.0, "uncertainty": 1.0})
    with pytest.warns(UserWarning, match="kept instead of 4"):
        assert EUPruner(sample_ratio=0.4).fit(equal).pruned.kept_samples == 10


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas"])
def test_formatted_data_is_pruned_alike(kind: str) -> None:
    scored, options = scored_data(), {"sample_ratio": 0.5, "token_ratio": 0.5}
    expected = scored.map(EUPruner(**options).fit(scored), batched=True)
    formatted = scored.with_format(kind)
    kept = formatted.map(EUPruner(**options).fit(formatted), batched=True).with_format(None)
    assert kept["labels"][:] == expected["labels"][:]
    assert kept["token_error"][:] == expected["token_error"][:]


def test_a_batch_without_scores_keeps_nothing() -> None:
    scored = scored_data(15).map(
        lambda row, index: {"error": math.nan, "unscored": "x"} if 5 <= index < 10 else {}, with_indices=True
    )
    kept = scored.map(EUPruner(sample_ratio=0.4, per_batch=True), batched=True, batch_size=5)
    assert sorted(index // 5 for index in kept["id"]) == [0, 0, 2, 2]


def test_either_end_of_the_ranking_can_be_kept() -> None:
    row = scored_data(1)[0] | {"token_error": [0.1, 3.0, 0.2, 5.0], "labels": [-100, 5, 6, 7, 8]}
    options = {"sample_ratio": 1, "token_ratio": 0.5, "neighbour_weight": 0}
    lowest = EUPruner(**options, trim_above=0).kept_tokens(row)
    highest = EUPruner(**options, token_strategy="reversed").kept_tokens(row)
    assert lowest.tolist() == [True, False, True, False]
    assert highest.tolist() == [False, True, False, True]


def test_rho1_keeps_the_highest_excess_error() -> None:
    row = scored_data(1)[0] | {"labels": [-100, 5, 6, 7]}
    row |= {"token_error": [3.0, 3.0, 1.0], "token_reference_error": [2.9, 1.0, 2.0]}
    kept = EUPruner(sample_ratio=1, token_ratio=0.34, token_strategy="rho1").kept_tokens(row)
    assert kept.tolist() == [False, True, False]


def test_pruning_per_batch_needs_no_fit() -> None:
    scored = scored_data(40)
    kept = scored.map(EUPruner(sample_ratio=0.25, per_batch=True), batched=True, batch_size=8)
    assert len(kept) == 10
    assert sorted(index // 8 for index in kept["id"]) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    streamed = scored.to_iterable_dataset().map(EUPruner(sample_ratio=0.25, per_batch=True), batched=True, batch_size=8)
    assert [row["id"] for row in streamed] == kept["id"][:]


def test_what_was_fitted_does_not_depend_on_batches() -> None:
    scored = scored_data(50)
    for strategy in ("eu_plane", "random", "infobatch"):
        pruner = EUPruner(sample_ratio=0.4, strategy=strategy, seed=3).fit(scored)
        whole = scored.map(pruner, batched=True, batch_size=50)["id"][:]
        assert scored.map(pruner, batched=True, batch_size=3)["id"][:] == whole
        reversed_rows = scored.select(range(49, -1, -1))
        assert reversed_rows.map(pruner, batched=True)["id"][:] == whole[::-1]
        if strategy != "eu_plane":
            assert EUPruner(sample_ratio=0.4, strategy=strategy, seed=4).fit(scored).quadrants(scored).tolist() != (
                pruner.quadrants(scored).tolist()
            )


def test_the_noisiest_rows_go_first() -> None:
    """A share of them, those without a number never; the limit is that of `fit`, or with `per_batch` of each batch."""
    scored = scored_data(80)
    pruner = EUPruner(sample_ratio=0.5, drop_noise=0.2, keep_dropped=True).fit(scored)
    noise = np.array(scored["noise"][:])
    count = int(0.2 * np.isfinite(noise).sum())
    noisiest = np.argsort(-np.nan_to_num(noise, nan=-1))[:count]
    assert pruner.pruned.counts["noisy"] == count
    for size in (80, 7):
        quadrants = np.array(scored.map(pruner, batched=True, batch_size=size, load_from_cache_file=False)["quadrant"])
        assert {*np.flatnonzero(quadrants == "noisy")} == {*noisiest}
    assert pruner.pruned.kept_samples == 40
    batches = EUPruner(sample_ratio=0.5, drop_noise=0.2, keep_dropped=True, per_batch=True)
    found = np.array(scored.map(batches, batched=True, batch_size=40)["quadrant"])
    for half in (slice(0, 40), slice(40, 80)):
        count = int(0.2 * np.isfinite(noise[half]).sum())
        assert (found[half] == "noisy").sum() == count
        assert noise[half][found[half] == "noisy"].min() > np.nanmax(np.delete(noise[half], found[half] == "noisy"))
    assert "noise" in pruner.scores
    with pytest.raises(ValueError, match=r"no column noise; score the data with EUScorer and scores=\('noise',\)"):
        EUPruner(sample_ratio=0.5, drop_noise=0.2).fit(scored.remove_columns("noise"))
    with pytest.raises(ValueError, match=r"drop_noise is 1"):
        EUPruner(sample_ratio=0.5, drop_noise=1)


def test_dropped_rows_are_named_when_they_are_kept() -> None:
    scored = scored_data(80)
    pruner = EUPruner(sample_ratio=0.5, token_ratio=0.5, keep_dropped=True, max_repetition=0.5).fit(scored)
    rows = scored.map(pruner, batched=True)
    assert len(rows) == 80
    corners = {"noise", "redundant", "misconception", "calibration"}
    assert {*rows["quadrant"]} == corners | {"topped_up", "middle", "degenerate"}
    assert rows[3]["quadrant"] == "degenerate"
    for row in rows:
        if row["quadrant"] not in KEPT:
            assert row["labels"] == scored[row["id"]]["labels"]
    assert pruner.pruned.counts == {name: rows["quadrant"][:].count(name) for name in pruner.pruned.counts}


def test_rows_without_a_score_are_said_and_not_kept() -> None:
    scored = scored_data(20).map(
        lambda row, index: {"error": math.nan, "unscored": "too long"} if index in (4, 5) else {}, with_indices=True
    )
    with pytest.warns(UserWarning, match="2 rows have no score and are not kept"):
        pruner = EUPruner(sample_ratio=0.5).fit(scored)
    assert pruner.pruned.kept_samples == 10
    assert pruner.pruned.counts["unscored"] == 2
    assert not {4, 5} & set(scored.map(pruner, batched=True)["id"])
    with pytest.warns(UserWarning, match="only 18 can be"):
        EUPruner(sample_ratio=1.0).fit(scored)


def test_ties_are_said() -> None:
    scored = scored_data(20).map(lambda row: {"error": 1.0, "uncertainty": 1.0})
    with pytest.warns(UserWarning, match="kept instead of 5: samples with equal scores"):
        pruner = EUPruner(sample_ratio=0.25).fit(scored)
    assert math.isnan(pruner.pruned.correlation)


def test_correlation_is_that_of_ranks() -> None:
    scored = scored_data(3)
    columns = scored.to_dict() | {"error": [1.0, 2.0, 3.0], "uncertainty": [1.0, 10.0, 5.0]}
    assert EUPruner(sample_ratio=1.0).fit(columns).pruned.correlation == pytest.approx(0.5)


def test_repetition_is_the_share_of_repeated_four_grams() -> None:
    assert repeated([1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert repeated([1, 2, 3, 4]) == repeated([]) == 0
    assert repeated([1, 2] * 10) == pytest.approx(1 - 2 / 17)


def test_pieces_put_together_are_the_text() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Bytes as tokens, so that one character is two or three of them, and words without their leading space.
    bytes_of = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=bytes_of, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "a é b 漢 #### 42"
    pieces = pieces_of(tokenizer, tokenizer(text)["input_ids"])
    assert len(pieces) == len(text.encode())
    assert "".join(pieces) == text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sample_ratio": 0}, "sample_ratio is 0; choose a share in (0, 1]."),
        ({"sample_ratio": 1.5}, "sample_ratio is 1.5"),
        ({"sample_ratio": float("nan")}, "sample_ratio is nan"),
        ({"sample_ratio": 0.5, "token_ratio": -1}, "token_ratio is -1"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({}, "No budget is given"),
        ({"sample_ratio": 0.5, "num_samples": 3}, "sample_ratio and num_samples are given"),
        ({"sample_ratio": 0.5, "strategy": "best"}, "strategy is 'best'; choose one of eu_plane, random"),
        ({"sample_ratio": 0.5, "trim_above": 50}, "trim_above is 50"),
        ({"sample_ratio": 0.5, "neighbour_weight": 2}, "neighbour_weight is 2"),
        ({"sample_ratio": 0.5, "protect": "x"}, "tokenizer is None"),
        ({"sample_ratio": 0.5, "protect": "("}, "no regular expression"),
    ],
)
def test_wrong_arguments_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the sentence is compared below)
        EUPruner(**options)
    assert sentence in str(error.value)


def test_wrong_data_is_one_sentence() -> None:
    scored = scored_data(5)
    with pytest.raises(ValueError, match="no column error; score the data"):
        EUPruner(sample_ratio=0.5).fit(scored.remove_columns("error"))
    with pytest.raises(ValueError, match=r"no column ifd; score the data with EUScorer and scores=\('ifd',\)"):
        EUPruner(sample_ratio=0.5, strategy="ifd").fit(scored.remove_columns("ifd"))
    with pytest.raises(ValueError, match="The data is empty"):
        EUPruner(sample_ratio=0.5).fit(scored.select([]))
    with pytest.raises(ValueError, match="error of row 0 is nan"):
        EUPruner(sample_ratio=0.5).fit(scored.map(lambda row: {"error": math.nan}))
    with pytest.raises(ValueError, match=r"call fit\(scored\)"):
        scored.map(EUPruner(sample_ratio=0.5), batched=True)
    with pytest.raises(ValueError, match="error holds something other than numbers"):
        EUPruner(sample_ratio=0.5).fit(scored.to_dict() | {"error": ["high"] * 5})
    with pytest.raises(ValueError, match="call map with batched=True"):
        scored.map(EUPruner(sample_ratio=0.5).fit(scored))
    with pytest.raises(ValueError, match="The data is streamed"):
        EUPruner(sample_ratio=0.5).fit(scored.to_iterable_dataset())
    with pytest.raises(ValueError, match="None of the 5 rows can be kept"):
        EUPruner(sample_ratio=0.5, max_repetition=0.0).fit(scored.map(lambda row: {"repetition": 1.0}))


def test_trimmed_rows_say_so_and_are_refused_where_texts_are_read(tmp_path: Path) -> None:
    scored = scored_data(100)
    text = ["w1 w2"] * len(scored)
    scored = scored.add_column("prompt", text).add_column("completion", text)
    whole = scored.map(EUPruner(sample_ratio=0.5).fit(scored), batched=True)
    trimmed = scored.map(EUPruner(sample_ratio=0.5, token_ratio=0.5).fit(scored), batched=True)
    assert "trimmed_tokens" not in whole.column_names
    assert any(trimmed["trimmed_tokens"])
    for row in trimmed:
        assert row["trimmed_tokens"] + row["supervised_tokens"] == scored[row["id"]]["supervised_tokens"]

    write_data(whole, tmp_path / "whole.jsonl")
    write_data(trimmed, tmp_path / "trimmed.jsonl")
    register(tmp_path / "whole.jsonl", "mine", tmp_path / "dataset_info.json")
    with pytest.raises(ValueError, match="trimmed samples, which its texts do not show"):
        register(tmp_path / "trimmed.jsonl", "mine", tmp_path / "dataset_info.json")
