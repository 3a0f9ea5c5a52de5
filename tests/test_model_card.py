"""The card of a saved adapter: what the Hub reads, what a reader needs, and nothing of the author's lost."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import EVERY_PART, randomize_side_network, side_parameters, tiny, token_ids
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from qtuning_peft.integrations.metadata import TrainingMetadataCallback, count, datasets_on_the_hub, shown
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from qtuning_peft import SideTuningConfig
from qtuning_peft.hub.card import complete
from qtuning_peft.hub.metadata import TrainingMetadata, slowdown
from qtuning_peft.hub.sharing import describe
from qtuning_peft.states import cache_states


@pytest.fixture
def model(tmp_path: Path) -> PeftModel:
    tiny().save_pretrained(tmp_path / "base")
    base = type(tiny()).from_pretrained(tmp_path / "base")
    return get_peft_model(base, SideTuningConfig(reduction_factor=4, downsample="avgpool", task_type="CAUSAL_LM"))


def test_it_says_what_the_hub_reads(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "adapter")
    data = ModelCard.load(tmp_path / "adapter" / "README.md").data
    assert data.library_name == "peft"
    # Where the base lies on this machine is of no use to the Hub, which would refuse the card, nor to a reader.
    assert data.get("base_model") is data.get("base_model_relation") is None
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text()
    model.active_peft_config.base_model_name_or_path = "org/base"
    model.save_pretrained(tmp_path / "adapter")
    data = ModelCard.load(tmp_path / "adapter" / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("org/base", "adapter")
    assert data.pipeline_tag == "text-generation"
    assert {"qst", "side-tuning", "qtuning-peft"} <= set(data.tags)


def test_a_new_card_names_the_paper_and_has_no_form_to_fill_in(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "adapter")
    complete(tmp_path / "README.md", model.active_peft_config)
    for readme in (tmp_path / "adapter" / "README.md", tmp_path / "README.md"):
        assert "https://arxiv.org/abs/2401.07159" in readme.read_text()
        assert "More Information Needed" not in readme.read_text()


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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task_type": "CAUSAL_LM"}, "`qtuning serve BASE --adapter"),
        ({"task_type": "CAUSAL_LM", "side_attention": True}, "`qtuning serve BASE --engine transformers --adapter"),
        ({"task_type": "SEQ_CLS"}, None),
    ],
)
def test_it_says_how_to_serve_what_generates(settings: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    complete(tmp_path / "README.md", SideTuningConfig(**settings))
    card = (tmp_path / "README.md").read_text()
    assert said in card if said else "qtuning serve" not in card


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


def loss(value: float, data: str = "org/data") -> EvalResult:
    return EvalResult(
        task_type="text-generation", dataset_type=data, dataset_name=data, dataset_split="test", metric_type="loss",
        metric_name="loss", metric_value=value,
    )  # fmt: skip


METADATA = TrainingMetadata(
    recipe="qst:\n  reduction_factor: 4\n", pruning="kept 32 of 64 samples | one way",
    results=(loss(1.25),), datasets=("org/data",),
    language=("en",), license="mit", steps=8, loss=1.5, seconds=90.4, peak_memory=(2**30, "allocated on the GPU"),
    machine="a machine",
)  # fmt: skip


def test_how_it_was_trained_is_told_once_and_stays(model: PeftModel, tmp_path: Path) -> None:
    readme = tmp_path / "adapter" / "README.md"
    model.training_metadata = METADATA
    model.save_pretrained(tmp_path / "adapter")
    first = readme.read_text()
    for known in (
        "| training data | `org/data` |", "| pruning | kept 32 of 64 samples \\| one way |", "| steps | 8 |",
        "| last training loss | 1.5 |", "| time | 90 s |", "| peak memory | 1024 MiB allocated on the GPU |",
        "| machine | a machine |", "| org/data, test | loss | 1.25 |", "```yaml\nqst:\n  reduction_factor: 4\n```",
    ):  # fmt: skip
        assert known in first
    data = ModelCard.load(readme).data
    assert data.eval_results == [loss(1.25)]
    assert (data.datasets, data.language, data.license) == (["org/data"], ["en"], "mit")
    assert ModelCardData(**yaml.safe_load(first.split("---")[1])).eval_results == [loss(1.25)]

    # Someone who knows nothing of the training saves it again.
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    again.save_pretrained(tmp_path / "adapter")
    assert readme.read_text() == first
    shown = dict(describe(str(tmp_path / "adapter")))
    assert shown["pruning"] == "kept 32 of 64 samples | one way"
    assert (shown["training data"], shown["loss on org/data, test"], shown["licence"]) == ("org/data", "1.25", "mit")


def test_new_training_metadata_replace_what_they_state_and_nothing_else(model: PeftModel, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    config = model.active_peft_config
    complete(readme, config, training=METADATA)
    card = ModelCard.load(readme)
    card.text = "# My poems\n" + card.text + "\n## Thanks\n"
    card.data.datasets += ["org/mine"]
    card.save(readme)

    complete(readme, config, training=TrainingMetadata(pruning="none", results=(loss(1.0),), steps=9))
    card = ModelCard.load(readme)
    assert card.text.count("## How it was trained") == 1
    assert "| steps | 9 |" in card.text
    assert "| steps | 8 |" not in card.text
    assert "# My poems" in card.text
    assert "## Thanks" in card.text
    assert card.data.datasets == ["org/data", "org/mine"]
    assert card.data.eval_results == [loss(1.0)]
    assert (card.data.language, card.data.license) == (["en"], "mit")

    # Metadata alone change no text.
    complete(readme, config, training=TrainingMetadata(results=(loss(2.0, "org/other"),)))
    text = ModelCard.load(readme).text
    assert ModelCard.load(readme).data.eval_results == [loss(2.0, "org/other")]
    complete(readme, config, training=TrainingMetadata(datasets=("org/more",), language=("de",), license="apache-2.0"))
    card = ModelCard.load(readme)
    assert card.text == text
    assert (card.data.datasets, card.data.language, card.data.license) == (["org/more"], ["de"], "apache-2.0")


def test_the_limits_are_always_said(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "adapter")
    limits = (tmp_path / "adapter" / "README.md").read_text().split("## Limits")[1].split("##")[0]
    for limit in ("works only beside", "cannot be merged", "slower", "`qtuning_peft` is installed"):
        assert limit in limits


def test_a_recipe_in_a_card_names_no_path_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    secret = "s3cret"
    content = yaml.safe_load(f"""
        model_name_or_path: {tmp_path}
        dataset_name: ~/{secret}/rows
        hub_token: {secret}
        output_dir: {secret}
        run_name: {secret}
        max_length: 64
        learning_rate: 1.0e-3
        packing: false
        optim: adamw_torch
        chat_template_path: {secret}
        model_init_kwargs: {{token: {secret}}}
        attn_implementation: C:\\Users\\{secret}
        datasets:
          - {{path: org/data, split: train, token: {secret}, data_files: {secret}}}
          - {{path: ./{secret}, split: test}}
          - {{path: "https://user:{secret}@host/rows"}}
        qst: {{reduction_factor: 4, token: {secret}}}
        eu_pruning: {{sample_ratio: 0.5, scorer_model: /home/{secret}, cache_path: {secret}, report_path: {secret}}}
    """)
    assert shown(content) == {
        "datasets": [{"path": "org/data", "split": "train"}, {"split": "test"}], "max_length": 64, "packing": False,
        "learning_rate": 1e-3, "optim": "adamw_torch", "qst": {"reduction_factor": 4},
        "eu_pruning": {"sample_ratio": 0.5},
    }  # fmt: skip
    files = [{"path": "json"}, {"path": str(tmp_path / "rows")}, "org/data", None]
    assert datasets_on_the_hub(files) == ("org/data",)


def test_a_score_is_that_of_the_weights_it_stands_beside(model: PeftModel) -> None:
    history = [
        {"loss": 3.0, "step": 2}, {"eval_loss": 2.0, "step": 4}, {"eval_loss": 2.5, "step": 6},
        {"loss": 0.5, "step": 8}, {"train_runtime": 7.0, "step": 8},
    ]  # fmt: skip
    state = SimpleNamespace(log_history=history, global_step=8, best_global_step=4)
    callback = TrainingMetadataCallback(model)
    names = []
    for best in (False, True):
        callback.on_log(SimpleNamespace(load_best_model_at_end=best), state, None)
        (result,) = model.training_metadata.results
        names.append((result.metric_name, result.metric_value))
    assert names == [("loss after 6 steps", 2.5), ("loss after 4 steps", 2.0)]
    known = model.training_metadata
    assert f"torch {torch.__version__}" in known.versions
    assert (known.pruning, known.steps, known.loss, known.seconds) == ("none in this training", 8, 0.5, 7.0)


def test_the_loss_before_training_stands_beside_the_loss_after_it(model: PeftModel) -> None:
    callback = TrainingMetadataCallback(model)
    state = SimpleNamespace(log_history=[{"eval_loss": 3.0, "step": 0}], global_step=0, best_global_step=None)
    arguments = SimpleNamespace(load_best_model_at_end=False)
    callback.on_log(arguments, state, None)
    assert [result.metric_name for result in model.training_metadata.results] == ["loss before training"]
    state.global_step, state.log_history = 8, [*state.log_history, {"eval_loss": 2.0, "step": 8}]
    callback.on_log(arguments, state, None)
    results = [(result.metric_name, result.metric_value) for result in model.training_metadata.results]
    assert results == [("loss before training", 3.0), ("loss", 2.0)]
    assert model.training_metadata.seconds is None


def test_the_time_of_a_resumed_training_says_from_where_it_counts(model: PeftModel) -> None:
    callback = TrainingMetadataCallback(model)
    state = SimpleNamespace(log_history=[], global_step=8, best_global_step=None)
    callback.on_train_begin(SimpleNamespace(learning_rate=0.5), state, None)
    state.global_step = 10
    callback.on_log(SimpleNamespace(load_best_model_at_end=False), state, None)
    rows = model.training_metadata.table()
    assert (rows["steps"], rows["time counts"]) == ("10", "from step 8 on")


def test_the_training_data_are_counted(model: PeftModel) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [-100]}]
    packed = [{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, -100], "seq_lengths": [3, 1]}]
    for data, known in ((rows, (2, 2)), (packed, (2, 2)), ([{"input_ids": [1]}], (None, None))):
        assert count(Dataset.from_list(data)) == known
    assert count(Dataset.from_list(rows).select([1])) == (1, 0)
    callback = TrainingMetadataCallback(model)
    state = SimpleNamespace(log_history=[], global_step=0, best_global_step=None)
    callback.on_train_begin(
        SimpleNamespace(), state, None, train_dataloader=SimpleNamespace(dataset=Dataset.from_list(rows))
    )
    callback.on_log(SimpleNamespace(load_best_model_at_end=False), state, None)
    shown = model.training_metadata.table()
    assert (shown["training rows"], shown["supervised tokens"]) == ("2", "2")
    assert "time per generated token" not in shown


@pytest.mark.parametrize("options", [{}, EVERY_PART], ids=["position-wise", "attention"])
def test_the_slow_down_is_measured_and_nothing_is_left_changed(options: dict[str, object]) -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM", side_dropout=0.5, **options)).train()
    randomize_side_network(model)
    cache_states(model, 2**20)
    frozen = next(iter(side_parameters(model).values())).requires_grad_(False)
    inputs = {"input_ids": token_ids(), "labels": token_ids()}
    model(**inputs)  # fills the cache
    torch.manual_seed(0)
    expected = model(**inputs).loss
    modes, drawn = [module.training for module in model.modules()], torch.get_rng_state()

    calls = []
    slow = next(m for name, m in model.named_modules() if "qst_side_network" in name and isinstance(m, nn.Linear))
    handle = slow.register_forward_hook(lambda *_: calls.append(time.sleep(0.05)))
    times, timed = slowdown(model, token_ids(1, 20)[0].tolist(), seconds=60)
    handle.remove()
    # Only the tuned model sleeps, for the prompt and each of ten tokens.
    assert times > 2
    assert len(calls) == 11
    assert "of a training row" in timed

    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad != (p is frozen) for p in side_parameters(model).values())
    torch.manual_seed(0)
    assert torch.equal(model(**inputs).loss, expected)


def ended(model: PeftModel, rows: list[dict[str, list[int]]], main: bool = True) -> dict[str, str]:
    """The card's table after a training on `rows`."""
    state = SimpleNamespace(log_history=[], global_step=8, best_global_step=None, is_world_process_zero=main)
    data = SimpleNamespace(dataset=Dataset.from_list(rows))
    callback, arguments = TrainingMetadataCallback(model), SimpleNamespace(load_best_model_at_end=False)
    callback.on_train_begin(arguments, state, None, train_dataloader=data)
    callback.on_train_end(arguments, state, None, model=model, train_dataloader=data)
    # An evaluation afterwards.
    callback.on_log(arguments, state, None)
    return model.training_metadata.table()


def test_a_card_says_how_much_slower_generation_is(model: PeftModel, tmp_path: Path) -> None:
    rows = [{"input_ids": [5]}, {"input_ids": [3, 4, 5, 6, 7, 8]}]
    shown = ended(model, rows)["time per generated token"]
    number, _, timed = shown.partition(" times the base's ")
    assert 0.2 < float(number) < 20
    assert timed == "(one row with a cache, fastest of 3 tokens after 3 of a training row)"
    model.save_pretrained(tmp_path)
    assert f"| time per generated token | {shown} |" in (tmp_path / "README.md").read_text()
    assert describe(str(tmp_path))["time per generated token"] == shown


def test_the_callback_alone_fills_the_card_of_any_trainer(model: PeftModel, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in token_ids(8, 8).tolist()])
    arguments = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=0.0125, use_cpu=True,
        report_to="none", eval_strategy="epoch", eval_on_start=True, bf16=False,
    )  # fmt: skip
    data = {"train_dataset": rows, "eval_dataset": rows, "callbacks": [TrainingMetadataCallback()]}
    trainer = Trainer(model, arguments, **data)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    card = (tmp_path / "adapter" / "README.md").read_text()
    for known in (
        "| training rows | 8 |", "| steps | 2 |", "| time per generated token | ", "| versions | ",
        "\nlearning_rate: 0.0125", "| unpublished rows | loss before training | ", "| unpublished rows | loss | ",
    ):  # fmt: skip
        assert known in card
    assert str(tmp_path) not in card

    other = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    Trainer(other, arguments, **data | {"callbacks": [TrainingMetadataCallback()]}).train()
    assert not hasattr(other, "training_metadata")


def test_no_slow_down_where_none_can_be_measured(model: PeftModel) -> None:
    rows = [{"input_ids": [3, 4, 5, 6]}]
    assert "time per generated token" not in ended(model, [{"input_ids": [3, 4, 5]}])
    assert "time per generated token" not in ended(model, [{"text": "w1 w2"}])
    model.training_metadata = TrainingMetadata()
    assert ended(model, rows, main=False) == ended(model, [{"text": "w1 w2"}])
    classifier = AutoModelForSequenceClassification.from_config(tiny().config)
    tuned = get_peft_model(classifier, SideTuningConfig(task_type="SEQ_CLS"))
    assert "time per generated token" not in ended(tuned, rows)
    # A pass that fails costs the figure, and not the training.
    with pytest.warns(UserWarning, match="slow-down of generation is not measured: IndexError"):
        shown = ended(model, [{"input_ids": [100_000] * 4}])
    assert shown["steps"] == "8"
    assert "time per generated token" not in shown


def test_the_form_that_peft_leaves_to_be_filled_in_goes(model: PeftModel, tmp_path: Path) -> None:
    get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "More Information Needed" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert "More Information Needed" not in (tmp_path / "README.md").read_text()


def test_cards_of_other_methods_are_left_alone(tmp_path: Path) -> None:
    get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "qtuning" not in (tmp_path / "README.md").read_text()
