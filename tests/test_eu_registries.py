"""A strategy or score from outside the package: one decorated function, known to Python, YAML and the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from datasets import Dataset
from qtuning_peft.integrations.blocks import EUPruningBlock, read_block
from test_eu_pruner import scored_data
from typer.testing import CliRunner

from qtuning_peft import EUPruner, EUScorer, prune
from qtuning_peft.cli import app
from qtuning_peft.eu_plane.scores import SCORES, Predictions, token_score
from qtuning_peft.eu_plane.selection import SAMPLE_STRATEGIES, sample_strategy
from qtuning_peft.eu_plane.tokens import TOKEN_STRATEGIES, token_strategy
from qtuning_peft.registry import Registry


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a test registers is gone after it."""
    kept: list[tuple[Registry[Any], dict[str, Any], dict[str, str]]] = [
        (registry, dict(registry._choices), dict(registry._help))
        for registry in (SAMPLE_STRATEGIES, TOKEN_STRATEGIES, SCORES)
    ]
    yield
    for registry, choices, helps in kept:
        registry._choices, registry._help = choices, helps


def shown(*command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_a_sample_strategy_in_ten_lines(tmp_path: Path) -> None:
    assert "fewest:" not in shown("prune")

    @sample_strategy("fewest", "supervised_tokens")
    def fewest(rows: Any, options: EUPruner) -> Any:
        """Fewest supervised tokens."""
        return -rows["supervised_tokens"]

    scored = scored_data(40).remove_columns("supervised_tokens").add_column("supervised_tokens", list(range(1, 41)))
    kept = scored.map(EUPruner(num_samples=5, strategy="fewest").fit(scored), batched=True)
    assert kept["id"][:] == [0, 1, 2, 3, 4]
    block = read_block("eu_pruning", EUPruningBlock, {"sample_ratio": 0.5, "strategy": "fewest"})
    assert block.pruner(None).strategy == "fewest"
    option = EUPruningBlock.model_json_schema()["properties"]["strategy"]
    assert "fewest: fewest supervised tokens" in option["description"]
    assert option["enum"] == [*SAMPLE_STRATEGIES]
    for command in ("prune", "plot"):
        assert "fewest: fewest supervised tokens" in shown(command)

    scored.to_parquet(str(tmp_path / "scored.parquet"))
    command = ["prune", str(tmp_path / "scored.parquet"), "-o", str(tmp_path / "kept.jsonl")]
    result = CliRunner().invoke(app, [*command, "--num-samples", "5", "--strategy", "fewest"])
    assert result.exit_code == 0, result.output
    assert "(5 kept, 35 dropped)" in " ".join(result.output.split())


def test_a_score_is_computed_for_the_strategies_that_read_it() -> None:
    @token_score("margin")
    def margin(predictions: Predictions) -> torch.Tensor:
        """Log-probability of the likeliest token."""
        return predictions.shifted.amax(-1) - predictions.log_partition

    @sample_strategy("unsure", "margin")
    def unsure(rows: Any, options: EUPruner) -> Any:
        """Least sure of its likeliest tokens."""
        return -rows["margin"]

    @token_strategy("surest", "token_margin")
    def surest(row: Any, options: EUPruner) -> np.ndarray:
        """Tokens where the model is surest."""
        return -np.asarray(row["token_margin"])

    draw = np.random.default_rng(0)
    data = Dataset.from_dict({"input_ids": [draw.integers(3, 100, 12).tolist() for _ in range(6)]})
    options = {"strategy": "unsure", "token_strategy": "surest", "token_ratio": 0.5, "num_samples": 3}
    kept = prune(data, tiny(), **options, scoring={"progress": False})
    scored = EUScorer(tiny(), scores=("margin",))(data[:])
    best = sorted(np.argsort(scored["margin"])[:3])
    assert kept["input_ids"][:] == [data["input_ids"][i] for i in best]
    for row, index in zip(kept, best, strict=True):
        np.testing.assert_allclose(np.sort(row["token_margin"]), np.sort(scored["token_margin"][index])[-5:], atol=1e-6)
    assert "margin: log-probability of the likeliest token" in shown("score")


def test_few_shot_gain_as_the_documents_write_it() -> None:
    """The difference of two losses that the model gives itself, with the examples before the row and without."""
    text = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    (snippet,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "few_shot_gain" in block)
    names: dict[str, Any] = {}
    exec(snippet, names)

    @sample_strategy("gains", "few_shot_gain")
    def gains(rows: Any, options: EUPruner) -> Any:
        """Highest few-shot gain."""
        return rows["few_shot_gain"]

    draw, model = np.random.default_rng(0), tiny().double()
    data = Dataset.from_dict({"input_ids": [draw.integers(3, 100, n).tolist() for n in (9, 4, 12, 7)]})
    data = data.map(lambda row: {"labels": [-100, -100, *row["input_ids"][2:]]})

    def loss(before: list[int], row: dict[str, Any]) -> float:
        tokens, labels = torch.tensor([before + row["input_ids"]]), torch.tensor([[-100] * len(before) + row["labels"]])
        with torch.no_grad():
            return float(model(input_ids=tokens, labels=labels).loss)

    expected = [loss([], row) - loss(names["EXAMPLES"], row) for row in data]
    kept = prune(data, model, strategy="gains", num_samples=2, scoring={"progress": False})
    assert kept["input_ids"][:] == [data[int(i)]["input_ids"] for i in sorted(np.argsort(expected)[-2:])]
    np.testing.assert_allclose(np.sort(kept["few_shot_gain"]), np.sort(expected)[-2:], atol=1e-6)


def test_names_that_are_taken_or_unknown_are_refused() -> None:
    with pytest.raises(ValueError, match="strategy random is registered already"):
        sample_strategy("random", "error")(lambda rows, options: rows["error"])
    with pytest.raises(ValueError, match="scores is 'best'; choose one of error, uncertainty, el2n"):
        EUScorer(tiny(), scores=("best",))
    with pytest.raises(ValueError, match="token_reference_error, but reference_model is None"):
        EUScorer(tiny(), scores=("token_reference_error",))


def test_every_option_has_its_help() -> None:
    text = shown("prune")
    for name, option in EUPruningBlock.model_json_schema()["properties"].items():
        assert option["description"], name
        if name in EUPruner.__dataclass_fields__:
            assert f"--{name.replace('_', '-')}" in text
