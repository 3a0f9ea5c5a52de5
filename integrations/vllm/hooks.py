"""The two places where vLLM asks nobody: who manages the adapters, and whose prefix cache a request uses."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.v1.core import kv_cache_utils
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from qtuning_peft.side_tuning.peft.peft_type import QST


def attach() -> None:
    """Attach both, for side-tuned models alone; calling it again changes nothing."""
    if not hasattr(LoRAModelRunnerMixin.load_lora_model, "__wrapped__"):
        _manage_side_networks()
        _share_prefixes()


def _manage_side_networks() -> None:
    original = LoRAModelRunnerMixin.load_lora_model

    @functools.wraps(original)
    def load_lora_model(self: Any, model: nn.Module, vllm_config: Any, device: torch.device) -> nn.Module:
        from .models import SideTuned

        if not isinstance(model, SideTuned):
            return original(self, model, vllm_config, device)
        self.lora_manager = model.make_adapters(vllm_config, device)
        return model

    LoRAModelRunnerMixin.load_lora_model = load_lora_model


def _share_prefixes() -> None:
    """A side network changes no key and no value of the base: what one adapter's request has cached serves them all."""
    original = kv_cache_utils._gen_lora_extra_hash_keys

    @functools.wraps(original)
    def extra_hash_keys(request: Any) -> list[Any]:
        adapter = request.lora_request
        return [] if adapter and is_side_network(adapter.lora_path) else original(request)

    kv_cache_utils._gen_lora_extra_hash_keys = extra_hash_keys


@functools.lru_cache(maxsize=1024)
def is_side_network(folder: str) -> bool:
    """Whether the adapter in `folder` is a side network; one on the Hub is not looked at, and gets its own cache."""
    try:
        found = json.loads(Path(folder, "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("peft_type") == QST
