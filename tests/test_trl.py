"""TRL's trainers, and its own YAML file with our two blocks, on a pico chat model."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from qtuning_peft.integrations.blocks import EUPruningBlock, QSTBlock, QSTTrainingBlock, read_block
from qtuning_peft.integrations.trl import EUPruningSFTTrainer, main
from safetensors.torch import load_file
from test_trainers import losses, require_only_the_side_network_learned, snapshot
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from qtuning_peft import EUPruner, SideTuningConfig, score


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.prepare(tmp_path_factory.mktemp("pico"))


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / "model")


@pytest.fixture
def base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def chat() -> Dataset:
    return Dataset.from_list([pico.messages(row) for row in pico.rows(64)])


def prompt_and_completion() -> Dataset:
    return Dataset.from_list([{"prompt": r["question"], "completion": " " + r["answer"]} for r in pico.rows(64)])


def settings(output: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output), "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 2e-2,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "max_length": 64, "seed": 0,
    } | overrides  # fmt: skip


def losses_of_training_the_side_network_alone(trainer: Any) -> list[float]:
    before = snapshot(trainer.model)
    trainer.train()
    require_only_the_side_network_learned(before, trainer.model)
    return losses(trainer)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (chat, {"assistant_only_loss": True}),
        (chat, {"packing": True, "num_train_epochs": 6}),
        (chat, {"packing": True, "packing_strategy": "wrapped", "num_train_epochs": 6}),
        (chat, {"assistant_only_loss": True, "bf16": True}),
        (prompt_and_completion, {}),
        (prompt_and_completion, {"completion_only_loss": False}),
        (prompt_and_completion, {"gradient_checkpointing": False}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_sft_trains_the_side_network_alone(
    data: Any, options: dict[str, Any], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trainer = SFTTrainer(
        model=base, args=SFTConfig(**settings(tmp_path, **options)), train_dataset=data(), processing_class=tokenizer,
        peft_config=SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"),
    )  # fmt: skip
    history = losses_of_training_the_side_network_alone(trainer)
    assert sum(history[-3:]) / 3 < sum(history[:3]) / 3 - 0.1


def test_dpo_trains_the_side_network_alone(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = Dataset.from_list(
        [{"prompt": r["question"], "chosen": " w1 w2 w3", "rejected": " w40 w41"} for r in pico.rows(32)]
    )
    options = settings(tmp_path, num_train_epochs=4)
    trainer = DPOTrainer(
        model=base, args=DPOConfig(**options), train_dataset=data, processing_class=tokenizer,
        peft_config=SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"),
    )  # fmt: skip
    history = losses_of_training_the_side_network_alone(trainer)
    # At first the policy is its own reference.
    assert history[0] == pytest.approx(0.6931, abs=1e-3)
    assert history[-1] < 0.5


@pytest.mark.parametrize("packing", [False, True])
def test_what_sft_trains_on_is_what_the_library_keeps(
    packing: bool, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    options = settings(tmp_path, assistant_only_loss=True)
    plain = SFTTrainer(model=base, args=SFTConfig(**options), train_dataset=chat(), processing_class=tokenizer)
    scored = score(plain.train_dataset.select_columns(["input_ids", "labels"]), base, tokenizer, progress=False)
    pruner = EUPruner(sample_ratio=0.5, token_ratio=0.5, tokenizer=tokenizer).fit(scored)
    expected = scored.map(pruner, batched=True)

    trainer = EUPruningSFTTrainer(
        model=base, args=SFTConfig(**options, packing=packing), train_dataset=chat(), processing_class=tokenizer,
        peft_config=SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"),
        eu_pruning=EUPruningBlock(sample_ratio=0.5, token_ratio=0.5),
    )  # fmt: skip
    if packing:
        lengths = [length for row in trainer.train_dataset["seq_lengths"] for length in row]
        assert sorted(lengths) == sorted(len(row) for row in expected["input_ids"])
    else:
        assert trainer.train_dataset["input_ids"][:] == expected["input_ids"][:]
        assert trainer.train_dataset["labels"][:] == expected["labels"][:]
    supervised = sum(label != -100 for row in trainer.train_dataset["labels"] for label in row)
    assert supervised == pruner.pruned.kept_tokens < pruner.pruned.tokens
    assert "misconception" in (tmp_path / "eu_report.html").read_text()
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def run(folder: Path, name: str, content: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return subprocess.run(
        [sys.executable, "-m", "qtuning_peft.cli", "sft", "--config", str(file), *arguments],
        capture_output=True, text=True, cwd=folder,
    )  # fmt: skip


def test_a_recipe_of_trl_becomes_ours_with_a_block(folder: Path, tmp_path: Path) -> None:
    # Double quantization, as in our recipes: on CPUs with AVX512-BF16, bitsandbytes 0.50 packs weights for its kernel
    # and unpacks them for a state dict, which every save takes. Scales that are not quantized themselves come back
    # transposed, so that after the first checkpoint the trainer's base would be another one.
    recipe = settings(tmp_path / "out", eval_strategy="steps", eval_steps=4, save_steps=4, max_steps=8) | {
        "learning_rate": 0.005,
        "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "chat"),
        "assistant_only_loss": True, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True,
        "hub_token": "hf_s3cret",
    }  # fmt: skip
    blocks = {
        "qst": {"reduction_factor": 4, "hidden_state_cache_gib": 1},
        "eu_pruning": {"sample_ratio": 0.5, "token_ratio": 0.7},
    }
    done = run(tmp_path, "qst", recipe | blocks, "--weight_decay", "0.125")
    assert done.returncode == 0, done.stderr
    assert "kept 32 of 64 samples" in done.stderr

    out = tmp_path / "out"
    assert all("qst_side_network" in name for name in load_file(out / "adapter_model.safetensors"))
    state = yaml.safe_load((out / "checkpoint-8" / "trainer_state.json").read_text())
    evaluations = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert evaluations[1] < evaluations[0]

    # What the file, the command line and the log say of it is in its card, but nothing of this machine.
    card = ModelCard.load(out / "README.md")
    for known in (
        "| pruning | kept 32 of 64 samples", "| training rows | 32 |", "| supervised tokens | ", "| steps | 8 |",
        "| time per generated token | ", "token_ratio: 0.7", "hidden_state_cache_gib: 1",
        "learning_rate: 0.005", "weight_decay: 0.125", "load_in_4bit: true", "| machine | ", "MiB resident",
        "import qtuning_peft", "huggingface/trl",
    ):  # fmt: skip
        assert known in card.text
    assert (card.data.library_name, card.data.datasets) == ("peft", None)
    assert [result.metric_value for result in card.data.eval_results] == [round(evaluations[1], 4)]
    for mine in (str(folder), str(tmp_path), "s3cret", platform.node()):
        assert mine not in str(card)

    # Loaded with plain PEFT, the adapter has the loss that the trainer saw.
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=quantization), out
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    test = load_dataset(str(folder / "chat"), split="test")
    scored = score(test, model, tokenizer, progress=False)
    tokens = scored["supervised_tokens"][:]
    loss = sum(e * n for e, n in zip(scored["error"], tokens, strict=True)) / sum(tokens)
    assert loss == pytest.approx(evaluations[1], abs=2e-2)

    # Other ratios need no new scores; a finished run goes on from its checkpoint.
    parts = {file: file.stat().st_mtime_ns for file in (out / "eu_scores").iterdir()}
    blocks["eu_pruning"]["sample_ratio"] = 0.25
    done = run(
        tmp_path, "again", recipe | blocks | {"max_steps": 10, "resume_from_checkpoint": str(out / "checkpoint-8")}
    )
    assert done.returncode == 0, done.stderr
    assert "kept 16 of 64 samples" in done.stderr
    card = ModelCard.load(out / "README.md")
    assert "| steps | 10 |" in card.text
    assert "from step 8 on" in card.text
    assert "kept 32 of" not in card.text
    assert len(card.data.eval_results) == 1
    assert parts == {file: file.stat().st_mtime_ns for file in (out / "eu_scores").iterdir()}


def test_a_recipe_of_trl_without_blocks_is_as_it_was(folder: Path, tmp_path: Path) -> None:
    recipe = settings(tmp_path / "out", max_steps=2) | {
        "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "chat"),
        "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    done = run(tmp_path, "lora", recipe, "--learning_rate", "1e-3")
    assert done.returncode == 0, done.stderr
    assert all("lora" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert "qtuning" not in (tmp_path / "out" / "README.md").read_text()


def test_batches_are_pruned_dynamically(folder: Path, tmp_path: Path) -> None:
    recipe = settings(tmp_path / "out", max_steps=4, per_device_train_batch_size=8) | {
        "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "chat"),
        "qst": {"reduction_factor": 4}, "eu_pruning": {"mode": "dynamic", "sample_ratio": 0.5},
    }  # fmt: skip
    done = run(tmp_path, "dynamic", recipe)
    assert done.returncode == 0, done.stderr
    state = yaml.safe_load((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    kept = [entry["kept_samples"] for entry in state["log_history"] if "kept_samples" in entry]
    assert len(kept) == 4
    assert all(0 < share <= 0.625 for share in kept)
    assert "| pruning | every batch while training, which kept" in (tmp_path / "out" / "README.md").read_text()


def test_a_sweep_beside_a_live_base(folder: Path, tmp_path: Path) -> None:
    """Several networks on one pass of the base; the best is saved, as any adapter is."""
    recipe = settings(tmp_path / "out", eval_strategy="epoch") | {
        "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "chat"), "assistant_only_loss": True,
        "qst": {"reduction_factor": 4}, "sweep": {"learning_rate": ["1e-4", 2e-2], "mixing": ["additive", "paper"]},
    }  # fmt: skip
    done = run(tmp_path, "sweep", recipe)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(row["learning_rate"], row["mixing"]) for row in rows] == [
        (1e-4, "additive"), (1e-4, "paper"), (2e-2, "additive"), (2e-2, "paper")
    ]  # fmt: skip
    best = min(rows, key=lambda row: row["eval_loss"])
    assert best["learning_rate"] == 2e-2
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), tmp_path / "out")
    scored = score(
        load_dataset(str(folder / "chat"), split="test"),
        model,
        AutoTokenizer.from_pretrained(folder / "model"),
        progress=False,
    )
    tokens = scored["supervised_tokens"][:]
    loss = sum(e * n for e, n in zip(scored["error"], tokens, strict=True)) / sum(tokens)
    assert loss == pytest.approx(best["eval_loss"], rel=1e-3)
    assert (tmp_path / "out" / "sweep.png").is_file()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"sweep": {"seed": [0, 1]}}, "sweep needs the block qst, and eval_strategy"),
        ({"qst": {}, "eval_strategy": "epoch", "sweep": {"rank": [0, 1]}}, "sweep.rank is no setting"),
        (
            {"qst": {"hidden_state_cache_gib": 1}, "eval_strategy": "epoch", "sweep": {"seed": [0, 1]}},
            "qst.hidden_state_cache_gib has no effect in a sweep",
        ),
        ({"qst": {"rank": 4}}, "qst.rank is no field; choose from reduction_factor, "),
        ({"qst": {"reduction_factor": 1}}, "qst: reduction_factor is 1; give an integer of at least 2."),
        ({"qst": {"reduction_factor": "wide"}}, "qst.reduction_factor: "),
        ({"qst": {"hidden_state_cache_gib": 0}}, "qst.hidden_state_cache_gib: Input should be greater than 0"),
        ({"qst": 4}, "qst: "),
        ({"qst": {}, "use_peft": True}, "use_peft is true"),
        (
            {"qst": {}, "use_peft": True, "lora_r": 16, "lora_dropout": 0.0, "lora_target_modules": ["q_proj"]},
            "use_peft is true and lora_r is 16 and lora_target_modules is 'q_proj', but there is a block qst; "
            "remove use_peft, lora_r, lora_target_modules: ",
        ),
        ({"eu_pruning": {}}, "eu_pruning: No budget is given"),
        ({"eu_pruning": {"sample_ratio": 2}}, "eu_pruning: sample_ratio is 2"),
        ({"eu_pruning": {"sample_ratio": 0.5, "mode": "often"}}, "eu_pruning.mode: "),
        ({"eu_pruning": {"num_samples": 5, "mode": "dynamic"}}, "sample_ratio is None"),
        ({"eu_pruning": {"sample_ratio": 0.5, "mode": "dynamic", "cache_path": "x"}}, "cache_path is 'x'"),
        ({"eu_pruning": {"sample_ratio": 0.5, "token_strategy": "rho1"}}, "needs a reference model"),
        ({"learning_rat": 1}, "learning_rat"),
    ],
    ids=str,
)
def test_a_wrong_block_is_one_sentence(content: dict[str, Any], sentence: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    recipe = {"model_name_or_path": str(folder / "model"), "output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    file.write_text(yaml.safe_dump(recipe | content))
    with pytest.raises(ValueError, match="(?s).*" + sentence.replace("(", r"\(")):
        main(["--config", str(file)])


def test_a_setting_of_lora_is_refused_as_an_option_too(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    recipe = {"model_name_or_path": str(folder / "model"), "output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    file.write_text(yaml.safe_dump(recipe | {"qst": None}))
    with pytest.raises(ValueError, match="lora_r is 16 and lora_alpha is 8, but there is a block qst"):
        main(["--config", str(file), "--lora-r", "16", "--lora_alpha=8"])


@pytest.mark.parametrize(("rate", "noticed"), [(2e-4, 1), (1e-3, 0)])
def test_a_rate_for_lora_is_noticed_once(
    rate: float, noticed: int, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    EUPruningSFTTrainer(
        model=base, args=SFTConfig(**settings(tmp_path, learning_rate=rate)), train_dataset=chat(),
        processing_class=tokenizer, peft_config=SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"),
    )  # fmt: skip
    assert caplog.text.count("learning_rate is 0.0002, a rate for LoRA") == noticed
    assert noticed or "a rate for LoRA" not in caplog.text


def test_help_lists_our_blocks_and_says_where_those_of_trl_are(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    for field in (*QSTTrainingBlock.model_fields, *EUPruningBlock.model_fields):
        assert f"\n  {field}" in shown
    assert "hidden_size / reduction_factor wide" in " ".join(shown.split())
    assert "Default: 4." in " ".join(shown.split())
    assert shown.count("trl sft --help") == 1
    assert "per_device_train_batch_size" not in shown


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("qtuning_peft.side_tuning.network.downsample", "DOWNSAMPLERS"),
        ("qtuning_peft.eu_plane.strategies", "SAMPLE_STRATEGIES"),
    ],
)
def test_help_knows_what_others_register(
    module: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = getattr(import_module(module), name)
    for table in ("_choices", "_help"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))

    @registry.register("from_outside")
    def choice() -> None:
        """Registered by a test."""

    main(["--help"])
    assert "from_outside: registered by a test" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("text", "sentence"), [("[1, 2]", "holds no keys"), ("a: [", "cannot be read")])
def test_a_wrong_file_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        main(["--config", str(file)])


def test_the_block_has_every_field_of_the_configuration() -> None:
    chosen = {
        "reduction_factor": 4, "downsample": "lora", "downsample_rank": 3, "downsample_norm": False,
        "num_side_heads": 2,
        "layers_to_transform": [0, 2], "side_dropout": 0.1, "mixing": "paper", "compute_dtype": "bfloat16",
        "modules_to_save": ["score"], "target_modules": None, "trainable_token_indices": None,
        "base_hidden_size": 64, "base_num_layers": 4, "tokenizer_fingerprint": None, "tap_storage": "int4",
        "side_attention": True, "tap_every": 2, "center_taps": False,
    }  # fmt: skip
    assert set(QSTBlock.model_fields) == set(chosen)
    config = read_block("qst", QSTBlock, chosen).peft_config()
    assert {name: getattr(config, name) for name in chosen} == chosen


def test_streamed_data_is_pruned_in_batches_alone(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    options = {
        "model": base, "args": SFTConfig(**settings(tmp_path, max_steps=2)), "processing_class": tokenizer,
        "train_dataset": chat().to_iterable_dataset(),
    }  # fmt: skip
    with pytest.raises(ValueError, match="mode is 'static'"):
        EUPruningSFTTrainer(**options, eu_pruning=EUPruningBlock(sample_ratio=0.5))
    trainer = EUPruningSFTTrainer(**options, eu_pruning=EUPruningBlock(sample_ratio=0.5, mode="dynamic"))
    trainer.train()
    assert "kept_samples" in trainer.state.log_history[0]


def test_another_model_can_score(
    folder: Path, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    pico.save_model(tmp_path / "other", seed=5)
    options = settings(tmp_path / "out", assistant_only_loss=True)
    kept = []
    for scorer in (None, str(folder / "model"), str(tmp_path / "other")):
        trainer = EUPruningSFTTrainer(
            model=base, args=SFTConfig(**options), train_dataset=chat(), processing_class=tokenizer,
            peft_config=SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"),
            eu_pruning=EUPruningBlock(sample_ratio=0.5, scorer_model=scorer),
        )  # fmt: skip
        kept.append(trainer.train_dataset["input_ids"][:])
        base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert kept[0] == kept[1] != kept[2]
    assert torch.is_grad_enabled()


def test_data_without_a_column_that_trl_reads(base: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    data = Dataset.from_list([{"question": "a", "answer": "b"}] * 4)
    with pytest.raises(ValueError, match=r"The data has the columns question, answer; TRL needs messages, .* or text"):
        EUPruningSFTTrainer(
            base, SFTConfig(**settings(tmp_path)), train_dataset=data, processing_class=tokenizer,
            peft_config=SideTuningConfig(task_type="CAUSAL_LM"),
        )  # fmt: skip
