"""The tasks of the yardstick: rows as token ids, split into what is trained on, chosen by and reported.

| task    | trained on                | chosen by            | reported           | measure           |
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtuning_peft.demo.gsm8k import RightPadding, encode, prompt_of

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
        train, choose, report: Rows with `input_ids` and `labels`; of a class, `labels` is one integer.
        padding: Token id that fills a batch.
    """

    name: str
    labels: int | None
    train: list[Encoded]
    choose: list[Encoded]
    report: list[Encoded]
    padding: int

    def batch(self, rows: list[Encoded]) -> Batch:
        """`input_ids`, `attention_mask` (batch, length) and `labels`, of that shape or (batch,), int64."""
        collate = RightPadding(self.padding)
        if self.labels is None:
            return collate(rows)
        texts = collate([{"input_ids": row["input_ids"], "labels": []} for row in rows])
        return {**texts, "labels": torch.tensor([row["labels"] for row in rows])}

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


def load(name: str, tokenizer: Any, folder: Path | None) -> Task:
    """The task called `name`.

    Raises:
        ValueError: when there is none, or its files are not in `folder`.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name}; choose one of {', '.join(TASKS)}.")
    return TASKS[name](tokenizer, folder)


def _read(folder: Path | None, name: str) -> list[dict[str, Any]]:
    if folder is None or not (folder / name).is_file():
        raise ValueError(f"data is {folder}, which has no {name}; name a folder that has it.")
    with (folder / name).open(encoding="utf-8") as lines:  # `splitlines` would also split within a string
        return [json.loads(line) for line in lines]


def _gsm8k(tokenizer: Any, folder: Path | None) -> Task:
    train, test = _read(folder, "gsm8k_train.jsonl"), _read(folder, "gsm8k_test.jsonl")[:300]
    rows = [[encode(tokenizer, row, MAX_LENGTH) for row in part] for part in (train[:7000], train[7000:], test)]
    return Task("gsm8k", None, *rows, padding=tokenizer.pad_token_id)


def _dolly(tokenizer: Any, folder: Path | None) -> Task:
    rows = [
        encode(
            tokenizer,
            {"question": f"{row['instruction']}\n\n{row['input']}".strip(), "answer": row["output"]},
            MAX_LENGTH,
        )
        for row in _read(folder, "dolly_3k.jsonl")
    ]
    return Task("dolly", None, rows[:2396], rows[2396:2696], rows[2696:2996], padding=tokenizer.pad_token_id)


def _classes(tokenizer: Any, rows: list[dict[str, Any]], question: Callable[[dict[str, Any]], str]) -> list[Encoded]:
    return [
        {
            "input_ids": tokenizer(prompt_of(tokenizer, question(row)), add_special_tokens=False).input_ids[
                -MAX_LENGTH:
            ],
            "labels": _label(row["label"]),
        }
        for row in rows
    ]


def _label(value: Any) -> int:
    return {"entailment": 0, "not_entailment": 1}[value] if value in ("entailment", "not_entailment") else int(value)


def _sst2(tokenizer: Any, folder: Path | None) -> Task:
    def question(row: dict[str, Any]) -> str:
        return f"Is the sentiment of this sentence positive or negative?\n\n{row['sentence']}"

    rows = [
        _classes(tokenizer, _read(folder, f"sst2_sentence_{part}.jsonl"), question) for part in ("train", "dev", "test")
    ]
    return Task("sst2", 2, *rows, padding=tokenizer.pad_token_id)


def _rte(tokenizer: Any, folder: Path | None) -> Task:
    def question(row: dict[str, Any]) -> str:
        return f"{row['premise']}\n\nDoes it follow that {row['hypothesis'].rstrip('.')}?"

    train, dev = (_classes(tokenizer, _read(folder, f"rte_{part}.jsonl"), question) for part in ("train", "dev"))
    return Task("rte", 2, train[:-300], train[-300:], dev, padding=tokenizer.pad_token_id)


TASKS: dict[str, Callable[[Any, Path | None], Task]] = {"gsm8k": _gsm8k, "dolly": _dolly, "sst2": _sst2, "rte": _rte}
