"""What `benchmarks.quality.selection` trains on and is measured by: states, computed once, and their scores."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from benchmarks.common import smollm2, smollm2_tokenizer
from benchmarks.gsm8k import encode
from benchmarks.noise import TOGETHER, corrupted
from benchmarks.quality.few_shot import errors
from benchmarks.quality.from_states import Rows, final_states, fresh, predictions, stored
from benchmarks.quality.tasks import MAX_LENGTH, behind_examples, load
from benchmarks.quality.texts import texts_of
from qtuning_peft import load_states
from qtuning_peft.atomic import replacing
from qtuning_peft.head import causal_model

HARD, EXAMPLES = 0.2, 4
CHOICES = 400  # test rows of SST-2, of one supervised token each


class Data:
    """States and scores of training rows, spoilt ones and those of the tests, computed where they are not there.

    Args:
        files: The folder of the tasks' files.
        count: Training rows.
        test_rows: Of GSM8K and of Dolly.
        most: How many training rows may be spoilt.

    Attributes:
        folder: The training rows' states.
        base: What is measured of the base.
    """

    def __init__(self, files: Path, count: int, test_rows: int, most: int) -> None:
        tokenizer, texts = smollm2_tokenizer(), texts_of("gsm8k", files).train
        task, dolly = (load(name, tokenizer, files) for name in ("gsm8k", "dolly"))
        spoilt, shown = spoilt_rows(texts[:most]), behind_examples(tokenizer, texts[-EXAMPLES:])
        self.folder = self._stored("train", task.train[:count])
        folders = [self.folder]
        if spoilt:
            folders.append(self._stored("spoilt", [encode(tokenizer, row, MAX_LENGTH) for row in spoilt]))
        self._parts = [Rows.of(folder) for folder in folders]
        self._scores = []
        for folder, answered in zip(folders, (texts[:count], spoilt), strict=False):
            scores = load_states(folder).remove_columns("states")
            behind = errors_behind_examples(folder, [encode(shown, row, 2**20) for row in answered])
            self._scores.append(scores.add_column("few_shot_gain", np.array(scores["error"]) - behind))
        tests = {"GSM8K": task.test[:test_rows], "Dolly": dolly.test[:test_rows]}
        self._tests = {name: Rows.of(self._stored(name, found)) for name, found in tests.items()}
        self._choices = Rows.of(self._stored("SST-2", first_tokens(texts_of("sst2", files).test[:CHOICES], tokenizer)))
        untrained = fresh(self.folder, 0)
        errors = predictions(untrained, self._tests["GSM8K"])[0]
        self._hard = errors > errors.quantile(1 - HARD)
        self.base = self.measured(untrained)

    @staticmethod
    def _stored(name: str, found: list[dict[str, Any]]) -> Path:
        return stored(f"selection-{name}-{len(found)}", found, lambda: smollm2(False)[0], scores=("ifd", "noise"))

    def with_spoilt(self, bad: int) -> tuple[Rows, Dataset]:
        """The training rows and their scores, the first `bad` of them replaced by spoilt ones, at the end."""
        good, scores = self._parts[0], self._scores[0].select(range(bad, len(self._scores[0])))
        if not bad:
            return good, scores
        spoilt = self._parts[1].rows[:bad]
        return Rows(good.layers, good.rows[bad:] + spoilt), concatenate_datasets(
            [scores, self._scores[1].select(range(bad))]
        )

    def measured(self, model: Any) -> dict[str, float]:
        """Means over the supervised tokens."""
        (errors, right), (dolly, dolly_right) = (predictions(model, self._tests[of]) for of in ("GSM8K", "Dolly"))
        return {
            "loss": errors.mean().item(), "accuracy": right.float().mean().item(),
            "easy": errors[~self._hard].mean().item(), "hard": errors[self._hard].mean().item(),
            "dolly_loss": dolly.mean().item(), "dolly_accuracy": dolly_right.float().mean().item(),
            "choice_accuracy": choice_accuracy(model, self._choices),
        }  # fmt: skip


def errors_behind_examples(folder: Path, found: list[dict[str, Any]]) -> np.ndarray:
    """The base's error of each row, (rows,), kept beside the states of `folder`."""
    file = folder.with_suffix(".npy")
    if not file.is_file():
        with replacing(file) as part:
            np.save(part, errors(found))
    return np.asarray(np.load(file))


def first_tokens(texts: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Rows that end with the first token of their answer, the one that tells the answers apart."""
    found = []
    for row in texts:
        whole = encode(tokenizer, row, MAX_LENGTH)
        end = 1 + next(place for place, label in enumerate(whole["labels"]) if label >= 0)
        found.append({name: values[:end] for name, values in whole.items()})
    return found


def spoilt_rows(texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row, its answer spoilt in one of the four ways that a score of noise should find, by turns."""
    draw = random.Random(0)
    return [
        row | {"answer": corrupted(TOGETHER[index % len(TOGETHER)], row["answer"], draw.choice(texts)["answer"], draw)}
        for index, row in enumerate(texts)
    ]


@torch.no_grad()
def choice_accuracy(model: Any, found: Rows) -> float:
    """Share of rows, of one token each, whose answer is likelier than the other rows' answers."""
    head = causal_model(model).get_output_embeddings()
    states, targets = (torch.cat(parts) for parts in zip(*final_states(model, found), strict=True))
    choices = targets.unique()
    return (choices[head(states)[:, choices].argmax(-1)] == targets).float().mean().item()
