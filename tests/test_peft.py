"""Side tuning is a PEFT method like any other."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import FAMILIES, randomize_side_network, side_parameters, tiny, token_ids
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    OlmoConfig,
    OlmoForCausalLM,
)

from qtuning_peft import SideTuningConfig, SideTuningModel
from qtuning_peft._register import register


def logits(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**({"input_ids": token_ids()} | inputs)).logits


def test_the_type_is_a_true_member_made_once() -> None:
    member = PeftType.QST
    register()
    assert PeftType("QST") is member
    assert isinstance(member, PeftType)
    assert list(PeftType).count(member) == 1
    assert member.value == "QST"
    assert SideTuningConfig().peft_type is member


def test_importing_the_package_is_enough_in_a_fresh_process(tmp_path: Path) -> None:
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), SideTuningConfig(task_type="CAUSAL_LM")
    )
    randomize_side_network(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "logits.pt")
    script = (
        "import sys, torch, qtuning_peft, importlib; importlib.reload(qtuning_peft)\n"
        "from peft import AutoPeftModelForCausalLM, PeftConfig\n"
        "folder = sys.argv[1]\n"
        "config = PeftConfig.from_pretrained(folder + '/adapter')\n"
        "assert type(config).__name__ == 'SideTuningConfig', type(config)\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(folder + '/adapter')\n"
        "ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(2))\n"
        "assert torch.equal(model(ids).logits, torch.load(folder + '/logits.pt'))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_at_the_base_learns_saves_and_unloads(family: str, tmp_path: Path) -> None:
    base = tiny(family)
    ids, mask = token_ids(), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    expected = logits(base, attention_mask=mask)
    model = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, attention_mask=mask), expected)

    optimizer = torch.optim.AdamW(side_parameters(model).values(), lr=1e-2)
    losses = []
    model.train()
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        assert all((p.grad is not None) == ("qst_side_network" in name) for name, p in model.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1

    model.eval()
    tuned = logits(model, attention_mask=mask)
    with model.disable_adapter():
        assert torch.equal(logits(model, attention_mask=mask), expected)
    model.save_pretrained(tmp_path)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, attention_mask=mask), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unloaded.modules())
    again = PeftModel.from_pretrained(unloaded, tmp_path, adapter_name="another")
    assert torch.equal(logits(again, attention_mask=mask), tuned)


def test_adapters_are_switched_deleted_and_kept_apart() -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"), adapter_name="a")
    model.add_adapter("ab", SideTuningConfig(reduction_factor=4, downsample="avgpool", task_type="CAUSAL_LM"))
    randomize_side_network(model)
    first = logits(model)
    model.set_adapter("ab")
    second = logits(model)
    assert not torch.equal(first, second)
    assert all(p.requires_grad == (".ab." in name) for name, p in side_parameters(model).items())
    model.set_adapter("a")
    assert torch.equal(logits(model), first)
    model.delete_adapter("a")
    model.set_adapter("ab")
    assert torch.equal(logits(model), second)


def test_trainable_parameters_are_those_of_the_side_network(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in side_parameters(model).values())
    assert total > trainable
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,}" in capsys.readouterr().out


def test_transformers_own_adapter_methods(tmp_path: Path) -> None:
    base = tiny()
    expected = logits(base)
    base.add_adapter(SideTuningConfig(), adapter_name="side")
    assert torch.equal(logits(base), expected)
    randomize_side_network(base)
    tuned = logits(base)
    base.save_pretrained(tmp_path)
    base.disable_adapters()
    assert torch.equal(logits(base), expected)
    base.enable_adapters()
    assert torch.equal(logits(base), tuned)

    other = tiny()
    other.load_adapter(tmp_path, adapter_name="loaded")
    assert torch.equal(logits(other), tuned)
    through_peft = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(through_peft), tuned)


def test_loading_without_initializing_weights_first(tmp_path: Path) -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
    randomize_side_network(model)
    model.save_pretrained(tmp_path)
    lazy = PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lazy), logits(model))
    assert {p.dtype for p in side_parameters(lazy).values()} == {torch.float32}


def test_weights_stay_float32_on_a_16_bit_base() -> None:
    model = get_peft_model(tiny().to(torch.bfloat16), SideTuningConfig(task_type="CAUSAL_LM"))
    assert {p.dtype for p in side_parameters(model).values()} == {torch.float32}
    randomize_side_network(model)
    assert logits(model).dtype == torch.bfloat16


def test_a_classification_head_trains_beside_the_side_network(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=100, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, SideTuningConfig(task_type=TaskType.SEQ_CLS))
    ids, labels = token_ids(6), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.1 < losses[0]
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        LlamaForSequenceClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(logits(again, input_ids=ids), logits(model, input_ids=ids))


def test_a_bare_decoder_gives_mixed_features() -> None:
    torch.manual_seed(0)
    model = get_peft_model(LlamaModel(tiny().config).eval(), SideTuningConfig(task_type=TaskType.FEATURE_EXTRACTION))
    with torch.no_grad():
        before = model(input_ids=token_ids()).last_hidden_state
        randomize_side_network(model)
        assert not torch.equal(model(input_ids=token_ids()).last_hidden_state, before)


def test_embeddings_as_input_give_what_tokens_give() -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
    randomize_side_network(model)
    embeddings = model.get_input_embeddings()(token_ids())
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeddings).logits, logits(model))


def test_a_copied_model_has_a_side_network_of_its_own() -> None:
    import copy

    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
    randomize_side_network(model)
    before = logits(model)
    twin = copy.deepcopy(model)
    randomize_side_network(twin, seed=7)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_threads_do_not_disturb_each_other() -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM")).eval()
    randomize_side_network(model)
    batches = [token_ids(1, length, seed=length) for length in (5, 9, 5, 12)]
    expected = [logits(model, input_ids=ids) for ids in batches]
    wrong: list[int] = []

    def serve(number: int) -> None:
        for _ in range(30):
            if not torch.allclose(logits(model, input_ids=batches[number]), expected[number], atol=1e-6):
                wrong.append(number)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(serve, number) for number in range(4)]:
            future.result()
    assert not wrong


def test_compiled_and_pickled_models_compute_the_same(tmp_path: Path) -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM")).eval()
    randomize_side_network(model)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(model))
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_off_loaded_weights_compute_the_same(dtype: torch.dtype) -> None:
    model = get_peft_model(tiny().to(dtype), SideTuningConfig(task_type="CAUSAL_LM")).eval()
    randomize_side_network(model)
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model), expected)


def test_a_norm_without_weights() -> None:
    base = OlmoForCausalLM(
        OlmoConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    ).eval()
    expected = logits(base)
    model = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


def test_the_default_number_of_heads_is_recorded() -> None:
    model = get_peft_model(
        tiny(hidden_size=256, head_dim=64), SideTuningConfig(reduction_factor=2, side_attention=True)
    )
    assert model.peft_config["default"].num_side_heads == 2
    assert get_peft_model(tiny(), SideTuningConfig(reduction_factor=2)).peft_config["default"].num_side_heads is None


def test_auto_class_loads_base_and_adapter(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
    randomize_side_network(model)
    model.save_pretrained(tmp_path / "adapter")
    saved = PeftConfig.from_pretrained(tmp_path / "adapter").to_dict()
    assert saved == model.peft_config["default"].to_dict() | {"inference_mode": True}
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded.base_model, SideTuningModel)
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_is_loaded_without_datasets(tmp_path: Path) -> None:
    """Who serves adapters need not install what reads training data."""
    tiny().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('datasets', 'pyarrow', 'pandas'))\n"
        "import qtuning_peft, torch\n"
        "from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'a')!r})\n"
        "print(model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=2, min_new_tokens=2).shape[1])\n"
        "try:\n    qtuning_peft.EUPruner\nexcept ModuleNotFoundError as error:\n    print(error.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    length, missing = done.stdout.split()
    assert (length, missing) in {("5", name) for name in ("datasets", "pyarrow", "pandas")}
