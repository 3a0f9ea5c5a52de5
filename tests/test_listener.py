"""Listeners: what they are notified of, what they may change, and that a replay of a recording is the pass itself."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from conftest import randomize_side_network, tiny, token_ids
from peft import get_peft_model
from torch import Tensor

from qtuning_peft import SideTuningConfig
from qtuning_peft.side_tuning.follow import BlockCall, follower_of, record_states

FAMILIES = ("llama", "opt", "gpt2", "gpt_neox")


def side_tuned(family: str = "llama", **options: Any) -> Any:
    model = get_peft_model(tiny(family), SideTuningConfig(task_type="CAUSAL_LM", **options)).eval()
    randomize_side_network(model)
    return model


class Shift:
    """Adds a constant behind one block, and notes what it is notified of."""

    def __init__(self, layer: int, by: float) -> None:
        self.layers, self.by = [layer], by
        self.notes: list[str] = []
        self.grad: set[bool] = set()

    def begin(self, embeddings: Tensor, call: BlockCall) -> None:
        self.notes.append(f"begin {tuple(embeddings.shape)}")
        self.grad.add(torch.is_grad_enabled())

    def block(self, index: int, hidden_states: Tensor, call: BlockCall) -> Tensor | None:
        self.notes.append(f"block {index} {type(call.block).__name__}")
        self.grad.add(torch.is_grad_enabled())
        return hidden_states + self.by if self.by else None

    def end(self, normed: Tensor) -> Tensor:
        self.notes.append("end")
        return normed


def decoder_output(model: Any, listener: Any, input_ids: Tensor) -> Tensor:
    follower = follower_of(model)
    assert follower is not None
    with follower.recording(listener):
        return follower.decoder(input_ids=input_ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_a_listener_may_change_what_a_block_returned(family: str) -> None:
    """As if the block itself had returned it; without a change the base is as it was, to the bit."""
    model, ids = side_tuned(family), token_ids()
    with model.disable_adapter():
        base = model.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    quiet = Shift(1, 0.0)
    assert torch.equal(decoder_output(model, quiet, ids), base)
    blocks = {"llama": "LlamaDecoderLayer", "opt": "OPTDecoderLayer", "gpt2": "GPT2Block", "gpt_neox": "GPTNeoXLayer"}
    assert quiet.notes == ["begin (2, 12, 64)", f"block 1 {blocks[family]}", "end"]

    changed = decoder_output(model, Shift(1, 0.5), ids)
    plain = tiny(family)

    def shifted(module: Any, args: Any, output: Any) -> Any:
        return (output[0] + 0.5, *output[1:]) if isinstance(output, tuple) else output + 0.5

    follower = follower_of(model)
    assert follower is not None
    index = [name for name, module in model.named_modules() if type(module).__name__ == blocks[family]][1]
    dict(plain.named_modules())[index.removeprefix("base_model.model.")].register_forward_hook(shifted)
    expected = plain.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(changed, expected)
    assert not torch.equal(changed, base)


def test_a_listener_has_the_grad_mode_of_the_caller_and_the_base_has_none() -> None:
    model, ids, seen = side_tuned(), token_ids(), []
    model.get_base_model().model.layers[1].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    listener = Shift(1, 0.0)
    decoder_output(model, listener, ids)
    with torch.no_grad():
        decoder_output(model, listener, ids)
    assert listener.grad == {True, False}
    assert seen == [False, False]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("options", [{}, {"tap_every": 1, "mixing": "paper"}], ids=str)
def test_a_replay_is_the_pass(options: dict[str, Any]) -> None:
    model, ids = side_tuned(**options), token_ids()
    follower = follower_of(model)
    assert follower is not None
    states = record_states(model, ids)
    expected = follower.decoder(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(states.replay(follower.host.make_listener()).last_hidden_state, expected)
    with model.disable_adapter():
        of_base = follower.decoder(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(states.output.last_hidden_state, of_base)
    assert not torch.equal(expected, of_base)


def test_a_recording_is_of_its_own_thread() -> None:
    """While one thread records, another one generates with the side network as before."""
    model, ids = side_tuned(), token_ids()
    expected = model(input_ids=ids).logits
    found: list[Tensor] = []
    inside, done = threading.Event(), threading.Event()

    class Waiting(Shift):
        def end(self, normed: Tensor) -> Tensor:
            inside.set()
            assert done.wait(60)
            return normed

    def other() -> None:
        assert inside.wait(60)
        with torch.no_grad():
            found.append(model(input_ids=ids).logits)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    decoder_output(model, Waiting(1, 0.0), ids)
    thread.join()
    assert torch.equal(found[0], expected)


def test_a_copy_is_followed_by_itself() -> None:
    model, ids = side_tuned(), token_ids()
    twin = copy.deepcopy(model)
    own, other = follower_of(model), follower_of(twin)
    assert own is not None
    assert other is not None
    assert other.decoder is not own.decoder
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
