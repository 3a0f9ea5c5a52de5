"""Adapters from checkpoints of the authors' own code for Quantized Side Tuning (QST, ACL 2024, arXiv 2401.07159).

    python scripts/convert_checkpoint.py CHECKPOINT BASE --output ADAPTER

Their trainer saves six files of tensors and nothing else. With z_i and s their gates, D_i their down-samplers and f the
output of the base's final norm, what the tensors mean is, for every block i of the base,

    D_i(h) = LayerNorm(B_i silu(A_i h))            g_0 = D_0(embeddings)
    g_i    = block_i((1 - sigmoid(z_i)) * D_i(h_i) + sigmoid(z_i) * g_(i-1))
    h      = sigmoid(s) * f + (1 - sigmoid(s)) * up(norm(g_N))         (Llama; for OPT, f and up(..) change places)

which is `mixing="reference"` here. Every tensor is copied, joined with others or repeated, never computed with, so that
the adapter is exact; what the side network cannot represent is refused.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from qtuning_peft import SideTuningConfig
from qtuning_peft.atomic import replacing
from qtuning_peft.cli.data import console, one_sentence, printable
from qtuning_peft.side_tuning.peft.files import check_adapter
from qtuning_peft.side_tuning.peft.layer import SideTuningLayer

LAYERS = "qst_layers_parameters.pt"
GATES = "qst_z_parameters.pt"
DOWNSAMPLE = "qst_downsample_parameters.pt"
NORM = "qst_norm_parameters.pt"
UPSAMPLE = "qst_upsample_parameters.pt"
# One tensor instead of a dictionary. The names differ, and so does the tensor's meaning: see the last equation.
OUTPUT_GATE = {"llama": "lm_head_z_path.pt", "opt": "lm_head_z_parameters.pt"}

# By our name in a side block: theirs, in the order in which their rows are joined.
BLOCK = {
    "llama": {
        "attention_norm": ("input_layernorm",),
        "attention.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.o_proj": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp.up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    },
    "opt": {
        "attention_norm": ("self_attn_layer_norm",),
        "attention.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.o_proj": ("self_attn.out_proj",),
        "mlp_norm": ("final_layer_norm",),
        "mlp.up_proj": ("fc1",),
        "mlp.down_proj": ("fc2",),
    },
}
TAP = {"down.0": "adapter_A", "down.2": "adapter_B", "norm": "post_layer_norm"}

Key = tuple[str, str]  # file, and name in it


def convert_checkpoint(
    folder: str | os.PathLike[str], base: str | os.PathLike[str] | PretrainedConfig, output: str | os.PathLike[str]
) -> SideTuningConfig:
    """Write the adapter that computes what the authors' checkpoint does.

    Args:
        folder: Where their `.pt` files are.
        base: The model it was trained on, a Llama or an OPT: a folder, a name on the Hub, or its configuration. Its
            weights are not read.
        output: Folder for `adapter_config.json` and `adapter_model.safetensors`; it appears when both are complete.

    Returns:
        The adapter's configuration.

    Raises:
        ValueError: in one sentence, when a file is missing, damaged or has code in it, when a tensor is missing, left
            over or of another shape, or when the side network cannot represent it.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output is {output}, which exists and is not an empty folder; name another.")
    config = base if isinstance(base, PretrainedConfig) else AutoConfig.from_pretrained(base)
    if config.model_type not in BLOCK:
        raise ValueError(
            f"The base is of type {config.model_type}, and the authors' code trains {' and '.join(BLOCK)} only; name "
            "the base that the checkpoint was trained on."
        )
    given = _read(Path(folder), config.model_type)
    adapter_config = _adapter_config(given, config)
    # No weight of the base is needed, only its shapes.
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), adapter_config)
    layer = next(module for module in model.modules() if isinstance(module, SideTuningLayer))
    network = layer.qst_side_network["default"]
    tensors = _renamed(given, network.state_dict(), config)
    check_adapter(network.state_dict(), tensors)
    network.load_state_dict(tensors, assign=True)
    with replacing(output) as unfinished:
        model.save_pretrained(str(unfinished))
    return model.peft_config["default"]


def _read(folder: Path, family: str) -> dict[Key, Tensor]:
    """Every tensor of the checkpoint, on the CPU. A pickle is a program: only the part for tensors is ever run."""
    names = [LAYERS, GATES, DOWNSAMPLE, NORM, UPSAMPLE, OUTPUT_GATE[family]]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}, of the {len(names)} files of a QST checkpoint on a base of type "
            f"{family}; name the folder that holds them all."
        )
    given: dict[Key, Tensor] = {}
    for name in names:
        try:
            content = torch.load(folder / name, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # damaged pickles raise nearly anything
            raise ValueError(
                f"{folder / name} does not load as tensors alone: it is damaged, or a pickle with code in it, which is "
                "never run; get the checkpoint again."
            ) from error
        for key, tensor in (content if isinstance(content, dict) else {"": content}).items():
            plain = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided
            if not plain or tensor.device.type != "cpu":
                raise ValueError(f"{_some([(name, str(key))])} is no tensor of weights; get the checkpoint again.")
            given[name, str(key)] = tensor.detach()
    return given


def _adapter_config(given: dict[Key, Tensor], config: PretrainedConfig) -> SideTuningConfig:
    first, second = (given.get((DOWNSAMPLE, f"0.adapter_{letter}.weight")) for letter in "AB")
    if first is None or second is None or first.dim() != 2 or second.dim() != 2:
        raise ValueError(
            f"{DOWNSAMPLE} has no matrices 0.adapter_A.weight and 0.adapter_B.weight, which give the widths; it is "
            "damaged, or not of the authors' current code."
        )
    width, hidden_size = second.shape[0], int(config.hidden_size)
    if width == 0 or hidden_size % width:
        raise ValueError(
            f"The side network of the checkpoint is {width} wide, which does not divide the base's {hidden_size}; name "
            "the base that it was trained on."
        )
    if config.model_type == "llama":
        _check_positions(config)
    return SideTuningConfig.reference(
        reduction_factor=hidden_size // width,
        downsample_rank=first.shape[0],
        downsample_norm=any(key.endswith(".post_layer_norm.weight") for _, key in given),
        num_side_heads=int(config.num_attention_heads),
        task_type="CAUSAL_LM",
    )


def _check_positions(config: PretrainedConfig) -> None:
    """Their side network has rotary positions of its own, always of base 10000; ours takes them from the base."""
    rope, head_dim = config.rope_parameters, config.hidden_size // config.num_attention_heads
    theta, kind = rope.get("rope_theta", 10000.0), rope.get("rope_type", "default")
    if theta != 10000.0 or kind not in ("default", "linear") or config.head_dim not in (None, head_dim):
        raise ValueError(
            f"The base has rope_theta {theta}, rope_type {kind} and head_dim {config.head_dim}, but the authors' side "
            f"network has rope_theta 10000 whatever the base has, unscaled or linear, and head_dim {head_dim} divided "
            "by r; only checkpoints on bases with the same convert."
        )


def _renamed(given: dict[Key, Tensor], expected: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """Our tensors, by name.

    Raises:
        ValueError: when one of theirs is missing, left over, or of another shape than the base asks for.
    """
    sources = {name: _sources(name, config.model_type) for name in expected}
    needed = [key for keys in sources.values() for key in keys]
    missing = sorted(set(needed) - given.keys())
    if missing:
        raise ValueError(f"The checkpoint lacks {_some(missing)}; it is damaged, or was trained on another base.")
    extra = sorted(given.keys() - set(needed))
    if extra:
        raise ValueError(f"The checkpoint has {_some(extra)} left over; it is not of the authors' current code.")

    heads = config.num_attention_heads
    groups = heads // getattr(config, "num_key_value_heads", heads)
    tensors = {}
    for name, keys in sources.items():
        parts = []
        for file, key in keys:
            # Our heads share no keys and values: each gets its own copy.
            repeats = groups if "k_proj" in key or "v_proj" in key else 1
            part, wanted = given[file, key], expected[name].shape
            shape = (wanted[0] // len(keys) // repeats, *wanted[1:])
            if part.shape != shape:
                raise ValueError(
                    f"{_some([(file, key)])} has shape {tuple(part.shape)}, and this base needs {shape}; name the base "
                    "that the checkpoint was trained on."
                )
            if repeats > 1:
                part = part.unflatten(0, (heads // repeats, -1)).repeat_interleave(repeats, 0).flatten(0, 1)
            parts.append(part.float())
        tensors[name] = torch.cat(parts)
    return tensors


def _sources(name: str, family: str) -> tuple[Key, ...]:
    """Which of their tensors, joined, make our tensor `name`."""
    module, _, kind = name.rpartition(".")
    part, _, rest = module.partition(".")
    index, _, inner = rest.partition(".")
    if part == "blocks":
        return tuple((LAYERS, f"{index}.{theirs}.{kind}") for theirs in BLOCK[family][inner])
    if part == "gates":
        return ((GATES, index),)
    if part == "taps":
        return ((DOWNSAMPLE, f"{index}.{TAP[inner]}.{kind}"),)
    if part == "embedding_tap":
        # They have none of its own: the first block's serves twice.
        return ((DOWNSAMPLE, f"0.{TAP[rest]}.{kind}"),)
    if part == "norm":
        return ((NORM, kind),)
    return ((UPSAMPLE, kind),) if rest else ((OUTPUT_GATE[family], ""),)


def _some(keys: list[Key]) -> str:
    named = [f"{key} in {file}" if key else file for file, key in keys[:3]]
    return ", ".join(named) + (f" and {len(keys) - 3} more tensors" if len(keys) > 3 else "")


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with the .pt files that the authors' code saved.")],
    base: Annotated[str, typer.Argument(help="Model it was trained on, Llama or OPT: a folder, or a name on the Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter; new, or empty.")],
) -> None:
    """Turn a checkpoint of the QST authors' code into an adapter with the same logits.

    The files are read as tensors alone, no code in them is run, and the base's weights are not loaded.
    """
    with one_sentence():
        config = convert_checkpoint(folder, base, output)
        network = f"{config.base_num_layers} side blocks with {config.num_side_heads} heads"
        console.print(f"reduction_factor {config.reduction_factor}, {network}: {printable(output)}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
