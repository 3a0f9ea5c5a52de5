"""What stands behind a decoder: from its hidden states to logits, a few positions at a time.

    logits = head(h)            h: (tokens, d), the decoder's last hidden state

A vocabulary is wide, and most of the memory of a naive loss or score is logits that are looked at once. Who has the
head as a function of hidden states never needs those of a whole batch.
"""

import inspect
from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .sharding import shape_of


def causal_model(model: nn.Module) -> Any:
    """The transformers model inside `model`, adapters included; a `ValueError` when it has no decoder and head."""
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"The adapter's method, {model.active_peft_config.peft_type.value}, puts tokens of its own before the "
                "input, which its head alone does not follow; use the base model, or another method."
            )
        model = model.get_base_model()
    if not is_causal(model):
        raise ValueError(
            f"{type(model).__name__} is not a causal language model with a decoder and a head; load the model with "
            "AutoModelForCausalLM."
        )
    return model


def is_causal(model: nn.Module) -> bool:
    """Whether `model` has a decoder and, behind it, a head that gives logits."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and getattr(model, "get_decoder", lambda: None)() not in (None, model)


def read_in_front(base: Any) -> set[str]:
    """Names of arguments that the model reads in front of its decoder, which does not know them: pictures, for one."""
    return _arguments(base.__class__) - _arguments(base.get_decoder().__class__)


@cache  # asked in every training step
def _arguments(kind: type[nn.Module]) -> set[str]:
    return set(inspect.signature(kind.forward).parameters)


def positions_at_once(base: Any, elements: int) -> int:
    """How many positions' logits are at most `elements` numbers; at least one."""
    vocabulary = shape_of(base.get_output_embeddings().weight)[0]
    return max(1, elements // vocabulary)


def head_of(base: Any, output: Any) -> Callable[[Tensor], Tensor]:
    """The model behind its decoder as a function: hidden states (tokens, d) to logits (tokens, vocabulary).

    Families scale or cap their logits behind the head, each in its own `forward`. So that `forward` is what runs, of a
    copy that shares every weight and has, in the place of its decoder, one that hands out the given hidden states;
    `output` is what the decoder returned for some input. The model itself is not touched: other threads may use it.
    The function raises a `ValueError` when the model's `forward` does not go through its decoder.
    """
    decoder = base.get_decoder()
    stand_in = _StandIn(output, decoder)
    twin = _with(base, next(path for path, module in base.named_modules() if module is decoder), stand_in)

    def head(hidden_states: Tensor) -> Tensor:
        stand_in.hidden_states = hidden_states.unsqueeze(0)  # (1, tokens, d)
        logits: Tensor = twin(input_ids=hidden_states.new_zeros((1, hidden_states.shape[0]), dtype=torch.long)).logits
        if stand_in.hidden_states is not None:
            raise ValueError(f"{type(base).__name__} does not call its decoder, so its head cannot run by itself.")
        return logits.squeeze(0).to(hidden_states.device)

    return head


class _StandIn(nn.Module):
    """Returns `output` with other hidden states, (1, tokens, d), once; has all else of the decoder it stands for."""

    def __init__(self, output: Any, decoder: nn.Module) -> None:
        super().__init__()
        self.output, self.decoder = output, (decoder,)  # not as a submodule
        self.hidden_states: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = copy(self.output)
        result["last_hidden_state"], self.hidden_states = self.hidden_states, None
        return result

    def __getattr__(self, name: str) -> Any:
        # Such as the embeddings, which vision-language models ask their decoder for.
        return getattr(self.decoder[0], name)


def _with(module: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    """A copy of `module` that shares all but the submodule at `path`."""
    twin, (name, _, rest) = copy(module), path.partition(".")
    # Wrapped by others, it would be the original's.
    vars(twin).pop("forward", None)
    twin._modules = {**module._modules, name: _with(module._modules[name], rest, replacement) if rest else replacement}  # type: ignore[arg-type]
    return twin
