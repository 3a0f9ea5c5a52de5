"""Error and uncertainty of tokens and samples, against an independent computation and under any batching."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, randomize_side_network, tiny, token_ids, without_pictures, word_tokenizer
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from qtuning_peft import EUScorer, SideTuningConfig, score
from qtuning_peft.eu_plane import batching
from qtuning_peft.eu_plane.batching import token_scores
from qtuning_peft.eu_plane.fingerprint import stable

SCORES = ("error", "uncertainty", "el2n", "ifd", "supervised_tokens")


def rows_of_tokens(count: int = 7, seed: int = 0) -> dict[str, list[list[int]]]:
    """Rows of 5 to 15 tokens, the first three of which are a prompt."""
    draw = np.random.default_rng(seed)
    input_ids = [draw.integers(3, 100, draw.integers(5, 16)).tolist() for _ in range(count)]
    return {"input_ids": input_ids, "labels": [[-100] * 3 + row[3:] for row in input_ids]}


def by_definition(
    model: torch.nn.Module, row: list[int], labels: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Error, uncertainty and EL2N of a row's supervised tokens from the model's own logits, in NumPy."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0].double().numpy()
    error, uncertainty, el2n = [], [], []
    for t in range(1, len(row)):
        if labels[t] != -100:
            p = np.exp(logits[t - 1] - logits[t - 1].max())
            p /= p.sum()
            error.append(-np.log(p[labels[t]]))
            uncertainty.append(-sum(v * np.log(v) for v in p))
            el2n.append(np.linalg.norm(p - np.eye(len(p))[labels[t]]))
    return np.array(error), np.array(uncertainty), np.array(el2n)


def with_scaled_or_capped_logits() -> list[PreTrainedModel]:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    shape |= {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return [
        Gemma2ForCausalLM(Gemma2Config(**shape, num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.1)),
        CohereForCausalLM(CohereConfig(**shape, logit_scale=3.0)),
        GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=7.0)),
    ]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3_moe"])
def test_scores_are_their_definition(family: str) -> None:
    model, rows = tiny(family).double(), rows_of_tokens()
    scored = EUScorer(model, scores=("el2n",))(rows)
    for index, (row, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
        error, uncertainty, el2n = by_definition(model, row, labels)
        assert scored["error"][index] == pytest.approx(error.mean(), abs=1e-9)
        assert scored["uncertainty"][index] == pytest.approx(uncertainty.mean(), abs=1e-9)
        assert scored["el2n"][index] == pytest.approx(el2n.mean(), abs=1e-9)
        np.testing.assert_allclose(scored["token_error"][index], error, atol=1e-6)
        np.testing.assert_allclose(scored["token_uncertainty"][index], uncertainty, atol=1e-6)
        assert scored["supervised_tokens"][index] == len(error) == len(row) - 3


@pytest.mark.parametrize("model", with_scaled_or_capped_logits(), ids=lambda m: type(m).__name__)
def test_what_a_family_does_behind_its_head_counts(model: PreTrainedModel) -> None:
    model, rows = model.double().eval(), rows_of_tokens(2)
    scored = EUScorer(model)(rows)
    error, uncertainty, _ = by_definition(model, rows["input_ids"][0], rows["labels"][0])
    assert scored["error"][0] == pytest.approx(error.mean(), abs=1e-9)
    assert scored["uncertainty"][0] == pytest.approx(uncertainty.mean(), abs=1e-9)


def test_mixture_of_experts_is_scored() -> None:
    # Not in float64: its grouped matrix product does not know that.
    model, rows = tiny("qwen3_moe"), rows_of_tokens(2)
    error, uncertainty, _ = by_definition(model, rows["input_ids"][0], rows["labels"][0])
    scored = EUScorer(model)(rows)
    assert scored["error"][0] == pytest.approx(error.mean(), abs=1e-5)
    assert scored["uncertainty"][0] == pytest.approx(uncertainty.mean(), abs=1e-5)


@pytest.mark.parametrize("tokens_per_batch", [1, 16, 40, 10_000])
def test_batches_do_not_matter(tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny().double(), rows_of_tokens(20)
    expected = EUScorer(model, scores=("el2n", "ifd"))(rows)
    monkeypatch.setitem(batching.CHUNK_ELEMENTS, "cpu", 7 * 100)
    scored = EUScorer(model, scores=("el2n", "ifd"), tokens_per_batch=tokens_per_batch)(rows)
    for name in SCORES:
        np.testing.assert_allclose(scored[name], expected[name], atol=1e-9, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(side: str) -> None:
    model, rows = tiny().double(), rows_of_tokens()
    expected = EUScorer(model)(rows)
    padded: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        for name, values, fill in (
            ("input_ids", row, 5),
            ("labels", labels, 7),  # as wrong labels under padding would be
            ("attention_mask", [1] * len(row), 0),
        ):
            padding = [fill] * (20 - len(row))
            padded[name].append(padding + values if side == "left" else values + padding)
    scored = EUScorer(model)(padded)
    np.testing.assert_allclose(scored["error"], expected["error"], atol=1e-9, rtol=0)
    for labels, given, mask in zip(scored["labels"], expected["labels"], padded["attention_mask"], strict=True):
        assert labels[np.array(mask, bool)].tolist() == given.tolist()
        assert (labels[~np.array(mask, bool)] == -100).all()
    assert [list(row) for row in scored["input_ids"]] == padded["input_ids"]


@pytest.mark.parametrize("packing", ["position_ids", "seq_lengths"])
def test_packed_samples_do_not_see_each_other(packing: str) -> None:
    model, rows = tiny().double(), rows_of_tokens(3)
    alone = EUScorer(model)(rows)
    sizes = [len(row) for row in rows["input_ids"]]
    packed = {
        "input_ids": [[token for row in rows["input_ids"] for token in row]],
        "labels": [[label for row in rows["labels"] for label in row]],
        packing: [[p for size in sizes for p in range(size)] if packing == "position_ids" else sizes],
    }
    scored = EUScorer(model)(packed)
    np.testing.assert_allclose(scored["token_error"][0], np.concatenate(alone["token_error"]), atol=1e-6)
    assert scored["error"][0] == pytest.approx(np.average(alone["error"], weights=alone["supervised_tokens"]), abs=1e-9)


def test_first_token_of_every_packed_sample_is_predicted_by_nothing() -> None:
    row = token_ids(1, 9)[0].tolist()
    scored = EUScorer(tiny())({"input_ids": [row], "position_ids": [[0, 1, 2, 3, 0, 1, 2, 3, 4]]})
    assert [i for i, label in enumerate(scored["labels"][0]) if label == -100] == [0, 4]
    assert scored["supervised_tokens"] == [7]


def test_ifd_compares_with_the_answer_alone() -> None:
    model, rows = tiny().double(), rows_of_tokens(4)
    scored = EUScorer(model, scores=("ifd",))(rows)
    for index, row in enumerate(rows["input_ids"]):
        answer = row[3:]
        alone = by_definition(model, answer, [-100, *answer[1:]])[0]
        conditioned = by_definition(model, row, [-100] * 4 + answer[1:])[0]
        assert scored["ifd"][index] == pytest.approx(np.exp(conditioned.mean() - alone.mean()), abs=1e-9)


def test_noise_is_what_the_prompt_does_not_explain_and_what_repeats() -> None:
    """By definition, from one further pass also beside `ifd`."""
    model, rows = tiny().double(), rows_of_tokens(4)
    for row, labels in zip(rows["input_ids"][:2], rows["labels"], strict=False):
        row[3:] = labels[3:] = (row[3:5] * len(row))[: len(row) - 3]
    passes: list[int] = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    alone_too, with_both = EUScorer(model, scores=("noise",))(rows), len(passes)
    scored = EUScorer(model, scores=("ifd", "noise"))(rows)
    handle.remove()
    assert len(passes) == 2 * with_both
    for index, row in enumerate(rows["input_ids"]):
        answer = row[3:]
        alone = by_definition(model, answer, [-100, *answer[1:]])[0].mean()
        given = by_definition(model, row, [-100] * 4 + answer[1:])[0].mean()
        assert scored["noise"][index] == pytest.approx(given**2 / alone + 5 * scored["repetition"][index], abs=1e-9)
        assert alone_too["noise"][index] == scored["noise"][index]
    assert min(scored["repetition"][:2]) > 0


def test_reference_model_scores_the_same_tokens() -> None:
    rows, other = rows_of_tokens(3), tiny(seed=1)
    scored = EUScorer(tiny(), reference_model=other)(rows)
    expected = EUScorer(other)(rows)["token_error"]
    for ours, theirs in zip(scored["token_reference_error"], expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("method", ["lora", "qst"])
def test_adapters_are_scored_as_they_are_active(method: str) -> None:
    rows = rows_of_tokens()
    base = EUScorer(tiny().double())(rows)["error"]
    config = (
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        if method == "lora"
        else SideTuningConfig(reduction_factor=2, task_type="CAUSAL_LM")
    )
    model = get_peft_model(tiny().double(), config).double()
    if method == "qst":
        randomize_side_network(model)
    model.train()
    scored = EUScorer(model)(rows)["error"]
    assert model.training
    expected = [by_definition(model.eval(), *row)[0].mean() for row in zip(*rows.values(), strict=True)]
    np.testing.assert_allclose(scored, expected, atol=1e-9)
    assert np.abs(np.array(scored) - base).min() > 1e-6
    with model.disable_adapter():
        np.testing.assert_allclose(EUScorer(model)(rows)["error"], base, atol=1e-9)


def test_model_is_left_as_it_was() -> None:
    model = tiny()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    EUScorer(model)(rows_of_tokens(2))
    assert [module.training for module in model.modules()] == modes
    assert "forward" not in vars(model.model)


def test_logits_of_a_batch_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original = batching.scores_of_logits

    def watched(logits: torch.Tensor, *args: object) -> object:
        nonlocal largest
        largest = max(largest, logits.numel())
        return original(logits, *args)

    monkeypatch.setattr(batching, "scores_of_logits", watched)
    monkeypatch.setitem(batching.CHUNK_ELEMENTS, "cpu", 500)
    input_ids = token_ids(8, 30)
    token_scores(tiny(), input_ids, None, input_ids)
    assert largest == 500


def test_sixteen_bit_logits_are_widened() -> None:
    logits = torch.randn(5, 50, dtype=torch.bfloat16) * 4
    targets = torch.arange(5)
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    scores = batching.scores_of_logits(logits.clone(), targets)
    torch.testing.assert_close(scores["error"].double(), expected, atol=1e-6, rtol=0)


def test_rows_that_cannot_be_scored_are_named(recwarn: pytest.WarningsRecorder) -> None:
    good = rows_of_tokens(1)
    rows = {
        "input_ids": [good["input_ids"][0], [], [5, 6, 7], [5] * 40, [5, 100, 6], [5, 6, 7], [4, 5, 6]],
        "labels": [good["labels"][0], [], [-100] * 3, [5] * 40, [5, 100, 6], [5, 6], [4, 5, 6]],
        "attention_mask": [None, None, None, None, None, None, [1, 0, 1]],
    }
    scored = EUScorer(tiny(), max_length=30, scores=("el2n", "ifd"))(rows, indices=range(10, 17))
    assert [bool(reason) for reason in scored["unscored"]] == [False] + [True] * 6
    for reason, part in zip(
        scored["unscored"][1:],
        ["empty", "no supervised tokens", "too long: 40 tokens", "vocabulary of 100", "labels has 2", "hole"],
        strict=True,
    ):
        assert part in reason
    for name in ("error", "uncertainty", "el2n", "ifd"):
        assert np.isnan(scored[name][1:]).all()
        assert np.isfinite(scored[name][0])
    assert scored["error"][0] == pytest.approx(EUScorer(tiny())(good)["error"][0], abs=1e-6)
    message = str(recwarn[0].message)
    assert "6 of 7" in message
    assert "row 12: no supervised tokens" in message


def test_output_that_is_not_finite_is_no_score() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.warns(UserWarning, match="not finite"):
        scored = EUScorer(model)(rows_of_tokens(2))
    assert np.isnan(scored["error"]).all()
    assert all("not finite" in reason for reason in scored["unscored"])


def test_map_scores_every_kind_of_data_set() -> None:
    rows, scorer = rows_of_tokens(6), EUScorer(tiny())
    expected = scorer(rows)["error"]
    data = Dataset.from_dict(rows)
    np.testing.assert_allclose(data.map(scorer, batched=True, batch_size=4)["error"][:], expected, atol=1e-6)
    splits = DatasetDict({"train": data}).map(scorer, batched=True)
    np.testing.assert_allclose(splits["train"]["error"][:], expected, atol=1e-6)
    streamed = [row["error"] for row in data.to_iterable_dataset().map(scorer, batched=True, batch_size=4)]
    np.testing.assert_allclose(streamed, expected, atol=1e-6)
    types = data.map(scorer, batched=True).features
    assert (types["error"].dtype, types["token_error"].feature.dtype) == ("float64", "float32")


def test_an_unscored_row_first_does_not_settle_the_column_types() -> None:
    rows = rows_of_tokens(3)
    rows["labels"][0] = [-100] * len(rows["labels"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scored = Dataset.from_dict(rows).map(EUScorer(tiny()), batched=True, batch_size=1)
    assert np.isnan(scored["error"][0])
    assert scored["error"][1] > 0
    assert scored.features["token_error"].feature.dtype == "float32"


def test_models_that_cannot_be_scored_are_refused() -> None:
    with pytest.raises(ValueError, match="not a causal language model"):
        EUScorer(LlamaModel(tiny().config))
    prompted = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        EUScorer(prompted)
    with pytest.raises(ValueError, match="tokens_per_batch is 0"):
        EUScorer(tiny(), tokens_per_batch=0)


def test_fingerprint_follows_the_weights_and_the_settings() -> None:
    model = get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    fingerprint = EUScorer(model).fingerprint()
    assert EUScorer(model).fingerprint() == fingerprint
    assert EUScorer(model, scores=("el2n",)).fingerprint() != fingerprint
    assert EUScorer(tiny(seed=1)).fingerprint() != EUScorer(tiny()).fingerprint()
    with model.disable_adapter():
        assert EUScorer(model).fingerprint() != fingerprint
    assert EUScorer(model).fingerprint() == fingerprint
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[3, 3] += 0.01
    assert EUScorer(model).fingerprint() != fingerprint
    # The order of a set, such as PEFT's target modules, changes from process to process.
    assert stable({"b", "a", "c"}) == b'["a", "b", "c"]'


def test_single_rows_are_refused() -> None:
    for rows in ({"text": "one row"}, {"input_ids": [5, 6, 7]}):
        with pytest.raises(ValueError, match="call map with batched=True"):
            EUScorer(tiny(), word_tokenizer())(rows)


def test_tokens_of_rows_without_a_score_are_not_lost() -> None:
    data = Dataset.from_dict({"input_ids": [[5, 6, 7, 8, 9, 10], [5, 6]], "labels": [[5, 6, 7, 8, 9, 10], [-100, 6]]})
    with pytest.warns(UserWarning, match="too long"):
        short = score(data, tiny(), max_length=4, progress=False)
    assert short["input_ids"][:] == data["input_ids"][:]
    assert short["labels"][0] == data["labels"][0]
    assert short["supervised_tokens"][:] == [0, 1]
    assert not any(score(short, tiny(), progress=False)["unscored"])


def test_padded_data_stays_consistent() -> None:
    data = Dataset.from_dict(
        {"input_ids": [[0, 0, 5, 6, 7], [5, 6, 7, 8, 9]], "attention_mask": [[0, 0, 1, 1, 1], [1] * 5]}
    )
    scored = score(data, tiny(), progress=False)
    assert [len(row) for row in scored["input_ids"]] == [len(row) for row in scored["attention_mask"]] == [5, 5]
    assert scored["labels"][0] == [-100, -100, -100, 6, 7]
    again = score(scored, tiny(), progress=False)
    np.testing.assert_allclose(again["error"], scored["error"], atol=1e-6)


def test_named_columns_are_scored_even_beside_tokens() -> None:
    data = Dataset.from_dict({"prompt": ["w5 w6"], "completion": [" w7 w8 w9"], "input_ids": [[5, 6]]})
    options = {"columns": {"completion": "completion"}, "chat_template": False, "progress": False}
    assert score(data, tiny(), word_tokenizer(), **options)["supervised_tokens"] == [4]


@pytest.mark.parametrize("change", ["shuffle", "filter", "split"])
def test_rearranged_tokens_are_scored(change: str) -> None:
    data = Dataset.from_dict(rows_of_tokens(8))
    data = {
        "shuffle": lambda: data.shuffle(seed=0),
        "filter": lambda: data.filter(lambda row: row["input_ids"][0] % 2),
        "split": lambda: data.train_test_split(0.5, seed=0)["train"],
    }[change]()
    scored = score(data, tiny(), progress=False)
    assert scored["input_ids"][:] == data["input_ids"][:]
    np.testing.assert_allclose(scored["error"], EUScorer(tiny())(data[:])["error"], atol=1e-5)


def rows_behind(prefix: int, count: int = 12) -> dict[str, list[list[int]]]:
    """Rows that all begin with the same `prefix` tokens, which are not supervised."""
    rows, shared = rows_of_tokens(count), list(range(3, 3 + prefix))
    return {
        "input_ids": [shared + row for row in rows["input_ids"]],
        "labels": [[-100] * prefix + row for row in rows["labels"]],
    }


def read_tokens(model: torch.nn.Module) -> list[int]:
    """Tokens of every pass of the decoder from now on, padding included."""
    seen: list[int] = []
    model.get_decoder().register_forward_pre_hook(  # type: ignore[operator]
        lambda module, args, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_is_computed_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny(family), rows_behind(20)
    seen = read_tokens(model)
    states = SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM")
    options: dict[str, Any] = {"scores": ("el2n",), "states": states, "states_format": "float32"}
    found = EUScorer(model, tokens_per_batch=100, **options)(rows)
    reused, seen[:] = sum(seen), []
    monkeypatch.setattr(batching, "prefix_of", lambda *_: None)
    expected = EUScorer(model, tokens_per_batch=100, **options)(rows)
    assert reused < 0.5 * sum(seen)
    for name in ("error", "uncertainty", "el2n"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4, rtol=0)
    for row, other in zip(found["states"], expected["states"], strict=True):
        np.testing.assert_allclose(np.frombuffer(row, np.float32), np.frombuffer(other, np.float32), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attends", [False, True])
def test_a_shared_prefix_under_an_adapter(attends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SideTuningConfig(reduction_factor=4, side_attention=attends, task_type="CAUSAL_LM")
    model, rows = get_peft_model(tiny(), config), rows_behind(20)
    randomize_side_network(model)
    seen = read_tokens(model.get_base_model())
    found = EUScorer(model)(rows)
    # Side blocks that attend need the prefix's own states.
    assert (20 in seen) is not attends
    monkeypatch.setattr(batching, "prefix_of", lambda *_: None)
    np.testing.assert_allclose(found["error"], EUScorer(model)(rows)["error"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        without_pictures,
        lambda: tiny("gemma3", use_bidirectional_attention=True),
        lambda: tiny(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    ],
    ids=["skipped blocks", "both directions", "dynamic positions"],
)
def test_a_prefix_that_cannot_be_reused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, rows = make().eval(), rows_behind(20)
    found = EUScorer(model)(rows)
    monkeypatch.setattr(batching, "prefix_of", lambda *_: None)
    np.testing.assert_array_equal(found["error"], EUScorer(model)(rows)["error"])
    assert np.isfinite(found["error"]).all()
