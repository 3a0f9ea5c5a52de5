"""What only a GPU can show: 16-bit training on an NF4 base, kernels, 8-bit optimizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import randomize_side_network, side_parameters, tiny, token_ids
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

from qtuning_peft import (
    EUScorer,
    HiddenStateCacheCallback,
    SideTuningConfig,
    SideTuningTrainer,
    StatesCollator,
    compute_states,
    model_from_states,
)
from qtuning_peft.loss import chunked_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def nf4(folder: Path) -> PeftModel:
    tiny().save_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": 0}
    )
    return get_peft_model(base, SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "PagedAdamW8bit"])
def test_every_side_tensor_learns_on_an_nf4_base(optimizer: str, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs 4-bit layers")
    model = nf4(tmp_path)
    parameters = side_parameters(model)
    assert {(p.device.type, p.dtype) for p in parameters.values()} == {("cuda", torch.float32)}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    owner = torch.optim if optimizer == "AdamW" else bnb.optim
    steps = getattr(owner, optimizer)(parameters.values(), lr=1e-2)
    ids, losses = token_ids(4, 16).cuda(), []
    model.train()
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        steps.step()
        steps.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert not any(torch.equal(before[name], p) for name, p in parameters.items())


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_cached_generation_equals_uncached(cache: dict[str, str]) -> None:
    model = get_peft_model(tiny().cuda(), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM")).eval()
    randomize_side_network(model, scale=0.3)
    options = {"input_ids": token_ids(2, 6).cuda(), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**options, **cache), model.generate(**options, use_cache=False))


def test_scores_are_those_of_the_cpu() -> None:
    rows = {"input_ids": token_ids(3, 12).tolist()}
    on_cpu = EUScorer(tiny())(rows)
    on_gpu = EUScorer(tiny().cuda())(rows)
    for name in ("error", "uncertainty"):
        assert on_gpu[name] == pytest.approx(on_cpu[name], abs=1e-4)


def test_scoring_holds_the_logits_of_a_chunk_alone() -> None:
    model = tiny(vocab_size=100_000).cuda()
    rows = {"input_ids": [[5] * 2000] * 8}
    EUScorer(model, tokens_per_batch=2000)(rows)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    EUScorer(model, tokens_per_batch=16_000)(rows)
    # All logits would be 6.4 GB; a chunk is 256 MiB, and a pass over it holds a few of its size.
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 2**30


@pytest.mark.parametrize("settings", [{}, {"tap_storage": "int8"}, {"downsample": "avgpool"}], ids=str)
def test_a_trainer_in_bf16_learns_and_reads_cached_states(settings: dict[str, str], tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in token_ids(8, 24).tolist()])

    def train(cached: bool) -> list[float]:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.bfloat16, device_map={"": 0},
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
        )  # fmt: skip
        model = get_peft_model(base, SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM", **settings))
        arguments = TrainingArguments(
            str(tmp_path / "run"), per_device_train_batch_size=4, num_train_epochs=6, learning_rate=1e-2, bf16=True,
            logging_steps=1, report_to="none", save_strategy="no", seed=0,
        )  # fmt: skip
        callbacks = [HiddenStateCacheCallback(gibibytes=1)] if cached else []
        trainer = SideTuningTrainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    live, cached = train(False), train(True)
    assert live[-1] < live[0] - 0.1
    assert cached == pytest.approx(live, abs=0.02)


def test_states_of_a_gpu_train_like_the_base(tmp_path: Path) -> None:
    base = tiny().cuda()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config.name_or_path = str(tmp_path / "base")
    ids = token_ids(4, 16)
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()])
    config = SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM")
    stored = compute_states(rows, base, None, config, tmp_path / "states", states_format="float32", progress=False)
    live = get_peft_model(tiny().cuda(), config).train()
    randomize_side_network(live)
    alone = model_from_states(tmp_path / "states", config).train()
    alone.load_state_dict(
        {name: tensor for name, tensor in live.state_dict().items() if "qst_side_network" in name}, strict=False
    )
    alone.cuda()
    batch = {name: tensor.cuda() for name, tensor in StatesCollator(tmp_path / "states")(list(stored)).items()}
    expected = chunked_cross_entropy(live, ids.cuda(), ids.cuda())
    assert alone(**batch).loss.item() == pytest.approx(expected.item(), abs=1e-4)


def test_dropping_adapters_frees_their_memory() -> None:
    model = get_peft_model(tiny().cuda(), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
    before = torch.cuda.memory_allocated()
    model.add_adapter("second", SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    model.delete_adapter("second")
    assert torch.cuda.memory_allocated() <= before + 2**16
