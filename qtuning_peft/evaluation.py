"""Eval mode for a while, also where several threads ask for it on one model."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from .head import causal_model


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; when the last thread leaves, every module gets its own mode back."""
    base = causal_model(model)
    with _scoring_lock:
        count, training = _scoring.get(base) or (0, [module for module in model.modules() if module.training])
        _scoring[base] = count + 1, training
        model.eval()
    try:
        yield
    finally:
        with _scoring_lock:
            count, training = _scoring.pop(base)
            if count > 1:
                _scoring[base] = count - 1, training
            else:
                for module in training:
                    module.training = True


# By model, how many threads score it, and which modules were in training mode before the first.
_scoring: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_scoring_lock = threading.Lock()
