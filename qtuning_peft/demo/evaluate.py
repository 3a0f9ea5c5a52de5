"""Held-out loss and a sample answer of a base model, with an adapter or without.

Run as a program, it is the demo's proof that the saved adapter is all there is: a fresh process, plain PEFT, and

    python -m qtuning_peft.demo.evaluate --base FOLDER --adapter FOLDER --recipe demo
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from .. import recipes  # type: ignore[attr-defined]  # in another folder until installed
from ..loss import IGNORE_INDEX, chunked_cross_entropy
from .gsm8k import RightPadding, encode, prompt_of, read_rows

BATCH_SIZE = 8


@dataclass
class Score:
    """Loss in nats per supervised token, its perplexity, and a greedy answer to one held-out question."""

    loss: float
    perplexity: float
    question: str
    answer: str


def quiet() -> None:
    """Leave the screen to the demo's own bars: loading a model of this size takes seconds."""
    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def load_base(folder: str, quantization: dict[str, Any]) -> nn.Module:
    """The base model, quantized, on the GPU if there is one.

    Args:
        folder: A checkpoint.
        quantization: Arguments of `BitsAndBytesConfig`.
    """
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float32
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **quantization),
        device_map={"": 0} if gpu else None,
    )
    return model


@torch.inference_mode()
def score(model: nn.Module, tokenizer: Any, recipe: dict[str, Any], description: str) -> Score:
    """Evaluate `model` on the recipe's held-out rows, batched by length."""
    model.eval()
    device = next(model.parameters()).device
    rows = read_rows("test", recipe["data"]["test_rows"])
    encoded = sorted(
        (encode(tokenizer, row, recipe["data"]["max_length"]) for row in rows), key=lambda row: len(row["input_ids"])
    )
    collate = RightPadding(tokenizer.pad_token_id)
    total, tokens = 0.0, 0
    for start in track(range(0, len(encoded), BATCH_SIZE), description=description, console=Console(stderr=True)):
        batch = {key: value.to(device) for key, value in collate(encoded[start : start + BATCH_SIZE]).items()}
        total += chunked_cross_entropy(model, **batch, num_items=1).item()
        tokens += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    loss = total / tokens

    question = rows[recipe["sample"]["row"]]["question"]
    prompt = tokenizer(prompt_of(tokenizer, question), add_special_tokens=False, return_tensors="pt")
    prompt = {key: value.to(device) for key, value in prompt.items()}
    generated = model.generate(  # type: ignore[operator]  # no tensor, as mypy thinks
        **prompt,
        max_new_tokens=recipe["sample"]["max_new_tokens"],
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    answer = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return Score(loss, math.exp(loss), question, answer.strip())


def main() -> None:
    """Print the score of an adapter as one line of JSON."""
    parser = argparse.ArgumentParser(description="Held-out loss of an adapter, loaded with plain PEFT.")
    parser.add_argument("--base", required=True, help="Folder of the base model's checkpoint.")
    parser.add_argument("--adapter", required=True, help="Folder of the adapter.")
    parser.add_argument("--recipe", default="demo", help="Recipe with the quantization and the data.")
    arguments = parser.parse_args()

    from peft import PeftModel

    quiet()
    recipe = recipes.load(arguments.recipe)
    model = PeftModel.from_pretrained(load_base(arguments.base, recipe["quantization"]), arguments.adapter)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    print(json.dumps(asdict(score(model, tokenizer, recipe, "Evaluating the saved adapter"))))


if __name__ == "__main__":
    main()
