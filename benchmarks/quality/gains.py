"""What cheap changes gain over the default side network: rates, widths, warm-up, Muon, differences, epochs, averages.

    python -m benchmarks.quality.gains --data FOLDER --epochs 1 3        resumes where it was interrupted

SmolLM2-135M-Instruct on GSM8K, in steps of 8 rows. The base runs once over the rows, in float32 or with the weights of
a quantized one; everything is read from its states. Of a variant every learning rate is tried with one seed, and the
rate that is best on the validation rows gets all seeds. Differences are taken of the stored states: s_j - s_(j-1) in
the place of s_j. An average is that of four networks which differ in their seeds: of their final states, which is that
of their log-probabilities,

    softmax(H (h_1 + ... + h_K) / K)  ~  (p_1 ... p_K)^(1/K)        H: the head

or of their probabilities. Rows go to `results/gains.jsonl`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks import rows
from benchmarks.common import DEVICE, smollm2, smollm2_tokenizer
from benchmarks.document import markdown, newest, not_measured, source, spread
from benchmarks.quality.from_states import Rows, batches_of, final_states, fresh, learn, stored, vocabulary_of
from benchmarks.quality.learner import WARM_UP
from benchmarks.quality.quantized_bases import FLOAT32, dense, load_named
from benchmarks.quality.tasks import load
from benchmarks.quantizers import QUANTIZERS
from benchmarks.step import positive
from qtuning_peft import SideTuningConfig, model_from_states
from qtuning_peft.head import causal_model

NAME, TOGETHER, SHARED_ROWS = "gains", 4, 320


@dataclass(frozen=True)
class Variant:
    """What differs from the default.

    Attributes:
        rates: Learning rates to try.
        warm_up: Share of the steps.
        reduction_factor: Of the side network.
        muon: Rate of `torch.optim.Muon` for the matrices, but for those of the output, over that of AdamW, which has
            the rest; 0 is AdamW alone.
        differences: Whether what a side block reads is the difference from what the one before it read.
    """

    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    warm_up: float = WARM_UP
    reduction_factor: int = 4
    muon: float = 0.0
    differences: bool = False

    def options(self) -> dict[str, Any]:
        """All but the rates."""
        return {name: value for name, value in asdict(self).items() if name != "rates"}


DEFAULT = "default"
VARIANTS = {
    DEFAULT: Variant(),
    "width d/2": Variant(reduction_factor=2),
    "width d/8": Variant(reduction_factor=8),
    "no warm-up": Variant(warm_up=0.0),
    "warm-up 0.3": Variant(warm_up=0.3),
    "differences": Variant(differences=True),
    "Muon, same rate": Variant(muon=1.0),
    "Muon, 10 times the rate": Variant(muon=10.0),
    "Muon, 10 times the rate, differences": Variant(muon=10.0, differences=True),
}
AVERAGES = [f"average of {TOGETHER}, states", f"average of {TOGETHER}, probabilities", f"best of {TOGETHER}"]


def differences(found: Rows) -> Rows:
    """The same rows, each tap minus the one before it; the first of the blocks' minus the embeddings."""
    return Rows(
        found.layers,
        [(torch.cat([states[:1], states[1:-1] - states[:-2], states[-1:]]), labels) for states, labels in found.rows],
    )


class Search:
    """Networks that learn the training rows, and what they lose on validation and test rows.

    Args:
        folder: The training rows' states.
        parts: States of "train", "validation" and "test".
    """

    def __init__(self, folder: Path, parts: dict[str, Rows]) -> None:
        self.folder, self.states = folder, {False: parts, True: {of: differences(part) for of, part in parts.items()}}
        model = fresh(folder, 0)
        self.head = causal_model(model).get_output_embeddings().weight.detach()  # (vocabulary, d)
        self.vocabulary = vocabulary_of(model, parts["train"])

    def train(self, variant: Variant, rate: float, epochs: int, seed: int) -> Any:
        """A side network after `epochs`."""
        torch.manual_seed(seed)
        config = SideTuningConfig(reduction_factor=variant.reduction_factor)
        model: Any = model_from_states(self.folder, config).to(DEVICE).train()
        batches = batches_of(self.states[variant.differences]["train"], epochs, seed)
        learn(model, batches, self.vocabulary, optimizers_of(model, variant, rate), variant.warm_up)
        return model.eval()

    @torch.no_grad()
    def final(self, model: Any, variant: Variant, of: str) -> Tensor:
        """Its final states (tokens, d)."""
        return torch.cat([states for states, _ in final_states(model, self.states[variant.differences][of])])

    @torch.no_grad()
    def nats(self, final: Tensor, of: str) -> Tensor:
        """By supervised token, (tokens,)."""
        labels = torch.cat([labels for _, labels in self.states[False][of].rows])
        parts = zip(final.split(512), labels.split(512), strict=True)
        return torch.cat([F.cross_entropy(states @ self.head.T, own, reduction="none") for states, own in parts])


def optimizers_of(model: Any, variant: Variant, rate: float) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon where the variant has it."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = {name for name, parameter in named if variant.muon and parameter.dim() == 2 and ".mix." not in name}
    rest = [parameter for name, parameter in named if name not in matrices]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=rate)]
    if matrices:
        chosen = [parameter for name, parameter in named if name in matrices]
        found.append(
            torch.optim.Muon(chosen, lr=rate * variant.muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        )
    return found


class Runs:
    """The rows that are there, and those that are measured for want of them."""

    def __init__(self, search: Search, sets: dict[str, int]) -> None:
        self.search, self.sets = search, sets

    def __call__(
        self, name: str, rate: float, epochs: int, seed: int, finals: dict[str, list[Tensor]] | None = None
    ) -> rows.Row:
        """The row of one network. With `finals` it is trained anyway, and its final states are added to them."""
        variant = VARIANTS[name]
        key = {"variant": name, "options": variant.options(), "rate": rate, "epochs": epochs, "seed": seed, **self.sets}
        done = [row for row in rows.read(NAME) if all(row.get(own) == value for own, value in key.items())]
        if done and finals is None:
            return done[-1]
        model = self.search.train(variant, rate, epochs, seed)
        own = {of: self.search.final(model, variant, of) for of in ("validation", "test")}
        row = key | {"loss": {of: self.search.nats(states, of).mean().item() for of, states in own.items()}}
        if finals is not None:
            for of, states in own.items():
                finals.setdefault(of, []).append(states)
        return done[-1] if done else self.write(row)

    def write(self, row: rows.Row) -> rows.Row:
        """Add one row."""
        row |= rows.provenance()
        rows.append(NAME, row)
        tqdm.write(f"{row['variant']}, {row['rate']:g}, {row['epochs']} epochs, seed {row['seed']}: {row['loss']}")
        return row

    def averages(self, rate: float, epochs: int, group: int) -> None:
        """Rows of the networks of seeds 4 `group` and the next three, together."""
        variant = VARIANTS[DEFAULT]
        key = {"options": variant.options(), "rate": rate, "epochs": epochs, "seed": group, **self.sets}
        if any(
            row["variant"] == AVERAGES[0] and all(row.get(k) == v for k, v in key.items()) for row in rows.read(NAME)
        ):
            return
        finals: dict[str, list[Tensor]] = {}
        seeds = range(TOGETHER * group, TOGETHER * (group + 1))
        found = [self(DEFAULT, rate, epochs, seed, finals)["loss"] for seed in seeds]
        each = {of: torch.stack([self.search.nats(own, of) for own in several]) for of, several in finals.items()}
        losses = {
            AVERAGES[0]: {
                of: self.search.nats(torch.stack(own).mean(0), of).mean().item() for of, own in finals.items()
            },
            AVERAGES[1]: {
                of: -(-own).logsumexp(0).sub(torch.tensor(TOGETHER).log()).mean().item() for of, own in each.items()
            },
            AVERAGES[2]: min(found, key=lambda loss: loss["validation"]),
        }
        for name, loss in losses.items():
            self.write({"variant": name, **key, "loss": loss})


def table(images: Path) -> str:
    """Each variant at its best rate, beside the default's test loss with the same seeds; then the rates."""
    found = newest(rows.read(NAME), lambda row: (*setting(row), row["variant"], row["rate"], row["seed"]))
    if not found:
        return not_measured(f"python -m benchmarks.quality.{NAME}")
    groups: dict[tuple[Any, ...], dict[float, list[rows.Row]]] = {}
    for row in sorted(found, key=lambda row: (*setting(row), row["seed"])):  # stable: variants as they were measured
        groups.setdefault((*setting(row), row["variant"]), {}).setdefault(row["rate"], []).append(row)
    best = {key: min(tried.values(), key=lambda same: same[0]["loss"]["validation"]) for key, tried in groups.items()}
    lines = []
    for (*of, name), same in best.items():
        validation, test = ([row["loss"][part] for row in same] for part in ("validation", "test"))
        default = best[(*of, DEFAULT)]
        seeds = {row["seed"] for row in (same if name in VARIANTS else default)}
        beside = mean(test) - mean(row["loss"]["test"] for row in default if row["seed"] in seeds)
        lines.append([
            *shown(of), name, f"{same[0]['rate']:g}", len(same), spread(validation), spread(test),
            "" if name == DEFAULT else f"{beside:+.3f}",
        ])  # fmt: skip
    rates = sorted({row["rate"] for row in found})
    tried = [
        [*shown(of), name, *(f"{by[rate][0]['loss']['validation']:.3f}" if rate in by else "" for rate in rates)]
        for (*of, name), by in groups.items()
        if len(by) > 1
    ]
    head = ["base", "few-shot examples", "rows x epochs", "variant"]
    return "\n\n".join([
        markdown([*head, "learning rate", "seeds", "validation", "test", "beside default"], lines),
        "Rates, validation loss of one seed:",
        markdown([*head, *(f"{rate:g}" for rate in rates)], tried), source(found, found[-1]["command"]),
    ])  # fmt: skip


def setting(row: rows.Row) -> tuple[Any, ...]:
    """What is the same for the variants that are compared."""
    return row["base"] != FLOAT32, row["base"], row["few_shot_examples"], row["train_rows"], row["epochs"]


def shown(found: Sequence[Any]) -> list[str]:
    """A setting in the table's first columns."""
    _, base, examples, count, epochs = found
    return [base, examples or "-", f"{count} x {epochs}"]


def main() -> None:
    """One row for each network, and for each average."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where GSM8K's files are")
    parser.add_argument("--base", default=FLOAT32, choices=[FLOAT32, *QUANTIZERS], metavar="BASE", help="(float32)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="NAME")
    parser.add_argument("--rows", type=positive, default=160, help="training rows (160)")
    parser.add_argument("--epochs", type=positive, nargs="+", default=[1, 3], help="of the rows (1 3)")
    parser.add_argument("--rates", type=float, nargs="+", help="those of the variants that are tried (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data order and weights (0 1 2)")
    parser.add_argument("--averages", type=int, default=0, help="groups of four networks of the default (0)")
    parser.add_argument("--few-shot", type=int, default=0, help="few-shot examples before each row (0)")
    arguments = parser.parse_args()
    # In float32 one pass is for every smaller amount.
    most = max(SHARED_ROWS, arguments.rows) if arguments.base == FLOAT32 else arguments.rows
    parts, folder = states_of(arguments.base, arguments.few_shot, arguments.data, most)
    parts["train"].rows = parts["train"].rows[: arguments.rows]
    sets = {"base": arguments.base, "few_shot_examples": arguments.few_shot}
    run = Runs(Search(folder, parts), sets | {f"{of}_rows": len(found.rows) for of, found in parts.items()})
    for epochs in arguments.epochs:
        for name in arguments.variants:
            tried = [rate for rate in VARIANTS[name].rates if rate in (arguments.rates or VARIANTS[name].rates)]
            best = min((run(name, rate, epochs, 0) for rate in tried), key=lambda row: row["loss"]["validation"])
            for seed in arguments.seeds:
                run(name, best["rate"], epochs, seed)
            if name == DEFAULT:
                for group in range(arguments.averages):
                    run.averages(best["rate"], epochs, group)


def states_of(base: str, few_shot: int, data: Path, most: int) -> tuple[dict[str, Rows], Path]:
    """States of the training rows, `most` of them, and of the validation and test rows."""
    task = load("gsm8k", smollm2_tokenizer(), data, few_shot)
    sets = {"train": task.train[:most], "validation": task.validation[:32], "test": task.test[:60]}
    model = cache(lambda: smollm2(False)[0] if base == FLOAT32 else dense(load_named(base)))
    prefix = f"gains-{base}-{few_shot}".replace(" ", "-").replace(",", "").lower()
    folders = {of: stored(f"{prefix}-{of}-{len(found)}", found, model) for of, found in sets.items()}
    return {of: Rows.of(folder) for of, folder in folders.items()}, folders["train"]


if __name__ == "__main__":
    main()
