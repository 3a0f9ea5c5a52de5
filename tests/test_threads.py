"""Several threads on one model: each computes what it would compute alone, at the worst moments for the others.

The moments are forced by events: one thread stops inside a module until another one has passed, or is inside it too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import randomize_side_network, side_parameters, tiny, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from qtuning_peft import SideTuningConfig
from qtuning_peft.eu_plane.batching import run
from qtuning_peft.eu_plane.tokenized import Sample
from qtuning_peft.loss import chunked_cross_entropy

WAIT = 60


def side_tuned() -> PeftModel:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
    randomize_side_network(model)
    return model.eval()


def generate(model: Any, seed: int) -> Tensor:
    return model.generate(input_ids=token_ids(1, 6, seed=seed), max_new_tokens=6, do_sample=False)


def logits(model: Any, seed: int) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(2, 8, seed=seed)).logits


def loss(model: Any, seed: int) -> Tensor:
    ids = token_ids(2, 8, seed=seed)
    return chunked_cross_entropy(model, input_ids=ids, labels=ids)


def gradient(model: Any, seed: int) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, seed), [*side_parameters(model).values()])])


def scores(model: Any, seed: int) -> Tensor:
    ids = token_ids(3, 9, seed=seed).tolist()
    samples = [Sample(index, row, [-100, *row[1:]]) for index, row in enumerate(ids)]
    found = run(model, samples, 18)
    return torch.cat([torch.from_numpy(values) for rows in found.values() for values in rows])


WORK: dict[str, Callable[[Any, int], Tensor]] = {
    "generating": generate, "forward": logits, "the loss": loss, "training": gradient, "scoring": scores,
}  # fmt: skip


@contextmanager
def stopping(module: nn.Module, name: str, entered: threading.Event, goes_on: threading.Event) -> Any:
    """The thread called `name` sets `entered` when it first enters `module`, and goes on when `goes_on` is set."""

    def stop(*_: Any) -> None:
        if threading.current_thread().name.startswith(name) and not entered.is_set():
            entered.set()
            assert goes_on.wait(WAIT)

    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("place", ["model.layers.1", "lm_head"])
@pytest.mark.parametrize("inner", WORK)
@pytest.mark.parametrize("outer", WORK)
def test_one_thread_works_while_another_is_stopped(outer: str, inner: str, place: str) -> None:
    model = side_tuned()
    alone = WORK[outer](model, 1), WORK[inner](model, 2)
    entered, goes_on = threading.Event(), threading.Event()
    module = model.get_base_model().get_submodule(place)
    with stopping(module, "outer", entered, goes_on), ThreadPoolExecutor(1, "outer") as pool:
        future = pool.submit(WORK[outer], model, 1)
        assert entered.wait(WAIT)
        between = WORK[inner](model, 2)
        goes_on.set()
        together = future.result(), between
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close((WORK[outer](model, 1), WORK[inner](model, 2)), alone)


@pytest.mark.parametrize("work", WORK)
def test_two_that_overlap_leave_the_model_as_it_was(work: str) -> None:
    """The first leaves while the second is still inside."""
    model = side_tuned()
    before = logits(model, 3)
    alone = [WORK[work](model, seed) for seed in (1, 2)]
    first_in, second_in, first_done = threading.Event(), threading.Event(), threading.Event()
    head = model.get_base_model().lm_head
    with (
        stopping(head, "first", first_in, second_in), stopping(head, "second", second_in, first_done),
        ThreadPoolExecutor(1, "first") as one, ThreadPoolExecutor(1, "second") as other,
    ):  # fmt: skip
        first = one.submit(WORK[work], model, 1)
        assert first_in.wait(WAIT)
        second = other.submit(WORK[work], model, 2)
        found = [first.result()]
        first_done.set()
        found.append(second.result())
    torch.testing.assert_close(found, alone)
    assert torch.equal(logits(model, 3), before)


def test_scoring_is_without_dropout_until_the_last_has_finished() -> None:
    """And the model is then in training again, as it was."""
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False))
    alone = [scores(model.eval(), seed) for seed in (1, 2)]
    model.train()
    training = {name for name, module in model.named_modules() if module.training}
    first_in, second_in, first_done = threading.Event(), threading.Event(), threading.Event()
    block = model.get_base_model().model.layers[0]
    with (
        stopping(block, "first", first_in, second_in), stopping(block, "second", second_in, first_done),
        ThreadPoolExecutor(1, "first") as one, ThreadPoolExecutor(1, "second") as other,
    ):  # fmt: skip
        first = one.submit(scores, model, 1)
        assert first_in.wait(WAIT)
        second = other.submit(scores, model, 2)
        found = [first.result()]
        first_done.set()
        found.append(second.result())
    torch.testing.assert_close(found, alone)
    assert {name for name, module in model.named_modules() if module.training} == training


def test_the_side_network_is_never_seen_in_another_mode() -> None:
    """What puts the base in eval mode before a pass leaves the side network alone, for whoever trains it meanwhile."""
    model = side_tuned().train()
    network = next(module for name, module in model.named_modules() if name.endswith("qst_side_network.default"))
    rotary = model.get_base_model().model.rotary_emb  # behind the norm, where the side network is
    seen: list[bool] = []

    class Watched(type(rotary)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "training":
                seen.append(network.training)
            super().__setattr__(name, value)

    rotary.__class__ = Watched
    logits(model, 1)
    assert seen
    assert all(seen)
    assert not rotary.training
