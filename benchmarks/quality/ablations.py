"""Ablations: what makes a side network learn better, each trained on the same cached hidden states.

    python -m benchmarks.quality.ablations --data FOLDER
    python -m benchmarks.quality.ablations --list

SmolLM2-135M-Instruct in NF4. AdamW, a tenth of the steps to warm up, a cosine, gradients clipped at 1. Every ablation
states what was expected before it was run. Its row has the result: validation loss in nats per token, and seconds.
Rows go to `results/ablations.jsonl`; an ablation with a row is not run again, so a stopped command resumes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import rows
from benchmarks.common import smollm2_tokenizer
from benchmarks.methods import trained
from benchmarks.quality import states
from benchmarks.quality.fit import Data, Rates, fit
from benchmarks.quality.networks import FINAL, LAST, Network, Options
from benchmarks.quality.tasks import Task, load
from benchmarks.step import positive

NAME, SEED = "ablations", 0
THIRD, FIFTH = tuple(range(3, LAST + 1, 3)), tuple(range(5, LAST + 1, 5))
FOUR = (15, 20, 25, 30)


@dataclass(frozen=True)
class Ablation:
    """One experiment.

    Attributes:
        name: As in commands and rows.
        what: Description.
        predicted: What was expected before it was run.
        options: Of the network.
        rates: Of its optimizers.
        epochs: How often the training rows are read, where not as many steps as all others.
    """

    name: str
    what: str
    predicted: str
    options: Options
    rates: Rates
    epochs: int | None = None


BASE_LINE = Options(gate="add", blocks=THIRD, reduction_factor=4)
DIRECT = replace(BASE_LINE, attention="none", linear=(LAST,))
WIDE = replace(DIRECT, blocks=FIFTH, reduction_factor=2, tap="difference")
FOUR_MAPS = Options(blocks=(), linear=FOUR)
FAST, MUON = Rates(4e-3), Rates(1e-3, linear=5e-4, muon=1e-2)

ABLATIONS = (
    Ablation(
        "every-block-d8", "a side block for every block, width d/8, lerp gates, attention and MLP",
        "The baseline.", Options(), Rates(1.5e-3),
    ),
    Ablation(
        "additive-gates", "taps are added instead of mixed in",
        "Better: with gates at one half, what the first blocks saw is halved thirty times.",
        Options(gate="add"), Rates(1.5e-3),
    ),
    Ablation(
        "every-third-d4", "a third of the blocks, twice as wide; the baseline of those below",
        "Better and faster at about as many parameters: fewer, wider blocks.", BASE_LINE, FAST,
    ),
    Ablation(
        "every-third-no-attention", "side blocks without attention",
        "Worse: copying from the question needs attention.", replace(BASE_LINE, attention="none"), FAST,
    ),
    Ablation(
        "every-third-no-mlp", "side blocks without MLP",
        "A little worse.", replace(BASE_LINE, mlp=False), FAST,
    ),
    Ablation(
        "norm-before", "taps are normalized before the down-sampler instead of after it",
        "Better: first tokens have huge states.", replace(BASE_LINE, norm="before"), FAST,
    ),
    Ablation(
        "differences", "what is down-sampled is the difference of successive taps",
        "Better: successive states are nearly the same, what a block added is not.",
        replace(BASE_LINE, tap="difference"), FAST,
    ),
    Ablation(
        "muon", "Muon for the side network's matrices",
        "Learns faster.", BASE_LINE, Rates(2e-3, muon=1e-2),
    ),
    Ablation(
        "faster-up", "three times the rate for the up-projection",
        "Learns faster: it starts at zero, and nothing else has a gradient before it moves.",
        BASE_LINE, Rates(4e-3, up=1.2e-2),
    ),
    Ablation(
        "low-rank-64", "and a map of rank 64 of the final state",
        "A little better: the final state's own directions, which the down-samplers lose.",
        replace(BASE_LINE, linear=(FINAL,), rank=64), FAST,
    ),
    Ablation(
        "linear-last", "no network, a full linear map of the last block's state",
        "A floor that any network beats.", Options(blocks=(), linear=(LAST,)), Rates(1e-3),
    ),
    Ablation(
        "linear-four", "no network, full linear maps of the states after blocks 15, 20, 25 and 30",
        "Better than of the last alone: middle states know what the last has dropped.", FOUR_MAPS, Rates(3e-4),
    ),
    Ablation(
        "linear-four-white", "the same of whitened states",
        "Faster: a few directions hold half of the variance, and the others hardly learn.",
        replace(FOUR_MAPS, white=True), Rates(3e-4),
    ),
    Ablation(
        "mlp-four-white", "MLPs of 256 units instead of linear maps",
        "A little better than linear, with fewer parameters.",
        replace(FOUR_MAPS, white=True, hidden=256), Rates(1e-3),
    ),
    Ablation(
        "no-attention-linear", "a network without attention and a linear map of the last state",
        "The sum of what both gain.", DIRECT, Rates(2e-3, up=1e-3, linear=5e-4),
    ),
    Ablation(
        "no-attention-linear-muon", "the same with Muon",
        "Better by what Muon gains alone.", DIRECT, MUON,
    ),
    Ablation(
        "wide-differences-linear-muon", "the same with differences, every fifth block and width d/2",
        "Better again: wider still, and differences help.", WIDE, MUON,
    ),
    Ablation(
        "from-base-weights", "down-samplers and side MLPs start as the base's, at its most written channels",
        "A better start; LST reports little at the end.",
        replace(BASE_LINE, attention="none", from_base=True), FAST,
    ),
    Ablation(
        "base-attention", "side blocks attend where the base does",
        "Better: circuits that copy need not be learned again.", replace(DIRECT, attention="base"), MUON,
    ),
    Ablation(
        "late-lora-6", "LoRA of rank 16 on the last 6 blocks, where gradients stop",
        "Near LoRA on all blocks.", Options(blocks=(), late=6, lora=16), Rates(7e-4),
    ),
    Ablation(
        "late-injection-6", "the network adds to the state before the last 6 blocks, which run again, frozen",
        "Better than adding after the last: the base's blocks still work on it.",
        replace(BASE_LINE, attention="none", blocks=tuple(range(4, 25, 4)), late=6), Rates(2e-3),
    ),
    Ablation(
        "three-epochs-linear", "linear-four-white, three epochs of all rows",
        "Better, until the maps have memorized the rows.", replace(FOUR_MAPS, white=True), Rates(3e-4), epochs=3,
    ),
    Ablation(
        "three-epochs-no-attention", "wide-differences-linear-muon, three epochs",
        "Better by more than the linear maps.", WIDE, MUON, epochs=3,
    ),
    Ablation(
        "three-epochs-attention",
        "every third block, width d/4, attention, differences, a linear map, Muon, three epochs",
        "Attention pays off with more steps.", replace(BASE_LINE, tap="difference", linear=(LAST,)), MUON, epochs=3,
    ),
)  # fmt: skip


def chosen(names: list[str] | None) -> list[Ablation]:
    """The ablations called `names`, or all.

    Raises:
        ValueError: when a name is none.
    """
    known = {ablation.name: ablation for ablation in ABLATIONS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"only is {name}; choose from {', '.join(known)}.")
    return [known[name] for name in names] if names else list(ABLATIONS)


def key(row: rows.Row) -> str:
    """What identifies a run, beside the machine."""
    names = ("task", "name", "options", "rates", "seed", "rows", "steps", "validation_rows")
    return json.dumps({name: row[name] for name in names}, sort_keys=True)


def run_of(ablation: Ablation, arguments: argparse.Namespace) -> rows.Row:
    """The part of a row that is known before the run."""
    epoch = arguments.rows // states.BATCH
    return {
        "task": arguments.task, "model": "SmolLM2-135M-Instruct", "name": ablation.name, "what": ablation.what,
        "predicted": ablation.predicted, "options": asdict(ablation.options),
        "rates": asdict(ablation.rates), "seed": SEED,
        "rows": arguments.rows, "batch": states.BATCH, "validation_rows": arguments.validation_rows,
        "steps": ablation.epochs * epoch if ablation.epochs else arguments.steps,
    }  # fmt: skip


def main() -> None:
    """Run what has no row yet; one row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("gsm8k", "dolly"), default="gsm8k", help="whose answers are text (gsm8k)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="where the tasks' files are")
    parser.add_argument("--rows", type=positive, default=480, help="training rows whose hidden states are cached (480)")
    parser.add_argument("--steps", type=positive, default=40, help="steps of 8 rows (40)")
    parser.add_argument("--validation-rows", type=positive, default=64, help="validation rows (64)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="ablations to run (all)")
    parser.add_argument("--list", action="store_true", help="list the ablations, and run none")
    arguments = parser.parse_args()
    try:
        wanted = chosen(arguments.only)
        if arguments.list:
            for ablation in wanted:
                print(f"{ablation.name}: {ablation.what}. Expected: {ablation.predicted}")
            return
        task = load(arguments.task, smollm2_tokenizer(), arguments.data)
        if not states.BATCH <= arguments.rows <= len(task.train):
            raise ValueError(f"rows is {arguments.rows}; give {states.BATCH} to {len(task.train)}.")
    except ValueError as error:
        parser.error(str(error))
    work(task, wanted, arguments)


def work(task: Task, wanted: list[Ablation], arguments: argparse.Namespace) -> None:
    """One row of every ablation that has none."""
    done = {key(row) for row in rows.read(NAME)}
    left = [(ablation, run) for ablation in wanted if key(run := run_of(ablation, arguments)) not in done]
    if not left:
        return
    source = rows.provenance()
    train, validation = states.cached(task, arguments.rows, arguments.validation_rows)
    base: Any = states.dequantized().to("cuda" if torch.cuda.is_available() else "cpu")
    data = Data(train, validation, base.lm_head.weight)
    untrained = data.measure(Network(Options(blocks=()), base, train))
    for ablation, run in tqdm(left, unit="ablation"):
        torch.manual_seed(SEED)
        network = Network(ablation.options, base, train).to(data.device)
        curve = [
            [step, round(clock, 3), round(loss, 5)]
            for step, clock, loss in fit(data, network, ablation.rates, run["steps"], SEED)
        ]
        row = {
            **run, "trained_parameters": sum(parameter.numel() for parameter in trained(network)),
            "seconds": curve[-1][1], "loss_at_start": round(untrained, 5), "curve": curve, "loss_at_end": curve[-1][2],
            **source,
        }  # fmt: skip
        rows.append(NAME, row)
        tqdm.write(f"{ablation.name}: {row['loss_at_end']} after {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
