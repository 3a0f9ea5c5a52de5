"""A side network on the first blocks of SmolLM2-135M in every quantization that runs on a CPU.

QUANTIZERS names the packages to test, of which each environment has some (scripts/test_quantizers.sh). With
QUANTIZER_ROWS set, every quantizer leaves a row for the tables in docs/models.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny, token_ids
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from benchmarks import rows
from benchmarks.gsm8k import encode, read_rows
from benchmarks.quantizers import QUANTIZERS, full_precision, stored_bytes
from qtuning_peft import SideTuningConfig

PACKAGES = os.environ.get("QUANTIZERS", "").split()
if not PACKAGES:
    pytest.skip("needs packages of its own; run scripts/test_quantizers.sh", allow_module_level=True)
BLOCKS = 2
OPTIONS: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "bf16": False,
    "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    model = full_precision(smollm2)
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


def record(name: str, **found: Any) -> None:
    if "QUANTIZER_ROWS" in os.environ:
        quantizer = QUANTIZERS[name]
        row = {"quantizer": name, "package": quantizer.version(), **found, **rows.provenance()}
        rows.append("quantizers", row | {"command": "bash scripts/test_quantizers.sh"})


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def gradients_of_lora(base: Any, dataset: Any, collate: Any, folder: Path) -> str:
    """What becomes of LoRA on the same base: refused, failing, or a gradient that reaches its first block."""
    try:
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
        trainer = Trainer(model, TrainingArguments(str(folder), **OPTIONS), collate, dataset)
    except (ValueError, ImportError, NotImplementedError, TypeError, RuntimeError, AttributeError) as error:
        refused_by = "Trainer" if "support training" in str(error) else "PEFT"
        return f"refused by {refused_by}"
    try:
        trainer.train()
    except (ValueError, NotImplementedError, TypeError, RuntimeError, AttributeError) as error:
        return f"fails: {type(error).__name__}"
    first = [p for name, p in model.named_parameters() if "layers.0." in name and "lora_B" in name]
    return "trains" if all(p.abs().sum() > 0 for p in first) else "no gradient in the first block"


@pytest.mark.smollm2
@pytest.mark.parametrize("name", [name for name, q in QUANTIZERS.items() if q.package in PACKAGES and not q.refusal])
def test_a_side_network_on_a_quantized_base(name: str, checkpoint: Path, tmp_path: Path) -> None:
    quantizer = QUANTIZERS[name]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows_ = [encode(tokenizer, row, 100) for row in read_rows("train", 2)]
    collate = DataCollatorForSeq2Seq(tokenizer)
    ids = torch.tensor([rows_[0]["input_ids"][:60]])

    base = quantizer.load(checkpoint, tmp_path / "kept")
    layer = base.model.layers[0].mlp.up_proj
    tensor = getattr(layer, "weight", None)
    kind = type(layer).__name__ + (f" of {type(tensor).__name__}" if "Tensor" in type(tensor).__name__[1:] else "")
    loaded = stored_bytes(base)
    # Some quantizers unpack or repack in their first pass.
    expected = logits(base, ids)
    assert torch.equal(logits(base, ids), expected)
    reference = logits(full_precision(checkpoint), ids)
    error = ((expected - reference).norm() / reference.norm()).item()
    assert error < (2 if "BitNet" in name else 0.3)
    assert error > 0 or "GGUF" in name  # whose numbers the checkpoint has
    running = stored_bytes(base)

    # By Trainer.
    torch.manual_seed(0)
    model = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, ids), expected)
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "out"), **OPTIONS), collate, rows_)
    trainer.train()
    first, second = losses(trainer)
    assert second < first
    model(**collate(rows_)).loss.backward()
    for path, parameter in model.named_parameters():
        ours = "qst_side_network" in path
        assert parameter.requires_grad == ours, path
        assert (parameter.grad is not None) == ours, path

    # Disabled, it is the base; saved and loaded, and generating, it is itself.
    tuned = logits(model, ids)
    assert not torch.equal(tuned, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)
    # Saved last: on some CPUs bitsandbytes re-quantizes a 4-bit base whenever its state dict is taken.
    # Packed GGUF layers run few tokens by the Hub's kernel alone, so the base needs whole texts here.
    generate = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2, "use_cache": "GGUF" not in name}
    text = model.generate(input_ids=ids, **generate)
    model.save_pretrained(tmp_path / "adapter")
    fresh = quantizer.load(checkpoint, tmp_path / "kept")
    logits(fresh, ids)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(logits(again, ids), tuned)
    assert torch.equal(again.generate(input_ids=ids, **generate), text)

    # By TRL, on the base that was trained on before.
    base = again.unload()
    assert torch.equal(logits(base, ids), expected)
    trainer = SFTTrainer(
        base, SFTConfig(str(tmp_path / "out"), **OPTIONS), train_dataset=Dataset.from_list(rows_),
        processing_class=tokenizer, peft_config=SideTuningConfig(task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    first, second = losses(trainer)
    assert second < first
    base = trainer.model.unload()
    assert torch.equal(logits(base, ids), expected)

    lora = gradients_of_lora(base, rows_, collate, tmp_path / "out")
    can_train = getattr(base, "hf_quantizer", None) is None or base.hf_quantizer.is_trainable
    assert can_train or lora.startswith("refused")
    record(name, layer=kind, bytes=loaded, running_bytes=running, error=error, lora=lora, trains=can_train)


@pytest.mark.smollm2
@pytest.mark.parametrize("name", [name for name, q in QUANTIZERS.items() if q.package in PACKAGES and q.refusal])
def test_quantizers_that_need_a_gpu_say_so(name: str, checkpoint: Path, tmp_path: Path) -> None:
    quantizer = QUANTIZERS[name]
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Exception, match=f"(?i){quantizer.refusal}") as caught:
        quantizer.load(checkpoint, tmp_path / "kept")
    record(name, refused=f"{caught.type.__name__}: {str(caught.value).splitlines()[0]}")


@pytest.mark.skipif("torchao" not in PACKAGES, reason="torchao is in another environment")
def test_quantized_experts(tmp_path: Path) -> None:
    """A mixture whose experts, not only its linear layers, are in 8 bits; they run one by one on a CPU."""
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    tiny("qwen3_moe").save_pretrained(tmp_path / "base")
    eight = Int8WeightOnlyConfig()
    names = {f"re:.*experts\\.{name}": eight for name in ("gate_up_proj", "down_proj")} | {"_default": eight}

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=TorchAoConfig(FqnToConfig(names)), experts_implementation="eager"
        ).eval()

    base, ids = load(), token_ids()
    layer = base.model.layers[0]
    for tensor in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, layer.self_attn.q_proj.weight):
        assert type(tensor).__name__ == "Int8Tensor"
    expected = logits(base, ids)
    model = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM", reduction_factor=4))
    assert torch.equal(logits(model, ids), expected)
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = OPTIONS | {"learning_rate": 1e-2}
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "out"), **options), train_dataset=data)
    trainer.train()
    first, second = losses(trainer)
    assert second < first
    assert all((p.grad is None or "qst_side_network" in name) for name, p in model.named_parameters())
    tuned = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, ids), tuned)
    generate = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(again.generate(input_ids=ids, **generate), model.generate(input_ids=ids, **generate))
