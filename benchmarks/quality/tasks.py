"""The tasks of the quality benchmark: rows as token ids, in training, validation and test sets.

| task    | training                  | validation           | test               | measure           |
|---------|---------------------------|----------------------|--------------------|-------------------|
| `gsm8k` | train rows 0 to 6,999     | train 7,000 to 7,472 | test rows 0 to 299 | nats per token    |
| `dolly` | rows 0 to 2,395           | 2,396 to 2,695       | 2,696 to 2,995     | nats per token    |
| `sst2`  | train                     | dev                  | test               | accuracy          |
| `rte`   | train, but the last 300   | the last 300         | dev                | accuracy          |

Files are read from a folder (`gsm8k_train.jsonl` with `question` and `answer`, `dolly_3k.jsonl` with `instruction`,
`input` and `output`, `sst2_sentence_*.jsonl` with `sentence` and `label`, `rte_*.jsonl` with `premise`, `hypothesis`
and `label`): the licences of some do not let them be copied here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.gsm8k import encode, prompt_of
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
        steps = round(epochs * (rows // size))
        while len(result) < steps:
            order = draw.sample(self.train[:rows], rows)
            pools = [by_length(order[start : start + POOL]) for start in range(0, rows, POOL)]
            batches = [pool[start : start + size] for pool in pools for start in range(0, len(pool), size)]
            result += draw.sample([batch for batch in batches if len(batch) == size], rows // size)
        return result[:steps]

    def evaluated(self, rows: list[Encoded], size: int) -> list[Batch]:
        """Batches of all `rows`."""
        ordered = by_length(rows)
        return [self.batch(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def by_length(rows: list[Encoded]) -> list[Encoded]:
    """Shortest first."""
    return sorted(rows, key=lambda row: len(row["input_ids"]))


@dataclass(frozen=True)
class Texts:
    """A task's rows with `question`, `answer` and, where there are classes, `label`; `labels` counts the classes."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    labels: int | None = None


def load(name: str, tokenizer: Any, folder: Path | None, few_shot_examples: int = 0, most: int | None = None) -> Task:
    """The task called `name`.

    Args:
        name: Its name.
        tokenizer: A chat model's.
        folder: Where its files are.
        few_shot_examples: Examples before every row: the last of the training rows, which short runs do not reach.
        most: Encode no more than so many rows of each set.

    Raises:
        ValueError: when there is none, or its files are not in `folder`.
    """
    texts, shown = texts_of(name, folder), copy(tokenizer)
    if few_shot_examples:
        examples = texts.train[-few_shot_examples:]
        turns = [(role, row[key]) for row in examples for role, key in (("user", "question"), ("assistant", "answer"))]
        add_few_shot_examples(shown, [{"role": role, "content": content} for role, content in turns])
    before = len(_prompt(shown, "")) - len(_prompt(tokenizer, ""))

    def encoded(row: dict[str, Any]) -> Encoded:
        if texts.labels is None:
            return encode(shown, row, before + MAX_LENGTH)
        prompt = _prompt(shown, row["question"])
        return {"input_ids": prompt[:before] + prompt[before:][-MAX_LENGTH:], "labels": row["label"]}

    parts = [[encoded(row) for row in part[:most]] for part in (texts.train, texts.validation, texts.test)]
    return Task(name, texts.labels, *parts, padding=tokenizer.pad_token_id, few_shot_examples=before)


def texts_of(name: str, folder: Path | None) -> Texts:
    """The texts of the task called `name`."""
    if name not in TASKS:
        raise ValueError(f"task is {name}; choose one of {', '.join(TASKS)}.")
    return TASKS[name](folder)


def _prompt(tokenizer: Any, question: str) -> list[int]:
    ids: list[int] = tokenizer(prompt_of(tokenizer, question), add_special_tokens=False).input_ids
    return ids


def _read(folder: Path | None, name: str) -> list[dict[str, Any]]:
    if folder is None or not (folder / name).is_file():
        raise ValueError(f"data is {folder}, which has no {name}; name a folder that has it.")
    with (folder / name).open(encoding="utf-8") as lines:  # `splitlines` would also split within a string
        return [json.loads(line) for line in lines]


def _gsm8k(folder: Path | None) -> Texts:
    train, test = _read(folder, "gsm8k_train.jsonl"), _read(folder, "gsm8k_test.jsonl")
    return Texts(train[:7000], train[7000:], test[:300])


def _dolly(folder: Path | None) -> Texts:
    rows = [
        {"question": f"{row['instruction']}\n\n{row['input']}".strip(), "answer": row["output"]}
        for row in _read(folder, "dolly_3k.jsonl")
    ]
    return Texts(rows[:2396], rows[2396:2696], rows[2696:2996])


def _sst2(folder: Path | None) -> Texts:
    def read(part: str) -> list[dict[str, Any]]:
        return [
            {
                "question": f"Is the sentiment of this sentence positive or negative?\n\n{row['sentence']}",
                "answer": ("negative", "positive")[int(row["label"])],
                "label": int(row["label"]),
            }
            for row in _read(folder, f"sst2_sentence_{part}.jsonl")
        ]

    return Texts(read("train"), read("dev"), read("test"), labels=2)


def _rte(folder: Path | None) -> Texts:
    def read(part: str) -> list[dict[str, Any]]:
        found = []
        for row in _read(folder, f"rte_{part}.jsonl"):
            label = {"entailment": 0, "not_entailment": 1}.get(row["label"], row["label"])
            question = f"{row['premise']}\n\nDoes it follow that {row['hypothesis'].rstrip('.')}?"
            found.append({"question": question, "answer": ("yes", "no")[int(label)], "label": int(label)})
        return found

    train = read("train")
    return Texts(train[:-300], train[-300:], read("dev"), labels=2)


TASKS: dict[str, Callable[[Path | None], Texts]] = {"gsm8k": _gsm8k, "dolly": _dolly, "sst2": _sst2, "rte": _rte}
