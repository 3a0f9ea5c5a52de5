"""Trainings of a tiny model by one process or by two: `python -m torch.distributed.run ... distributed_cases.py`.

Every case returns what can be compared: losses of the whole batch, and tensors of the side network. The processes
write them to a folder, and `test_distributed.py` runs the same functions in one process.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from conftest import randomize_side_network, tiny, token_ids, word_tokenizer
from datasets import Dataset
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from qtuning_peft import (
    EUPruner,
    EUPruningCallback,
    HiddenStateCacheCallback,
    PrefixCachingCallback,
    SideTuningConfig,
    SideTuningTrainer,
)
from qtuning_peft.sharding import is_sharded
from qtuning_peft.side_tuning.follow import find_decoder
from qtuning_peft.states import cache_states, reuse_of

# What a process waits for the others; a case that hangs ends with an error after it.
TIMEOUT = timedelta(seconds=120)
GLOBAL_BATCH = 8
SIDE = "qst_side_network"
Result = dict[str, Any]


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def side_tuned(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A tiny Llama with a side network away from its start."""
    model = get_peft_model(
        tiny().to(dtype), SideTuningConfig(reduction_factor=4, tap_every=1, task_type="CAUSAL_LM", **fields)
    ).train()
    randomize_side_network(model)
    return model


def rows(count: int = 16, prefix: int = 20) -> Dataset:
    """Rows of different lengths that begin alike."""
    ids = token_ids(count, prefix + 12)
    ids[:, :prefix] = ids[0, :prefix]
    own = [row[: prefix + 6 + index % 7].tolist() for index, row in enumerate(ids)]
    return Dataset.from_list([{"input_ids": row, "labels": [-100] * (prefix + 2) + row[prefix + 2 :]} for row in own])


def settings(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Arguments of a trainer: four steps of eight rows."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": GLOBAL_BATCH // world(), "num_train_epochs": 2,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "bf16": False, "seed": 0,
    } | overrides  # fmt: skip


def trained(trainer: Any, folder: Path) -> Result:
    """Train, save, and say what came out."""
    passes = count_passes(trainer.model)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    passed = len(passes)
    own = {name: tensor for name, tensor in trainer.model.state_dict(keep_vars=True).items() if SIDE in name}
    whole: Any = nullcontext()
    if trainer.is_deepspeed_enabled:
        import deepspeed

        whole = deepspeed.zero.GatheredParameters([p for p in own.values() if p.requires_grad])
    with whole:
        tensors = {name: tensor.detach().clone() for name, tensor in own.items()}
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], "passes": passed,
        "tensors": tensors, "logits": logits(trainer.model_wrapped),
    }  # fmt: skip


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of the trained model, as it is wrapped."""
    model.eval()  # DeepSpeed's returns nothing
    return model(input_ids=token_ids()).logits


def count_passes(model: Any) -> list[int]:
    """Is longer by one after every training pass of the base."""
    passes: list[int] = []
    # When training ends, one process measures its slow-down.
    block = find_decoder(model.get_base_model()).blocks[0]
    block.register_forward_hook(lambda *_: passes.append(1) if model.training else None)
    return passes


def trainer(
    folder: Path, kind: type = Trainer, callbacks: tuple[Any, ...] = (), pruner: EUPruner | None = None,
    **overrides: Any,
) -> Result:  # fmt: skip
    """`Trainer`, or one like it; the states of a base in 16 bits are cached as they are."""
    args = TrainingArguments(**settings(folder, **overrides))
    dtype = torch.bfloat16 if callbacks else torch.float32
    # A callback holds what it caches: one of its own for each case.
    made = kind(
        model=side_tuned(dtype), args=args, train_dataset=rows(),
        data_collator=DataCollatorForSeq2Seq(word_tokenizer()), callbacks=[make() for make in callbacks],
    )  # fmt: skip
    if pruner is not None:
        made.add_callback(EUPruningCallback(made, pruner))
    return trained(made, folder)


def caches() -> tuple[Any, ...]:
    """Makers of both callbacks."""
    return PrefixCachingCallback, lambda: HiddenStateCacheCallback(0.01)


def sft(folder: Path) -> Result:
    """TRL's trainer, with both caches."""
    from trl import SFTConfig, SFTTrainer

    return trained(
        SFTTrainer(
            model=tiny().to(torch.bfloat16), args=SFTConfig(**settings(folder, max_length=64)), train_dataset=rows(),
            processing_class=word_tokenizer(), callbacks=[make() for make in caches()],
            peft_config=SideTuningConfig(reduction_factor=4, tap_every=1, task_type="CAUSAL_LM"),
        ),
        folder,
    )  # fmt: skip


def pruned_in_training(folder: Path) -> Result:
    """Every process prunes its own batch; one process sees the same batches by accumulating gradients."""
    return trainer(
        folder, pruner=EUPruner(sample_ratio=0.5, token_ratio=0.5), per_device_train_batch_size=GLOBAL_BATCH // 2,
        gradient_accumulation_steps=2 // world(),
    )  # fmt: skip


def pruned_before_training(folder: Path) -> Result:
    """The processes share the scoring."""
    from qtuning_peft.integrations.blocks import EUPruningBlock
    from qtuning_peft.integrations.trl import EUPruningSFTTrainer
    from trl import SFTConfig

    options = settings(folder, max_length=64, num_train_epochs=3)
    trainer = EUPruningSFTTrainer(
        model=tiny(), args=SFTConfig(**options), train_dataset=rows(),
        processing_class=word_tokenizer(), eu_pruning=EUPruningBlock(sample_ratio=0.5, token_ratio=0.5),
        peft_config=SideTuningConfig(reduction_factor=4, tap_every=1, task_type="CAUSAL_LM"),
    )  # fmt: skip
    return trained(trainer, folder) | {"kept": [list(row) for row in trainer.train_dataset["input_ids"]]}


def fsdp2(model: Any) -> None:
    """Every block a unit, and all else another."""
    for block in find_decoder(model.get_base_model()).blocks:
        fully_shard(block)
    fully_shard(model)


def accelerate_fsdp2(model: Any) -> None:
    """As accelerate does it, which takes FSDP for GPUs only: embeddings and head are units of their own."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    state = SimpleNamespace(fsdp_plugin=plugin)
    fsdp2_prepare_model(SimpleNamespace(state=state, mixed_precision="no", is_main_process=True), model)


def fsdp1(model: Any) -> Any:
    """The older FSDP, which needs `use_orig_params` for a base that is frozen."""
    return FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=True, device_id=torch.device("cpu")
    )


def batch(begin: int, stop: int) -> dict[str, torch.Tensor]:
    """Some of the rows, with another count of supervised tokens in each; none from row 24 on."""
    inputs = dict(DataCollatorForSeq2Seq(word_tokenizer())([dict(row) for row in rows(32).select(range(begin, stop))]))
    inputs["labels"][torch.arange(begin, stop) >= 24] = -100
    return inputs


def steps(
    folder: Path, shard: Callable[[Any], Any] = fsdp2, chunked: bool = True, batches: Sequence[Any] = ((0, 4, 8),) * 3,
    prepare: Callable[[Any], Any] = lambda model: None, dtype: torch.dtype = torch.float32, **fields: Any,
) -> Result:  # fmt: skip
    """Steps of a plain loop; of each batch, (begin, middle, stop), two processes take the two parts."""
    model = side_tuned(dtype, **fields)
    passes = count_passes(model)
    whole = shard(model) or model if world() > 1 else model
    assert is_sharded(whole) == (world() > 1 and shard is not DistributedDataParallel)
    prepare(model)
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for begin, middle, stop in batches:
        own = (begin, stop) if world() == 1 else (begin, middle) if dist.get_rank() == 0 else (middle, stop)
        inputs, tokens = batch(*own), (batch(begin, stop)["labels"][:, 1:] != -100).sum()
        # Sharding averages gradients over the processes.
        loss = whole(**inputs, chunked_loss=chunked, num_items_in_batch=tokens / world()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss.detach()))
    passed = len(passes)
    whole_tensors = get_model_state_dict(
        whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    )
    if world() == 1 or dist.get_rank() == 0:
        model.save_pretrained(folder / "adapter", state_dict=whole_tensors)
    return {
        "losses": losses,
        "passes": passed,
        "tensors": {name: tensor.clone() for name, tensor in whole_tensors.items() if SIDE in name},
        "logits": logits(whole),
    }


UNLABELLED = ((20, 24, 28), (0, 4, 8), (0, 4, 8))
MET_AGAIN = ((0, 4, 8), (0, 4, 8 + 4), (0, 4, 8 + 4))


def cached(model: Any) -> None:
    """With the hidden-state cache."""
    cache_states(model, 2**24)


def cached_prefix(model: Any) -> None:
    """With the prefix too."""
    cached(model)
    reuse_of(model).cache_prefix(batch(0, 1)["input_ids"][0, :18].tolist())


def one_prefix(model: Any) -> None:
    """The rows of one process alone begin with the prefix."""
    cached_prefix(model)
    if world() > 1 and dist.get_rank() == 1:
        reuse_of(model).prefix.input_ids += 1


def mean(value: torch.Tensor) -> float:
    """Over the processes."""
    if world() > 1:
        dist.all_reduce(value)
    return value.item() / world()


def zero3(
    folder: Path, kind: Any = SideTuningTrainer, callbacks: tuple[Any, ...] = (), data: Dataset | None = None,
    arguments: Any = TrainingArguments, options: Mapping[str, Any] = {}, **fields: Any,
) -> Result:  # fmt: skip
    """A base that DeepSpeed has partitioned while it was loaded."""
    unset_hf_deepspeed_config()  # of the case before
    tiny().to(torch.bfloat16 if callbacks else torch.float32).save_pretrained(folder / "base")
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}} | dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    )
    if world() > 1:
        import deepspeed

        deepspeed.init_distributed("gloo")
        dist.barrier()  # the first process saves
        # torch's AdamW, as DeepSpeed's own would be compiled.
        options = {**options, "deepspeed": config | {"zero_allow_untested_optimizer": True}}
    args = arguments(**settings(folder, **options))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert world() == 1 or base.lm_head.weight.numel() == 0
    model = get_peft_model(base, SideTuningConfig(reduction_factor=4, tap_every=1, task_type="CAUSAL_LM", **fields))
    randomize_side_network(model)
    trainer = kind(
        model=model, args=args, train_dataset=data or rows(), processing_class=word_tokenizer(),
        data_collator=DataCollatorForSeq2Seq(word_tokenizer()), callbacks=[make() for make in callbacks],
    )  # fmt: skip
    return trained(trainer, folder)


def few_supervised() -> Dataset:
    """Four rows of sixteen with labels: a process often has none."""
    data = rows().to_list()
    return Dataset.from_list(
        [row if index % 5 == 0 else row | {"labels": [-100] * len(row["labels"])} for index, row in enumerate(data)]
    )


def zero3_sft(folder: Path) -> Result:
    """TRL's trainer, with its own chunked loss, and a card."""
    from qtuning_peft.integrations.trl import EUPruningSFTTrainer
    from trl import SFTConfig

    return zero3(folder, EUPruningSFTTrainer, arguments=SFTConfig, options={"max_length": 64})


def refused(case: Callable[[Path], Any]) -> Callable[[Path], Result]:
    """A case that ends with a ValueError in every process."""

    def attempt(folder: Path) -> Result:
        try:
            case(folder)
        except ValueError as error:
            return {"refused": str(error)}
        return {}

    return attempt


def pruned_in_sharded_training(folder: Path) -> None:
    """Dynamic pruning beside FSDP2."""
    model = side_tuned()
    fsdp2(model)
    EUPruningCallback(None, EUPruner(sample_ratio=0.5)).on_train_begin(
        TrainingArguments(**settings(folder)), TrainerState(), TrainerControl(), model=model
    )


def pruned_before_sharded_training(folder: Path) -> None:
    """Static pruning by a partitioned base."""
    from qtuning_peft.integrations.blocks import EUPruningBlock
    from qtuning_peft.integrations.trl import EUPruningSFTTrainer
    from trl import SFTConfig

    pruning = partial(EUPruningSFTTrainer, eu_pruning=EUPruningBlock(sample_ratio=0.5))
    zero3(folder, pruning, arguments=SFTConfig, options={"max_length": 64})


REFUSED = {
    "fsdp2": {"EUPruningCallback, refused": refused(pruned_in_sharded_training)},
    "zero3": {"EUPruningSFTTrainer, refused": refused(pruned_before_sharded_training)},
}
CASES: dict[str, dict[str, Callable[[Path], Result]]] = {
    "ddp": {
        "Trainer": lambda folder: trainer(folder),
        "Trainer, caches": lambda folder: trainer(folder, callbacks=caches()),
        "SideTuningTrainer, cache": lambda folder: trainer(folder, SideTuningTrainer, callbacks=caches()[1:]),
        "SFTTrainer, caches": sft,
        "EUPruningCallback": pruned_in_training,
        "EUPruningSFTTrainer": pruned_before_training,
        "nothing supervised in one process": lambda folder: steps(folder, DistributedDataParallel, batches=UNLABELLED),
    },
    "fsdp2": {
        "additive": lambda folder: steps(folder),
        "nothing supervised in one process": lambda folder: steps(folder, accelerate_fsdp2, batches=UNLABELLED),
        "logits": lambda folder: steps(folder, chunked=False),
        "paper": lambda folder: steps(folder, mixing="paper", side_attention=True),
        "reference": lambda folder: steps(folder, mixing="reference"),
        "int8": lambda folder: steps(folder, tap_storage="int8", downsample="linear"),
        "int4": lambda folder: steps(folder, tap_storage="int4", downsample="linear"),
        "accelerate": lambda folder: steps(folder, accelerate_fsdp2),
        # The first process meets rows 0 to 3 again in the second step, the second its own only in the third.
        "cache": lambda folder: steps(folder, batches=MET_AGAIN, prepare=cached, dtype=torch.bfloat16),
        "prefix, cache": lambda folder: steps(folder, batches=MET_AGAIN, prepare=cached_prefix, dtype=torch.bfloat16),
        "prefix of one": lambda folder: steps(folder, batches=MET_AGAIN, prepare=one_prefix, dtype=torch.bfloat16),
    },
    "fsdp1": {
        "additive": lambda folder: steps(folder, fsdp1),
        "cache": lambda folder: steps(folder, fsdp1, batches=MET_AGAIN, prepare=cached, dtype=torch.bfloat16),
        "int8": lambda folder: steps(folder, fsdp1, tap_storage="int8"),
        "paper": lambda folder: steps(folder, fsdp1, mixing="paper"),
    },
    "zero3": {
        "Trainer": lambda folder: zero3(folder, Trainer),
        "SideTuningTrainer": lambda folder: zero3(folder),
        "SideTuningTrainer, cache": lambda folder: zero3(folder, callbacks=caches()[1:]),
        "nothing supervised in one process": lambda folder: zero3(folder, data=few_supervised()),
        "EUPruningSFTTrainer": zero3_sft,
        "int8": lambda folder: zero3(folder, tap_storage="int8"),
        "paper": lambda folder: zero3(folder, mixing="paper", side_attention=True),
    },
}


def main(group: str, folder: Path) -> None:
    """Run the cases of a group in this process, one of several."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    for name, case in (CASES[group] | REFUSED.get(group, {})).items():
        place = folder / name
        place.mkdir(exist_ok=True)
        try:
            result = case(place)
        except Exception:
            # The other process would wait for this one.
            torch.save({"error": traceback.format_exc()}, place / f"{dist.get_rank()}.pt")
            raise
        torch.save(result, place / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
