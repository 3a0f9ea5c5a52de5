"""GSM8K rows (Cobbe et al., 2021; MIT) as prompt and supervised answer, through the model's chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qtuning_peft.loss import IGNORE_INDEX


def read_rows(split: str, count: int) -> list[dict[str, str]]:
    """The first `count` rows of `"train"` or `"test"`, each with `question` and `answer`.

    Raises:
        ValueError: when there are fewer rows here.
    """
    lines = (Path(__file__).parent / "data" / f"gsm8k_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    if not 1 <= count <= len(lines):
        raise ValueError(f"count is {count}; choose from 1 to {len(lines)}, the rows that are here.")
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
