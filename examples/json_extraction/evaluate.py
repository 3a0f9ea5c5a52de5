"""Test loss and answers of a base model, with an adapter or without.

Run as a program, it is the demo's proof that the saved adapter is all there is: a fresh process, plain PEFT, and

    python -m examples.json_extraction.evaluate BASE ADAPTER
"""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
import typer
import yaml
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForSeq2Seq
from transformers.utils.logging import disable_progress_bar

from qtuning_peft.eu_plane.rows import RowEncoder
from qtuning_peft.loss import IGNORE_INDEX, chunked_cross_entropy

from .messages import draw_rows


def load_recipe() -> dict[str, Any]:
    """The settings in `recipe.yaml`."""
    recipe: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("recipe.yaml").read_text(encoding="utf-8"))
    return recipe


@dataclass
class Score:
    """How a model does on the test rows.

    Attributes:
        loss: Nats per supervised token.
        exact: Share of the answers that are the wanted text, to the letter.
        fields: Share of the fields that are somewhere in the answer, written as they should be.
        answers: Greedy answers, in the order of the rows.
    """

    loss: float
    exact: float
    fields: float
    answers: list[str]


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
def score(model: Any, tokenizer: Any, recipe: dict[str, Any], description: str) -> Score:
    """Loss and greedy answers of `model` on the recipe's test rows, `description` beside the progress bar."""
    model.eval()
    settings = recipe["test"]
    rows, size = draw_rows(settings["split"], settings["rows"]), settings["batch_size"]
    encoder, collate = RowEncoder(tokenizer), DataCollatorForSeq2Seq(tokenizer)
    total, tokens, answers = 0.0, 0, []
    for start in track(range(0, len(rows), size), description=description, console=Console(stderr=True)):
        encoded = [encoder.encode(row, "prompt") for row in rows[start : start + size]]
        batch = collate([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]).to(model.device)
        total += chunked_cross_entropy(model, **batch, num_items=1).item()
        tokens += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        prompts = tokenizer.apply_chat_template(
            [[{"role": "user", "content": row["prompt"]}] for row in rows[start : start + size]],
            add_generation_prompt=True, padding=True, tokenizer_kwargs={"padding_side": "left"},
            return_dict=True, return_tensors="pt",
        ).to(model.device)  # fmt: skip
        generated = model.generate(
            **prompts, max_new_tokens=settings["max_new_tokens"], do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answers += tokenizer.batch_decode(generated[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    exact = [answer == row["completion"] for answer, row in zip(answers, rows, strict=True)]
    fields = [
        f'"{name}": {json.dumps(value)}' in answer
        for answer, row in zip(answers, rows, strict=True)
        for name, value in json.loads(row["completion"]).items()
    ]
    return Score(total / tokens, mean(exact), mean(fields), answers)


def main(base: str, adapter: str) -> None:
    """Print, as a line of JSON, the score of the adapter in one folder on the base in another, loaded by plain PEFT."""
    quiet()
    settings, tokenizer = load_recipe(), AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(load_base(base, settings["quantization"]), adapter)
    print(json.dumps(asdict(score(model, tokenizer, settings, "Evaluating the saved adapter"))))


if __name__ == "__main__":
    typer.run(main)
