"""Padding, packing and batching change nothing: the side network sees what its base block sees."""

from __future__ import annotations

import pytest
import torch
from conftest import EVERY_PART, randomize_side_network, side_parameters, tiny, token_ids
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from qtuning_peft import SideTuningConfig

ROPE_FAMILIES = ("llama", "mistral", "qwen3", "gemma3", "gpt_neox")


def side_tuned(family: str = "llama", dtype: torch.dtype = torch.float64, **overrides: object) -> PeftModel:
    config = SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM", **EVERY_PART)
    model = get_peft_model(tiny(family, **overrides), config).to(dtype)
    randomize_side_network(model)
    return model


PADDED = [(family, "sdpa") for family in (*ROPE_FAMILIES, "opt", "gpt2")] + [
    (family, "eager") for family in ("llama", "gemma3", "opt", "bloom")
]


@pytest.mark.parametrize(("family", "implementation"), PADDED)
def test_padded_rows_equal_rows_alone(family: str, implementation: str) -> None:
    # Eager attention takes its softmax in float32, where a float64 mask overflows: the base alone gives NaN.
    dtype, tolerance = (torch.float64, 1e-9) if implementation == "sdpa" else (torch.float32, 1e-5)
    model = side_tuned(family, dtype, attn_implementation=implementation)
    short, long = token_ids(1, 5, seed=3), token_ids(1, 11, seed=4)
    pad = torch.zeros(1, 6, dtype=torch.long)
    with torch.no_grad():
        alone = model(input_ids=short).logits[0]
        for left in (False, True):
            row = torch.cat([pad, short] if left else [short, pad], dim=1)
            mask = torch.cat([torch.cat([pad, torch.ones_like(short)] if left else [torch.ones_like(short), pad], 1),
                              torch.ones_like(long)])  # fmt: skip
            inputs = {"input_ids": torch.cat([row, long]), "attention_mask": mask}
            if family != "bloom":
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            out = model(**inputs).logits[0]
            kept = out[6:] if left else out[:5]
            assert (kept - alone).abs().max() < tolerance


@pytest.mark.parametrize("family", ROPE_FAMILIES)
def test_packed_sequences_equal_sequences_alone(family: str) -> None:
    model = side_tuned(family)
    first, second = token_ids(1, 5, seed=3), token_ids(1, 7, seed=4)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits[0]
        assert (packed[:5] - model(input_ids=first).logits[0]).abs().max() < 1e-9
        assert (packed[5:] - model(input_ids=second).logits[0]).abs().max() < 1e-9


def rows() -> list[dict[str, list[int]]]:
    lengths = (5, 9, 7, 12, 6, 11, 8, 10)
    return [
        {"input_ids": (ids := token_ids(1, n, seed=n)[0].tolist()), "labels": [-100] * 2 + ids[2:]} for n in lengths
    ]


def padded_batch(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in samples)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in samples]),
        "labels": torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in samples]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in samples]
        ),
    }


def packed_batch(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[token for row in samples for token in row["input_ids"]]]),
        "labels": torch.tensor([[label for row in samples for label in [-100, *row["labels"][1:]]]]),
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in samples])[None],
    }


def test_five_steps_on_padded_and_on_packed_batches_end_at_the_same_loss() -> None:
    finals = []
    for collate in (padded_batch, packed_batch):
        model = side_tuned()
        optimizer = torch.optim.SGD(side_parameters(model).values(), lr=0.5)
        model.train()
        for _ in range(5):
            batch = collate(rows())
            labels = batch.pop("labels")
            logits = model(**batch, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append(loss.item())
    assert finals[0] == pytest.approx(finals[1], abs=1e-9)


def test_a_batch_of_8_equals_2_accumulated_4_times(tmp_path: object) -> None:
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = side_tuned()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
                max_steps=3, learning_rate=1e-2, optim="sgd", max_grad_norm=0.0, report_to="none", save_strategy="no",
                train_sampling_strategy="sequential", use_cpu=True, disable_tqdm=True,
            ),
            train_dataset=rows(),
            data_collator=padded_batch,
        )  # fmt: skip
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in side_parameters(model).items()})
    for name, whole in weights[0].items():
        assert (whole - weights[1][name]).abs().max() < 1e-9, name
