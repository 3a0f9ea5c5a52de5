"""`transformers.Trainer` with the loss of `loss`: nothing else about it is different.

TRL and Axolotl bring a loss of their own that holds no logits; this is for who uses `Trainer` itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer


class SideTuningTrainer(Trainer):
    """A `Trainer` for side-tuned causal language models that never holds the logits of a batch.

    Arguments are those of `transformers.Trainer`, and so are its results up to rounding. While training, the model's
    output has a loss and no logits.
    """

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `Trainer` does, with the loss in pieces while training."""
        if model.training:
            inputs = {**inputs, "loss_in_pieces": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As `Trainer` does, with the loss in pieces where nothing but the loss is asked for."""
        if prediction_loss_only:
            inputs = {**inputs, "loss_in_pieces": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
