"""`transformers.Trainer` and TRL train the side network and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize_side_network, side_parameters, tiny, token_ids
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from qtuning_peft import SideTuningConfig

ROWS = [{"input_ids": [1, *[3 + (5 * i + j) % 20 for j in range(6 + i % 5)], 2]} for i in range(32)]


def nf4(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny Llama whose linear layers are NF4 with double quantization."""
    tiny().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ),
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 100)}
    fast = Tokenizer(models.WordLevel(words, unk_token="w3"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, but not quantized ones: on some CPUs bitsandbytes repacks those at the first forward pass."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.is_floating_point()}


def require_only_the_side_network_learned(before: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    after = snapshot(model)
    for name, tensor in before.items():
        changed = not torch.equal(tensor.float(), after[name].float())
        assert changed == ("qst_side_network" in name), name
    assert all(p.requires_grad == ("qst_side_network" in name) for name, p in model.named_parameters())


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]),
        "attention_mask": torch.tensor([[int(i < len(row["input_ids"])) for i in range(width)] for row in rows]),
        "labels": torch.tensor([row["input_ids"] + [-100] * (width - len(row["input_ids"])) for row in rows]),
    }


def test_a_compiled_model_gives_the_same_loss_and_gradient() -> None:
    """With graph breaks; the backend needs no compiler of the machine's."""
    results = []
    for compiled in (False, True):
        model = get_peft_model(tiny(), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM")).train()
        randomize_side_network(model)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        loss = run(input_ids=token_ids(), labels=token_ids()).loss
        results.append((loss, torch.autograd.grad(loss, list(side_parameters(model).values()))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"optim": "adamw_bnb_8bit"},
        # On a CPU nothing is paged, but the optimizer is the same.
        {"optim": "paged_adamw_8bit"},
    ],
    ids=str,
)
def test_the_trainer(options: dict[str, object], tmp_path: Path) -> None:
    model = get_peft_model(tiny(), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
    before = snapshot(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=4, per_device_train_batch_size=4, learning_rate=2e-2,
            logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="epoch", **options,
        ),
        train_dataset=ROWS,
        data_collator=collate,
    )  # fmt: skip
    trainer.train()
    require_only_the_side_network_learned(before, model)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    saved = PeftModel.from_pretrained(tiny(), tmp_path / "checkpoint-32")
    for name, parameter in side_parameters(model).items():
        assert torch.equal(saved.get_parameter(name), parameter), name


def test_muon_as_the_page_has_it(tmp_path: Path) -> None:
    """The inner matrices move by Muon's steps, whose size is ten times AdamW's times 0.2, and the rest by AdamW's."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
    before = {name: value.detach().clone() for name, value in side_parameters(model).items()}
    page = (Path(__file__).parent.parent / "docs" / "settings.md").read_text(encoding="utf-8")
    block = page.partition("## Muon")[2].partition("```python\n")[2].partition("```")[0]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none",
        lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    names: dict[str, Any] = {"model": model, "arguments": arguments, "dataset": ROWS}
    exec(block, names)
    names["trainer"].data_collator = collate
    names["trainer"].train()
    moved = {
        name: (value - before[name]).square().mean().sqrt().item() for name, value in side_parameters(model).items()
    }
    # In the first step the output is zero, and nothing behind it has a gradient.
    inner = [value for name, value in moved.items() if before[name].dim() == 2 and ".mix." not in name]
    assert inner
    assert all(0.5 * 2e-3 < value < 1.5 * 2e-3 for value in inner)
    assert all(0 < value < 2.1e-3 for value in moved.values())
    assert all(parameter.grad is None for parameter in names["matrices"].values())


def test_one_run_of_four_steps_equals_two_runs_of_two(tmp_path: Path) -> None:
    finals = []
    for resumed in (False, True):
        folder = str(tmp_path / str(resumed))

        def train(steps: int, checkpoint: str | None = None, folder: str = folder) -> torch.nn.Module:
            torch.manual_seed(3)
            model = get_peft_model(tiny(), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
            args = TrainingArguments(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
                lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True, save_steps=2,
            )  # fmt: skip
            trainer = Trainer(model=model, args=args, train_dataset=ROWS, data_collator=collate)
            trainer.train(resume_from_checkpoint=checkpoint)
            return model

        if resumed:
            train(2)
            model = train(4, f"{folder}/checkpoint-2")
        else:
            model = train(4)
        finals.append(snapshot(model))
    for name, tensor in finals[0].items():
        assert torch.equal(tensor, finals[1][name]), name


def test_the_trainer_on_a_quantizer_that_cannot_train(tmp_path: Path) -> None:
    """A side network needs none that can; LoRA does, and so does the base when the side network is gone."""
    from benchmarks.quantizers import bitnet

    tiny().save_pretrained(tmp_path / "base")

    def base() -> PreTrainedModel:
        return bitnet(tmp_path / "base", tmp_path / "bitnet")

    def trainer(model: torch.nn.Module) -> Trainer:
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"), num_train_epochs=4, per_device_train_batch_size=4, learning_rate=2e-2,
            logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model=model, args=args, train_dataset=ROWS, data_collator=collate)

    def require_refused(model: torch.nn.Module) -> None:
        with pytest.raises(ValueError, match=r"do not support training|purely quantized"):
            trainer(model)

    lora = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    side = get_peft_model(base(), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
    assert not side.hf_quantizer.is_trainable
    with torch.compiler.set_stance("force_eager"):  # BitNet's layers ask for a compiler
        before = snapshot(side)
        trained = trainer(side)
        trained.train()
        require_only_the_side_network_learned(before, side)
        assert losses(trained)[-1] < losses(trained)[0] - 0.5
        trained.save_model(str(tmp_path / "adapter"))
        loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
        with side.disable_adapter():
            trainer(side)
        for model in (loaded, copy.deepcopy(side)):
            trainer(model).train()
    require_refused(lora)
    require_refused(side.unload())
    loaded.delete_adapter("default")
    require_refused(loaded)


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_trl_sft_with_its_defaults(base: str, tmp_path: Path) -> None:
    """Checkpointing on, its fused head, and on a 4-bit base trainable weights cast to bfloat16."""
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
    trainer = trl.SFTTrainer(
        model=nf4(tmp_path / "base") if base == "nf4" else tiny(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), num_train_epochs=4, per_device_train_batch_size=4, learning_rate=2e-2,
            logging_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
        peft_config=SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"),
    )  # fmt: skip
    assert trainer.args.gradient_checkpointing
    before = snapshot(trainer.model)
    trainer.train()
    require_only_the_side_network_learned(before, trainer.model)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    assert {p.dtype for p in side_parameters(trainer.model).values()} == {torch.float32}
    batch = {key: value for key, value in collate(ROWS[:4]).items() if key != "labels"}
    trainer.model.eval()
    with torch.no_grad():
        tuned = trainer.model(**batch).logits
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(nf4(tmp_path / "base") if base == "nf4" else tiny(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, tuned)
