"""What goes wrong is said in one sentence; versions and devices are there for a bug report."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny, token_ids, word_tokenizer
from peft import PeftModel, get_peft_model
from qtuning_peft.integrations.blocks import EUPruningBlock, QSTBlock, read_block
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import qtuning_peft
from qtuning_peft import SideTuningConfig
from qtuning_peft.cli import app
from qtuning_peft.loading import load_model


def test_versions_for_a_bug_report() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output.strip()) == (0, f"qtuning-peft {qtuning_peft.__version__}")
    shown = CliRunner().invoke(app, ["env"])
    assert shown.exit_code == 0
    found = dict(line.split(None, 1) for line in shown.output.splitlines())
    assert found["qtuning-peft"] == qtuning_peft.__version__
    assert found["torch"] == torch.__version__
    assert found.keys() >= {"peft", "transformers", "bitsandbytes", "datasets", "python", "device"}


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (QSTBlock, {"reduction_facter": 8}, r"^block\.reduction_facter is no field; did you mean reduction_factor\?$"),
        (QSTBlock, {"r": 8}, r"^block\.r is no field; choose from reduction_factor, downsample, "),
        (EUPruningBlock, {"sample_rate": 0.5}, r"^block\.sample_rate is no field; did you mean sample_ratio\?$"),
    ],
)
def test_a_typo_is_answered_with_the_field_it_may_be(kind: Any, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_block("block", kind, content)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN"])
def test_a_tokenizer_with_ids_that_are_no_integers_is_none(number: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), SideTuningConfig())
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"][0]["id"] = "HERE"
    file.write_text(json.dumps(content).replace('"HERE"', number))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_a_step_raises_no_warning_of_what_transformers_deprecates(recwarn: pytest.WarningsRecorder) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from qtuning_peft import HiddenStateCacheCallback, PrefixCachingCallback

    rows = [[*range(3, 23), *token_ids(1, 6, seed=index)[0].tolist()] for index in range(4)]
    data = Dataset.from_dict({"input_ids": rows, "labels": [[-100] * 22 + row[22:] for row in rows]})
    arguments = TrainingArguments(
        output_dir="unused", num_train_epochs=2, report_to="none", use_cpu=True, save_strategy="no"
    )
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
    callbacks = [PrefixCachingCallback(), HiddenStateCacheCallback(1)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    assert not [str(entry.message) for entry in caught if "past_key_values" in str(entry.message)]


@pytest.mark.parametrize("method", [{"peft_type": "NEWER"}, {"peft_typ": "QST"}], ids=["unknown", "misspelt"])
def test_an_adapter_of_an_unknown_method_is_one_sentence(method: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(method | {"base_model_name_or_path": "org/base"}))
    with pytest.raises(ValueError, match=f"^{tmp_path} has an adapter_config.json of an unknown method .*upgrade PEFT"):
        load_model(str(tmp_path))
