"""A sweep: several side networks learn side by side from the same batches, for one pass of the base.

    L_k = - 1/|T_k| sum_(t in T_k) log p(y_t | mix_k(f_N, g_N,k))        k = 1 ... K, each with its own optimizer state

The base's states are the same for all of them (QST, ACL 2024, section 3), so a batch is run once, or read once from
stored states. Each network becomes what it would be if it was trained by itself.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..atomic import replacing
from ..reading import IGNORE_INDEX
from ..side_tuning.follow import follower_of, from_parts, from_pass, replayed_cross_entropy
from .candidate import Candidate, of_share

RESULTS = "sweep.json"


class SweepTrainer(Trainer):
    """`Trainer` for the networks of a sweep; `class Mine(SweepTrainer, SFTTrainer)` makes one of another trainer.

    Its model is side-tuned, with one adapter, in whose place the networks come. `eval_loss` is the best network's, in
    nats per supervised token; those of all are logged under their names. The best is what `save_model` writes.

    Args:
        *args, **kwargs: As the other class takes them.
        sweep: The networks.
        keep_all: Also save the others, each in a folder of its name.
    """

    def __init__(self, *args: Any, sweep: Sequence[Candidate], keep_all: bool = False, **kwargs: Any) -> None:
        self.sweep, self.keep_all = sweep, keep_all
        self.losses: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ValueError("A sweep is trained by one process on one GPU; launch it without accelerate or torchrun.")
        if self.args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end is True, but each network of a sweep has a best checkpoint of its own; leave "
                "it out: the network that is best at the end is saved."
            )
        model: Any = self.model
        follower = follower_of(model)
        assert follower is not None
        self._host = cast(Any, follower.host)  # a layer of PEFT
        for candidate in sweep:
            if candidate.name not in model.peft_config:
                model.add_adapter(candidate.name, candidate.config)
            with torch.random.fork_rng():
                torch.manual_seed(candidate.seed)
                self._host.update_layer(candidate.name, candidate.config)
        model.set_adapter(sweep[0].name)
        for name in [name for name in model.peft_config if name not in {candidate.name for candidate in sweep}]:
            model.delete_adapter(name)
        self._layers = sorted({layer for candidate in sweep for layer in self._network(candidate).layers})
        self._require_gradients()

    def _network(self, candidate: Candidate) -> Any:
        return self._host.qst_side_network[candidate.name]

    def _require_gradients(self) -> None:
        # PEFT trains the active adapter alone.
        for candidate in self.sweep:
            self._network(candidate).requires_grad_(True)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As `Trainer`'s, with a learning rate for each network."""
        if self.optimizer is None:  # type: ignore[has-type]  # set by Trainer
            trained: Any = self.model if model is None else model
            self._require_gradients()
            decayed = set(self.get_decay_parameter_names(trained))
            groups: list[dict[str, Any]] = []
            for candidate in self.sweep:
                own = {id(parameter) for parameter in self._network(candidate).parameters()}
                for decay in (True, False):
                    named = [(n, p) for n, p in trained.named_parameters() if id(p) in own and p.requires_grad]
                    chosen = [p for n, p in named if (n in decayed) == decay]
                    rate = {"lr": candidate.learning_rate, "weight_decay": self.args.weight_decay if decay else 0.0}
                    groups += [{"params": chosen, **rate}] if chosen else []
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One pass of the base, or none; one backward pass of every network."""
        model.train()
        losses = []
        for candidate, total, tokens, share in self._totals(inputs):
            steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
            items = tokens * steps if num_items_in_batch is None else num_items_in_batch * share
            loss = total / max(items, 1)
            self.accelerator.backward(loss)
            self._count(candidate, total, tokens)
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def _totals(self, inputs: dict[str, Any]) -> Any:
        """Of every network in turn: its loss in nats, over how many tokens, and their share of the batch's."""
        inputs = self._prepare_inputs(inputs)
        labels, lengths = inputs.pop("labels"), inputs.pop("row_tokens", None)
        stored, layers = inputs.pop("states", None), inputs.pop("state_layers", None)
        if stored is not None:
            states, targets = from_parts(self.model, stored, labels, layers.tolist())
        else:
            with self.compute_loss_context_manager():
                states, targets = from_pass(self.model, self._layers, labels, **inputs)
            lengths = (labels[:, 1:] != IGNORE_INDEX).sum(1)
        for candidate in self.sweep:
            shown = targets
            if candidate.data_share < 1 and torch.is_grad_enabled():
                shown = of_share(targets, lengths, candidate)
            tokens = int((shown != IGNORE_INDEX).sum())
            with self.compute_loss_context_manager():
                listener = self._host.listener_of(candidate.name)
                total = replayed_cross_entropy(self.model, states, listener, shown)
            yield candidate, total, tokens, tokens / max(1, len(targets))

    def _count(self, candidate: Candidate, total: Tensor, tokens: int) -> None:
        for sums, value in ((self._sums, total.detach().double()), (self._tokens, torch.tensor(float(tokens)))):
            sums[candidate.name] = sums.get(candidate.name, 0) + value

    def _means(self) -> dict[str, float]:
        """Every network's loss since the last call."""
        found = {name: float(total) / max(1.0, float(self._tokens[name])) for name, total in self._sums.items()}
        self._sums, self._tokens = {}, {}
        return found

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        # Each by itself: one that diverges must not slow the others.
        self.accelerator.unscale_gradients()
        norms = [
            nn.utils.clip_grad_norm_(self._network(candidate).parameters(), self.args.max_grad_norm)
            for candidate in self.sweep
        ]
        return torch.stack([torch.as_tensor(norm) for norm in norms]).max()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add every network's own loss."""
        if "loss" in logs:
            logs |= {f"loss_{name}": loss for name, loss in self._means().items()}
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """One pass of the base, or none, for all networks."""
        losses = []
        with torch.no_grad():
            for candidate, total, tokens, _ in self._totals(inputs):
                self._count(candidate, total, tokens)
                losses.append(total / max(1, tokens))
        return torch.stack(losses).mean(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As `Trainer`'s; the loss is the best network's, and each has its own beside it."""
        before, self._sums, self._tokens = (self._sums, self._tokens), {}, {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.losses = self._means()
        self._sums, self._tokens = before
        output.metrics.update({f"{metric_key_prefix}_loss_{name}": loss for name, loss in self.losses.items()})
        output.metrics[f"{metric_key_prefix}_loss"] = min(self.losses.values())
        return output

    @property
    def best(self) -> Candidate:
        """The network of the lowest loss in the last evaluation; a `ValueError` before there was one."""
        if not self.losses:
            raise ValueError("The sweep has not been evaluated, so none is the best; give it an eval_dataset.")
        return min(self.sweep, key=lambda candidate: self.losses[candidate.name])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the best network, `sweep.json` with what all of them reached, and, if asked, the others."""
        if _internal_call:  # a checkpoint, with all of them
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        model: Any = self.model
        if not self.losses and self.eval_dataset is not None:
            self.evaluate()
        best = self.best
        with TemporaryDirectory() as temporary:
            model.set_adapter(best.name)
            model.save_pretrained(temporary, selected_adapters=[each.name for each in self.sweep])
            saved = Path(temporary)
            for file in [*(saved / best.name).iterdir(), *(f for f in saved.iterdir() if f.is_file())]:
                _copy(file, folder / file.name)
            if self.keep_all:
                for file in saved.glob("*/*"):
                    _copy(file, folder / file.relative_to(saved))
        self._require_gradients()
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        rows = [
            {"name": each.name, **each.settings, "eval_loss": self.losses[each.name], "best": each is best}
            for each in self.sweep
        ]
        with replacing(folder / RESULTS) as unfinished:
            unfinished.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as unfinished:
        unfinished.write_bytes(source.read_bytes())
