"""One float32 checkpoint of Llama in every quantization: the bases that quantizers are compared and tested with.

A loader takes the checkpoint and a folder to keep a calibrated one in, and returns the model. Packages are imported
where they are used: no environment has them all (see scripts/test_quantizers.sh).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.gsm8k import prompt_of, read_rows
from examples.json_extraction.smollm2 import FILE, gguf_folder

GROUP = 64  # weights that share a scale: what divides SmolLM2's 576 channels, and every package has
Loader = Callable[[Path, Path], Any]


@dataclass(frozen=True)
class Quantizer:
    """How a base is loaded, the package that does it, and for a quantizer that needs a GPU what it says without one."""

    package: str
    load: Loader
    refusal: str | None = None

    def version(self) -> str:
        """Name and version of the package, as a row shows them."""
        return f"{self.package} {version(self.package)}"


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers with the scales of quantized ones, wherever a package keeps them."""
    storages: dict[int, int] = {}

    def see(value: Any) -> None:
        if isinstance(value, dict):  # HQQ's
            for part in value.values():
                see(part)
        elif hasattr(value, "__tensor_flatten__"):  # torchao's
            for name in value.__tensor_flatten__()[0]:
                see(getattr(value, name))
        elif isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        for name in ("quant_state", "absmax", "code", "offset", "state2", "SCB"):  # bitsandbytes'
            if (part := getattr(value, name, None)) is not None:
                see(part)

    for module in model.modules():
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False), getattr(module, "meta", None)):
            see(value)
    return sum(storages.values())


def full_precision(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The checkpoint as it is, or as `options` quantize it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def by_config(name: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Loader:
    """Quantized while loading, by the class `name` of transformers."""

    def load(folder: Path, _: Path) -> Any:
        return full_precision(folder, dtype, quantization_config=getattr(transformers, name)(**options))

    return load


def gguf(folder: Path) -> Any:
    """The file of SmolLM2's package, de-quantized while loading, with as many blocks as the checkpoint has."""
    model = AutoModelForCausalLM.from_pretrained(gguf_folder(), gguf_file=FILE).eval()
    model.config.num_hidden_layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    model.model.layers = model.model.layers[: model.config.num_hidden_layers]
    return model


def packed_gguf(folder: Path) -> Any:
    """Every linear layer of the blocks as transformers' packed GGUF layer, holding the file's own 4-bit blocks.

    transformers 5.23 packs other families than Llama while loading, where the Hub has a kernel for the machine; so it
    is put together here.
    """
    from gguf import GGUFReader
    from transformers.integrations.gguf.utils import GgufLinear

    model = gguf(folder)
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf_folder() / FILE).tensors}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for index, layer in enumerate(model.model.layers):
        for owner in (layer.self_attn, layer.mlp):
            for name, dense in list(owner.named_children()):
                if isinstance(dense, nn.Linear):
                    tensor = tensors[f"blk.{index}.{names[name]}.weight"]
                    packed = GgufLinear(dense.in_features, dense.out_features, int(tensor.tensor_type))
                    rows = torch.from_numpy(tensor.data.copy())
                    if name in heads:  # GGUF interleaves the two halves of a rotary head
                        rows = rows.view(heads[name], -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)
                    packed.weight.data = rows
                    setattr(owner, name, packed)
    return model


def bitnet(folder: Path, kept: Path) -> Any:
    """BitNet's packed ternary layers, rounded from weights that were not trained for it: a base that knows nothing."""
    from safetensors.torch import save_file
    from transformers.integrations.bitnet import pack_weights

    if not kept.exists():
        model = full_precision(folder)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, module in model.model.named_modules(prefix="model"):
            if isinstance(module, nn.Linear):
                scale = 1 / module.weight.detach().abs().mean()
                tensors[f"{name}.weight"] = pack_weights((module.weight.detach() * scale).round().clamp(-1, 1))
                tensors[f"{name}.weight_scale"] = scale[None]
        kept.mkdir()
        model.config.quantization_config = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
        model.config.save_pretrained(kept)
        save_file(tensors, kept / "model.safetensors", metadata={"format": "pt"})
    return full_precision(kept)


def torchao(name: str, module: str = "torchao.quantization", **options: Any) -> Loader:
    """One of torchao's configurations."""

    def load(folder: Path, _: Path) -> Any:
        config = getattr(__import__(module, fromlist=[name]), name)(**options)
        return full_precision(folder, quantization_config=transformers.TorchAoConfig(config))

    return load


def hqq(folder: Path, _: Path) -> Any:
    """By the package itself: transformers 5.23 has no `HqqConfig` that loads."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = full_precision(folder)
    config = BaseQuantizeConfig(nbits=4, group_size=GROUP)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    return model


def compressed_tensors(folder: Path, kept: Path, scheme: str, dtype: torch.dtype = torch.float32) -> Any:
    """A preset scheme, rounded to nearest: the largest weight of a group, or of a row, sets the scale."""
    if not kept.exists():
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationConfig,
            QuantizationStatus,
            apply_quantization_config,
            preset_name_to_scheme,
        )
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        model = full_precision(folder)
        chosen = preset_name_to_scheme(scheme, ["Linear"])
        if (chosen.weights.group_size or 0) > GROUP:
            chosen.weights.group_size = GROUP
        apply_quantization_config(
            model,
            QuantizationConfig(
                config_groups={"all": chosen}, ignore=["lm_head"], quantization_status=QuantizationStatus.INITIALIZED
            ),
        )
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                weight = module.weight.detach()
                groups = weight.unflatten(1, (-1, chosen.weights.group_size or weight.shape[1]))
                overall = None
                if hasattr(module, "weight_global_scale"):
                    overall = generate_gparam(weight.min(), weight.max())
                    module.weight_global_scale.data.copy_(overall)
                scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), chosen.weights, overall)
                module.weight_scale.data.copy_(scale)
                if hasattr(module, "input_global_scale"):  # NVFP4's, of activations: taken as they are
                    module.input_global_scale.data.fill_(1)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(kept)
        compressor.update_config(str(kept))
    return full_precision(kept, dtype)


def calibration_texts(folder: Path, count: int) -> list[str]:
    """What calibrated quantizers see: questions and answers of the training set, through the chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [prompt_of(tokenizer, row["question"]) + row["answer"] for row in read_rows("train", count)]


def auto_round(folder: Path, kept: Path, texts: int = 16, steps: int = 8) -> Any:
    """Rounding learnt block by block (SignRound), in `steps` steps each."""
    if not kept.exists():
        from auto_round import AutoRound

        AutoRound(
            full_precision(folder), AutoTokenizer.from_pretrained(folder), scheme="W4A16", group_size=GROUP,
            iters=steps, nsamples=texts // 2, seqlen=128, batch_size=4, dataset=calibration_texts(folder, texts),
            device_map="cpu",
        ).quantize_and_save(str(kept), format="auto_round")  # fmt: skip
    # It makes a folder of its own in the given one, and computes in float16.
    return full_precision(next(kept.rglob("config.json")).parent)


def gptq(folder: Path, kept: Path, texts: int = 16) -> Any:
    """Rounding with second-order error compensation."""
    if not kept.exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        dataset = calibration_texts(folder, texts)
        config = transformers.GPTQConfig(bits=4, group_size=GROUP, dataset=dataset, tokenizer=tokenizer)
        full_precision(folder, quantization_config=config, device_map="cpu").save_pretrained(kept)
    return full_precision(kept, device_map="cpu")


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
PROTOTYPE = "torchao.prototype.quantization.int4"
QUANTIZERS = {
    "bitsandbytes NF4": Quantizer("bitsandbytes", by_config("BitsAndBytesConfig", **NF4)),
    "bitsandbytes int8": Quantizer("bitsandbytes", by_config("BitsAndBytesConfig", load_in_8bit=True)),
    "GGUF Q4_1, packed": Quantizer("transformers", lambda folder, _: packed_gguf(folder)),
    "BitNet, 1.58 bits": Quantizer("transformers", bitnet),
    "GPTQ, 4 bits": Quantizer("gptqmodel", gptq),
    "AutoRound W4A16": Quantizer("auto-round", auto_round),
    "HQQ, 4 bits": Quantizer("hqq", hqq),
    "torchao int4 weights": Quantizer(
        "torchao", torchao("PrototypeInt4WeightOnlyConfig", PROTOTYPE, group_size=GROUP, set_inductor_config=False)
    ),
    "torchao int8 weights": Quantizer("torchao", torchao("Int8WeightOnlyConfig")),
    "torchao int8 weights and activations": Quantizer("torchao", torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao float8 weights": Quantizer("torchao", torchao("Float8WeightOnlyConfig")),
    "compressed-tensors W4A16": Quantizer("compressed-tensors", partial(compressed_tensors, scheme="W4A16")),
    "compressed-tensors FP8": Quantizer("compressed-tensors", partial(compressed_tensors, scheme="FP8_DYNAMIC")),
    "compressed-tensors NVFP4": Quantizer(
        "compressed-tensors", partial(compressed_tensors, scheme="NVFP4", dtype=torch.bfloat16)
    ),
    # Not on a CPU.
    "torchao int4 weights (stable configuration)": Quantizer(
        "torchao", torchao("Int4WeightOnlyConfig", group_size=GROUP), "conversion"
    ),
    "torchao float8 weights and activations": Quantizer(
        "torchao", torchao("Float8DynamicActivationFloat8WeightConfig"), "conversion"
    ),
    "HQQ by transformers' HqqConfig": Quantizer("hqq", by_config("HqqConfig"), "not available yet"),
    "NVFP4 (transformers)": Quantizer("transformers", by_config("NVFP4Config"), "NVFP4"),
    "fine-grained FP8": Quantizer("transformers", by_config("FineGrainedFP8Config"), "GPU"),
    "FBGEMM FP8": Quantizer("transformers", by_config("FbgemmFp8Config"), "GPU"),
    "HIGGS": Quantizer("transformers", by_config("HiggsConfig"), "GPU"),
    "FP-Quant": Quantizer("transformers", by_config("FPQuantConfig"), "GPU"),
}
