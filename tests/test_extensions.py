"""A down-sampler and a sample strategy from outside of the package: ten lines each, known everywhere at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize_side_network, tiny, token_ids
from datasets import Dataset
from peft import PeftModel, get_peft_model
from qtuning_peft.integrations.blocks import EUPruningBlock, QSTBlock, read_block
from torch import Tensor, nn
from typer.testing import CliRunner

from qtuning_peft import EUPruner, SideTuningConfig
from qtuning_peft.cli import app
from qtuning_peft.eu_plane.selection import SAMPLE_STRATEGIES, sample_strategy
from qtuning_peft.side_tuning.network import DOWNSAMPLERS, down_sampler


def add_a_down_sampler() -> None:
    @down_sampler("strided", learned=False)
    class Strided(nn.Module):
        """Every r-th channel, nothing to learn."""

        def __init__(self, hidden_size: int, width: int, rank: int) -> None:
            super().__init__()
            self.stride = hidden_size // width

        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states[..., :: self.stride]


def add_a_sample_strategy() -> None:
    @sample_strategy("fewest", "supervised_tokens")
    def fewest(rows: Any, options: Any) -> Any:
        """Fewest supervised tokens."""
        return -rows["supervised_tokens"]


@pytest.fixture(autouse=True)
def _added() -> Any:
    add_a_down_sampler()
    add_a_sample_strategy()
    yield
    for registry, name in ((DOWNSAMPLERS, "strided"), (SAMPLE_STRATEGIES, "fewest")):
        del registry._choices[name], registry._help[name]


def shown(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return re.sub(r"[\s│]+", " ", result.output)


def test_the_down_sampler_trains_saves_and_loads(tmp_path: Path) -> None:
    block = read_block("qst", QSTBlock, {"downsample": "strided"})
    model = get_peft_model(tiny(), block.peft_config())
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    randomize_side_network(model)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    with pytest.raises(ValueError, match=r"downsample is 'cut'; choose one of linear, .*, avgpool, strided\."):
        SideTuningConfig(downsample="cut")
    with pytest.raises(ValueError, match="strided saves no hidden state for backward"):
        SideTuningConfig(downsample="strided", tap_storage="int8")


def test_the_sample_strategy_keeps_rows() -> None:
    rows = Dataset.from_dict({
        "error": [1.0, 2.0, 3.0], "uncertainty": [1.0, 2.0, 3.0], "supervised_tokens": [3, 1, 2], "unscored": [""] * 3,
        "input_ids": [[1, 2, 3, 4]] * 3, "labels": [[-100, 1, 2, 3], [-100] * 3 + [1], [-100, -100, 1, 2]],
        "token_error": [[1.0] * 3, [1.0], [1.0] * 2], "token_uncertainty": [[1.0] * 3, [1.0], [1.0] * 2],
    })  # fmt: skip
    kept = rows.map(EUPruner(num_samples=1, strategy="fewest").fit(rows), batched=True)
    assert kept["supervised_tokens"][:] == [1]
    with pytest.raises(ValueError, match=r"strategy is 'tallest'; choose one of eu_plane, .*fewest"):
        EUPruner(num_samples=1, strategy="tallest")


def test_yaml_blocks_and_help_know_both() -> None:
    blocks = {QSTBlock: ("downsample", "strided"), EUPruningBlock: ("strategy", "fewest")}
    for block, (field, name) in blocks.items():
        schema = block.model_json_schema()["properties"][field]
        assert name in schema["enum"]
        assert f"{name}: " in schema["description"]
    assert "every r-th channel" in str(QSTBlock.model_json_schema())
    assert read_block("eu_pruning", EUPruningBlock, {"strategy": "fewest", "sample_ratio": 0.5}).strategy == "fewest"
    assert "fewest" in shown("prune")
    help_of_sft = shown("sft")
    assert "strided" in help_of_sft
    assert "fewest" in help_of_sft
