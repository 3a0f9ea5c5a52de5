"""What cannot have an effect is refused or warned of, at the earliest place that can know; nothing is swallowed."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize_side_network, side_parameters, tiny, token_ids
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from qtuning_peft import PrefixCachingCallback, SideTuningConfig
from qtuning_peft.loss import IGNORE_INDEX


def side_tuned(**options: Any) -> PeftModel:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM", **options))
    randomize_side_network(model)
    return model


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=100,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=99, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def picture() -> dict[str, Tensor]:
    ids = torch.cat([torch.full((1, 4), 99), token_ids(1, 6)], dim=1)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16), "labels": ids.masked_fill(ids == 99, -100)}


def test_a_gradient_of_the_input_embeddings() -> None:
    model = side_tuned().train()
    embeddings = torch.randn(2, 5, 64, requires_grad=True)
    with pytest.warns(UserWarning, match="inputs_embeds requires a gradient, and none reaches it"):
        model(inputs_embeds=embeddings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(inputs_embeds=embeddings.detach())


def test_noise_on_the_embeddings(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, neftune_noise_alpha=5.0
    )
    rows = Dataset.from_dict({"input_ids": token_ids().tolist(), "labels": token_ids().tolist()})
    trainer = Trainer(side_tuned(), arguments, train_dataset=rows)
    with pytest.raises(ValueError, match=r"neftune_noise_alpha is 5\.0, .*; leave it out"):
        trainer.train()


@pytest.mark.parametrize("given", ["all-linear", ["q_proj"], "q_proj|v_proj"])
def test_target_modules(given: Any) -> None:
    with pytest.raises(
        ValueError, match=r"target_modules is .*, but a side network attaches at the final norm; leave it"
    ):
        get_peft_model(tiny(), SideTuningConfig(target_modules=given))


def test_taps_further_apart_than_there_are_blocks() -> None:
    with pytest.warns(UserWarning, match="tap_every is 50, but the base has 3 blocks: only the last is tapped"):
        side_tuned(tap_every=50)
    get_peft_model(tiny(num_hidden_layers=2), SideTuningConfig())


def test_a_task_of_encoder_decoders() -> None:
    with pytest.raises(ValueError, match=r"task_type is 'SEQ_2_SEQ_LM', .*; choose CAUSAL_LM"):
        SideTuningConfig(task_type="SEQ_2_SEQ_LM")


def test_weights_that_keep_the_base_s_dtype() -> None:
    with pytest.warns(UserWarning, match="autocast_adapter_dtype is False, but a side network's weights are float32"):
        get_peft_model(tiny().to(torch.bfloat16), SideTuningConfig(), autocast_adapter_dtype=False)


def test_a_config_serves_bases_of_two_sizes_and_stays_as_it_was() -> None:
    config = SideTuningConfig(reduction_factor=4)
    before = copy.deepcopy(vars(config))
    for size in (64, 32):
        model = get_peft_model(tiny(hidden_size=size), config)
        assert model.peft_config["default"].base_hidden_size == size
    changed = {name for name in before if before[name] != vars(config)[name]}
    assert changed <= {"base_model_name_or_path"}, changed


def test_modules_in_front_of_the_decoder() -> None:
    with pytest.raises(
        ValueError, match="modules_to_save names multi_modal_projector, which runs in front of the base"
    ):
        get_peft_model(llava(), SideTuningConfig(modules_to_save=["multi_modal_projector"]))


def test_modules_in_front_of_the_decoder_set_to_train_by_hand() -> None:
    model = get_peft_model(llava(), SideTuningConfig(task_type="CAUSAL_LM")).train()
    model(**picture()).loss.backward()
    model.get_base_model().enable_input_require_grads()
    model(**picture()).loss.backward()
    model.get_base_model().get_submodule("model.multi_modal_projector").requires_grad_(True)
    with pytest.raises(ValueError, match="4 parameters in front of the base's blocks require a gradient"):
        model(**picture())
    with torch.no_grad():
        model(**picture())


@pytest.mark.parametrize("spoilt", ["infinite", "nan"])
def test_a_first_batch_that_is_not_finite_leaves_the_centers_to_the_next(spoilt: str) -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM", tap_every=1)).train()
    centers = [buffer for name, buffer in model.named_buffers() if name.endswith(".center")]
    ids = token_ids()

    def step(value: float | None) -> None:
        hook = (
            model.get_base_model()
            .model.layers[0]
            .mlp.register_forward_hook(
                lambda module, args, output: output if value is None else output.index_fill(0, torch.tensor([1]), value)
            )
        )
        model(input_ids=ids, labels=ids).loss.backward()
        hook.remove()

    step(float("inf") if spoilt == "infinite" else float("nan"))
    assert all(center.isfinite().all() for center in centers)
    step(None)
    assert all(center.isfinite().all() and center.any() for center in centers)


class ReadsThePrompt(Trainer):
    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        output = model(**inputs)
        return output.loss + output.logits[:, :4].float().logsumexp(-1).mean()


def test_a_loss_of_ones_own_that_reads_the_prefix(tmp_path: Path) -> None:
    """Otherwise the gradient of those positions is silently lost."""
    rows = [[*range(3, 23), *token_ids(1, 6, seed=index)[0].tolist()] for index in range(4)]
    labels = [[IGNORE_INDEX] * 22 + row[22:] for row in rows]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, per_device_train_batch_size=2
    )
    data = Dataset.from_dict({"input_ids": rows, "labels": labels})
    for trainer_class in (Trainer, ReadsThePrompt):
        trainer = trainer_class(side_tuned(), arguments, train_dataset=data, callbacks=[PrefixCachingCallback()])
        if trainer_class is Trainer:
            trainer.train()
            continue
        with pytest.raises(RuntimeError, match=r"The loss reads positions of the prompt prefix.*PrefixCachingCallback"):
            trainer.train()


@pytest.mark.parametrize("options", [{"save_embedding_layers": True}, {"safe_serialization": False}], ids=str)
def test_a_file_that_could_not_be_loaded_is_not_written(options: dict[str, bool], tmp_path: Path) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is {options[name]}, .*; leave it out"):
        side_tuned().save_pretrained(tmp_path, **options)
    assert not any(tmp_path.rglob("adapter_model*"))


def test_rows_of_added_tokens_are_warned_of_when_saved(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    for rows in (100, 104):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(rows, mean_resizing=False)
        model = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.save_pretrained(tmp_path / "adapter")
        found = [str(entry.message) for entry in caught if "vocabulary" in str(entry.message)]
        assert bool(found) == (rows == 104)
    assert "The base's vocabulary has 104 tokens, and 100 where it is loaded from" in found[0]


def test_trainable_parameters_alone_are_no_adapter() -> None:
    model = side_tuned()
    alone = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(alone) == len(side_parameters(model))
    with pytest.raises(ValueError, match=r"The adapter lacks .*center"):
        model.load_state_dict(alone, strict=False)


def test_few_shot_examples_that_fill_the_rows(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    ids = [*range(3, 30)]
    for rows, warned in (([ids, ids], True), ([ids, [*ids[:-1], 5]], False)):
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Trainer(side_tuned(), arguments, train_dataset=data, callbacks=[PrefixCachingCallback()]).train()
        found = [entry for entry in caught if "The first 2 rows are the same 27 tokens" in str(entry.message)]
        assert bool(found) == warned
