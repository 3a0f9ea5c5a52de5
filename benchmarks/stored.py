"""What the base's pass costs as data, each against what it replaces, in turn: one row of ratios for each command.

    python -m benchmarks.stored pass      scoring and storing states, over a bare forward pass with its loss
    python -m benchmarks.stored epoch     a step from states on disk, over QLoRA's on the same rows
    python -m benchmarks.stored sweep     a live step of 8 networks, over one of 1
    python -m benchmarks.stored memory    peak memory and time of a step beside no base, a large shape, random states

SmolLM2-135M-Instruct on the GSM8K rows in `benchmarks/data`. Rows go to `results/stored.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.optimization import Adafactor

from benchmarks import bases, methods, rows
from benchmarks.common import smollm2, smollm2_tokenizer
from benchmarks.gsm8k import encode, read_rows
from benchmarks.step import Memory, positive, seconds
from qtuning_peft import (
    EUScorer,
    SideTuningConfig,
    StatesCollator,
    SweepTrainer,
    compute_states,
    load_states,
    model_from_states,
)
from qtuning_peft.eu_plane.batching import right_padded
from qtuning_peft.eu_plane.dataset import write_part
from qtuning_peft.eu_plane.tokenized import Sample
from qtuning_peft.loss import chunked_cross_entropy
from qtuning_peft.states.format import FORMATS
from qtuning_peft.stored import HEAD, MANIFEST, Manifest
from qtuning_peft.stored.manifest import checksum_of
from qtuning_peft.sweep import candidates

NAME = "stored"
CONFIG = SideTuningConfig(task_type="CAUSAL_LM")
NETWORKS = 8
# The leanest by `benchmarks.saved_for_backward`.
NETWORKS_OF: dict[str, dict[str, Any]] = {"lean": {"reduction_factor": 16, "downsample": "avgpool"}, "default": {}}


def encoded(count: int) -> list[dict[str, Any]]:
    """Rows with `input_ids` and `labels`."""
    tokenizer = smollm2_tokenizer()
    return [encode(tokenizer, row, 512) for row in read_rows("train", count)]


def batch_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """`input_ids`, `attention_mask` and `labels` (batch, length) of rows."""
    samples = [Sample(index, row["input_ids"], row["labels"]) for index, row in enumerate(found)]
    input_ids, mask, labels = right_padded(samples, torch.device("cpu"))
    return {"input_ids": input_ids, "labels": labels} | ({} if mask is None else {"attention_mask": mask})


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> dict[str, float]:
    """Medians in seconds, and their ratio; the first of each is not counted."""
    times = [(seconds(ours), seconds(theirs)) for _ in tqdm(range(repeats + 1))][1:]
    mine, other = (median(column) for column in zip(*times, strict=True))
    return {"seconds": mine, "against_seconds": other, "ratio": mine / other}


def one_pass(arguments: argparse.Namespace) -> dict[str, Any]:
    """Scores and states of rows, over a forward pass of the same rows with its loss."""
    base, found = smollm2(False)[0], encoded(arguments.rows)
    scorer = EUScorer(base, None, states=CONFIG, states_format="bfloat16", tokens_per_batch=100_000)
    columns = {name: [row[name] for row in found] for name in ("input_ids", "labels")}
    batch = batch_of(sorted(found, key=lambda row: -len(row["input_ids"])))

    @torch.no_grad()
    def bare() -> None:
        chunked_cross_entropy(base, **batch)

    return in_turn(lambda: scorer(columns), bare, arguments.repeats)


def epoch(arguments: argparse.Namespace) -> dict[str, Any]:
    """A step from a folder on disk, over QLoRA's."""
    found = encoded(arguments.rows)
    quantized = methods.find("qlora")
    theirs = methods.apply(quantized, smollm2(True)[0])
    theirs_optimizer = methods.optimizer(quantized, theirs, quantized.learning_rate)
    with tempfile.TemporaryDirectory() as folder:
        compute_states(Dataset.from_list(found), smollm2(True)[0], None, CONFIG, folder)
        stored, collator = load_states(folder), StatesCollator(folder)
        ours = model_from_states(folder, CONFIG).train()
        optimizer = methods.optimizer(methods.find("side"), ours)
        batch = batch_of(found)

        def step(model: Any, loss: Callable[[], torch.Tensor], of: torch.optim.Optimizer) -> None:
            loss().backward()
            nn.utils.clip_grad_norm_(methods.trained(model), 1.0)
            of.step()
            of.zero_grad()

        return in_turn(
            lambda: step(ours, lambda: ours(**collator(list(stored))).loss, optimizer),
            lambda: step(theirs, lambda: chunked_cross_entropy(theirs, **batch), theirs_optimizer),
            arguments.repeats,
        )


def sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    """A live step of several networks, over one of one, behind prompts three times as long as their answers."""
    found, networks = encoded(arguments.rows), candidates(CONFIG, {"seed": [*range(NETWORKS)]}, 1e-3, 0)
    for row in found:
        length = len(row["input_ids"])
        row["labels"] = [-100] * (3 * length // 4) + row["input_ids"][3 * length // 4 :]
    batch = batch_of(found)

    def trainer(chosen: Any) -> Any:
        run = TrainingArguments("unused", report_to="none", use_cpu=True)
        made = SweepTrainer(get_peft_model(smollm2(False)[0], CONFIG), run, sweep=chosen)
        made.create_optimizer()
        return made

    def step(of: Any) -> None:
        of.training_step(of.model, dict(batch))
        of._clip_grad_norm(of.model)
        of.optimizer.step()
        of.optimizer.zero_grad()

    all_of_them, one = trainer(networks), trainer(networks[:1])
    return {"networks": NETWORKS} | in_turn(lambda: step(all_of_them), lambda: step(one), arguments.repeats)


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time and peak memory of a step from random states on disk, of the shape of a large base."""
    config, side = (
        bases.shape(arguments.base),
        SideTuningConfig(**NETWORKS_OF[arguments.network], task_type="CAUSAL_LM"),
    )
    width, tokens, device = config.hidden_size, 64, "cuda" if torch.cuda.is_available() else "cpu"  # tokens of a row
    layers = tuple(range(config.num_hidden_layers - 1, -1, -side.tap_every))[::-1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"weight": torch.randn(config.vocab_size, width, dtype=torch.bfloat16) / 100}, folder / HEAD)
        config.dtype = "bfloat16"
        config.save_pretrained(folder)
        content = FORMATS["int8"].encode(torch.randn(len(layers) + 2, tokens, width))
        row = {"states": [content], "state_tokens": [[*range(tokens)]], "labels": [[5] * tokens]}
        row = {name: column * arguments.rows for name, column in row.items()}
        write_part(folder / "part.arrow", Dataset.from_dict(row).data.table)
        del content, row
        manifest = Manifest("random", layers, config.num_hidden_layers, width, "int8", "", "", None, ("part.arrow",),
                            checksum_of(folder / HEAD), arguments.rows)  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps(asdict(manifest)), encoding="utf-8")
        peak = Memory(device)
        model = model_from_states(folder, side).to(device).train()
        optimizer = (
            # As `optim: adafactor` of TrainingArguments.
            Adafactor(methods.trained(model), lr=1e-3, scale_parameter=False, relative_step=False)
            if arguments.adafactor
            else methods.optimizer(methods.find("side-lean" if arguments.network == "lean" else "side"), model)
        )
        stored, collator = load_states(folder), StatesCollator(folder)

        def read() -> dict[str, Any]:
            return {name: tensor.to(device) for name, tensor in collator(list(stored)).items()}

        def step(batch: dict[str, Any]) -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):
            step(read())
        found = peak.peak()
        batch = read()
        return {
            "base": arguments.base,
            "network": arguments.network,
            "tokens": tokens * arguments.rows,
            "optimizer": type(optimizer).__name__,
            "trained_parameters": sum(p.numel() for p in methods.trained(model)),
            "read_seconds": median(seconds(read) for _ in range(arguments.repeats)),
            "step_seconds": median(seconds(lambda: step(batch)) for _ in range(arguments.repeats)),
        } | found


COMMANDS = {"pass": one_pass, "epoch": epoch, "sweep": sweep, "memory": memory}


def main() -> None:
    """Measure, and append and print the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--rows", type=positive, default=8, help="rows of a batch (8)")
    parser.add_argument(
        "--base", choices=bases.SHAPES, default="llama-2-70b", help="for memory: the shape (llama-2-70b)"
    )
    parser.add_argument(
        "--network", choices=NETWORKS_OF, default="lean", help="for memory: of least memory, or default"
    )
    parser.add_argument("--adafactor", action="store_true", help="for memory: Adafactor in the place of AdamW")
    parser.add_argument("--repeats", type=positive, default=5, help="timed repeats, after one that is not (5)")
    arguments = parser.parse_args()
    row = {"what": arguments.what, "rows": arguments.rows, **COMMANDS[arguments.what](arguments)}
    rows.append(NAME, row | rows.provenance())
    print(json.dumps(row))


if __name__ == "__main__":
    main()
