"""`VLLMEngine`: the base's scores and states by vLLM, for `score` and `compute_states`.

    compute_states(rows, VLLMEngine("base"), tokenizer, SideTuningConfig(), "states")

vLLM runs quantizations and sizes that transformers does not, on several GPUs; on a CPU it is no faster.
"""

import os
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm
import xxhash
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qtuning_peft.eu_plane.batching import PLANE
from qtuning_peft.eu_plane.engine import Engine
from qtuning_peft.eu_plane.fingerprint import CHUNK_BYTES, stable
from qtuning_peft.eu_plane.tokenized import Sample
from qtuning_peft.loss import IGNORE_INDEX
from qtuning_peft.side_tuning.network import BaseShape

from . import STATES
from .adapters import decoder_of
from .models import refuse_unknown
from .states import TASK


class VLLMEngine(Engine):
    """A base in vLLM, which starts when something is to be run.

    Args:
        name: A folder, or a name on the Hub.
        **options: Of `vllm.LLM`, such as `dtype`, `quantization`, `tensor_parallel_size`.
    """

    def __init__(self, name: str, **options: Any) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("Several processes were launched, but vLLM starts its own: set tensor_parallel_size.")
        self.name, self.options = name, options
        self.config = AutoConfig.from_pretrained(name)
        self.architecture = (self.config.architectures or ["a model without a name"])[0]
        refuse_unknown(self.architecture)
        self.vocabulary: int = self.config.get_text_config().vocab_size
        self._llm: Any = None
        self._layers: list[int] = []

    def run(
        self, samples: Sequence[Sample], tokens_per_batch: int, names: Sequence[str] = PLANE,
        on_progress: Callable[[int], object] | None = None, take: Callable[[int, Tensor], object] | None = None,
        layers: Collection[int] = (),
    ) -> dict[str, list[np.ndarray]]:  # fmt: skip
        """See [`Engine`]."""
        llm, names = self._start(tokens_per_batch, sorted(layers)), [*names]
        prompts, asked = [], []
        for sample in samples:
            # A token is predicted at the position before it.
            read = [index - 1 for index, label in enumerate(sample.labels) if label != IGNORE_INDEX]
            targets = [sample.labels[index + 1] for index in read]
            wanted = {"positions": read, "targets": targets, "scores": names, "states": take is not None}
            asked.append(vllm.PoolingParams(task=TASK, extra_kwargs=wanted))
            prompts.append({"prompt_token_ids": sample.input_ids})
        answers = llm.encode(prompts, asked, pooling_task=TASK, use_tqdm=False) if prompts else []
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for index, answer in enumerate(answers):
            rows: Tensor = answer.outputs.data  # (tokens, scores and states)
            width = len(names) * torch.float32.itemsize // rows.dtype.itemsize
            scores = rows[:, :width].contiguous().view(torch.float32)  # (tokens, scores)
            for name, values in zip(names, scores.unbind(-1), strict=True):
                found[name].append(values.double().numpy())
            if take is not None:
                states = rows[:, width:].unflatten(-1, (len(self._layers) + 2, -1)).transpose(0, 1)
                kept = [0, *(1 + self._layers.index(layer) for layer in sorted(layers)), len(states) - 1]
                take(index, states[kept])  # (N + 2, tokens, d)
        if on_progress is not None:
            on_progress(len(samples))
        return found

    def _start(self, tokens_per_batch: int, layers: list[int]) -> Any:
        """A vLLM whose model hands out `layers`: the one that runs, if it does."""
        if self._llm is None or not {*layers} <= {*self._layers}:
            self.close()
            overrides = {"architectures": [f"{STATES}{self.architecture}"], "qst_layers": layers}
            given = {"max_num_batched_tokens": tokens_per_batch, "enable_prefix_caching": False, **self.options}
            self._layers = layers
            self._llm = vllm.LLM(self.name, runner="pooling", hf_overrides=overrides, **given)
        return self._llm

    def close(self) -> None:
        """Stop vLLM, which gives its memory back."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def shape(self) -> BaseShape:
        """See [`Engine`]."""
        return decoder_of(self.config).shape

    @cached_property
    def folder(self) -> Path:
        """Where the checkpoint is."""
        return Path(self.name if os.path.isdir(self.name) else snapshot_download(self.name))

    def head(self) -> dict[str, Tensor]:
        """See [`Engine`]; read from the checkpoint."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        paths = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
        head = model.get_output_embeddings()
        # A head that is tied is stored as the embeddings.
        owners = [paths[id(head)], paths[id(model.get_input_embeddings())]]
        found = {}
        for name in head.state_dict():
            stored = [tensor for owner in owners if (tensor := self._tensor(f"{owner}.{name}")) is not None]
            if not stored:
                raise ValueError(f"{self.folder} holds no {owners[0]}.{name} in safetensors; use transformers.")
            found[name] = stored[0].to(self._dtype())
        return found

    def _tensor(self, name: str) -> Tensor | None:
        for file in self.folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (no mapping)
                    return tensors.get_tensor(name)
        return None

    def _dtype(self) -> torch.dtype:
        given = self.options.get("dtype", "auto")
        if isinstance(given, str):
            return (self.config.dtype or torch.float32) if given == "auto" else getattr(torch, given)
        return given

    def add_to(self, digest: xxhash.xxh3_128) -> None:
        """See [`Engine`]: the checkpoint's files, vLLM's version and the options."""
        settings = {name: value for name, value in self.config.to_dict().items() if name != "_name_or_path"}
        digest.update(stable([vllm.__version__, settings, self.options]))
        for file in sorted(self.folder.glob("*.safetensors")):
            with file.open("rb") as content:
                while chunk := content.read(CHUNK_BYTES):
                    digest.update(chunk)
