"""What the plugin adds to Axolotl's configuration: two blocks, and what must not stand beside them."""

import importlib.util
from typing import Any

from pydantic import BaseModel, Field, model_validator

from ..blocks import EUPruningBlock, QSTTrainingBlock, read_block
from ..common import refuse_lora

NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


class QTuningArgs(BaseModel):
    """Axolotl's configuration has these keys besides its own."""

    qst: QSTTrainingBlock | None = Field(
        default=None, description="Quantized side tuning, with `adapter: qst`: `SideTuningConfig`, and what to keep."
    )
    eu_pruning: EUPruningBlock | None = Field(
        default=None, description="Pruning of the training data on the Error-Uncertainty plane, with any adapter."
    )

    @model_validator(mode="before")
    @classmethod
    def check(cls, data: Any) -> Any:
        """Refuse what contradicts the blocks, and ask for the quantization that Axolotl keeps for its own adapters."""
        if data.get("qst") is not None:
            read_block("qst", QSTTrainingBlock, data["qst"])
        if "eu_pruning" in data:
            read_block("eu_pruning", EUPruningBlock, data["eu_pruning"])
            if data.get("rl"):
                raise ValueError(
                    f"rl is {data['rl']!r} beside eu_pruning, which needs one answer a prompt; remove one."
                )
            if data.get("pretraining_dataset") or data.get("streaming"):
                raise ValueError("eu_pruning cannot see streamed data whole; give datasets, without streaming.")
        if data.get("adapter") != "qst":
            if data.get("qst") is not None:
                raise ValueError(f"adapter is {data.get('adapter')!r} beside the block qst; set adapter: qst.")
            return data
        if data.get("merge_lora"):
            raise ValueError("adapter is 'qst', which cannot be merged into the base; share the adapter itself.")
        refuse_lora(data, "adapter is 'qst'")
        return data | quantization(data)


def quantization(data: dict[str, Any]) -> dict[str, Any]:
    """The key that quantizes the base on loading; Axolotl does so only for adapters of its own."""
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if data.get(name)]
    if not bits:
        return {}
    if len(bits) > 1:
        raise ValueError("load_in_4bit and load_in_8bit are both true; choose one.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{bits[0]} is true, but bitsandbytes is not installed: pip install bitsandbytes.")
    wanted = {"quant_method": "bitsandbytes", bits[0]: True}
    if bits == ["load_in_4bit"]:
        wanted |= NF4 | {"bnb_4bit_compute_dtype": _compute_dtype(data)}
    wanted |= data.get("bnb_config_kwargs") or {}
    own = data.get("overrides_of_model_kwargs") or {}
    return {"overrides_of_model_kwargs": {"quantization_config": wanted} | own}


def _compute_dtype(data: dict[str, Any]) -> str:
    """What 4-bit weights are multiplied in: as Axolotl reads its keys for precision."""
    import torch

    bf16 = data.get("bf16", "auto")
    if bf16 == "auto":
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if not bf16 and torch.cuda.is_available():
            return "float16"
    return "bfloat16" if bf16 or data.get("bfloat16") else "float16" if data.get("fp16") else "float32"
