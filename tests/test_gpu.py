"""What only a GPU can show: 16-bit training on an NF4 base, kernels, 8-bit optimizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import randomize_side_network, side_parameters, tiny, token_ids
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qtuning_peft import EUScorer, SideTuningConfig

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
