"""The prompt prefix that rows share, computed once: loss and gradient are those of the whole rows, in every family."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import (
    FAMILIES,
    config_of,
    randomize_side_network,
    side_parameters,
    tiny,
    token_ids,
    without_pictures,
    word_tokenizer,
)
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, DataCollatorForSeq2Seq, TrainingArguments

from qtuning_peft import PrefixCachingCallback, SideTuningConfig, SideTuningTrainer, add_few_shot_examples
from qtuning_peft.loss import chunked_cross_entropy
from qtuning_peft.side_tuning.follow import find_decoder
from qtuning_peft.states import common_prefix, reuse_of
from qtuning_peft.states.reuse import depends_on_length

PREFIX = 20
TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"


def side_tuned(family: str = "llama", **fields: Any) -> Any:
    model = get_peft_model(
        tiny(family), SideTuningConfig(reduction_factor=4, tap_every=1, task_type="CAUSAL_LM", **fields)
    ).train()
    randomize_side_network(model)
    return model


def batch(prefix: int = PREFIX) -> dict[str, torch.Tensor]:
    """Three rows of unequal lengths, padded at the right, that begin alike."""
    ids = token_ids(3, 32)
    ids[:, :prefix] = ids[0, :prefix]
    mask = torch.ones_like(ids)
    mask[1, 29:] = 0
    mask[2, 25:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : prefix + 1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = chunked_cross_entropy(model, **inputs)
    loss.backward()
    return loss.item(), {
        name: parameter.grad.clone() for name, parameter in side_parameters(model).items() if parameter.grad is not None
    }


def passed_lengths(model: Any) -> list[int]:
    """Lengths of what the first block of the base is given from now on."""
    lengths: list[int] = []
    find_decoder(model.get_base_model()).blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    return lengths


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_whole_rows(family: str) -> None:
    """Whatever positions and masks a family has, windows shorter than the prefix included."""
    model, inputs = side_tuned(family), batch()
    loss, gradients = loss_and_gradients(model, inputs)
    reuse_of(model).cache_prefix(inputs["input_ids"][0, :PREFIX].tolist())
    lengths = passed_lengths(model)
    for _ in range(2):  # the second time from what is kept
        shared_loss, shared = loss_and_gradients(model, inputs)
        assert shared_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(shared[name], gradient, rtol=1e-3, atol=1e-5)
    assert lengths == [PREFIX, 12, 12]


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_however_taps_are_held(storage: str) -> None:
    """A second pass of the base for the taps finds the prefix as the first did."""
    model, inputs = side_tuned(tap_storage=storage), batch()
    loss, gradients = loss_and_gradients(model, inputs)
    reuse_of(model).cache_prefix(inputs["input_ids"][0, :PREFIX].tolist())
    shared_loss, shared = loss_and_gradients(model, inputs)
    assert shared_loss == pytest.approx(loss, rel=1e-4)
    name = max(gradients, key=lambda name: float(gradients[name].norm()))
    difference = (shared[name] - gradients[name]).norm() / gradients[name].norm()
    assert difference < (0.02 if storage == "int8" else 1e-4)


def other_rows(name: str) -> dict[str, torch.Tensor]:
    inputs = batch()
    if name == "another beginning":
        inputs["input_ids"][1, 3] = 3 + (inputs["input_ids"][1, 3] - 2) % 90
    elif name == "padding at the left":
        inputs["attention_mask"][2] = inputs["attention_mask"][2].flip(0)
    elif name == "packed":
        del inputs["attention_mask"]
        inputs["position_ids"] = torch.cat([torch.arange(24), torch.arange(8)]).expand(3, -1)
    return inputs


@pytest.mark.parametrize("name", ["another beginning", "padding at the left", "packed"])
def test_other_batches_are_computed_whole(name: str) -> None:
    """Bit for bit as if no prefix had been named."""
    model, inputs = side_tuned(), other_rows(name)
    loss, _ = loss_and_gradients(model, inputs)
    reuse_of(model).cache_prefix(batch()["input_ids"][0, :PREFIX].tolist())
    lengths = passed_lengths(model)
    assert loss_and_gradients(model, inputs)[0] == loss
    assert lengths == [32]


def test_whoever_reads_the_prefix_has_it_computed_whole() -> None:
    """A batch supervised from its start, logits that are asked for, and a loss that nobody knows."""
    model, inputs = side_tuned(), batch()
    full = {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    unlabelled = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    read = inputs["labels"].roll(-1, 1) != -100
    with torch.no_grad():
        expected = model(**unlabelled).logits
    gradients = loss_and_gradients(model, full)
    reuse_of(model).cache_prefix(inputs["input_ids"][0, :PREFIX].tolist())
    lengths = passed_lengths(model)
    again = loss_and_gradients(model, full)
    assert again[0] == gradients[0]
    assert all(torch.equal(again[1][name], gradient) for name, gradient in gradients[1].items())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[read], expected[read])
    torch.testing.assert_close(model(**unlabelled).logits.detach(), expected)
    model.get_base_model().config.use_cache = False  # as trainers set it
    torch.testing.assert_close(model.eval()(**inputs).logits.detach(), expected)
    assert lengths == [32, PREFIX, 12, 32, 32]  # labels say where logits are read, with gradients or without


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_share_nothing(rope_type: str) -> None:
    """A prefix alone would be rotated otherwise."""
    config = config_of("llama")
    assert not depends_on_length(config)
    config.rope_parameters = {"full_attention": {"rope_type": rope_type}}
    assert depends_on_length(config)


def test_side_blocks_that_attend_see_whole_rows() -> None:
    """They attend to the prefix, with keys and values that training changes."""
    model, inputs = side_tuned(side_attention=True), batch()
    reuse_of(model).cache_prefix(inputs["input_ids"][0, :PREFIX].tolist())
    lengths = passed_lengths(model)
    loss_and_gradients(model, inputs)
    assert lengths == [32]


def test_generation_and_caches_are_left_alone() -> None:
    """Generation and whoever asks for a cache get the model's own."""
    model, inputs = side_tuned().eval(), batch()
    ids = inputs["input_ids"][:1, :25]
    expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    reuse_of(model).cache_prefix(ids[0, :PREFIX].tolist())
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), expected)
    assert model(input_ids=ids).past_key_values.get_seq_length() == 25


def test_a_classifier_reads_the_last_token_of_whole_rows() -> None:
    """Logits of a classification head, whose padding is counted in whole rows."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config_of("llama", num_labels=2))
    model: Any = get_peft_model(base, SideTuningConfig(reduction_factor=4, task_type="SEQ_CLS")).train()
    randomize_side_network(model)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    expected = model(**inputs).logits
    reuse_of(model).cache_prefix(inputs["input_ids"][0, :PREFIX].tolist())
    lengths = passed_lengths(model)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert lengths == [PREFIX, 12]


def test_an_evaluation_of_the_loss_alone_reuses_it() -> None:
    """As that of `SideTuningTrainer`, which asks for no logits."""
    model, inputs = side_tuned().eval(), batch()
    with torch.no_grad():
        expected = chunked_cross_entropy(model, **inputs)
        reuse_of(model).cache_prefix(inputs["input_ids"][0, :PREFIX].tolist())
        lengths = passed_lengths(model)
        torch.testing.assert_close(chunked_cross_entropy(model, **inputs), expected, rtol=1e-5, atol=1e-6)
    assert lengths == [PREFIX, 12]


def test_a_model_is_copied_without_what_was_kept() -> None:
    """A copy computes the prefix itself."""
    model, inputs = side_tuned(), batch()
    reuse_of(model).cache_prefix(inputs["input_ids"][0, :PREFIX].tolist())
    loss, _ = loss_and_gradients(model, inputs)
    assert loss_and_gradients(copy.deepcopy(model), inputs)[0] == pytest.approx(loss, rel=1e-6)
    assert not pickle.loads(pickle.dumps(reuse_of(model).prefix))._computed


def rows_of(inputs: dict[str, torch.Tensor]) -> list[dict[str, list[int]]]:
    lengths = inputs["attention_mask"].sum(1).tolist()
    return [
        {name: inputs[name][index, :length].tolist() for name in ("input_ids", "labels")}
        for index, length in enumerate(lengths)
    ]


def test_the_prefix_ends_before_what_predicts_a_supervised_token() -> None:
    """So that every hidden state with a loss behind it is computed in its row."""
    rows = rows_of(batch())
    assert common_prefix(rows) == rows[0]["input_ids"][:PREFIX]
    earlier = [{**row, "labels": [-100] * 18 + row["input_ids"][18:]} for row in rows]
    assert common_prefix(earlier) == rows[0]["input_ids"][:17]
    completions = [{"input_ids": row["input_ids"], "completion_mask": [0] * 18 + [1] * 7} for row in rows]
    assert common_prefix(completions) == rows[0]["input_ids"][:17]
    assert common_prefix([{"input_ids": row["input_ids"]} for row in rows]) == []
    assert common_prefix([{**row, "labels": row["input_ids"]} for row in rows]) == []
    assert common_prefix([{"input_ids": row["input_ids"], "label": 1} for row in rows]) == rows[0]["input_ids"][:PREFIX]
    assert common_prefix(Dataset.from_list(rows).with_format("torch")) == rows[0]["input_ids"][:PREFIX]
    assert common_prefix([{**row, "label": 1, "labels": row["input_ids"]} for row in rows]) == []
    assert common_prefix([{"input_ids": torch.tensor([row["input_ids"]])} for row in rows]) == []
    assert common_prefix([]) == common_prefix([(1, 2)]) == common_prefix([{"text": "a"}]) == []


def test_the_trainer_shares_what_its_rows_begin_with(tmp_path: Any) -> None:
    """Two steps end at the weights of two steps over whole rows; afterwards nothing is kept."""
    rows = rows_of(batch())
    weights = []
    for shared in (True, False):
        model = side_tuned()
        trainer = SideTuningTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2,
                use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForSeq2Seq(word_tokenizer()),
        )  # fmt: skip
        if not shared:
            trainer.remove_callback(PrefixCachingCallback)
        lengths = passed_lengths(model)
        trainer.train()
        assert lengths == ([PREFIX, 12, 12] if shared else [32, 32])
        assert reuse_of(model).prefix is None
        weights.append({name: value.detach().clone() for name, value in side_parameters(model).items()})
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


# -- few-shot examples ---------------------------------------------------------------------------------------------


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


def test_few_shot_examples_come_behind_the_system_prompt() -> None:
    """In whatever is rendered, whatever characters they have; also from a saved tokenizer."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "\n" + TEMPLATE
    shown = turns('a "quoted" {{ question }}\n\\n', "ein Ä, 🙂 {% raw %}")
    question = turns("q")
    system = [{"role": "system", "content": "s"}]
    expected = [
        tokenizer.apply_chat_template(messages, tokenize=False)
        for messages in (shown + question, system + shown + question)
    ]
    add_few_shot_examples(tokenizer, shown)
    assert tokenizer.apply_chat_template(question, tokenize=False) == expected[0]
    assert tokenizer.apply_chat_template(system + question, tokenize=False) == expected[1]


@pytest.mark.parametrize(
    ("messages", "template", "sentence"),
    [
        ([], TEMPLATE, "messages are 0 turns"),
        (turns("a"), TEMPLATE, "messages are 1 turns"),
        (turns("a", "b")[::-1], TEMPLATE, r"messages\[0\] has role 'assistant'"),
        ([{"role": "user", "content": ["a"]}, *turns("a", "b")[1:]], TEMPLATE, "content of type list"),
        (turns("a", "b"), None, "chat_template is unset"),
    ],
)
def test_few_shot_examples_that_are_none(messages: Any, template: str | None, sentence: str) -> None:
    """One sentence, and the template is as it was."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=sentence):
        add_few_shot_examples(tokenizer, messages)
    assert tokenizer.chat_template == template


def test_few_shot_examples_twice_are_refused() -> None:
    """They would be rendered twice."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    add_few_shot_examples(tokenizer, turns("a", "b"))
    with pytest.raises(ValueError, match="has few-shot examples already"):
        add_few_shot_examples(tokenizer, turns("c", "d"))


def test_trl_renders_few_shot_examples_and_computes_them_once(tmp_path: Any) -> None:
    """`SFTTrainer` on prompts and completions: the examples are in every row, and not supervised."""
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('w1 ' if m['role'] == 'user' else 'w2 ') + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
    )
    add_few_shot_examples(tokenizer, turns("w5 w6 w7", "w8 w9 w8 w9", "w6 w6 w7", "w9 w9 w8 w8"))
    rows = [
        {"prompt": turns(f"w{20 + index} w4"), "completion": turns("", f"w{30 + index} w3 w3")[1:]}
        for index in range(4)
    ]
    model = side_tuned()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, use_cpu=True, bf16=False,
            report_to="none", save_strategy="no", gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[PrefixCachingCallback()],
    )  # fmt: skip
    lengths = passed_lengths(model)
    trainer.train()
    # Two examples of 9 tokens and the marker of the question; then its two words, a marker, the answer and its end.
    assert lengths[0] == 19
    assert lengths[1] < 10


def test_blocks_that_do_not_run_keep_nothing_of_a_prefix() -> None:
    config = SideTuningConfig(reduction_factor=4, layers_to_transform=[0, 2, 3], task_type="CAUSAL_LM")
    model = get_peft_model(without_pictures(), config).train()
    randomize_side_network(model)
    inputs = batch()
    expected, gradients = loss_and_gradients(model, inputs)
    reuse: Any = reuse_of(model)
    reuse.cache_prefix(inputs["input_ids"][0, :PREFIX].tolist())
    loss, others = loss_and_gradients(model, inputs)
    assert loss == expected
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=0, msg=name)
