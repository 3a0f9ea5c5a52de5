"""The adapters of one engine: loaded, checked, and chosen for every token; what vLLM's LoRA manager is for LoRA."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtuning_peft.loading import side_tuning_config
from qtuning_peft.side_tuning.follow import BlockCall, Decoder, SideRun, find_decoder
from qtuning_peft.side_tuning.network import SideNetwork
from qtuning_peft.side_tuning.peft.refusals import PEFT_PREFIX, refuse_another_size, warn_of_another_base
from qtuning_peft.side_tuning.peft.untrusted import CONTAINER, check_file, tokenizer_fingerprint


def decoder_of(config: Any) -> Decoder:
    """The decoder of the causal language model that `config` describes, without its weights."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(f"{type(config).__name__} describes no causal language model of transformers.") from error
    return find_decoder(model)


def load_network(folder: str | Path, decoder: Decoder, base: str) -> SideNetwork:
    """The side network in `folder`, checked as a whole before it is loaded; a `ValueError` when it cannot be served."""
    config = side_tuning_config(Path(folder))
    for name in ("side_attention", "modules_to_save"):
        if value := getattr(config, name):
            raise ValueError(
                f"{name} of {folder} is {value}, but vLLM serves side networks whose blocks do not attend, and the "
                "base's own head; run this one with transformers."
            )
    refuse_another_size(config, decoder)
    network = SideNetwork(config, decoder.shape).eval().requires_grad_(False)
    prefix = f"{PEFT_PREFIX}{decoder.norm_path}.{CONTAINER}."
    assert config.origin is not None
    file = config.origin.weights()
    check_file(file, {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()})
    network.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in load_file(file).items()})
    warn_of_another_base(config, SimpleNamespace(name_or_path=base), tokenizer_fingerprint(base))
    return network


class SideAdapters:
    """Side networks by their id, and whose are the tokens of the running batch.

    The methods that vLLM calls are those of its `WorkerLoRAManager`.

    Attributes:
        ids: Id of the adapter of each token, 0 for the base, (tokens in a batch at most,), int32; its place in memory
            does not change, so that a graph of the pass may read it.
    """

    def __init__(self, tapped: list[int], vllm_config: Any, device: torch.device) -> None:
        model = vllm_config.model_config
        self.tapped, self.base, self.device, self.dtype = tapped, model.model, device, model.dtype
        self.decoder = decoder_of(model.hf_config)
        self.capacity: int = vllm_config.lora_config.max_cpu_loras
        self.networks: OrderedDict[int, SideNetwork] = OrderedDict()
        self.ids = torch.zeros(vllm_config.scheduler_config.max_num_batched_tokens, dtype=torch.int32, device=device)
        self.warming_up = False

    def mix(self, adapter: int, normed: Tensor, states: Mapping[int, Tensor]) -> Tensor:
        """What `adapter` makes of rows of the base: the final norm's (rows, d), the embeddings (-1) and the blocks'."""
        run = SideRun(self.networks[adapter], str(adapter))
        run.begin(states[-1].unsqueeze(0), BlockCall())
        for index in run.layers:
            run.block(index, states[index].unsqueeze(0), BlockCall())
        return run.end(normed.unsqueeze(0)).squeeze(0).to(normed.dtype)

    def add_adapter(self, request: Any) -> bool:
        """Load an adapter, if it is not there; a `ValueError` leaves everything as it was."""
        if request.lora_int_id not in self.networks or request.load_inplace:
            network = load_network(request.lora_path, self.decoder, self.base)
            if missing := sorted({*network.layers} - {*self.tapped}):
                raise ValueError(
                    f"{request.lora_path} taps blocks {missing}, but this server reads {self.tapped}; name the adapter "
                    "when the server starts."
                )
            self.networks[request.lora_int_id] = self._in_dtype(network).to(self.device)
        return True

    def _in_dtype(self, network: SideNetwork) -> SideNetwork:
        # As autocast would, once instead of in every pass.
        dtype = network.compute_dtype or self.dtype
        for module in network.modules():
            if dtype.itemsize == 2 and isinstance(module, nn.Linear):
                module.to(dtype)
        return network

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """Those of the next batch, and which token has which."""
        if self.warming_up:
            return
        for request in requests:
            if request.lora_int_id not in self.networks:  # evicted since it was loaded
                self.add_adapter(request)
            self.networks.move_to_end(request.lora_int_id)
        while len(self.networks) > self.capacity:
            self.networks.popitem(last=False)
        ids = torch.tensor(mapping.index_mapping, dtype=torch.int32)
        self.ids.zero_()
        self.ids[: len(ids)] = ids.to(self.device)

    def remove_adapter(self, adapter: int) -> bool:
        """Forget an adapter."""
        return self.networks.pop(adapter, None) is not None

    def remove_all_adapters(self) -> None:
        """Forget all."""
        self.networks.clear()

    def list_adapters(self) -> set[int]:
        """Ids of those that are loaded."""
        return {*self.networks}

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Warming up, which vLLM does with adapters that are none: the base runs alone."""
        self.warming_up = True
        try:
            yield
        finally:
            self.warming_up = False

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """Nothing to add."""
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Of no meaning here."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """No: side networks are beside the language model."""
        return False

    def pin_adapter(self, adapter: int) -> bool:
        """Not needed: an adapter that is gone is loaded again when it is asked for."""
        return adapter in self.networks
