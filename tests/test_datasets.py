"""Scoring and pruning as users of `datasets` expect it: streams, splits, formats, processes, columns, copies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny, word_tokenizer
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from qtuning_peft.integrations.blocks import EUPruningBlock
from qtuning_peft.integrations.common import prune_before_training
from test_eu_dataset import rows, run
from test_eu_pruner import scored_data
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qtuning_peft import EUPruner, EUScorer, SideTuningConfig, compute_states, load_states, prune, prune_states, score
from qtuning_peft.eu_plane.files import read_data, write_data
from qtuning_peft.eu_plane.training import for_batches

SCORING: dict[str, Any] = {"chat_template": False}
QUIET = SCORING | {"progress": False}


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Rows with columns that are nobody's business but their owner's."""
    kinds = ["sum", "story"]
    made = [
        {"id": 7 * i, "kind": i % 2, "from": {"site": f"s{i}", "seen": [i, i + 1]}, **row}
        for i, row in enumerate(rows(24))
    ]
    return Dataset.from_list(made).cast_column("kind", ClassLabel(names=kinds))


@pytest.fixture(scope="module")
def scored(data: Dataset) -> Dataset:
    return score(data, tiny(), word_tokenizer(), **QUIET)


# -- streams -----------------------------------------------------------------------------------------------------------


def streams(data: Dataset) -> list[IterableDataset]:
    """A stream whose columns are known, and one whose columns nobody has said."""
    made = data.to_list()

    def generate() -> Iterator[dict[str, Any]]:
        yield from made

    return [data.to_iterable_dataset(), IterableDataset.from_generator(generate)]


def test_a_stream_is_scored_and_pruned_as_it_is_read(data: Dataset, scored: Dataset) -> None:
    fitted, alone = EUPruner(sample_ratio=0.5).fit(scored), EUPruner(sample_ratio=0.5, per_batch=True)
    for stream in streams(data):
        # As long a batch as the data set's part, so that the padding, and with it the rounding, is the same.
        found = score(stream, tiny(), word_tokenizer(), **SCORING)
        assert Dataset.from_list([*found], features=scored.features).to_list() == scored.to_list()
        for pruner in (fitted, alone):
            kept = scored.map(pruner, batched=True, batch_size=8)
            assert len(kept) == 12
            again = Dataset.from_list([*found.map(pruner, batched=True, batch_size=8)], features=kept.features)
            assert again.to_list() == kept.to_list()
        lazy = prune(stream, tiny(), word_tokenizer(), scoring=SCORING, sample_ratio=0.5, per_batch=True)
        assert [row["id"] for row in lazy] == scored.map(alone, batched=True, batch_size=24)["id"][:]


def test_what_needs_the_whole_data_says_so_of_a_stream(data: Dataset, tmp_path: Path) -> None:
    for stream in streams(data):
        found = score(stream, tiny(), word_tokenizer(), **SCORING)
        with pytest.raises(ValueError, match="The data is streamed, so thresholds for all of it cannot be found; set"):
            EUPruner(sample_ratio=0.5).fit(found)
        with pytest.raises(ValueError, match="The data is streamed, so thresholds for all of it cannot be found; set"):
            prune(stream, tiny(), word_tokenizer(), sample_ratio=0.5)
        with pytest.raises(ValueError, match="but streamed data is not kept; leave it out"):
            score(stream, tiny(), word_tokenizer(), resume_dir=tmp_path / "parts", **SCORING)
    with pytest.raises(ValueError, match="deduplicate and per_batch are True, but batches do not see each other"):
        EUPruner(sample_ratio=0.5, deduplicate=True, per_batch=True)
    with pytest.raises(ValueError, match="deduplicate is True; it works on data sets, not on mini-batches"):
        for_batches(EUPruner(sample_ratio=0.5, deduplicate=True))


# -- splits ------------------------------------------------------------------------------------------------------------


def test_the_training_split_is_pruned_and_others_are_left_alone(data: Dataset, scored: Dataset) -> None:
    splits = DatasetDict({"train": data, "test": data.select(range(5))})
    found = score(splits, tiny(), word_tokenizer(), **QUIET)
    assert found["train"].to_list() == scored.to_list()
    pruner = EUPruner(sample_ratio=0.5)
    streamed = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    sentence = r"several splits, and only training data is pruned; pass dataset\['train'\]"
    for several in (found, score(streamed, tiny(), word_tokenizer(), **SCORING)):
        with pytest.raises(ValueError, match=sentence):
            pruner.fit(several)
    for several in (splits, streamed):
        for per_batch in (False, True):
            with pytest.raises(ValueError, match=sentence):
                prune(several, tiny(), word_tokenizer(), sample_ratio=0.5, per_batch=per_batch)
    before = found["test"].to_list()
    found["train"] = found["train"].map(pruner.fit(found["train"]), batched=True)
    assert (len(found["train"]), found["test"].to_list()) == (12, before)


# -- formats, processes, columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "array"), [("torch", torch.Tensor), ("numpy", np.ndarray)])
def test_a_format_is_kept_with_the_columns_that_it_shows(
    data: Dataset, scored: Dataset, kind: str, array: type
) -> None:
    shown = data.with_format(kind, ["id", "prompt", "completion"], output_all_columns=True)
    found = score(shown, tiny(), word_tokenizer(), **QUIET)
    mapped = shown.map(EUScorer(tiny(), word_tokenizer(), **SCORING), batched=True)
    for name, value in found.format.items():
        assert {*value} == {*mapped.format[name]} if name == "columns" else value == mapped.format[name]
    assert "kind" not in found.format["columns"]
    assert found.with_format(None).to_list() == scored.to_list()
    pruner = EUPruner(sample_ratio=0.5, token_ratio=0.5).fit(found)
    kept = found.map(pruner, batched=True)
    assert (kept.format["type"], kept.format["output_all_columns"]) == (kind, True)
    assert all(isinstance(kept[0][name], array) for name in ("labels", "input_ids", "token_error"))
    plain = scored.map(EUPruner(sample_ratio=0.5, token_ratio=0.5).fit(scored), batched=True)
    for name in plain.column_names:
        values = kept.with_format(None)[name][:]
        if name in ("error", "uncertainty"):  # PyTorch's format hands map float32
            np.testing.assert_allclose(values, plain[name][:], rtol=1e-6)
        else:
            assert values == plain[name][:]


@pytest.mark.parametrize("processes", [2, 3])
def test_pruning_in_several_processes_is_pruning_in_one(scored: Dataset, processes: int) -> None:
    twice = Dataset.from_list([*scored, *scored.select(range(10))])
    for options in ({"token_ratio": 0.5}, {"deduplicate": True}):
        pruner = EUPruner(num_samples=12, **options).fit(twice)
        alone, parallel = (
            twice.map(pruner, batched=True, with_indices=True, batch_size=4, num_proc=count)
            for count in (None, processes)
        )
        assert parallel.to_list() == alone.to_list()
    with pytest.raises(ValueError, match="cannot be sent to another process; call map without num_proc"):
        twice.map(EUScorer(tiny(), word_tokenizer(), **SCORING), batched=True, num_proc=processes)


def test_nothing_of_the_users_columns_is_lost(data: Dataset, scored: Dataset) -> None:
    own = data.rename_columns({"prompt": "question", "completion": "answer"})
    names = {"prompt": "question", "completion": "answer"}
    kept = prune(own, tiny(), word_tokenizer(), sample_ratio=0.5, token_ratio=0.5, scoring=QUIET | {"columns": names})
    assert kept.column_names[: len(own.column_names)] == own.column_names
    assert {name: kept.features[name] for name in own.features} == own.features
    by_id = {row["id"]: row for row in own}
    assert [{name: row[name] for name in own.column_names} for row in kept] == [by_id[i] for i in kept["id"]]
    pruner = EUPruner(sample_ratio=0.5, token_ratio=0.5, tokenizer=word_tokenizer()).fit(scored)
    assert kept["labels"][:] == scored.map(pruner, batched=True)["labels"][:]


# -- what was found ----------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_rows_that_come_out() -> None:
    scored = scored_data(80)
    doubled = Dataset.from_list([*scored, *scored.select(range(9))])
    options = {"sample_ratio": 0.5, "token_ratio": 0.5, "deduplicate": True, "drop_noise": 0.1, "max_repetition": 0.5}
    found = EUPruner(**options).fit(doubled).pruned
    assert found is not None
    assert {"noisy", "duplicate", "degenerate"} < {*found.counts}
    every = doubled.map(EUPruner(**options, keep_dropped=True).fit(doubled), batched=True, with_indices=True)
    for name in every.unique("quadrant"):
        places = [i for i, quadrant in enumerate(every["quadrant"]) if quadrant == name]
        assert found.counts[name] == len(places)
        assert found.token_counts[name] == sum(doubled["supervised_tokens"][i] for i in places)
    assert sum(found.counts.values()) == found.samples == 89
    assert sum(found.token_counts.values()) == found.tokens == sum(doubled["supervised_tokens"])
    kept = doubled.map(EUPruner(**options).fit(doubled), batched=True, with_indices=True)
    assert found.kept_samples == len(kept) == 44
    assert found.kept_tokens == sum(kept["supervised_tokens"])
    assert json.loads(json.dumps(asdict(found)))["token_counts"] == found.token_counts


# -- copies ------------------------------------------------------------------------------------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every byte, so that any text can be written, and one that ends it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)} | {"<eos>": 256}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


SAID = [
    ("Is it so?", "Yes, it is."), ("Is it?", "Yes, it is."), ("is  it so?\n", "YES, it\tis. "), ("Is it so?", "No."),
    ("Is it so?", "Yes, it is."), ("Is it so? Yes,", " it is."), ("Isitso?", "Yes, it is."), ("STRASSE", "é"),
    ("straße", "É"), ("", "yes"), ("", "Yes "),
]  # fmt: skip
COPIES = {2, 4, 8, 10}
# Without a tokenizer, tokens are compared.
EXACT = {4}


@pytest.fixture(scope="module")
def said() -> Dataset:
    made = Dataset.from_list([{"n": i, "prompt": p, "completion": c} for i, (p, c) in enumerate(SAID)])
    return score(made, tiny(vocab_size=257), byte_tokenizer(), **QUIET)


def test_copies_are_what_says_the_same_and_the_first_stays(said: Dataset) -> None:
    for tokenizer, copies in ((byte_tokenizer(), COPIES), (None, EXACT)):
        pruner = EUPruner(num_samples=len(said) - len(copies), deduplicate=True, tokenizer=tokenizer).fit(said)
        assert {*np.flatnonzero(pruner.quadrants(said) == "duplicate")} == copies
        assert pruner.pruned.counts["duplicate"] == len(copies)
        assert not any("kept instead of" in note or "deduplicate" in note for note in pruner.pruned.notes)
        for size in (2, 5, 100):
            kept = said.map(pruner, batched=True, batch_size=size, with_indices=True)
            assert kept["n"][:] == [i for i in range(len(said)) if i not in copies]
            assert kept.column_names == [*said.column_names, "quadrant"]


def test_copies_are_the_loops_on_random_rows() -> None:
    draw, tokenizer = np.random.default_rng(0), byte_tokenizer()
    blank = [" ", "  ", "\n", "\t "]
    for _ in range(20):
        texts = [
            ["".join(draw.choice([*"aAbB", *blank], draw.integers(2, 5))) for _ in range(2)]
            for _ in range(int(draw.integers(2, 60)))
        ]
        made = []
        for prompt, answer in texts:
            ids = [tokenizer(text)["input_ids"] for text in (prompt, answer)]
            length = len(ids[1])
            made.append({
                "input_ids": ids[0] + ids[1], "labels": [-100] * len(ids[0]) + ids[1], "supervised_tokens": length,
                "error": float(draw.random()), "uncertainty": float(draw.random()), "token_error": [1.0] * length,
                "token_uncertainty": [1.0] * length,
            })  # fmt: skip
        scored, seen, later = Dataset.from_list(made), set(), []
        for prompt, answer in texts:
            words = tuple(" ".join(text.lower().split()) for text in (prompt, answer))
            later.append(words in seen)
            seen.add(words)
        pruner = EUPruner(num_samples=1, deduplicate=True, tokenizer=tokenizer).fit(scored)
        assert (pruner.quadrants(scored) == "duplicate").tolist() == later


def test_the_budget_is_met_by_others_than_copies(said: Dataset) -> None:
    """What is kept of data with copies is what is kept of the same data without."""
    first = said.select([i for i in range(len(said)) if i not in COPIES])
    options = {"num_samples": 4, "drop_noise": 0.0, "tokenizer": byte_tokenizer()}
    for strategy in ("eu_plane", "highest_perplexity", "random"):
        pruner = EUPruner(**options, strategy=strategy, deduplicate=True).fit(said)
        expected = EUPruner(**options, strategy=strategy).fit(first)
        kept = said.map(pruner, batched=True, with_indices=True)
        assert kept.to_list() == first.map(expected, batched=True).to_list()


def test_rows_that_fit_has_not_seen_are_refused(said: Dataset) -> None:
    pruner = EUPruner(num_samples=5, deduplicate=True, tokenizer=byte_tokenizer()).fit(said)
    assert said.map(pruner, batched=True)["n"][:] == said.map(pruner, batched=True, with_indices=True)["n"][:]
    twice = Dataset.from_list([*said, *said])
    both = EUPruner(num_samples=5, deduplicate=True, tokenizer=byte_tokenizer()).fit(twice)
    for broken in (
        lambda: twice.map(both, batched=True, batch_size=len(said)),  # each batch begins as the data does
        lambda: said.select(range(10)).map(pruner, batched=True),
        lambda: said.select(range(1, 11)).map(pruner, batched=True, with_indices=True),
        lambda: said.select(range(10, -1, -1)).map(pruner, batched=True, with_indices=True),
        lambda: twice.map(pruner, batched=True, with_indices=True),
    ):
        with pytest.raises(ValueError, match=r"call map\(pruner, batched=True, with_indices=True\) on the data that"):
            broken()


def test_copies_go_from_every_entry(said: Dataset, tmp_path: Path, checkpoint: Path) -> None:
    """One line, the shell, and the block that trainers' recipes share."""
    tokenizer, model = byte_tokenizer(), tiny(vocab_size=257)
    expected = [i for i in range(len(said)) if i not in COPIES]
    texts = said.select_columns(["n", "prompt", "completion"])
    with pytest.warns(UserWarning, match="7 samples are kept instead of 11: only 7 can be kept"):
        assert prune(texts, model, tokenizer, sample_ratio=1.0, deduplicate=True, scoring=QUIET)["n"][:] == expected
    write_data(said, tmp_path / "scored.parquet")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ("--num-samples", "7", "--deduplicate", "--tokenizer", tmp_path / "tokenizer")
    done = run("prune", tmp_path / "scored.parquet", "-o", tmp_path / "kept.jsonl", *options)
    assert done.exit_code == 0, done.stderr
    assert "4 duplicate" in " ".join(done.stderr.split())
    assert read_data(tmp_path / "kept.jsonl")["n"][:] == expected
    pytest.importorskip("matplotlib", reason="draws: pip install matplotlib")
    done = run("plot", tmp_path / "scored.parquet", "-o", tmp_path / "report.html", *options)
    assert done.exit_code == 0, done.stderr
    assert "dropped: says the same as an earlier row" in (tmp_path / "report.html").read_text()
    block = EUPruningBlock(num_samples=7, deduplicate=True)
    rows_of_trainer = said.select_columns(["n", "input_ids", "labels"])
    kept, words = prune_before_training(rows_of_trainer, model, tokenizer, block, tmp_path / "out", lambda _: None)
    assert kept["n"][:] == expected
    assert "4 duplicate" in words
    assert kept.column_names == rows_of_trainer.column_names


def test_copies_go_from_stored_states(said: Dataset, tmp_path: Path) -> None:
    texts, states = said.select_columns(["n", "input_ids", "labels"]), tmp_path / "states"
    compute_states(texts, tiny(vocab_size=257), None, SideTuningConfig(reduction_factor=4), states, progress=False)
    pruner = EUPruner(num_samples=7, deduplicate=True, tokenizer=byte_tokenizer())
    prune_states(states, pruner, tmp_path / "view")
    whole, view = load_states(states), load_states(tmp_path / "view")
    expected = [i for i in range(len(said)) if i not in COPIES]
    assert view["input_ids"][:] == [texts["input_ids"][i] for i in expected]
    assert view["states"][:] == [whole["states"][i] for i in expected]
