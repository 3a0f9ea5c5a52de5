"""The tasks of the quality benchmark: the rows of `benchmarks.quality.texts` as token ids, and their batches."""

from __future__ import annotations

import random
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.gsm8k import encode, prompt_of
from benchmarks.quality.texts import texts_of
from qtuning_peft import add_few_shot_examples
from qtuning_peft.loss import IGNORE_INDEX

MAX_LENGTH = 512
# Sequences of like lengths share a batch, so that little of it is padding; within this many, batches are random.
POOL = 80
Batch = dict[str, Tensor]
Encoded = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Encoded rows.

    Attributes:
        name: As in commands and rows.
        labels: Number of classes; none where the answer is text.
        train, validation, test: Rows with `input_ids` and `labels`; of a class, `labels` is one integer.
        padding: Token id that fills a batch.
        few_shot_examples: Tokens of the few-shot examples that every row begins with, the system prompt aside.
    """

    name: str
    labels: int | None
    train: list[Encoded]
    validation: list[Encoded]
    test: list[Encoded]
    padding: int
    few_shot_examples: int = 0

    def batch(self, rows: list[Encoded]) -> Batch:
        """`input_ids`, `attention_mask` (batch, length) and `labels`, of that shape or (batch,), int64."""

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=fill)

        ids = [row["input_ids"] for row in rows]
        labels = [row["labels"] for row in rows]
        return {
            "input_ids": padded(ids, self.padding),
            # By length and not by token: SmolLM2's padding token is also its end token.
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded(labels, IGNORE_INDEX) if self.labels is None else torch.tensor(labels),
        }

    def epochs(self, rows: int, size: int, epochs: float, seed: int) -> list[list[Encoded]]:
        """Batches of `size` from the first `rows` rows, another order every epoch: the same for every method."""
        draw, result = random.Random(seed), []
        steps, pool = round(epochs * (rows // size)), max(size, POOL // size * size)
        while len(result) < steps:
            order = draw.sample(self.train[:rows], rows)
            pools = [by_length(order[start : start + pool]) for start in range(0, rows, pool)]
            batches = [some[start : start + size] for some in pools for start in range(0, len(some), size)]
            result += draw.sample([batch for batch in batches if len(batch) == size], rows // size)
        return result[:steps]

    def evaluated(self, rows: list[Encoded], size: int) -> list[Batch]:
        """Batches of all `rows`."""
        ordered = by_length(rows)
        return [self.batch(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def by_length(rows: list[Encoded]) -> list[Encoded]:
    """Shortest first."""
    return sorted(rows, key=lambda row: len(row["input_ids"]))


def load(name: str, tokenizer: Any, folder: Path | None, few_shot_examples: int = 0, most: int | None = None) -> Task:
    """The task called `name`.

    Args:
        name: Its name.
        tokenizer: A chat model's.
        folder: Where its files are.
        few_shot_examples: Examples before every row: the last of the training rows, which short runs do not reach.
        most: Rows of a set that are read, all unless given.

    Raises:
        ValueError: when there is none, or its files are not in `folder`.
    """
    texts = texts_of(name, folder)
    shown = behind_examples(tokenizer, texts.train[-few_shot_examples:] if few_shot_examples else [])
    before = len(_prompt(shown, "")) - len(_prompt(tokenizer, ""))

    def encoded(row: dict[str, Any]) -> Encoded:
        if texts.labels is None:
            return encode(shown, row, before + MAX_LENGTH)
        prompt = _prompt(shown, row["question"])
        return {"input_ids": prompt[:before] + prompt[before:][-MAX_LENGTH:], "labels": row["label"]}

    parts = [[encoded(row) for row in part[:most]] for part in (texts.train, texts.validation, texts.test)]
    return Task(name, texts.labels, *parts, padding=tokenizer.pad_token_id, few_shot_examples=before)


def behind_examples(tokenizer: Any, examples: list[dict[str, Any]]) -> Any:
    """A copy of the tokenizer that puts these rows, as turns, before every conversation."""
    shown = copy(tokenizer)
    if examples:
        turns = [(role, row[key]) for row in examples for role, key in (("user", "question"), ("assistant", "answer"))]
        add_few_shot_examples(shown, [{"role": role, "content": content} for role, content in turns])
    return shown


def _prompt(tokenizer: Any, question: str) -> list[int]:
    ids: list[int] = tokenizer(prompt_of(tokenizer, question), add_special_tokens=False).input_ids
    return ids
