"""The plane with the real SmolLM2-135M: every precision, what it sees, and the budgets on real answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from algorithm_1 import keep_samples, keep_tokens
from datasets import Dataset
from peft import get_peft_model
from test_quantized_bases import full_precision, gguf, nf4, packed_gguf, read_rows
from transformers import AutoTokenizer, PreTrainedModel

from qtuning_peft import EUPruner, EUScorer, SideTuningConfig, score

pytestmark = pytest.mark.smollm2


def rows(count: int) -> Dataset:
    return Dataset.from_list([{"prompt": r["question"], "completion": r["answer"]} for r in read_rows("train", count)])


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def scored(smollm2: Path, tokenizer: Any) -> Dataset:
    torch.set_num_threads(2)
    return score(rows(16), full_precision(smollm2), tokenizer, progress=False)


@pytest.mark.parametrize("load", [full_precision, nf4, gguf, packed_gguf])
def test_any_precision_is_scored_by_its_own_logits(
    smollm2: Path, tokenizer: Any, load: Callable[[Path], PreTrainedModel]
) -> None:
    model = load(smollm2).eval()
    result = EUScorer(model, tokenizer)(rows(2)[:])
    for input_ids, labels, error, uncertainty in zip(
        *(result[name] for name in ("input_ids", "labels", "error", "uncertainty")), strict=True
    ):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(input_ids)[None]).logits[0, :-1].double()
        targets = torch.tensor(labels)[1:]
        kept = targets != -100
        log_p = logits[kept].log_softmax(-1)
        # Kernels of 4-bit layers round differently for another batch.
        tolerance = 1e-4 if load is full_precision or load is gguf else 2e-2
        assert error == pytest.approx(-log_p.gather(1, targets[kept, None]).mean().item(), abs=tolerance)
        assert uncertainty == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), abs=tolerance)


@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.5])
@pytest.mark.parametrize("batch", [8, 16])
def test_real_answers_are_chosen_and_trimmed_as_published(scored: Dataset, ratio: float, batch: int) -> None:
    pruner = EUPruner(sample_ratio=ratio, token_ratio=0.5, per_batch=True)
    kept = scored.add_column("id", [*range(16)]).map(pruner, batched=True, batch_size=batch)
    by_id = {row["id"]: row for row in kept}
    for start in range(0, 16, batch):
        rows = scored[start : start + batch]
        expected = keep_samples(rows["error"], rows["uncertainty"], ratio)
        assert {index for index in by_id if start <= index < start + batch} == {start + index for index in expected}
        for index, role in expected.items():
            labels = np.array(rows["labels"][index])
            supervised = np.flatnonzero(labels != -100)
            stay = keep_tokens(rows["token_error"][index], 0.5, 0.5, 0.5) if role == "Q2" else [True] * len(supervised)
            labels[supervised[~np.array(stay)]] = -100
            assert by_id[start + index]["labels"] == labels.tolist()


@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.5, 0.75])
def test_budgets_are_met_on_real_answers(scored: Dataset, tokenizer: Any, ratio: float) -> None:
    pruner = EUPruner(sample_ratio=ratio, token_ratio=0.5, protect="####.*", tokenizer=tokenizer).fit(scored)
    kept = scored.map(pruner, batched=True)
    assert len(kept) == 16 * ratio
    for row in kept:
        # The final answer and the end of the turn are learned in every row that is kept.
        learned = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert learned.rstrip("\n").endswith("#### " + row["completion"].split("#### ")[1] + "<|im_end|>")


def test_answers_of_other_questions_have_more_error(smollm2: Path, tokenizer: Any, scored: Dataset) -> None:
    data = rows(16)
    swapped = Dataset.from_dict(
        {"prompt": data["prompt"][:], "completion": data["completion"][8:] + data["completion"][:8]}
    )
    mismatched = score(swapped, full_precision(smollm2), tokenizer, progress=False)
    assert np.mean(np.array(mismatched["error"]) > np.array([*scored["error"][8:], *scored["error"][:8]])) > 0.8


def test_loops_look_clean_and_are_seen_by_their_repetition(smollm2: Path, tokenizer: Any, scored: Dataset) -> None:
    looped = Dataset.from_list([{"prompt": "Say something.", "completion": "The cat sat on the mat. " * 12}])
    loop = score(looped, full_precision(smollm2), tokenizer, progress=False)
    assert loop["error"][0] < min(scored["error"])
    assert loop["repetition"][0] > 0.8 > max(scored["repetition"])


def test_a_fresh_side_network_scores_as_its_base(smollm2: Path, tokenizer: Any, scored: Dataset) -> None:
    model = get_peft_model(full_precision(smollm2), SideTuningConfig(task_type="CAUSAL_LM"))
    result = EUScorer(model, tokenizer)(rows(2)[:])
    np.testing.assert_allclose(result["error"], scored["error"][:2], atol=1e-4)
