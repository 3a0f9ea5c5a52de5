"""`torch.compile`: one graph for a forward and for a training step, whose results are those of the eager model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import randomize_side_network, side_parameters, tiny, token_ids
from peft import PeftModel, get_peft_model
from torch import fx

from qtuning_peft import SideTuningConfig


class Graphs:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward


def side_tuned(**options: Any) -> PeftModel:
    torch.compiler.reset()
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM", **options))
    randomize_side_network(model)
    return model


@pytest.mark.parametrize(
    "options", [{}, {"side_attention": True}, {"mixing": "paper"}, {"downsample": "maxpool"}], ids=str
)
def test_a_forward_is_one_graph(options: dict[str, Any]) -> None:
    model, backend = side_tuned(**options).eval(), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for ids in (token_ids(), token_ids(seed=3)):
            expected = model(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)
    assert len(backend.graphs) == 1
    # The base is in it, and the side network.
    assert len(list(backend.graphs[0].graph.nodes)) > 50


@pytest.mark.parametrize("options", [{}, {"downsample": "maxpool"}], ids=str)
def test_a_training_step_is_one_graph(options: dict[str, Any]) -> None:
    model, backend = side_tuned(**options), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    weights = [*side_parameters(model).values()]
    for ids in (token_ids(), token_ids(seed=3)):
        model.train()  # as trainers do before every step
        found = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        expected = model(input_ids=ids, labels=ids, use_cache=False).loss
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights))
    assert len(backend.graphs) == 1


def test_the_first_training_step_measures_the_centers() -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM")).train()
    ids = token_ids()
    torch.compiler.reset()
    torch.compile(model, backend="eager")(input_ids=ids, labels=ids).loss.backward()
    centers = [buffer for name, buffer in model.named_buffers() if name.endswith(".center")]
    assert centers
    assert all(center.any() for center in centers)


@pytest.mark.parametrize("training", [False, True])
def test_a_base_whose_graph_breaks(training: bool) -> None:
    """Frames that go on behind a break find the pass that they are in."""
    model = side_tuned()
    mlp = model.get_base_model().model.layers[1].mlp
    forward = mlp.forward

    def broken(hidden_states: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(hidden_states)

    mlp.forward = broken
    compiled, ids = torch.compile(model, backend="aot_eager"), token_ids()
    for _ in range(2):
        model.train(training)
        with torch.set_grad_enabled(training):
            found, expected = (each(input_ids=ids, labels=ids).loss for each in (compiled, model))
        torch.testing.assert_close(found, expected)
        assert found.requires_grad == training
        if training:
            weights = [*side_parameters(model).values()]
            torch.testing.assert_close(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights))


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    model = side_tuned().train()
    compiled, ids = torch.compile(model, fullgraph=True), token_ids()
    weights = [*side_parameters(model).values()]
    found, expected = (each(input_ids=ids, labels=ids, use_cache=False).loss for each in (compiled, model))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights))
