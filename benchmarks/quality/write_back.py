"""Write-back with fitted feedback: a side network also adds to the base's stream, without a backward through the base.

    python -m benchmarks.quality.write_back --data FOLDER --variants read-only last-12 --steps 10 40 --seeds 0 1 2

    h_l <- h_l + s_l B_l A_l rms(h_l)      behind the last blocks, B = 0 at the start, s_l the median rms of h_l
    dL/dh_l ~ dL/dh_N F_l,                 F_l = (C + 0.1 mean(diag C) I)^-1 sum d_N^T d_l,      C = sum d_N^T d_N

The base runs on what was written, forward only. d_N, the gradient at the last block's output, is exact and free; F_l is
fitted once, by ridge regression on the exact d_l of a few training rows, at the positions that the loss reads.
SmolLM2-135M-Instruct in float32 on GSM8K, 8 rows in a step. Tokens that all rows begin with (system prompt, few-shot
examples) are computed once and never written to. Rows go to `results/write_back.jsonl`; a run with a row is not
repeated, and `--worker K/N` takes every N-th of those that are left, for N processes at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections.abc import Collection
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import methods, rows
from benchmarks.common import smollm2_tokenizer
from benchmarks.quality.learner import Learner, factor, load_base
from benchmarks.quality.tasks import Batch, Task, load
from benchmarks.step import positive, seconds
from qtuning_peft.head import head_of, positions_at_once
from qtuning_peft.loss import CHUNK_ELEMENTS, summed_cross_entropy, supervised_positions
from qtuning_peft.reading import positions_that_predict
from qtuning_peft.side_tuning.follow import BaseStates, BlockCall, follower_of, replayed_cross_entropy
from qtuning_peft.states import PromptPrefix, common_prefix
from qtuning_peft.trainer import ROWS

NAME, BATCH, EPS, RIDGE = "write_back", 8, 1e-6, 0.1
# A step of Adam moves what a block writes by up to rank times the rate, successive blocks in one direction: divided by
# both, one rate suits every rank and number of blocks. Chosen by a first step at rank 64 behind 12 blocks.
WIDTH = 192
TIMED = 10  # steps that the base's bare forward pass takes turns with


@dataclass(frozen=True)
class Variant:
    """What is trained, and by which gradient.

    Attributes:
        method: LoRA, of `benchmarks.methods`, instead of all that follows.
        network: The package's side network; else nothing of it but its linear map of the final state.
        blocks: Behind how many of the last blocks it writes.
        rank: Of B A; a constant vector in its place for 0.
        bound: Largest rms of what is written to a token, as a share of its state's.
        where: At which tokens: `own`, all but those that rows begin with, or `read`, those that the loss reads.
        feedback: `fitted`, or `exact`: backward through the written blocks.
        fit_rows: Rows that the feedback is fitted on.
        refit_every: Steps between fits on the step's own rows; none for 0.
        keep: Share of the sums of earlier fits that a later one keeps.
        exact_rows: Rows of each step whose exact gradient corrects the guess: the mean guess of all rows, plus the
            mean of exact minus guessed of these.
        pace: Learning rate of what is written, as a multiple.
    """

    method: str | None = None
    network: bool = True
    blocks: int = 0
    rank: int = 64
    bound: float | None = None
    where: str = "own"
    feedback: str = "fitted"
    fit_rows: int = 24
    refit_every: int = 0
    keep: float = 0.5
    exact_rows: int = 0
    pace: float = 1.0


VARIANTS = {
    "lora": Variant("lora"),
    "read-only": Variant(),
    "linear": Variant(network=False),
}
for _n in range(1, 31):
    VARIANTS |= {
        f"last-{_n}": Variant(blocks=_n),
        f"constant-{_n}": Variant(blocks=_n, rank=0),
        f"exact-{_n}": Variant(blocks=_n, feedback="exact"),
    }
CHANGES: dict[str, dict[str, Any]] = {
    "rank-4": {"rank": 4}, "rank-16": {"rank": 16}, "linear": {"network": False}, "read": {"where": "read"},
    "slower": {"pace": 0.1}, "slow": {"pace": 0.3}, "fast": {"pace": 3.0}, "bound": {"bound": 0.1},
    "refit": {"refit_every": 20}, "refit-10": {"refit_every": 10, "keep": 0.75},
    "refit-5": {"refit_every": 5, "keep": 0.9}, "fit-8": {"fit_rows": 8}, "fit-64": {"fit_rows": 64},
    "one-exact": {"exact_rows": 1},
}  # fmt: skip


def variant_of(name: str) -> Variant:
    """The variant called `name`, as `last-12` or, with changes, `last-12+slow+refit`; a `ValueError` for any other."""
    first, *changes = name.split("+")
    if first not in VARIANTS or not {*changes} <= {*CHANGES}:
        raise ValueError(f"variant is {name}; give one of {', '.join(VARIANTS)}, with any of +{', +'.join(CHANGES)}.")
    return replace(VARIANTS[first], **{field: value for change in changes for field, value in CHANGES[change].items()})


class Writes(nn.Module):
    """What is added behind each written block; all of them at once, or one."""

    scale: Tensor  # (blocks, 1, 1)

    def __init__(self, variant: Variant, hidden_size: int) -> None:
        super().__init__()
        blocks, rank = variant.blocks, variant.rank
        self.bound, self.width = variant.bound, WIDTH / max(1, blocks * max(1, rank))
        self.register_buffer("scale", torch.ones(blocks, 1, 1))
        self.down = nn.Parameter(torch.randn(blocks, rank, hidden_size) / hidden_size**0.5) if rank else None
        self.up = nn.Parameter(torch.zeros(blocks, hidden_size, rank or 1))

    def forward(self, states: Tensor, at: int | slice = slice(None)) -> Tensor:
        """For `states` (blocks, tokens, d), or (batch, length, d) of the block `at`."""
        size = states.square().mean(-1, keepdim=True).add(EPS).sqrt()
        inner = states.new_ones(*states.shape[:-1], 1)
        if self.down is not None:
            inner = states / size @ self.down[at].mT  # (..., rank)
        written = self.width * self.scale[at] * (inner @ self.up[at].mT)
        if self.bound is not None:
            written = written * (self.bound * size * (written.square().mean(-1, keepdim=True) + EPS).rsqrt()).clamp(
                max=1
            )
        return written


class Pass:
    """Listens to a pass of the base (see `Listener`): writes, and records what the side network and `Writes` read."""

    def __init__(self, model: WriteBack, labels: Tensor, keep: bool) -> None:
        self.model, self.keep = model, keep
        read = positions_that_predict(labels)
        rows, columns = read.nonzero(as_tuple=True)  # before they are on a GPU, which each of them would wait for
        self.targets = labels[rows, columns + 1].to(model.device)  # (tokens,)
        self.read, self.rows, self.columns = (part.to(model.device) for part in (read, rows, columns))
        self.layers: Collection[int] = range(model.depth)
        self.states = BaseStates(model.tapped)
        self.unwritten: list[Tensor] = []  # of every written block (batch, length, d)
        self.calls: list[BlockCall] = []

    def begin(self, embeddings: Tensor, call: BlockCall) -> None:
        """Record the embeddings."""
        self.states.embeddings = self.at_read(embeddings)

    def block(self, index: int, hidden_states: Tensor, call: BlockCall) -> Tensor | None:
        """Write behind a block."""
        if self.keep:
            self.calls.append(call)
        written = None
        if index >= self.model.first:
            self.unwritten.append(hidden_states)
            hidden_states = written = hidden_states + self.model.written(hidden_states, index, self.read)
        if index in self.model.tapped:
            self.states.blocks.append((index, self.at_read(hidden_states)))
        return written

    def end(self, normed: Tensor) -> Tensor:
        """Nothing; the final norm is run again, at the positions that are read."""
        return normed

    def at_read(self, states: Tensor) -> Tensor:
        """Of (..., batch, length, d) those at the positions that the loss reads, (..., tokens, d)."""
        found = states[..., self.rows, self.columns, :]
        return found[None] if found.dim() == 2 else found


class WriteBack:
    """A base with a side network that writes back, in training; its steps are as `Learner`'s.

    Args:
        model: With a side network as its active adapter.
        task: Its rows.
        rate: Learning rate at its highest.
        steps: Steps in all, for the schedule.
        seed: Of new weights, and of the rows that correct the guess.
    """

    def __init__(self, variant: Variant, model: Any, task: Task, rate: float, steps: int, seed: int) -> None:
        self.variant, self.model, self.task, self.rate, self.steps = variant, model, task, rate, steps
        follower = follower_of(model)
        assert follower is not None
        self.follower, self.host = follower, follower.host
        network = self.host.active_network()
        assert network is not None
        if not variant.network:
            network.requires_grad_(False)
            network.mix.correction.requires_grad_(True)
        self.blocks: nn.ModuleList = follower.decoder.layers  # type: ignore[assignment]
        self.depth, self.first = len(self.blocks), len(self.blocks) - variant.blocks
        self.tapped = sorted({*network.layers, self.depth - 1})
        self.base: nn.Module = model.get_base_model()
        self.device, hidden_size = self.base.device, self.base.config.hidden_size
        torch.manual_seed(seed)
        self.writes = Writes(variant, hidden_size).to(self.device, self.base.dtype)
        self.draw = random.Random(seed)
        own = list(methods.trained(model))
        # No tensor of the base is trained, nor in the graph: `Follower.run` switches autograd off.
        assert {id(p) for p in own} <= {id(p) for p in network.parameters()}
        groups = [(own, 1.0), ([p for p in self.writes.parameters() if p.numel()], variant.pace)]
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "pace": pace} for group, pace in groups if group], lr=rate
        )
        self.trained = [parameter for group, _ in groups for parameter in group]
        self.prefix = PromptPrefix(prefix) if (prefix := common_prefix(task.train[:ROWS])) else None
        self.sums: tuple[Tensor, Tensor] | None = None
        self.feedback = torch.empty(0)  # (blocks, d, d)
        self.step_number, self.clock, self.fit_clock = 0, 0.0, 0.0
        self.losses: list[Tensor] = []

    def written(self, states: Tensor, index: int, read: Tensor) -> Tensor:
        """What is added to block `index`'s output `states` (batch, length, d)."""
        written = self.writes(states, index - self.first)
        return written * read[..., None] if self.variant.where == "read" else written

    @torch.no_grad()
    def follow(self, batch: Batch, keep: bool = False) -> Pass:
        """A pass over the rows behind the common prefix; `keep` what `exact` needs."""
        inputs, labels = self.inputs(batch)
        listener = Pass(self, labels, keep)
        listener.states.output = self.follower.run(listener, **inputs)
        return listener

    def inputs(self, batch: Batch) -> tuple[dict[str, Any], Tensor]:
        """The decoder's arguments for the rows behind the common prefix, and their labels, on the CPU."""
        inputs: dict[str, Any] = {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}
        if self.prefix is None:
            return {"use_cache": False, **inputs}, batch["labels"]
        length = len(self.prefix.input_ids)
        assert (batch["input_ids"][:, :length] == self.prefix.input_ids).all()
        return self.prefix.left_out(self.follower, inputs)[0], batch["labels"][:, length:]

    def loss(self, passed: Pass) -> tuple[Tensor, Tensor]:
        """Sum over the targets in nats, and the last block's output that it is a function of, (1, tokens, d)."""
        states = copy(passed.states)
        last, leaf = states.blocks[-1][0], states.blocks[-1][1].detach().requires_grad_()
        states.blocks = [*states.blocks[:-1], (last, leaf)]
        states.normed = self.host.base_layer(leaf)  # type: ignore[attr-defined]  # the layer in the norm's place
        listener = self.host.make_listener()
        assert listener is not None
        return replayed_cross_entropy(self.model, states, listener, passed.targets), leaf

    def exact(self, passed: Pass, last: Tensor) -> Tensor:
        """The gradient behind every written block, (blocks, batch, length, d), from that at read positions, `last`.

        Block by block, each of them run once more: the memory of one block.
        """
        gradient = last.new_zeros(*passed.read.shape, last.shape[-1])
        gradient[passed.rows, passed.columns] = last[0]
        found = [gradient]
        for index in range(self.depth - 1, self.first, -1):
            (name, states), *others = passed.calls[index].arguments.items()
            with torch.enable_grad():
                states = states.detach().requires_grad_()
                output = self.blocks[index](**{name: states}, **dict(others))
                output = output[0] if isinstance(output, tuple) else output
                output = output + self.written(output, index, passed.read)
            (gradient,) = torch.autograd.grad(output, states, gradient)
            found.append(gradient)
        return torch.stack(found[::-1])

    def at_last(self, batch: Batch, tokens: float | None = None) -> tuple[Pass, Tensor]:
        """A pass that `exact` can follow, and the gradient of its loss per token at the last block, (1, tokens, d)."""
        passed = self.follow(batch, keep=True)
        total, leaf = self.loss(passed)
        return passed, torch.autograd.grad(total / (tokens or len(passed.targets)), leaf)[0]

    def fit(self, batches: list[Batch]) -> None:
        """Fit the feedback on the exact gradients of `batches`, and on what is kept of earlier ones."""
        self.sums = None if self.sums is None else tuple(self.variant.keep * part for part in self.sums)  # type: ignore[assignment]
        for batch in batches:
            passed, last = self.at_last(batch)
            if self.sums is None:  # the median size of a state
                sizes = passed.at_read(torch.stack(passed.unwritten)).square().mean(-1).sqrt()
                self.writes.scale.copy_(sizes.median(-1).values[:, None, None])
            exact = passed.at_read(self.exact(passed, last))  # (blocks, tokens, d)
            new = last[0].mT @ last[0], last[0].mT @ exact
            self.sums = new if self.sums is None else (self.sums[0] + new[0], self.sums[1] + new[1])
        assert self.sums is not None
        square, cross = (part.double() for part in self.sums)
        identity = torch.eye(len(square), dtype=square.dtype, device=square.device)
        self.feedback = torch.linalg.solve(square + RIDGE * square.diag().mean() * identity, cross).to(self.writes.up)
        self.feedback[-1] = identity  # the last block's is exact

    def prepare(self) -> None:
        """The first fit, on training rows; a clock of its own runs."""
        if self.variant.blocks:
            self.model.eval()  # no centers of taps yet
            batches = self.task.evaluated(self.task.train[: self.variant.fit_rows], BATCH)
            self.fit_clock += seconds(lambda: self.fit(batches))
            self.model.train()

    def step(self, batch: Batch) -> None:
        """One step; the clock runs."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group["pace"] * factor(self.step_number, self.steps)
        self.clock += seconds(lambda: self._step(batch))
        self.step_number += 1

    def _step(self, batch: Batch) -> None:
        variant = self.variant
        if variant.refit_every and self.step_number and self.step_number % variant.refit_every == 0:
            self.fit([batch])
        passed = self.follow(batch, variant.feedback == "exact")
        total, leaf = self.loss(passed)
        loss = total / len(passed.targets)
        loss.backward()
        if variant.blocks:
            self._learn(passed, leaf.grad, exact=variant.feedback == "exact")  # type: ignore[arg-type]
        if variant.exact_rows:
            some = self.draw.sample(range(len(batch["labels"])), variant.exact_rows)
            tokens = len(passed.targets) * variant.exact_rows / len(batch["labels"])
            passed, last = self.at_last({name: tensor[some] for name, tensor in batch.items()}, tokens)
            self._learn(passed, last, exact=True)
            self._learn(passed, -last, exact=False)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def _learn(self, passed: Pass, last: Tensor, exact: bool) -> None:
        """Add the writes' gradient that follows from `last`, (1, tokens, d), at the last block."""
        if exact:
            gradient = self.exact(passed, last)
            read = passed.read[..., None] if self.variant.where == "read" else 1
            self.writes(torch.stack(passed.unwritten).flatten(1, 2)).backward((gradient * read).flatten(1, 2))
        else:
            self.writes(passed.at_read(torch.stack(passed.unwritten))).backward(last @ self.feedback)

    def cosines(self, batch: Batch) -> list[float]:
        """Of guessed and exact gradient of every written block's B, on `batch`."""
        passed, last = self.at_last(batch)
        found = []
        for exact in (False, True):
            self._learn(passed, last, exact)
            found.append(self.writes.up.grad.flatten(1))  # type: ignore[union-attr]
            self.writes.zero_grad()
        return [round(value, 3) for value in torch.cosine_similarity(found[0], found[1]).tolist()]

    @torch.no_grad()
    def measure(self, batches: list[Batch]) -> float:
        """Nats per supervised token."""
        total = count = 0.0
        for batch in batches:
            passed = self.follow(batch)
            total, count = total + self.loss(passed)[0].item(), count + len(passed.targets)
        return total / count

    @torch.no_grad()
    def base_forward(self, batch: Batch) -> None:
        """The base's bare pass over the same tokens, and its loss."""
        inputs, labels = self.inputs(batch)
        output = self.follower.run(None, **inputs)
        states, targets = supervised_positions(output.last_hidden_state, labels.to(self.device))
        chunk = positions_at_once(self.base, CHUNK_ELEMENTS)
        summed_cross_entropy(head_of(self.base, output), states, targets, chunk, frozen=True)


def planned(arguments: argparse.Namespace) -> list[rows.Row]:
    """What identifies each run, beside the machine; the first seed's first."""
    choices = itertools.product(
        arguments.seeds, arguments.few_shot, arguments.steps, arguments.variants, arguments.rates
    )
    return [
        {
            "model": "SmolLM2-135M-Instruct", "task": "gsm8k", "variant": name, "options": asdict(variant_of(name)),
            "learning_rate": rate, "seed": seed, "few_shot_examples": few_shot, "steps": steps,
            "rows": steps * BATCH, "batch": BATCH, "evaluated_rows": arguments.evaluated_rows,
        }
        for seed, few_shot, steps, name, rate in choices
    ]  # fmt: skip


def key(row: rows.Row) -> str:
    """Of the part of a row that `planned` makes."""
    names = ("variant", "options", "learning_rate", "seed", "few_shot_examples", "steps", "evaluated_rows")
    return json.dumps([row[name] for name in names], sort_keys=True)


def train(run: rows.Row, task: Task, base: Any) -> rows.Row:
    """What `run` gives; `base` is as it was afterwards, and LoRA is given one of its own."""
    variant, seed, steps = variant_of(run["variant"]), run["seed"], run["steps"]
    batches = [task.batch(part) for part in task.epochs(run["rows"], BATCH, 1, seed)]
    parts = {"validation": task.validation, "test": task.test}
    evaluated = {name: task.evaluated(part[: run["evaluated_rows"]], BATCH) for name, part in parts.items()}
    times: list[float] = []
    forwards: list[float] = []
    found: rows.Row = {}
    learner: Learner | WriteBack
    if variant.method is not None:
        learner = Learner(methods.find(variant.method), task, run["learning_rate"], steps, seed)
    else:
        torch.manual_seed(seed)
        arguments = {} if variant.network else {"layers_to_transform": [len(base.get_decoder().layers) - 1]}
        side = methods.apply(replace(methods.find("side"), arguments=arguments), base)
        learner = WriteBack(variant, side, task, run["learning_rate"], steps, seed)
    try:
        if isinstance(learner, WriteBack):
            found["loss_at_start"] = learner.measure(evaluated["validation"])
            learner.prepare()
            found["cosines_at_start"] = learner.cosines(evaluated["validation"][0]) if variant.blocks else None
        for batch in batches:
            before = learner.clock
            learner.step(batch)
            times.append(learner.clock - before)
            if isinstance(learner, WriteBack) and len(forwards) < TIMED:
                forwards.append(seconds(lambda: learner.base_forward(batch)))  # noqa: B023  (called here)
        found |= {name: learner.measure(part) for name, part in evaluated.items()}
        if isinstance(learner, WriteBack):
            found["cosines_at_end"] = learner.cosines(evaluated["validation"][0]) if variant.blocks else None
            found["curve"] = [round(value, 4) for value in torch.stack(learner.losses).tolist()]
            found["fit_seconds"] = learner.fit_clock
            warm = list(zip(times, forwards, strict=False))[2:] or [(times[0], forwards[0])]
            found["base_forward_seconds"] = median(forward for _, forward in warm)
            found["step_over_forward"] = median(step / forward for step, forward in warm)
    finally:
        if isinstance(learner, WriteBack):
            learner.model.unload()
    count = sum(parameter.numel() for parameter in getattr(learner, "trained", methods.trained(learner.model)))
    return {**found, "trained_parameters": count, "seconds": learner.clock, "step_seconds": median(times)}


def main() -> None:
    """Run what has no row yet; one row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where the task's files are")
    parser.add_argument("--variants", nargs="+", required=True, metavar="NAME", help="as last-12 or last-12+slow+refit")
    parser.add_argument("--steps", type=positive, nargs="+", default=[10, 40, 160], help="of 8 rows (10 40 160)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3], help="learning rates (1e-3)")
    parser.add_argument("--few-shot", type=int, nargs="+", default=[0], help="numbers of few-shot examples (0)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data order and new weights (0)")
    parser.add_argument("--evaluated-rows", type=positive, default=100, help="of validation and test set (100)")
    parser.add_argument("--worker", default="0/1", metavar="K/N", help="the K-th of N processes (0/1)")
    arguments = parser.parse_args()
    worker, workers = map(int, arguments.worker.split("/"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    done = {key(row) for row in rows.read(NAME) if "error" not in row}
    try:
        left = [run for run in planned(arguments) if key(run) not in done]
    except ValueError as error:
        parser.error(str(error))
    # Along diagonals, so that no process has the slowest variant of every group.
    mine = [run for index, run in enumerate(left) if (index + index // workers) % workers == worker]
    if not mine:
        return
    most = max(arguments.evaluated_rows, ROWS, *(run["rows"] for run in mine))
    tokenizer = smollm2_tokenizer()
    numbers = {run["few_shot_examples"] for run in mine}
    tasks = {number: load("gsm8k", tokenizer, arguments.data, number, most) for number in numbers}
    base, source = load_base(next(iter(tasks.values())), False, 0), rows.provenance()
    for run in tqdm(mine, f"worker {worker}", unit="run"):
        try:
            found = train(run, tasks[run["few_shot_examples"]], base)
        except RuntimeError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        finite = all(not isinstance(value, float) or math.isfinite(value) for value in found.values())
        row = {**run, **found, "diverged": not finite or found.get("validation", 0) > found.get("loss_at_start", 99)}
        rows.append(NAME, {name: _finite(value) for name, value in row.items()} | source)
        shown = {name: row.get(name) for name in ("variant", "learning_rate", "seed", "few_shot_examples", "steps")}
        tqdm.write(
            f"{shown}: {found.get('validation')} {found.get('test')} {found.get('seconds')} {found.get('error')}"
        )


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
