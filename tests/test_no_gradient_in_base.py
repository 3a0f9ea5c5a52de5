"""No tensor of the base is ever in the autograd graph, and what is held for backward is what the arithmetic says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from conftest import EVERY_PART, randomize_side_network, side_parameters, tiny, token_ids
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qtuning_peft import SideTuningConfig
from qtuning_peft.side_tuning.network.quantize import Quantized

Prepare = Callable[[PreTrainedModel], object]
PREPARATIONS: dict[str, Prepare] = {
    "nothing": lambda model: None,
    "enable_input_require_grads": lambda model: model.enable_input_require_grads(),
    "reentrant checkpointing": lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
    "non-reentrant checkpointing": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
    "prepare_model_for_kbit_training": lambda model: prepare_model_for_kbit_training(model),
    "everything": lambda model: (
        prepare_model_for_kbit_training(model),
        model.enable_input_require_grads(),
        model.gradient_checkpointing_enable({"use_reentrant": True}),
    ),
}


@contextmanager
def saved_for_backward(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the tensors that autograd keeps, one for each storage, without parameters."""
    addresses = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in addresses:
            addresses.add(address)
            saved.append(tensor)
        return tensor

    def quantized(states: torch.Tensor, bits: int) -> Quantized:
        # What inner hooks pack, outer ones do not see.
        result = quantize(states, bits)
        pack(result.values), pack(result.scales)
        return result

    quantize = Quantized.of
    with (
        patch.object(Quantized, "of", quantized),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        yield saved


def graph_leaves(loss: torch.Tensor) -> set[int]:
    """Ids of the leaf tensors that `loss` depends on."""
    leaves, seen, stack = set(), set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        stack.extend(parent for parent, _ in node.next_functions)
    return leaves


def block_forwards(model: torch.nn.Module, counts: list[int]) -> None:
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_hook(lambda *_: counts.append(1))


@pytest.mark.parametrize("preparation", PREPARATIONS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_only_the_side_network_is_in_the_graph(preparation: str, when: str) -> None:
    base = tiny()
    prepare = PREPARATIONS[preparation]
    if when == "before":
        prepare(base)
    model = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM"))
    if when == "after":
        prepare(base)
        for name, parameter in model.named_parameters():  # kbit preparation freezes whatever is there
            parameter.requires_grad_("qst_side_network" in name)
    randomize_side_network(model)
    counts: list[int] = []
    block_forwards(model, counts)
    model.train()
    ids = token_ids()
    loss = model(input_ids=ids, labels=ids).loss
    side = {id(p) for p in side_parameters(model).values()}
    assert graph_leaves(loss) == side
    loss.backward()
    assert len(counts) == 3, "every base block runs once: no recomputation"
    assert all((p.grad is not None) == ("qst_side_network" in name) for name, p in model.named_parameters())


def test_the_gradient_is_the_same_whatever_was_prepared() -> None:
    gradients = []
    for prepare in PREPARATIONS.values():
        model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
        randomize_side_network(model)
        prepare(model.get_base_model())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("qst_side_network" in name)
        model.train()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        gradients.append([p.grad for p in side_parameters(model).values()])
    for other in gradients[1:]:
        for mine, theirs in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


def test_the_base_runs_in_eval_mode_while_training() -> None:
    base = tiny("opt", dropout=0.5, attention_dropout=0.5)
    model = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM"))
    randomize_side_network(model)
    ids = token_ids()
    model.eval()
    expected = model(input_ids=ids).logits
    model.train()
    for _ in range(2):
        assert torch.equal(model(input_ids=ids).logits, expected)
    network = base.model.decoder.final_layer_norm.qst_side_network["default"]
    assert network.training
    assert not base.model.decoder.layers[0].training


def test_side_dropout_acts_while_training_only() -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM", side_dropout=0.5))
    randomize_side_network(model)
    model.train()
    ids = token_ids()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_grad_mode_is_restored_after_an_error_and_respected_elsewhere() -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
    layer = model.get_base_model().model.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=token_ids())
    handle.remove()
    assert torch.is_grad_enabled()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt  # no Exception: torch runs no hook after it

    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=token_ids())
    handle.remove()
    assert torch.is_grad_enabled()
    assert model(input_ids=token_ids()).logits.requires_grad
    with torch.no_grad():
        assert not model(input_ids=token_ids()).logits.requires_grad
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert model(input_ids=token_ids()).logits.is_inference()
    with model.disable_adapter():
        assert not model(input_ids=token_ids()).logits.requires_grad


# -- bytes held for backward ---------------------------------------------------------------------------------------

# No other dimension is 37, so that a tensor with a 37 holds something per token; autocast's copies of weights do not.
WIDTH, R, LENGTH = 1024, 16, 37
SIDE, INNER = WIDTH // R, 224
LEARNED = ("linear", "lora", "adapter")


def held(downsample: str, layers: int, checkpointing: bool = False, **options: object) -> list[torch.Tensor]:
    """What training holds up to the final norm, on a bf16 base of `layers` blocks with an 8B model's proportions."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2, head_dim=128,
            intermediate_size=INNER * R, vocab_size=100,
        )
    ).to(torch.bfloat16)  # fmt: skip
    config = SideTuningConfig(reduction_factor=R, downsample=downsample, task_type="CAUSAL_LM", **EVERY_PART | options)
    model = get_peft_model(base, config)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    with saved_for_backward(model) as saved:
        base.model(input_ids=token_ids(1, LENGTH), use_cache=False)
    return saved


def bytes_per_token(saved: list[torch.Tensor], width: int | None = None) -> int:
    held = [t.untyped_storage().nbytes() for t in saved if LENGTH in t.shape and width in (None, t.shape[-1])]
    return sum(held) // LENGTH


def bytes_per_token_and_block(downsample: str, checkpointing: bool = False) -> int:
    three, two = (bytes_per_token(held(downsample, layers, checkpointing)) for layers in (3, 2))
    return three - two


@pytest.mark.parametrize("downsample", LEARNED)
def test_a_learned_downsample_holds_every_tap_once_in_16_bits(downsample: str) -> None:
    """And the linear map of the final state that state."""
    assert bytes_per_token(held(downsample, layers=2, mixing="additive"), WIDTH) == (2 + 1 + 1) * WIDTH * 2


@pytest.mark.parametrize("downsample", ["maxpool", "avgpool"])
def test_a_pooled_downsample_holds_nothing_as_wide_as_the_base(downsample: str) -> None:
    """But the final state once in 16 bits, for the linear map of it."""
    saved = held(downsample, layers=2, mixing="additive")
    assert bytes_per_token(saved, WIDTH) == WIDTH * 2
    assert max(t.untyped_storage().nbytes() for t in saved if LENGTH in t.shape) == LENGTH * WIDTH * 2


def test_no_attention_map_is_held() -> None:
    assert not any(t.shape[-2:] == (LENGTH, LENGTH) for t in held("avgpool", layers=1))


@pytest.mark.parametrize("downsample", [*LEARNED, "maxpool", "avgpool"])
def test_a_side_block_holds_what_its_formulas_need(downsample: str) -> None:
    float32, bfloat16, statistic = 4, 2, 4
    # On a CPU, RMSNorm holds its input and the normed value in float32; a pooled tap's input needs no gradient.
    norms = ((6 if downsample in LEARNED else 5) * SIDE + 3) * float32
    gate = 2 * SIDE * bfloat16  # the normed tap and the side state
    attention = (SIDE + 3 * SIDE + 2 * SIDE + SIDE) * bfloat16 + statistic * SIDE // 64
    mlp = (SIDE + 2 * INNER + INNER + INNER) * bfloat16
    tap = {"linear": WIDTH, "lora": WIDTH + 16, "adapter": WIDTH + 2 * 16}.get(downsample, 0) * bfloat16
    block = norms + gate + attention + mlp + tap
    assert bytes_per_token_and_block(downsample) == pytest.approx(block, rel=0.01)


@pytest.mark.parametrize("downsample", [*LEARNED, "maxpool", "avgpool"])
def test_a_checkpointed_side_block_holds_its_narrow_inputs(downsample: str) -> None:
    inputs = 2 * SIDE * 2  # the down-sampled tap and the side state
    tap = {"linear": WIDTH, "lora": WIDTH + 16, "adapter": WIDTH + 2 * 16}.get(downsample, 0) * 2
    assert bytes_per_token_and_block(downsample, checkpointing=True) == inputs + tap


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enable in (False, True):
        model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
        randomize_side_network(model)
        if enable:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            assert model.get_base_model().model.norm.qst_side_network["default"].gradient_checkpointing
        model.train()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        gradients.append([p.grad for p in side_parameters(model).values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=1e-7)
