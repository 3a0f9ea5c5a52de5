"""What went wrong once in scoring, pruning and their files, and stays mended."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomize_side_network, tiny, word_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_eu_dataset import rows, run
from test_eu_pruner import scored_data
from torch import nn

from qtuning_peft import EUPruner, EUScorer, SideTuningConfig, add_few_shot_examples, fit_projections, score
from qtuning_peft.eu_plane.files import read_data, write_data

PLAIN: dict[str, Any] = {"chat_template": False, "progress": False}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


# -- the fingerprint ---------------------------------------------------------------------------------------------------


def quantized() -> Any:
    """A tiny model whose linear layers are in NF4, on the CPU."""
    import bitsandbytes as bnb

    model = tiny()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            layer.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to("cpu"))
    return model


def test_quantized_weights_and_their_scales_count() -> None:
    model = quantized()
    layer = model.model.layers[1].mlp.up_proj
    assert layer.weight.dtype == torch.uint8
    first = EUScorer(model).fingerprint()
    EUScorer(model)({"input_ids": [[5, 6, 7, 8]]})
    assert EUScorer(model).fingerprint() == first
    with torch.inference_mode():
        layer.weight.data[3] ^= 1
        changed = EUScorer(model).fingerprint()
        layer.weight.quant_state.absmax[0] *= 2
    assert len({first, changed, EUScorer(model).fingerprint()}) == 3


def test_a_buffer_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny(), SideTuningConfig(reduction_factor=2, task_type="CAUSAL_LM"))
    randomize_side_network(model)
    data = Dataset.from_list(rows(4))
    before = score(data, model, word_tokenizer(), resume_dir=tmp_path, **PLAIN)
    mapped = data.map(EUScorer(model, word_tokenizer(), chat_template=False), batched=True)
    name, buffer = next((n, b) for n, b in model.named_buffers() if "qst" in n)
    with torch.no_grad():
        buffer += 1.0
    after = score(data, model, word_tokenizer(), resume_dir=tmp_path, **PLAIN)
    assert np.abs(np.array(after["error"]) - before["error"]).max() > 1e-6, name
    again = data.map(EUScorer(model, word_tokenizer(), chat_template=False), batched=True)
    assert again["error"][:] != mapped["error"][:]


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_damaged_part_is_believed(copies: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10, 11]]})
    model = tiny()
    expected = score(data, model, progress=False, resume_dir=tmp_path).to_dict()
    (part,) = tmp_path.iterdir()
    whole, draw = part.read_bytes(), np.random.default_rng(0)
    caplog.set_level(logging.WARNING, logger="qtuning_peft")
    for number in range(copies):
        content = bytearray(whole)
        place = int(draw.integers(len(content)))
        if number % 3 == 0:
            content[place] ^= 1 << int(draw.integers(8))
        elif number % 3 == 1:
            content[place : place + 512] = draw.bytes(len(content[place : place + 512]))
        else:
            del content[place:]
        part.write_bytes(content)
        caplog.clear()
        assert score(data, model, progress=False, resume_dir=tmp_path).to_dict() == expected
        assert [record.getMessage().endswith("its rows are scored again.") for record in caplog.records] == [True]
        assert part.read_bytes() == whole


def test_a_part_under_another_name_is_not_taken(tmp_path: Path) -> None:
    first, second = (Dataset.from_dict({"input_ids": [[5, 6, token]]}) for token in (7, 8))
    score(first, tiny(), progress=False, resume_dir=tmp_path)
    (part,) = tmp_path.iterdir()
    expected = score(second, tiny(), progress=False, resume_dir=tmp_path).to_dict()
    (other,) = {*tmp_path.iterdir()} - {part}
    shutil.copy(part, other)
    assert score(second, tiny(), progress=False, resume_dir=tmp_path).to_dict() == expected
