"""Vision-language models with pixels: a side network on the language model, in Trainer and in TRL's own path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import GROUPED, randomize_side_network
from datasets import Dataset, Features, Image, List, Value
from peft import PeftModel, get_peft_model
from PIL import Image as Pillow
from qtuning_peft.integrations.trl import main
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from qtuning_peft import (
    EUScorer,
    HiddenStateCacheCallback,
    PrefixCachingCallback,
    SideTuningConfig,
    SideTuningTrainer,
    recipes,
)
from qtuning_peft.loss import chunked_cross_entropy
from qtuning_peft.states import cache_states

SIZE, PATCH = 8, 4  # of pictures, in pixels
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
)


def processor() -> LlavaProcessor:
    words = ["<pad>", "<image>", "user", "assistant", "which", "colour", *COLOURS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def base() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(**GROUPED)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=1, vision_feature_select_strategy="full"
    )
    return LlavaForConditionalGeneration(config).eval()


def rows() -> Dataset:
    """Pictures of one colour, and its name."""
    features = Features({
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    })  # fmt: skip
    found: list[dict[str, Any]] = []
    for name, colour in COLOURS.items():
        messages = [{"role": "user", "content": "which colour"}, {"role": "assistant", "content": name}]
        found.append({"images": [Pillow.new("RGB", (SIZE, SIZE), colour)], "messages": messages})
    return Dataset.from_list(found * 4, features=features)


def batch(names: tuple[str, ...] = tuple(COLOURS)) -> dict[str, torch.Tensor]:
    """As a collator makes it: the same words before each answer, another picture."""
    pictures = [Pillow.fromarray(np.full((SIZE, SIZE, 3), COLOURS[name], dtype=np.uint8)) for name in names]
    texts = [f"user <image> which colour assistant {name}" for name in names]
    inputs = dict(processor()(images=pictures, text=texts, return_tensors="pt"))
    labels = inputs["input_ids"].clone()
    labels[:, :-1] = -100
    return {**inputs, "labels": labels}


def side_tuned(**fields: Any) -> PeftModel:
    model = get_peft_model(base(), SideTuningConfig(reduction_factor=4, tap_every=1, task_type="CAUSAL_LM", **fields))
    randomize_side_network(model)
    return model


def answers(model: Any) -> list[str]:
    """What is generated for each picture, cached as uncached."""
    inputs = batch()
    asked = {name: tensor[:, :-1] if name != "pixel_values" else tensor for name, tensor in inputs.items()}
    del asked["labels"]
    cached, uncached = (
        model.eval().generate(**asked, max_new_tokens=1, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, uncached)
    return processor().tokenizer.decode(cached[:, -1]).split()


@pytest.mark.parametrize("fields", [{}, {"side_attention": True}], ids=["default", "side_attention"])
def test_it_learns_what_is_in_the_pictures_in_trainer(fields: dict[str, Any], tmp_path: Path) -> None:
    model = side_tuned(**fields)
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=40, learning_rate=1e-2, per_device_train_batch_size=3, report_to=[],
        save_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    data: Any = [{name: tensor[index] for name, tensor in batch().items()} for index in range(3)] * 4
    callbacks = [PrefixCachingCallback(), HiddenStateCacheCallback(1)]
    Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    assert all(
        parameter.grad is None and not parameter.requires_grad
        for name, parameter in model.named_parameters()
        if "qst_side_network" not in name
    )
    assert answers(model) == list(COLOURS)
    model.save_pretrained(tmp_path / "adapter")
    assert answers(PeftModel.from_pretrained(base(), tmp_path / "adapter")) == list(COLOURS)
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, base()(**batch()).logits)


def test_the_same_words_beside_another_picture_are_another_row() -> None:
    """Their tokens are the same, so cached states of one must not be taken for the other's."""
    model = side_tuned().train()
    plain = [model(**batch((name,))).loss.item() for name in COLOURS]
    cache_states(model, 2**30)
    for _ in range(2):
        assert [model(**batch((name,))).loss.item() for name in COLOURS] == pytest.approx(plain, rel=1e-6)


def test_chunked_loss_sees_the_pictures(tmp_path: Path) -> None:
    model, inputs = side_tuned().train(), batch()
    expected = model(**inputs)
    assert model(**inputs, chunked_loss=True).loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    with pytest.raises(ValueError, match="pixel_values is not read by the decoder"):
        chunked_cross_entropy(model, **inputs)
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=1, per_device_train_batch_size=3, report_to=[], save_strategy="no", use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    data: Any = [{name: tensor[index] for name, tensor in inputs.items()} for index in range(3)]
    found = SideTuningTrainer(model, arguments, train_dataset=data).train()
    assert found.training_loss == pytest.approx(expected.loss.item(), rel=1e-5)


def test_rows_without_pictures() -> None:
    """Their logits are never all there, and their scores are those of the model's own logits."""
    model, inputs = side_tuned().train(), batch()
    inputs["input_ids"] = torch.randint(3, 9, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    inputs["labels"] = inputs["input_ids"]
    del inputs["pixel_values"]
    chunked = model(**inputs, chunked_loss=True)
    assert chunked.logits is None
    assert chunked.loss.item() == pytest.approx(model(**inputs).loss.item(), rel=1e-5)
    rows = {"input_ids": inputs["input_ids"].tolist(), "labels": inputs["labels"].tolist()}
    with torch.no_grad():
        logits = base()(input_ids=inputs["input_ids"]).logits[:, :-1]
    errors = torch.nn.functional.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:], reduction="none")
    assert EUScorer(base())(rows)["error"] == pytest.approx(errors.mean(1).tolist(), rel=1e-5)
    with pytest.raises(ValueError, match=r"Rows have pictures \(column images\)"):
        EUScorer(base())(rows | {"images": [[]] * 3})


def test_in_trls_own_path(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        tmp_path / "run", max_steps=40, learning_rate=1e-2, per_device_train_batch_size=3, report_to=[], use_cpu=True,
        save_strategy="no", bf16=False, max_length=None, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    config = SideTuningConfig(reduction_factor=4, tap_every=1, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        base(), arguments, train_dataset=rows(), processing_class=processor(), peft_config=config,
        callbacks=[PrefixCachingCallback()],
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0] or losses[-1] < 0.5
    assert answers(trainer.model) == list(COLOURS)


def test_the_recipe(tmp_path: Path) -> None:
    """With a small model and rows for its own, for two steps on a CPU."""
    base().save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    (tmp_path / "rows").mkdir()
    rows().to_parquet(str(tmp_path / "rows" / "train.parquet"))
    recipe = recipes.load("trl/qwen2.5-vl-7b-pictures") | {
        "model_name_or_path": str(tmp_path / "model"), "datasets": [{"path": str(tmp_path / "rows"), "split": "train"}],
        "output_dir": str(tmp_path / "out"), "dtype": "float32", "load_in_4bit": False, "use_bnb_nested_quant": False,
        "use_cpu": True, "bf16": False, "max_steps": 2, "optim": "adamw_torch",
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    main(["--config", str(file)])
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all("language_model.norm.qst_side_network" in key for key in weights)
    answers(PeftModel.from_pretrained(base(), tmp_path / "out"))
    file.write_text(yaml.safe_dump(recipe | {"eu_pruning": {"sample_ratio": 0.5}}))
    with pytest.raises(ValueError, match="eu_pruning is set, but the data has images"):
        main(["--config", str(file)])
