"""In training the side network runs where the loss reads, and nowhere else: loss and gradient are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize_side_network, side_parameters, tiny, token_ids
from peft import get_peft_model
from torch import Tensor

from benchmarks.small_bases import families, small_base
from qtuning_peft import SideTuningConfig
from qtuning_peft.loss import chunked_cross_entropy
from qtuning_peft.states import cache_states, reuse_of

# Columns of the prompt; rows also end early, at the right.
PROMPT, LENGTH = 18, 24


def side_tuned(base: Any = None, **fields: Any) -> Any:
    config = SideTuningConfig(**{"reduction_factor": 4, "tap_every": 1, "task_type": "CAUSAL_LM"} | fields)
    model = get_peft_model(tiny() if base is None else base, config).train()
    randomize_side_network(model)
    return model


def batch() -> dict[str, Tensor]:
    ids = token_ids(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, 21:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    labels[2, 20] = -100  # a hole, as pruned tokens leave
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def read(inputs: dict[str, Tensor]) -> Tensor:
    return F.pad(inputs["labels"][:, 1:] != -100, (0, 1))  # (batch, length)


def of_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The loss of logits that were asked for without labels, so that every position is computed."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in side_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("way", ["labels", "chunked"])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"mixing": "paper", "downsample": "adapter"}),
        ("llama", {"downsample": "avgpool"}),
        ("llama", {"downsample": "projection"}),
        ("gpt2", {}),
        ("jamba", {}),
        ("gemma3n_text", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_loss_and_gradient_are_those_of_all_positions(family: str, fields: dict[str, Any], way: str) -> None:
    base = tiny(family) if family in ("llama", "gpt2") else small_base(*families()[family])
    model, inputs = side_tuned(base, **fields), batch()
    expected = of_logits(model, inputs)
    expected_gradients = gradients(model, expected)
    loss = model(**inputs).loss if way == "labels" else chunked_cross_entropy(model, **inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    found = gradients(model, loss)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)


def test_centers_are_those_of_all_positions() -> None:
    centers = []
    for labelled in (True, False):
        model, inputs = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM")).train(), batch()
        (model(**inputs).loss if labelled else of_logits(model, inputs)).backward()
        centers.append({name: b for name, b in model.named_buffers() if name.endswith(".center")})
    assert centers[0]
    for name, center in centers[0].items():
        assert center.any()
        torch.testing.assert_close(center, centers[1][name], rtol=1e-5, atol=1e-7)


def test_the_side_network_sees_nothing_else() -> None:
    model, inputs = side_tuned(), batch()
    network = model.get_base_model().model.norm.qst_side_network["default"]
    seen: list[tuple[int, ...]] = []
    network.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(tuple(args[0].shape)))
    output = model(**inputs)
    assert seen == [(1, int(read(inputs).sum()), 16)]
    with model.disable_adapter():
        base = model(**inputs).logits
    assert torch.equal(output.logits[~read(inputs)], base[~read(inputs)])
    assert not torch.isclose(output.logits[read(inputs)], base[read(inputs)]).all()
    # Whoever evaluates may look anywhere.
    model.eval()(**inputs)
    assert seen[1:] == [(3, LENGTH, 16)]


def test_what_is_saved_for_backward_falls_with_the_share_of_supervised_tokens() -> None:
    def saved(labels: Tensor) -> int:
        model, sizes = side_tuned(), {}

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = chunked_cross_entropy(model, input_ids=ids, labels=labels)
        total = sum(sizes.values())
        loss.backward()
        return total

    ids = token_ids(4, 64)
    quarter = ids.clone()
    quarter[:, :48] = -100
    assert saved(quarter) < 0.3 * saved(ids)


def test_a_loss_that_reads_more_than_its_labels_say_is_refused() -> None:
    model, inputs = side_tuned(), batch()
    output = model(**inputs)
    with pytest.raises(RuntimeError, match="reads positions that its labels do not supervise"):
        (output.loss + output.logits[:, 0].logsumexp(-1).mean()).backward()


def test_a_batch_without_supervised_tokens_and_one_of_nothing_else() -> None:
    model, inputs = side_tuned(), batch()
    inputs["labels"][:] = -100
    assert chunked_cross_entropy(model, **inputs) == 0
    full = {"input_ids": inputs["input_ids"], "labels": inputs["input_ids"]}
    assert torch.isclose(model(**full).loss, chunked_cross_entropy(model, **full))


def test_behind_a_cached_prefix_and_from_cached_states() -> None:
    model, inputs = side_tuned(tiny().to(torch.bfloat16)), batch()
    inputs["input_ids"][:, :PROMPT] = inputs["input_ids"][0, :PROMPT]
    expected = of_logits(model, inputs).item()
    reuse_of(model).cache_prefix(inputs["input_ids"][0, : PROMPT - 1].tolist())
    cache_states(model, 2**30)
    for _ in range(3):
        assert model(**inputs).loss.item() == pytest.approx(expected, rel=1e-2)
    cache = reuse_of(model).cache
    assert cache.used == 2 * 5 * int(read(inputs).sum()) * 64  # embeddings, three taps and the norm, in 16 bits
    # The same rows with other labels are computed anew.
    inputs["labels"][0, -1] = -100
    assert model(**inputs).loss.item() == pytest.approx(of_logits(model, inputs).item(), rel=1e-2)
    assert cache.used > 2 * 5 * int(read(inputs).sum()) * 64
