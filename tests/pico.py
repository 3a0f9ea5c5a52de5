"""A pico chat model on disk, and a task that it can learn in seconds: what trainers' own commands are run on.

`python tests/pico.py FOLDER` makes both, for other environments than the one of the tests.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 48
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "user", "assistant", "\n")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|> ' + message['role'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' <|im_end|> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' <|im_end|> ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


def save_model(folder: Path, seed: int = 0) -> Path:
    """Save a random Llama of four blocks, 128 wide, and its tokenizer of whole words with a ChatML template."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions and answers that say the question's first word several times; some answers are noise."""
    draw = random.Random(seed)
    result = []
    for index in range(count):
        words = [f"w{draw.randrange(WORDS)}" for _ in range(draw.randrange(3, 9))]
        answer = [f"w{index % 4}"] * draw.randrange(4, 10)
        if index % 5 == 0:
            answer = [f"w{draw.randrange(WORDS)}" for _ in answer]
        result.append({"question": " ".join(words), "answer": " ".join(answer)})
    return result


def messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """A row as a conversation."""
    return {
        "messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    }


def write_chat(file: Path, count: int = 64, seed: int = 0) -> Path:
    """Write conversations as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(messages(row)) + "\n" for row in rows(count, seed)))
    return file


def prepare(folder: Path) -> Path:
    """Make the model and conversations to train and to test on in `folder`."""
    save_model(folder / "model")
    write_chat(folder / "chat" / "train.jsonl")
    write_chat(folder / "chat" / "test.jsonl", 16, seed=1)
    return folder


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
