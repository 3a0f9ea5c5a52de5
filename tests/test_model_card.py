"""The card of a saved adapter: what the Hub reads, what a reader needs, and nothing of the author's lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tiny
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

from qtuning_peft import SideTuningConfig


@pytest.fixture
def model(tmp_path: Path) -> PeftModel:
    tiny().save_pretrained(tmp_path / "base")
    base = type(tiny()).from_pretrained(tmp_path / "base")
    return get_peft_model(base, SideTuningConfig(r=4, downsample="avgpool", task_type="CAUSAL_LM"))


def test_it_says_what_the_hub_reads(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "adapter")
    data = ModelCard.load(tmp_path / "adapter" / "README.md").data
    assert data.library_name == "peft"
    assert data.base_model == str(tmp_path / "base")
    assert data.base_model_relation == "adapter"
    assert data.pipeline_tag == "text-generation"
    assert {"qst", "side-tuning", "qtuning-peft"} <= set(data.tags)


def test_its_snippet_runs_and_imports_first(model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path / "ADAPTER")
    snippet = (tmp_path / "ADAPTER" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert snippet.startswith("import qtuning_peft")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(snippet, scope)
    assert scope["AutoPeftModelForCausalLM"] is AutoPeftModelForCausalLM
    assert isinstance(scope["model"], PeftModel)
    assert scope["model"].active_peft_config.downsample == "avgpool"


def test_what_the_author_wrote_stays(model: PeftModel, tmp_path: Path) -> None:
    readme = tmp_path / "adapter" / "README.md"
    model.save_pretrained(tmp_path / "adapter")
    first = readme.read_text()
    model.save_pretrained(tmp_path / "adapter")
    assert readme.read_text() == first

    card = ModelCard.load(readme)
    card.data.license = "mit"
    card.data.tags = [*card.data.tags, "poetry"]
    card.text = "# My poems\n\nWritten at night.\n" + card.text + "\n## Thanks\n"
    card.save(readme)
    model.active_peft_config.side_dropout = 0.25
    model.save_pretrained(tmp_path / "adapter")
    text = readme.read_text()
    for kept in ("# My poems\n\nWritten at night.\n", "## Thanks", "license: mit", "- poetry", "side_dropout: 0.25"):
        assert kept in text
    assert text.index("# My poems") < text.index("import qtuning_peft") < text.index("## Thanks")
    assert text.count("import qtuning_peft") == 1


def test_cards_of_other_methods_are_left_alone(tmp_path: Path) -> None:
    get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "qtuning" not in (tmp_path / "README.md").read_text()
