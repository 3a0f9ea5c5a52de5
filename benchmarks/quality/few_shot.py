"""Which few-shot examples, and how many: the frozen base's loss behind them.

    python -m benchmarks.quality.few_shot --data FOLDER          resumes where it was interrupted

SmolLM2-135M-Instruct in float32 on GSM8K. Examples come from the last 80 training rows: drawn, or those that are
shortest, longest, easiest or hardest to the base. The loss is that of 32 validation rows, in nats per token, and of 16
training rows, by which a user would choose among draws. Nothing is trained. Rows go to `results/few_shot.jsonl`.
"""

from __future__ import annotations

import argparse
import random
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from tqdm import tqdm

from benchmarks import rows
from benchmarks.common import DEVICE, smollm2, smollm2_tokenizer
from benchmarks.document import markdown, not_measured, source, spread
from benchmarks.gsm8k import encode
from benchmarks.quality.tasks import behind_examples
from benchmarks.quality.texts import texts_of
from qtuning_peft import SideTuningConfig
from qtuning_peft.loss import chunked_cross_entropy
from qtuning_peft.states import common_prefix, reuse_of

NAME, POOL, VALIDATION_ROWS, CHOOSING_ROWS = "few_shot", 80, 32, 16
COMMAND = "python -m benchmarks.quality.few_shot --data data"
DRAWS, COUNTS = range(4), (1, 2, 4, 8)
ORDERS = ("shortest", "longest", "easiest", "hardest")


@cache
def _base() -> Any:
    return get_peft_model(smollm2(False)[0], SideTuningConfig(task_type="CAUSAL_LM")).train()


def errors(found: list[dict[str, Any]]) -> np.ndarray:
    """The base's error of each row in nats per token, (rows,); what all begin with is computed once."""
    model = _base()
    reuse = reuse_of(model)
    assert reuse is not None
    reuse.cache_prefix(common_prefix(found))
    batches = [{name: torch.tensor([values], device=DEVICE) for name, values in row.items()} for row in found]
    return np.array([chunked_cross_entropy(model, **batch).item() for batch in tqdm(batches, "Errors", unit="row")])


def main() -> None:
    """One row for each choice of examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where GSM8K's files are")
    arguments = parser.parse_args()
    tokenizer, texts = smollm2_tokenizer(), texts_of("gsm8k", arguments.data)
    pool = texts.train[-POOL:]
    alone = [encode(tokenizer, row, 2**20) for row in pool]
    lengths, found = np.array([len(row["input_ids"]) for row in alone]), errors(alone)
    orders = dict(zip(ORDERS, (lengths, -lengths, found, -found), strict=True))
    wanted = [(f"draw {seed}", 4) for seed in DRAWS] + [("draw 0", count) for count in COUNTS if count != 4]
    done = {(row["choice"], row["count"]) for row in rows.read(NAME)}
    for choice, count in [("none", 0), *((name, 4) for name in ORDERS), *wanted]:
        if (choice, count) in done:
            continue
        if choice in orders:
            places = np.argsort(orders[choice], kind="stable")[:count].tolist()
        else:
            places = random.Random(choice).sample(range(POOL), count)
        shown = behind_examples(tokenizer, [pool[place] for place in places])
        sets = {"validation": texts.validation[:VALIDATION_ROWS], "train": texts.train[:CHOOSING_ROWS]}
        losses = {of: behind(shown, answered) for of, answered in sets.items()}
        tokens = int(lengths[places].sum())
        rows.append(NAME, {"choice": choice, "count": count, "tokens": tokens, "loss": losses} | rows.provenance())
        tqdm.write(f"{choice}, {count}: {losses}")


def behind(tokenizer: Any, answered: list[dict[str, Any]]) -> float:
    """Nats per supervised token of rows behind the tokenizer's examples."""
    found = [encode(tokenizer, row, 2**20) for row in answered]
    weights = [sum(label >= 0 for label in row["labels"]) for row in found]
    return float(np.average(errors(found), weights=weights))


def table(images: Path) -> str:
    """Every choice; draws together, and the one that is best on training rows."""
    found = {(row["choice"], row["count"]): row for row in rows.read(NAME)}
    if not found:
        return not_measured(COMMAND)
    draws = [row for (choice, count), row in found.items() if choice.startswith("draw") and count == 4]
    groups = {
        **{f"{count} drawn": [found["draw 0", count]] for count in COUNTS if ("draw 0", count) in found and count != 4},
        f"4 drawn, {len(draws)} times": draws,
        f"4 drawn, the best of {len(draws)} on {CHOOSING_ROWS} training rows": [
            min(draws, key=lambda row: row["loss"]["train"])
        ],
        **{f"4 {choice}": [row] for (choice, _), row in found.items() if choice in ORDERS},
    }
    lines = [
        [name, round(mean(row["tokens"] for row in group)), spread([row["loss"]["validation"] for row in group])]
        for name, group in {"none": [found["none", 0]], **groups}.items()
    ]
    body = markdown(["few-shot examples", "their tokens", "validation"], lines)
    return f"{body}\n\n{source([*found.values()], COMMAND)}"


if __name__ == "__main__":
    main()
