"""Cross-entropy of a causal language model over its supervised positions only.

    L = - 1/|T| sum_(t in T) log p(y_t | y_<t),      T = {t : label_t != -100}

The head is applied to the hidden states that predict a supervised token and to no others. With a large vocabulary and
prompts that are only context, logits are most of a step's memory and, on a CPU, a good part of its time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

IGNORE_INDEX = -100


def supervised_loss(
    model: nn.Module, input_ids: Tensor, labels: Tensor, num_items: Tensor | int | None = None, **inputs: Tensor
) -> Tensor:
    """Mean negative log-likelihood of the supervised tokens, in nats.

    Args:
        model: A transformers causal language model, or a PEFT model around one, whose logits are its output
            embeddings times its decoder's last hidden state and nothing else.
        input_ids: (batch, length), int64.
        labels: (batch, length), int64, -100 where a token is not supervised. They are shifted here.
        num_items: Divisor instead of the number of supervised tokens, for gradient accumulation.
        **inputs: Passed to the decoder: `attention_mask`, `position_ids`.

    Returns:
        The loss, a float32 scalar; zero for a batch without supervised tokens.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden_states = base.get_decoder()(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    logits = base.get_output_embeddings()(hidden_states[:, :-1][supervised])  # (supervised, vocabulary)
    total = F.cross_entropy(logits.float(), targets[supervised], reduction="sum")
    return total / (num_items if num_items is not None else torch.clamp(supervised.sum(), min=1))
