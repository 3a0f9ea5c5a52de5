"""Any base that runs forward can be tuned: full precision, NF4, 8 bits and GGUF, with the real SmolLM2-135M."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import tiny, token_ids
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from qtuning_peft import SideTuningConfig
from qtuning_peft.loss import chunked_cross_entropy

REPOSITORY = Path(__file__).parent.parent
if not (REPOSITORY / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not installed with the package", allow_module_level=True)
sys.path.insert(0, str(REPOSITORY))

from benchmarks.gsm8k import encode, read_rows  # noqa: E402
from benchmarks.quantizers import full_precision, gguf, packed_gguf  # noqa: E402

pytestmark = pytest.mark.smollm2


def nf4(folder: Path) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    return model


def int8(folder: Path) -> PreTrainedModel:
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)
    return model


def test_packed_gguf_layers_compute_what_the_file_says(smollm2: Path) -> None:
    ids = torch.arange(100, 140)[None]
    packed = packed_gguf(smollm2)
    assert {p.dtype for p in packed.model.layers[0].mlp.parameters()} == {torch.uint8}
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, full_precision(smollm2)(ids).logits, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("load", [full_precision, nf4, int8, gguf, packed_gguf])
def test_a_side_network_learns_on_the_real_model(
    load: Callable[[Path], PreTrainedModel], smollm2: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = [encode(tokenizer, row, 160) for row in read_rows("train", 4)]
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    base = load(smollm2).eval()
    with torch.no_grad():
        expected = base(input_ids=batch["input_ids"]).logits
    torch.manual_seed(0)
    model = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=batch["input_ids"]).logits, expected)

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        loss = chunked_cross_entropy(model, **batch)
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is None for name, p in model.named_parameters() if "qst_side_network" not in name)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1

    model.eval()
    with torch.no_grad():
        tuned = model(input_ids=batch["input_ids"]).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=batch["input_ids"]).logits, expected)
        # Saved last: on some CPUs bitsandbytes re-quantizes a 4-bit base whenever its state dict is taken.
        model.save_pretrained(tmp_path)
        del model, base
        again = PeftModel.from_pretrained(load(smollm2), tmp_path)
        assert torch.equal(again(input_ids=batch["input_ids"]).logits, tuned)


def test_trainers_take_a_side_network_on_packed_gguf_layers(
    smollm2: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """transformers' GGUF quantizer says that it cannot train."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = [encode(tokenizer, row, 120) for row in read_rows("train", 2)]
    options = {
        "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "bf16": False,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    base = packed_gguf(smollm2)
    base.model.layers = base.model.layers[:3]  # without a kernel, every pass unpacks them
    base.config.num_hidden_layers = 3
    assert not base.hf_quantizer.is_trainable
    before = copy.deepcopy(base.state_dict())
    config = SideTuningConfig(task_type="CAUSAL_LM")

    def by_trainer() -> Trainer:
        collate = DataCollatorForSeq2Seq(tokenizer)
        return Trainer(get_peft_model(base, config), TrainingArguments(str(tmp_path), **options), collate, rows)

    def by_trl() -> SFTTrainer:
        return SFTTrainer(
            base, SFTConfig(str(tmp_path), **options), train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, peft_config=config,
        )  # fmt: skip

    for make in (by_trainer, by_trl):
        trainer = make()
        trainer.train()
        trainer.save_model()
        first, second = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert second < first
        base = trainer.model.unload()
        after = base.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    # The folder of a GGUF file holds no configuration to compare the vocabulary with.
    assert not [str(warning.message) for warning in recwarn if "vocabulary" in str(warning.message)]


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "opt"])
@pytest.mark.parametrize("blocks", ["Q8_0", "Q4_0"])
def test_packed_gguf_layers_of_other_families(family: str, blocks: str, tmp_path: Path) -> None:
    """Random weights: every linear layer of the blocks, its bias too, in transformers' packed layer."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize
    from transformers.integrations.gguf.utils import GgufLinear

    def packed() -> PreTrainedModel:
        base, kind = tiny(family), GGMLQuantizationType[blocks]
        for path, module in list(base.named_modules()):
            if isinstance(module, torch.nn.Linear) and module is not base.get_output_embeddings():
                layer = GgufLinear(module.in_features, module.out_features, int(kind), module.bias is not None)
                layer.weight.data = torch.from_numpy(quantize(module.weight.detach().numpy(), kind))
                layer.bias = module.bias
                base.set_submodule(path, layer)
        return base.requires_grad_(False)

    ids = token_ids(4, 24)  # few tokens need a kernel of the Hub
    base = packed()
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        error = (expected - tiny(family)(input_ids=ids).logits).norm() / expected.norm()
        assert 0 < error < 0.5
    model = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM", reduction_factor=4)).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01
    assert all(p.grad is None for name, p in model.named_parameters() if "qst_side_network" not in name)
    with torch.no_grad():
        tuned = model.eval()(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(packed(), tmp_path).eval()(input_ids=ids).logits, tuned)
        assert torch.equal(model.unload()(input_ids=ids).logits, expected)


def test_the_size_of_the_default_adapter(smollm2: Path, tmp_path: Path) -> None:
    model = get_peft_model(full_precision(smollm2), SideTuningConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    lora_r16_all_linear = 4_884_480 * 4
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < lora_r16_all_linear


def test_cached_generation_equals_uncached_on_the_real_model(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = get_peft_model(nf4(smollm2), SideTuningConfig(task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up_proj" in name and "mix" in name:
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    prompts = tokenizer(["The capital of France is", "2 + 2 ="], return_tensors="pt", padding=True, padding_side="left")
    texts = [
        model.generate(**prompts, max_new_tokens=12, do_sample=False, pad_token_id=2, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)
