"""GSM8K rows (Cobbe et al., 2021; MIT) as prompt and supervised answer, through the model's chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from ..loss import IGNORE_INDEX


def read_rows(split: str, count: int) -> list[dict[str, str]]:
    """The first `count` rows of `"train"` or `"test"`, each with `question` and `answer`.

    Raises:
        ValueError: when the package ships fewer rows.
    """
    lines = (files("qtuning_peft.data") / f"gsm8k_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    if not 1 <= count <= len(lines):
        raise ValueError(f"{split}_rows is {count}; the package ships {len(lines)} rows, choose from 1 to that many.")
    return [json.loads(line) for line in lines[:count]]


def prompt_of(tokenizer: Any, question: str) -> str:
    """The question as the user's turn, ending where the assistant's answer begins."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return text


def encode(tokenizer: Any, row: dict[str, str], max_length: int) -> dict[str, list[int]]:
    """Tokens of one row; only the answer and its end token are supervised.

    Args:
        tokenizer: A chat model's tokenizer.
        row: `question` and `answer`.
        max_length: Longer rows are cut at their end.

    Returns:
        `input_ids` and `labels`, equally long.
    """
    prompt = tokenizer(prompt_of(tokenizer, row["question"]), add_special_tokens=False).input_ids
    answer = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False).input_ids
    return {
        "input_ids": (prompt + answer)[:max_length],
        "labels": ([IGNORE_INDEX] * len(prompt) + answer)[:max_length],
    }


@dataclass
class RightPadding:
    """Collator: pads `input_ids` and `labels` at the right and masks the padding."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Batch `rows`: every tensor is (batch, longest length), int64."""
        length = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, value: int) -> Tensor:
            return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])

        # By length and not by token: SmolLM2's padding token is also its end token.
        mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORE_INDEX),
            "attention_mask": torch.tensor(mask),
        }
