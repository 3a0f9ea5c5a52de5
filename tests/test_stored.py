"""States computed once, and training without the base: the same losses, gradients and adapters as live."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomize_side_network, side_parameters, tiny, token_ids, word_tokenizer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from typer.testing import CliRunner

from qtuning_peft import EUPruner, SideTuningConfig, score
from qtuning_peft.cli import app
from qtuning_peft.eu_plane import dataset as scoring
from qtuning_peft.loss import chunked_cross_entropy
from qtuning_peft.states.format import FORMATS
from qtuning_peft.stored import HEAD, MANIFEST, StatesCollator, compute_states, load_states, model_from_states

FIELDS = {"reduction_factor": 4, "layers_to_transform": [0, 2], "task_type": "CAUSAL_LM"}


def data(count: int = 12) -> Dataset:
    """Rows of tokens with a prompt, of several lengths."""
    rows = []
    for index, ids in enumerate(token_ids(count, 20).tolist()):
        own = ids[: 12 + index % 5]
        rows.append({"input_ids": own, "labels": [-100] * 8 + own[8:]})
    return Dataset.from_list(rows)


def base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model that has a folder, where an adapter's loaders look for it."""
    model = tiny().to(dtype)
    model.save_pretrained(folder)
    model.name_or_path = model.config.name_or_path = str(folder)
    return model


def stored(tmp_path: Path, states_format: str = "float32", **settings: Any) -> tuple[Path, Dataset]:
    folder = tmp_path / "states"
    rows = compute_states(
        data(), base(tmp_path / "base"), None, SideTuningConfig(**FIELDS), folder, states_format=states_format,
        rows_per_part=5, progress=False, **settings,
    )  # fmt: skip
    return folder, rows


def alike(folder: Path, fields: dict[str, Any] = FIELDS) -> list[Any]:
    """A live model and one from states, with the same random side network."""
    live = get_peft_model(tiny(), SideTuningConfig(**fields)).train()
    randomize_side_network(live)
    alone = model_from_states(folder, SideTuningConfig(**fields)).train()
    own = {name: tensor for name, tensor in live.state_dict().items() if "qst_side_network" in name}
    assert own.keys() == {name for name in alone.state_dict() if "qst_side_network" in name}
    alone.load_state_dict(own, strict=False)
    return [live, alone]


def live_batch(rows: Any) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows]),
        "labels": torch.tensor([row["labels"] + [-100] * (length - len(row["labels"])) for row in rows]),
        "attention_mask": torch.tensor([[int(i < len(row["input_ids"])) for i in range(length)] for row in rows]),
    }


@pytest.mark.parametrize("fields", [{}, {"mixing": "paper"}, {"downsample": "avgpool"}], ids=str)
def test_loss_and_gradients_are_those_of_live_training(fields: dict[str, str], tmp_path: Path) -> None:
    folder, rows = stored(tmp_path)
    live, alone = alike(folder, FIELDS | fields)
    expected = chunked_cross_entropy(live, **live_batch(data()))
    found = alone(**StatesCollator(folder)(list(rows))).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    expected.backward()
    found.backward()
    for name, parameter in side_parameters(live).items():
        torch.testing.assert_close(side_parameters(alone)[name].grad, parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("name", "bound"), [("float32", 0), ("float16", 1e-3), ("bfloat16", 8e-3), ("int8", 1e-2)])
def test_formats_give_back_what_they_got(name: str, bound: float) -> None:
    states = torch.randn(4, 7, 64, generator=torch.Generator().manual_seed(0))
    content = FORMATS[name].encode(states)
    assert len(content) == 4 * 7 * {"float32": 256, "float16": 128, "bfloat16": 128, "int8": 66}[name]
    found = FORMATS[name].decode(content, 4, 64).float()
    assert (found - states).abs().amax() <= bound * states.abs().amax()
    assert FORMATS[name].decode(FORMATS[name].encode(states[:, :0]), 4, 64).shape == (4, 0, 64)


@pytest.mark.parametrize(("name", "bound"), [("bfloat16", 2e-3), ("int8", 5e-3)])
def test_a_loss_of_rounded_states(name: str, bound: float, tmp_path: Path) -> None:
    folder, rows = stored(tmp_path, name)
    live, alone = alike(folder)
    expected = chunked_cross_entropy(live, **live_batch(data())).item()
    assert alone(**StatesCollator(folder)(list(rows))).loss.item() == pytest.approx(expected, rel=bound)


def test_a_projection_keeps_what_rows_have_in_common(tmp_path: Path) -> None:
    """Fewer bytes, the final state whole; more channels come closer; killed, damaged and other channels are noticed."""
    distances, sizes = [], []
    exact_folder, exact_rows = stored(tmp_path / "exact")
    exact = StatesCollator(exact_folder)(list(exact_rows))["states"]
    for channels in (4, 16, 48):
        folder, rows = stored(tmp_path / str(channels), "projection", channels=channels)
        live, alone = alike(folder)
        expected = chunked_cross_entropy(live, **live_batch(data())).item()
        batch = StatesCollator(folder)(list(rows))
        assert alone(**batch).loss.item() == pytest.approx(expected, abs=1e-2)
        torch.testing.assert_close(batch["states"][-1], exact[-1], rtol=0, atol=2e-2 * exact[-1].abs().max().item())
        distances.append((batch["states"][:-1] - exact[:-1]).norm().item())
        sizes.append(sum(len(row["states"]) for row in rows) / sum(rows["supervised_tokens"]))
    assert sizes == [3 * (channels + 2) + 66 for channels in (4, 16, 48)]
    assert distances == sorted(distances, reverse=True)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    next(iter(sorted(folder.glob("*.arrow")))).unlink()
    stored(tmp_path / "48", "projection", channels=48)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    damaged = bytearray(before["projection.safetensors"])
    damaged[-5] ^= 1
    (folder / "projection.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"projection.safetensors is missing or damaged"):
        StatesCollator(folder)
    with pytest.raises(ValueError, match="channels is 64; choose at least 1, and fewer than the base's width 64"):
        stored(tmp_path / "many", "projection", channels=64)


def trained(model: Any, rows: Any, collator: Any, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        folder, num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        remove_unused_columns=False, logging_steps=1, seed=0, disable_tqdm=True,
        **{"save_strategy": "no", "prediction_loss_only": True} | settings,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)


def test_trainer_makes_the_adapter_that_live_training_makes(tmp_path: Path) -> None:
    """Steps, centers, evaluation and file; plain PEFT loads it on the base."""
    folder, rows = stored(tmp_path)
    torch.manual_seed(0)
    live = get_peft_model(base(tmp_path / "base"), SideTuningConfig(**FIELDS))
    torch.manual_seed(0)
    alone = model_from_states(folder, SideTuningConfig(**FIELDS))
    alone.load_state_dict({n: p.detach() for n, p in live.state_dict().items() if "qst_side" in n}, strict=False)
    live_trainer = trained(live, data(), DataCollatorForSeq2Seq(word_tokenizer()), tmp_path / "live")
    trainer = trained(alone, rows, StatesCollator(folder), tmp_path / "alone")
    for each in (live_trainer, trainer):
        each.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (live_trainer, trainer)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(live_trainer.evaluate()["eval_loss"], rel=2e-2)
    alone.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        found, expected = loaded(token_ids()).logits, live.eval()(token_ids()).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert loaded.active_peft_config.base_model_name_or_path == str(tmp_path / "base")


def test_training_is_resumed(tmp_path: Path) -> None:
    folder, rows = stored(tmp_path)
    torch.manual_seed(0)
    whole = model_from_states(folder, SideTuningConfig(**FIELDS))
    start = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    settings = {"save_strategy": "steps", "save_steps": 3}
    trained(whole, rows, StatesCollator(folder), tmp_path / "run", **settings).train()
    again = model_from_states(folder, SideTuningConfig(**FIELDS))
    again.load_state_dict(start)
    trainer = trained(again, rows, StatesCollator(folder), tmp_path / "run", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, parameter in side_parameters(whole).items():
        torch.testing.assert_close(side_parameters(again)[name], parameter)


def test_nothing_of_the_base_but_its_head_is_in_memory(tmp_path: Path) -> None:
    folder, _ = stored(tmp_path)
    model = model_from_states(folder, SideTuningConfig(**FIELDS))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if "qst_side_network" not in name}
    assert {name.split("model.")[-1]: size for name, size in sizes.items() if size} == {"lm_head.weight": 100 * 64}


def test_the_scores_are_those_of_scoring_alone(tmp_path: Path) -> None:
    _, rows = stored(tmp_path, scores=("el2n",))
    scored = score(data(), tiny(), None, scores=("el2n",), progress=False, rows_per_part=5)
    for column in ("error", "uncertainty", "el2n", "input_ids", "labels", "supervised_tokens"):
        assert rows[column][:] == scored[column][:]
    # The model is left as it was.
    model = tiny()
    expected = model(token_ids()).logits
    compute_states(data(), model, None, SideTuningConfig(**FIELDS), tmp_path / "again", progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert torch.equal(model(token_ids()).logits, expected)


def test_pruned_rows_and_tokens_are_left_out(tmp_path: Path) -> None:
    """What is trained on is what live training on the pruned rows would be."""
    folder, rows = stored(tmp_path)
    kept = rows.map(EUPruner(sample_ratio=0.75, token_ratio=0.5).fit(rows), batched=True)
    assert len(kept) == 9
    batch = StatesCollator(folder)(list(kept))
    supervised = [label for row in kept for label in row["labels"] if label != -100]
    assert batch["labels"].tolist() == [-100, *supervised]
    assert len(supervised) < sum(map(len, kept["state_tokens"][:]))
    live, alone = alike(folder)
    expected = chunked_cross_entropy(live.train(), **live_batch(list(kept)))
    torch.testing.assert_close(alone.train()(**batch).loss, expected, rtol=1e-6, atol=1e-6)


def test_killed_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is not there is computed, and the folder is the same to the byte."""
    folder, _ = stored(tmp_path)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "states").rename(tmp_path / "first")
    write, written = scoring.write_part, []

    def killed(file: Path, table: Any) -> None:
        if len(written) % 2:
            written.append("killed")
            raise KeyboardInterrupt
        write(file, table)
        written.append(file.name)

    monkeypatch.setattr(scoring, "write_part", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stored(tmp_path)
        with pytest.raises(ValueError, match="holds no finished states"):
            load_states(folder)
    stored(tmp_path)
    assert [name for name in written if name != "killed"] == json.loads(whole[MANIFEST])["parts"]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_damaged_states_are_never_read(tmp_path: Path) -> None:
    folder, rows = stored(tmp_path, "int8")
    expected = rows.to_dict()
    files, rng = sorted(folder.glob("*.arrow")), random.Random(0)
    for _ in range(100):
        file = rng.choice(files)
        content = file.read_bytes()
        damaged = bytearray(content)
        if rng.random() < 0.3:
            damaged = damaged[: rng.randrange(len(damaged))]
        else:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is missing or damaged"):
            load_states(folder)
        file.write_bytes(content)
    head = folder / HEAD
    head.write_bytes(head.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"head.safetensors is missing or damaged"):
        model_from_states(folder, SideTuningConfig(**FIELDS))
    files[0].unlink()
    stored(tmp_path, "int8")
    assert load_states(folder).to_dict() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ["../a"]}, "names parts outside of the folder"),
        ({"version": 0}, "has states of version 0"),
        ({"format": "int3"}, "states_format is 'int3'"),
        ({"rows": 3}, "holds 12 rows, its manifest says 3"),
        ({"layers": None}, None),
    ],
)
def test_a_manifest_that_does_not_fit(change: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    folder, _ = stored(tmp_path)
    content = json.loads((folder / MANIFEST).read_text())
    if message is None:
        del content["layers"]
        message = "holds no finished states"
    (folder / MANIFEST).write_text(json.dumps(content | {k: v for k, v in change.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        load_states(folder)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder, rows = stored(tmp_path)
    with pytest.raises(ValueError, match=r"taps blocks \[0, 1, 2\], but the states are of \[0, 2\]"):
        model_from_states(folder, SideTuningConfig(reduction_factor=4, tap_every=1))
    with pytest.raises(ValueError, match="model carries an adapter"):
        compute_states(data(), get_peft_model(tiny(), SideTuningConfig()), None, SideTuningConfig(), tmp_path / "x")
    model = get_peft_model(tiny(), SideTuningConfig(reduction_factor=4, tap_every=1, task_type="CAUSAL_LM")).train()
    with pytest.raises(
        ValueError,
        match=r"states holds 4 parts, of blocks \[0, 2\], but the active side network reads blocks \[0, 1, 2\]",
    ):
        model(**StatesCollator(folder)(list(rows)))
    attending = SideTuningConfig(**FIELDS, side_attention=True)
    with pytest.raises(ValueError, match="side_attention is True"):
        compute_states(data(), tiny(), None, attending, tmp_path / "y")
    with pytest.raises(ValueError, match="side_attention is True"):
        model_from_states(folder, attending)


def test_it_is_a_data_set(tmp_path: Path) -> None:
    folder, rows = stored(tmp_path)
    assert isinstance(rows, Dataset)
    assert len(rows.cache_files) == len(list(folder.glob("*.arrow"))) == 3
    chosen = rows.select([3, 1]).shuffle(seed=0).train_test_split(test_size=1, seed=0)["train"]
    chosen.to_parquet(str(tmp_path / "rows.parquet"))
    again = Dataset.from_parquet(str(tmp_path / "rows.parquet"))
    assert again[0]["states"] == chosen[0]["states"]
    assert np.isfinite(again[0]["error"])
    assert (folder / HEAD).is_file()


def test_from_a_shell(tmp_path: Path) -> None:
    import pico

    pico.save_model(tmp_path / "model")
    pico.write_chat(tmp_path / "chat.jsonl")
    command = ["states", str(tmp_path / "chat.jsonl"), str(tmp_path / "model"), "-o", str(tmp_path / "states")]
    result = CliRunner().invoke(app, [*command, "--tap-every", "1", "--states-format", "int8"])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "states"
    config = SideTuningConfig(reduction_factor=4, tap_every=1)
    model = model_from_states(folder, config).train()
    loss = model(**StatesCollator(folder)(list(load_states(folder)))).loss
    loss.backward()
    assert loss.isfinite()
    again = CliRunner().invoke(app, [*command, "--tap-every", "1", "--states-format", "int8"])
    assert again.exit_code == 1
    assert "is there already" in " ".join(again.output.split())
    kept = CliRunner().invoke(
        app, ["prune", str(folder), "-o", str(tmp_path / "kept"), "--sample-ratio", "0.5", "--strategy", "random"]
    )
    assert kept.exit_code == 0, kept.output
    assert 0 < len(load_states(tmp_path / "kept")) < len(load_states(folder))
