"""vLLM's scores and states of the base are those of transformers, whatever the family; what learns from them is too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GROUPED, config_of, token_ids, word_tokenizer
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)

pytest.importorskip("vllm.entrypoints", reason="needs an environment of its own: bash scripts/test_vllm.sh")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from qtuning_peft.integrations.vllm import engine_options
from qtuning_peft.integrations.vllm.engine import VLLMEngine
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from qtuning_peft import EUScorer, SideTuningConfig, StatesCollator, compute_states, load_states, model_from_states
from qtuning_peft.eu_plane.engine import Engine, TransformersEngine
from qtuning_peft.eu_plane.tokenized import Sample

OPTIONS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "max_model_len": 512}
# Heads of a size that vLLM's kernels know.
SIZE = GROUPED | {"hidden_size": 128, "head_dim": 32}
# A mixture of experts first: in one process, vLLM makes groups for experts for its first model or never.
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3_moe": lambda: config_of("qwen3_moe", **SIZE),
    "llama": lambda: config_of("llama", **SIZE),
    "mistral": lambda: config_of("mistral", **SIZE),
    "qwen2": lambda: Qwen2Config(**SIZE),
    "qwen3": lambda: config_of("qwen3", **SIZE),
    "granite": lambda: GraniteConfig(**SIZE, residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=3.0),
}


def small(folder: Path, config: PretrainedConfig) -> Any:
    """A random model whose every weight matters, saved with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.3)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return model


def passed(engine: Engine, samples: list[Sample]) -> tuple[dict[str, list[np.ndarray]], list[torch.Tensor]]:
    states: dict[int, torch.Tensor] = {}
    scores = engine.run(samples, 48, ["error", "uncertainty", "el2n"], None, states.__setitem__, [0, 2])
    return scores, [states[index] for index in range(len(samples))]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_states_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = small(tmp_path, FAMILIES[family]())
    rows = [token_ids(1, length, seed=length)[0].tolist() for length in (5, 100, 17)]
    samples = [Sample(i, row, [-100] * (2 + i) + row[2 + i :]) for i, row in enumerate(rows)]
    # A label that is not the next token, and a hole.
    samples[2].labels[6:8] = [-100, 7]
    # The second row takes several passes of 48 tokens.
    with closing(VLLMEngine(str(tmp_path), **OPTIONS)) as engine:
        scores, states = passed(engine, samples)
        # Other scores, and no states, of the same model.
        assert engine.run(samples[:1], 48)["error"][0] == pytest.approx(scores["error"][0])
        head = engine.head()
    expected = TransformersEngine(model)
    wanted, wanted_states = passed(expected, samples)
    for name, values in wanted.items():
        for own, theirs in zip(scores[name], values, strict=True):
            np.testing.assert_allclose(own, theirs, atol=1e-4)
    for own_states, their_states in zip(states, wanted_states, strict=True):
        largest = their_states.abs().amax(dim=(1, 2), keepdim=True)
        torch.testing.assert_close(own_states / largest, their_states / largest, atol=3e-5, rtol=0)
    assert torch.equal(head["weight"], expected.head()["weight"])
    assert replace(engine.shape(), config=None) == replace(expected.shape(), config=None)
    assert engine.vocabulary == expected.vocabulary


def test_in_16_bits_scores_stay_exact(tmp_path: Path) -> None:
    model = small(tmp_path, FAMILIES["llama"]())
    with torch.no_grad():  # flatter, as rounding is large beside weights of this size
        model.lm_head.weight.mul_(0.1)
    model.bfloat16().save_pretrained(tmp_path)
    row = token_ids(1, 40)[0].tolist()
    samples = [Sample(0, row, [-100] * 8 + row[8:])]
    with closing(VLLMEngine(str(tmp_path), **OPTIONS | {"dtype": "bfloat16"})) as engine:
        scores, states = passed(engine, samples)
    wanted, wanted_states = passed(TransformersEngine(model), samples)
    assert states[0].dtype == wanted_states[0].dtype == torch.bfloat16
    assert torch.equal(states[0][0], wanted_states[0][0])
    # Scores come in float32: their last digits are there.
    own = torch.from_numpy(scores["error"][0]).float()
    assert (own != own.bfloat16()).all()
    np.testing.assert_allclose(scores["error"][0], wanted["error"][0], atol=0.1)


def test_other_weights_are_another_engine(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "same", tmp_path / "other"]
    for folder in folders:
        model = small(folder, FAMILIES["llama"]())
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(folders[2])
    prints = [EUScorer(VLLMEngine(str(folder), **OPTIONS)).fingerprint() for folder in folders]
    assert prints[0] == prints[1] != prints[2]
    assert EUScorer(VLLMEngine(str(folders[0]), **OPTIONS | {"dtype": "bfloat16"})).fingerprint() not in prints


def test_a_model_that_hands_out_no_states_is_refused(tmp_path: Path) -> None:
    OPTConfig(architectures=["OPTForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="OPTForCausalLM cannot be followed in vLLM"):
        VLLMEngine(str(tmp_path))


@pytest.mark.smollm2
def test_an_adapter_from_vllms_states_scores_the_same_in_both(smollm2: Path, tmp_path: Path) -> None:
    texts = [f"Name the number after {n}. It is {n + 1}, and then comes {n + 2}." for n in range(8)]
    data = [{"prompt": text[: text.index(".") + 1], "completion": text[text.index(".") + 1 :]} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    states = tmp_path / "states"
    command = [sys.executable, "-m", "qtuning_peft.cli", "states", tmp_path / "rows.jsonl", smollm2, "-o", states]
    command += ["--engine", "vllm", "--dtype", "float32", "--states-format", "float32", "--tokens-per-batch", "256"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-5000:]

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    expected = compute_states(
        Dataset.from_list(data), base, tokenizer, SideTuningConfig(), tmp_path / "expected", states_format="float32",
        progress=False,
    )  # fmt: skip
    found = load_states(states)
    assert found["input_ids"] == expected["input_ids"]
    for name in ("token_error", "token_uncertainty"):
        for own, theirs in zip(found[name], expected[name], strict=True):
            np.testing.assert_allclose(own, theirs, atol=1e-4)

    config = SideTuningConfig(task_type="CAUSAL_LM", reduction_factor=8)
    model = model_from_states(states, config)
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=8, per_device_train_batch_size=8, learning_rate=3e-3, report_to="none",
        remove_unused_columns=False, use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=found, data_collator=StatesCollator(states)).train()
    model.save_pretrained(tmp_path / "adapter")

    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = tokenizer(texts[3], return_tensors="pt").input_ids

    def likelihoods() -> torch.Tensor:
        with torch.no_grad():
            return tuned(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]

    wanted = likelihoods()
    with tuned.disable_adapter():
        assert wanted.mean() > likelihoods().mean() + 0.1
    llm = LLM(**engine_options(str(smollm2), {"tuned": tmp_path / "adapter"}), **OPTIONS)
    request = LoRARequest("tuned", 1, str(tmp_path / "adapter"))
    answer = llm.generate(
        {"prompt_token_ids": ids[0].tolist()}, SamplingParams(max_tokens=1, prompt_logprobs=0), lora_request=request,
        use_tqdm=False,
    )[0]  # fmt: skip
    served = [entry[int(token)].logprob for entry, token in zip(answer.prompt_logprobs[1:], ids[0, 1:], strict=True)]
    llm.llm_engine.engine_core.shutdown()
    torch.testing.assert_close(torch.tensor(served), wanted, atol=1e-4, rtol=0)
