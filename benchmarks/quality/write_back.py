"""Write-back with fitted feedback: a side network also adds to the base's stream, without a backward through the base.

    h_l <- h_l + s_l B_l A_l rms(h_l)      behind the last blocks, B = 0 at the start, s_l the median rms of h_l
    dL/dh_l ~ dL/dh_N F_l,                 F_l = (C + 0.1 mean(diag C) I)^-1 sum d_N^T d_l,      C = sum d_N^T d_N

The base runs on what was written, forward only. d_N, the gradient at the last block's output, is exact and free; F_l is
fitted by ridge regression on the exact d_l of a few training rows, at the positions that the loss reads. Tokens that
all rows begin with (system prompt, few-shot examples) are computed once and never written to.
`benchmarks.quality.write_back_runs` measures variants of it.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import methods
from benchmarks.quality.learner import factor
from benchmarks.quality.tasks import Batch, Task
from benchmarks.step import seconds
from qtuning_peft.reading import positions_that_predict
from qtuning_peft.side_tuning.follow import BaseStates, BlockCall, follower_of, replayed_cross_entropy
from qtuning_peft.states import PromptPrefix, common_prefix
from qtuning_peft.trainer import ROWS

EPS, RIDGE = 1e-6, 0.1
FIT_ROWS, AT_ONCE = 24, 8  # rows of the first fit
KEEP = 0.5  # share of the sums of earlier fits that a later one keeps
# A step of Adam moves what a block writes by up to rank times the rate, successive blocks in one direction: divided by
# both, one rate suits every rank and number of blocks. Chosen by a first step at rank 64 behind 12 blocks.
WIDTH = 192


@dataclass(frozen=True)
class Variant:
    """What is trained, and by which gradient.

    Attributes:
        method: LoRA, of `benchmarks.methods`, instead of all that follows.
        network: The package's side network; else nothing of it but its linear map of the final state.
        blocks: Behind how many of the last blocks it writes.
        rank: Of B A; a constant vector in its place for 0.
        feedback: `fitted`, or `exact`: backward through the written blocks.
        refit_every: Steps between fits on the step's own rows; none for 0.
        exact_rows: Rows of each step whose exact gradient corrects the guess: the mean guess of all rows, plus the
            mean of exact minus guessed of these.
        pace: Learning rate of what is written, as a multiple.
    """

    method: str | None = None
    network: bool = True
    blocks: int = 0
    rank: int = 64
    feedback: str = "fitted"
    refit_every: int = 0
    exact_rows: int = 0
    pace: float = 1.0


class Writes(nn.Module):
    """What is added behind each written block; all of them at once, or one."""

    scale: Tensor  # (blocks, 1, 1)

    def __init__(self, variant: Variant, hidden_size: int) -> None:
        super().__init__()
        blocks, rank = variant.blocks, variant.rank
        self.width = WIDTH / max(1, blocks * max(1, rank))
        self.register_buffer("scale", torch.ones(blocks, 1, 1))
        self.down = nn.Parameter(torch.randn(blocks, rank, hidden_size) / hidden_size**0.5) if rank else None
        self.up = nn.Parameter(torch.zeros(blocks, hidden_size, rank or 1))

    def forward(self, states: Tensor, at: int | slice = slice(None)) -> Tensor:
        """For `states` (blocks, tokens, d), or (batch, length, d) of the block `at`."""
        inner = states.new_ones(*states.shape[:-1], 1)
        if self.down is not None:
            normed = states * states.square().mean(-1, keepdim=True).add(EPS).rsqrt()
            inner = normed @ self.down[at].mT  # (..., rank)
        return self.width * self.scale[at] * (inner @ self.up[at].mT)


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
            hidden_states = written = hidden_states + self.model.writes(hidden_states, index - self.model.first)
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
                output = output + self.writes(output, index - self.first)
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
        self.sums = None if self.sums is None else tuple(KEEP * part for part in self.sums)  # type: ignore[assignment]
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
            batches = self.task.evaluated(self.task.train[:FIT_ROWS], AT_ONCE)
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
            gradient = self.exact(passed, last).flatten(1, 2)
            self.writes(torch.stack(passed.unwritten).flatten(1, 2)).backward(gradient)
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
