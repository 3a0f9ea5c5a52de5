"""`transformers.Trainer` for side-tuned models: the loss of `loss`, and what all rows begin with computed once.

TRL and Axolotl bring a loss of their own that holds no logits; the trainer is for who uses `Trainer` itself, the
callback for any of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .side_tuning.base_states import side_tuning_layer
from .side_tuning.shared_prefix import common_prefix

ROWS = 256


class PrefixCachingCallback(TrainerCallback):
    """While training, computes once what all rows begin with: a system prompt, or demonstrations.

    The prefix is found in the first 256 rows; a batch that begins otherwise, is packed, or padded at the left is
    computed whole. Results are the same up to rounding. It comes to nothing where side blocks attend
    (`side_attention`), or where no side network is.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the prefix in the training data."""
        layer = side_tuning_layer(kwargs["model"])
        data: Any = getattr(kwargs.get("train_dataloader"), "dataset", None)
        # A stream's rows could not be given back.
        if layer is not None and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            layer.share_prefix(common_prefix(data[index] for index in range(min(ROWS, len(data)))))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of its keys and values."""
        layer = side_tuning_layer(kwargs["model"])
        if layer is not None:
            layer.share_prefix([])


class HiddenStateCacheCallback(TrainerCallback):
    """Keeps the base's hidden states in main memory, so that epochs after the first cost the side network alone.

    What is kept has 16 bits, also of a base in float32: there, later epochs see states that are rounded. Packed rows,
    rows padded at the left, and side blocks that attend (`side_attention`) are computed in every epoch.

    Args:
        gibibytes: Of memory at most. A row of n tokens takes n (N + 2) d numbers of 16 bits, N taps of width d: 0.1 MB
            a token for the default beside Llama-3-8B.

    Raises:
        ValueError: when `gibibytes` is not above zero.
    """

    def __init__(self, gibibytes: float) -> None:
        if not gibibytes > 0:
            raise ValueError(f"gibibytes is {gibibytes}; give a number above 0.")
        self.gibibytes = gibibytes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to keep, if there is more than one epoch."""
        layer = side_tuning_layer(kwargs["model"])
        if layer is not None and state.num_train_epochs > 1:
            layer.keep_states(round(self.gibibytes * 2**30))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of all."""
        layer = side_tuning_layer(kwargs["model"])
        if layer is not None:
            layer.keep_states(0)


class SideTuningTrainer(Trainer):
    """A `Trainer` for side-tuned causal language models that never holds the logits of a batch.

    Arguments are those of `transformers.Trainer`, and so are its results up to rounding. While training, the model's
    output has a loss and no logits. What all rows begin with is computed once, see `PrefixCachingCallback`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(PrefixCachingCallback())

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `Trainer` does, with the loss in pieces while training."""
        if model.training:
            inputs = {**inputs, "chunked_loss": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As `Trainer` does, with the loss in pieces where nothing but the loss is asked for."""
        if prediction_loss_only:
            inputs = {**inputs, "chunked_loss": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
