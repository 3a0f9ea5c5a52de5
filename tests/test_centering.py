"""What tapped hidden states have in common is measured once, where the loss reads, and taken off them from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import EVERY_PART, FAMILIES, config_of, side_parameters, tiny, token_ids
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from qtuning_peft import SideTuningConfig
from qtuning_peft.loss import chunked_cross_entropy

Batch = dict[str, Tensor]


def adapted(family: str = "llama", **config: object) -> PeftModel:
    return get_peft_model(tiny(family), SideTuningConfig(task_type="CAUSAL_LM", **config)).train()


def centers(model: torch.nn.Module) -> Tensor:
    """(taps, d), the embeddings' first."""
    return torch.stack([buffer for name, buffer in model.named_buffers() if name.endswith(".center")])


def partly_read() -> Batch:
    """Rows of several lengths, each supervised from its fourth token on."""
    ids, mask = token_ids(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def expected(base: torch.nn.Module, batch: Batch, read: Tensor, taps: list[int]) -> Tensor:
    """The mean over the positions `read` (batch, length) of the embeddings and of what the blocks `taps` return."""
    found: dict[int, Tensor] = {}
    decoder = base.get_decoder()
    blocks = next(m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList))
    hooks = [
        blocks[0].register_forward_pre_hook(
            lambda block, args, kwargs: found.update({-1: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    ]
    for index in taps:
        hooks.append(
            blocks[index].register_forward_hook(
                lambda block, args, output, index=index: found.update(
                    {index: output[0] if isinstance(output, tuple) else output}
                )
            )
        )
    base(**{name: value for name, value in batch.items() if name != "labels"})
    for hook in hooks:
        hook.remove()
    return torch.stack([found[index][read].double().mean(0) for index in (-1, *taps)]).float()


def before_supervised(batch: Batch) -> Tensor:
    read = torch.zeros_like(batch["labels"], dtype=torch.bool)
    read[:, :-1] = batch["labels"][:, 1:] != -100
    return read


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_of_what_the_loss_reads(family: str) -> None:
    batch = partly_read()
    means = expected(tiny(family), batch, before_supervised(batch), [2])
    model = adapted(family)
    model(**batch).loss.backward()
    torch.testing.assert_close(centers(model), means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"tap_storage": "int4"},
        {"downsample": "avgpool"},
        {"downsample": "projection"},
        EVERY_PART,
        EVERY_PART | {"layers_to_transform": [0, 2]},
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_whatever_is_held_for_backward(config: dict[str, object], checkpointing: bool) -> None:
    batch = partly_read()
    taps = config.get("layers_to_transform", [0, 1, 2] if "tap_every" in config else [2])
    means = expected(tiny(), batch, before_supervised(batch), taps)
    model = adapted(**config)
    if checkpointing:
        model.gradient_checkpointing_enable()
    chunked_cross_entropy(model, **batch).backward()
    torch.testing.assert_close(centers(model), means, rtol=1e-4, atol=1e-5)


def test_of_a_classifier_the_last_tokens() -> None:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config_of("llama", num_labels=3)).eval()
    ids = token_ids(4, 9)
    ids[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    read = torch.zeros_like(ids, dtype=torch.bool)
    read[[0, 1, 2, 3], [8, 4, 8, 8]] = True
    means = expected(base, batch, read, [2])
    model = get_peft_model(base, SideTuningConfig(task_type="SEQ_CLS")).train()
    model(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    torch.testing.assert_close(centers(model), means, rtol=1e-4, atol=1e-5)


def test_measured_once_and_training_starts_at_the_base() -> None:
    batch = partly_read()
    with torch.no_grad():
        base = tiny()(**batch).logits
    model = adapted()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base)
    assert not centers(model).any()
    model.train()
    model(**batch).loss.backward()
    first = centers(model).clone()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base)
    other = token_ids(seed=5)
    model(input_ids=other, labels=other).loss.backward()
    assert torch.equal(centers(model), first)


def test_a_pass_in_which_nothing_is_read_leaves_it_to_the_next() -> None:
    model, batch = adapted(), partly_read()
    nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}
    chunked_cross_entropy(model, **nothing, num_items=1).backward()
    assert not centers(model).any()
    chunked_cross_entropy(model, **batch).backward()
    assert centers(model).any(1).all()


def test_what_is_off_the_taps_gets_no_gradient() -> None:
    # Every position reads the same hidden state: there is nothing that tells them apart.
    model = adapted()
    ids = torch.full((2, 1), 7)
    batch = {"input_ids": ids.repeat(1, 2), "labels": torch.tensor([[-100, 5], [-100, 9]])}
    model(**batch).loss.backward()
    model.zero_grad()
    with torch.no_grad():
        for name, parameter in side_parameters(model).items():
            if "up_proj" in name:
                parameter.normal_()
    model(**batch).loss.backward()
    gradients = [p.grad for name, p in side_parameters(model).items() if "down.weight" in name]
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


def test_saved_loaded_and_not_measured_again(tmp_path: Path) -> None:
    model, batch = adapted(), partly_read()
    model(**batch).loss.backward()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True).train()
    assert torch.equal(centers(again), centers(model))
    other = token_ids(seed=5)
    again(input_ids=other, labels=other).loss.backward()
    assert torch.equal(centers(again), centers(model))


def test_none_where_it_is_off_and_in_the_published_network(tmp_path: Path) -> None:
    for config in (
        SideTuningConfig(center_taps=False),
        SideTuningConfig.paper(reduction_factor=4),
        SideTuningConfig.reference(reduction_factor=4),
    ):
        model = get_peft_model(tiny(), config).train()
        model(**partly_read()).loss.backward()
        assert not [name for name in model.state_dict() if name.endswith(".center")]


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    batch = partly_read()
    rows = slice(0, 1) if rank == 0 else slice(1, 3)
    model = adapted()
    torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)(
        **{name: value[rows] for name, value in batch.items()}
    ).loss.backward()
    torch.save(centers(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_one_mean(tmp_path: Path) -> None:
    batch = partly_read()
    means = expected(tiny(), batch, before_supervised(batch), [2])
    mp.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), means, rtol=1e-4, atol=1e-5)
