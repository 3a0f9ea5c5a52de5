"""Adapters on the Hub: pushed and loaded by the real client over HTTP, each in a process and a cache of its own.

`python tests/test_hub.py publish FOLDER` and `... load FOLDER` are those processes; the Hub is `loopback_hub.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from loopback_hub import Commit, LoopbackHub

BASE, ADAPTER, SAME, CONFIG, TRAINER, TRL, SFT = (
    f"qst/{name}" for name in ("base", "adapter", "same-weights", "config", "trainer", "trl", "sft")
)
WEIGHTS = "adapter_model.safetensors"
# Less than the weights and more than any other file of an adapter.
HALF = 50_000


def publish(folder: Path) -> None:
    """Push a base and adapters in every way there is, and keep the logits they had."""
    import pico
    from conftest import randomize_side_network
    from datasets import Dataset
    from huggingface_hub import HfApi
    from peft import PeftModel, get_peft_model
    from qtuning_peft.integrations.blocks import EUPruningBlock
    from qtuning_peft.integrations.trl import EUPruningSFTTrainer
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from qtuning_peft import SideTuningConfig

    kept: dict[str, torch.Tensor] = {}
    commits: dict[str, str] = {}

    def fresh() -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(BASE)
        kept["base"] = _logits(base)
        return get_peft_model(base, SideTuningConfig(mixing="paper", task_type="CAUSAL_LM"))

    pico.save_model(folder / "base")
    AutoModelForCausalLM.from_pretrained(folder / "base").push_to_hub(BASE)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.push_to_hub(BASE)

    model = fresh()
    for name, branch in (("first", None), ("second", None), ("branch", "experiment")):
        randomize_side_network(model)
        commits[name] = model.push_to_hub(ADAPTER, revision=branch, commit_message=name).oid
        kept[name] = _logits(model)
        if name == "second":
            commits["second again"] = model.push_to_hub(ADAPTER).oid
            model.push_to_hub(SAME)
            model.save_pretrained(folder / "second")
    HfApi().create_tag(ADAPTER, tag="v1", revision=commits["first"])
    randomize_side_network(model)
    model.save_pretrained(folder / "unpublished")
    SideTuningConfig(reduction_factor=4, downsample="lora", base_model_name_or_path=BASE).push_to_hub(CONFIG)

    settings = {
        "output_dir": str(folder / "out"),
        "push_to_hub": True,
        "max_steps": 2,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    ids = _ids().tolist()
    trainer = Trainer(
        fresh(),
        TrainingArguments(**settings | {"hub_model_id": TRAINER}),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids * 4]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.push_to_hub()
    kept["trainer"] = _logits(trainer.model)

    sft = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(BASE),
        SFTConfig(**settings | {"hub_model_id": TRL, "output_dir": str(folder / "out-trl")}),
        train_dataset=Dataset.from_list([pico.messages(row) for row in pico.rows(16)]),
        processing_class=tokenizer,
        peft_config=SideTuningConfig(task_type="CAUSAL_LM"),
    )
    sft.train()
    sft.push_to_hub()
    kept["trl"] = _logits(sft.model)

    rows = Dataset.from_list([pico.messages(row) for row in pico.rows(16)])
    ours = EUPruningSFTTrainer(
        AutoModelForCausalLM.from_pretrained(BASE),
        SFTConfig(
            **settings | {"hub_model_id": SFT, "output_dir": str(folder / "out-sft")},
            hub_token=os.environ["HF_TOKEN"], eval_strategy="steps", eval_steps=1, logging_steps=1,
        ),
        train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
        peft_config=SideTuningConfig(task_type="CAUSAL_LM"), eu_pruning=EUPruningBlock(sample_ratio=0.5),
        recipe={"dataset_name": "org/rows", "dataset_test_split": "test", "output_dir": str(folder), "max_steps": 2},
    )  # fmt: skip
    ours.train()
    ours.push_to_hub(dataset_name=str(folder / "rows"))
    kept["sft"] = _logits(ours.model)
    # Whoever pushes it again by PEFT knows nothing of the training.
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), SFT).push_to_hub(SFT)

    torch.save(kept, folder / "published.pt")
    (folder / "commits.json").write_text(json.dumps(commits))


def load(folder: Path) -> None:
    """Load by name and revision what `publish` pushed, and keep the logits and the errors."""
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    import qtuning_peft  # noqa: F401  (registers QST with PEFT)

    commits = json.loads((folder / "commits.json").read_text())
    kept: dict[str, Any] = {}

    def from_peft(repo: str, **where: Any) -> torch.Tensor:
        return _logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), repo, **where))

    def from_auto(repo: str, **where: Any) -> torch.Tensor:
        return _logits(AutoPeftModelForCausalLM.from_pretrained(repo, **where))

    kept["head"] = from_peft(ADAPTER)
    kept["first"] = from_peft(ADAPTER, revision=commits["first"])
    kept["second"] = from_peft(ADAPTER, revision=commits["second"])
    kept["tag"] = from_peft(ADAPTER, revision="v1")
    kept["branch"] = from_peft(ADAPTER, revision="experiment")
    kept["auto"] = from_auto(ADAPTER)
    kept["auto first"] = from_auto(ADAPTER, revision=commits["first"])
    kept["trainer"] = from_auto(TRAINER)
    kept["trl"] = from_auto(TRL)
    kept["sft"] = from_auto(SFT)
    kept["after a broken download"] = from_peft(ADAPTER, cache_dir=folder / "broken-download" / "hub")
    config = PeftConfig.from_pretrained(CONFIG)
    kept["config"] = (type(config).__name__, config.reduction_factor, config.downsample, config.base_model_name_or_path)
    for name, repo, revision in (("no repository", "qst/none", None), ("no revision", ADAPTER, "v9")):
        for way in (from_peft, from_auto):
            try:
                way(repo, revision=revision)
            except Exception as error:
                cause = error.__cause__ or error.__context__
                kept[f"{name}, {way.__name__}"] = (type(error).__name__, str(error), type(cause).__name__)
    torch.save(kept, folder / "loaded.pt")


def _ids() -> torch.Tensor:
    return torch.randint(6, 50, (2, 12), generator=torch.Generator().manual_seed(2))


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=_ids()).logits


def _start(hub: LoopbackHub, home: Path, *arguments: str) -> subprocess.Popen[str]:
    # Variables of the machine, such as another cache, must not reach past the ones of the Hub.
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    environment = outside | hub.environment | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _run(hub: LoopbackHub, home: Path, *arguments: str) -> None:
    with _start(hub, home, *arguments) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `publish` has left what it kept."""
    folder = tmp_path_factory.mktemp("hub")
    _run(hub, folder / "publisher", __file__, "publish", str(folder))
    return folder


@pytest.fixture(scope="module")
def published(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "published.pt")


@pytest.fixture(scope="module")
def commits(folder: Path) -> dict[str, str]:
    return json.loads((folder / "commits.json").read_text())


@pytest.fixture(scope="module")
def cached_when_killed(hub: LoopbackHub, folder: Path) -> dict[str, bytes]:
    """What a client that was killed half-way through the weights had put under `snapshots`."""
    home = folder / "broken-download"
    script = f"import huggingface_hub; huggingface_hub.snapshot_download({ADAPTER!r})"
    with hub.breaking("download", after=HALF) as broken, _start(hub, home, "-c", script) as process:
        assert broken.wait(60)
        process.kill()
    return {path.name: path.read_bytes() for path in home.rglob("snapshots/*/*")}


@pytest.fixture(scope="module")
def loaded(hub: LoopbackHub, folder: Path, cached_when_killed: dict[str, bytes]) -> dict[str, Any]:
    _run(hub, folder / "reader", __file__, "load", str(folder))
    return torch.load(folder / "loaded.pt")


@pytest.mark.parametrize(
    ("loaded_as", "published_as"),
    [
        ("head", "second"),
        ("first", "first"),
        ("second", "second"),
        ("tag", "first"),
        ("branch", "branch"),
        ("auto", "second"),
        ("auto first", "first"),
        ("trainer", "trainer"),
        ("trl", "trl"),
        ("sft", "sft"),
    ],
)
def test_every_revision_loads_in_a_fresh_process_as_it_was_pushed(
    loaded_as: str, published_as: str, loaded: dict[str, Any], published: dict[str, torch.Tensor]
) -> None:
    torch.testing.assert_close(loaded[loaded_as], published[published_as], rtol=0, atol=0)
    others = [logits for name, logits in published.items() if name != published_as]
    assert all((loaded[loaded_as] - other).abs().max() > 1e-3 for other in others)


def test_a_config_alone_can_be_pushed_and_loaded(loaded: dict[str, Any]) -> None:
    assert loaded["config"] == ("SideTuningConfig", 4, "lora", BASE)


@pytest.mark.parametrize("way", ["from_peft", "from_auto"])
@pytest.mark.parametrize(
    ("missing", "repo", "cause"),
    [
        ("no repository", "qst/none", "RepositoryNotFoundError"),
        ("no revision", ADAPTER, "RevisionNotFoundError"),
    ],
)
def test_what_is_not_there_is_an_error_that_names_it(
    way: str, missing: str, repo: str, cause: str, loaded: dict[str, Any]
) -> None:
    kind, message, caused_by = loaded[f"{missing}, {way}"]
    assert (kind, caused_by) == ("ValueError", cause)
    assert repo in message


def test_a_repository_holds_the_adapter_and_nothing_of_the_base(hub: LoopbackHub, folder: Path) -> None:
    assert set(_head(hub, ADAPTER).files) == {"README.md", "adapter_config.json", WEIGHTS}
    config = json.loads(_head(hub, ADAPTER).files["adapter_config.json"].content)
    assert config["base_model_name_or_path"] == BASE
    for repo in (TRAINER, TRL):
        assert {"adapter_config.json", WEIGHTS} < set(_head(hub, repo).files)
        assert "model.safetensors" not in _head(hub, repo).files


def test_an_adapter_records_which_commit_of_its_base_it_was_trained_on(hub: LoopbackHub, folder: Path) -> None:
    for repo in (ADAPTER, TRAINER, TRL, SFT):
        config = json.loads(_head(hub, repo).files["adapter_config.json"].content)
        assert config["revision"] == _head(hub, BASE).oid


def test_a_commit_of_the_base_is_recorded_where_it_is_certain(hub: LoopbackHub, folder: Path) -> None:
    script = """
import torch
from huggingface_hub import HfApi
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from qtuning_peft import SideTuningConfig
def recorded(**where):
    base = AutoModelForCausalLM.from_pretrained("qst/moving", **where)
    return get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM")).active_peft_config.revision
base = AutoModelForCausalLM.from_pretrained("qst/base")
first = base.push_to_hub("qst/moving").oid
HfApi().create_tag("qst/moving", tag="v1", revision=first)
with torch.no_grad():
    base.get_input_embeddings().weight.add_(1)
second = base.push_to_hub("qst/moving").oid
assert recorded(revision="v1") == first  # not what main is
third = HfApi().upload_file(
    repo_id="qst/moving", revision="main", path_or_fileobj=b"words", path_in_repo="README.md"
).oid
assert recorded() is None  # there are two in the cache now
"""
    _run(hub, folder / "moving", "-c", script)


def test_commits_with_the_same_weights_are_one(hub: LoopbackHub, folder: Path) -> None:
    script = """
from huggingface_hub import HfApi
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from qtuning_peft import SideTuningConfig
AutoModelForCausalLM.from_pretrained("qst/base").push_to_hub("qst/still")
for words in (b"one", b"two"):
    head = HfApi().upload_file(repo_id="qst/still", path_or_fileobj=words, path_in_repo="README.md").oid
    base = AutoModelForCausalLM.from_pretrained("qst/still")
    assert get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM")).active_peft_config.revision == head
"""
    _run(hub, folder / "still", "-c", script)


def test_weights_go_through_lfs_and_the_same_ones_only_once(hub: LoopbackHub, commits: dict[str, str]) -> None:
    weights = hub.repos[ADAPTER].at(commits["second"]).files[WEIGHTS]
    assert weights.large
    assert sum(method == "PUT" and weights.oid in path for method, path in hub.requests) == 1
    assert _head(hub, SAME).files[WEIGHTS] == weights
    assert commits["second again"] == commits["second"]


def test_the_card_on_the_hub_says_peft(hub: LoopbackHub, folder: Path) -> None:
    card = _card(hub, ADAPTER)
    assert (card["library_name"], card.get("base_model")) == ("peft", BASE)


def test_the_card_that_trainer_pushes_says_peft_and_names_the_base(hub: LoopbackHub, folder: Path) -> None:
    card = _card(hub, TRAINER)
    assert card["library_name"] == "peft"
    assert card["base_model"] == BASE
    assert f"base_model:adapter:{BASE}" in card["tags"]


def test_the_card_that_qtuning_sft_pushes_says_how_it_was_trained(hub: LoopbackHub, folder: Path) -> None:
    commits = hub.repos[SFT].commits.values()
    cards = [commit.files["README.md"].content.decode() for commit in commits if "README.md" in commit.files]
    card = ModelCard(cards[-1])
    assert (card.data.library_name, card.data.base_model) == ("peft", BASE)
    assert card.data.datasets == ["org/rows"]
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_type) == ("org/rows", "test", "loss")
    for known in ("| pruning | kept 8 of 16 samples", "| steps | 2 |", "max_steps: 2", f'from_pretrained("{SFT}")'):
        assert known in card.text
    # TRL's own snippet runs, too.
    assert "import qtuning_peft  # registers QST with PEFT\nfrom transformers import pipeline" in card.text
    for card in cards:
        assert hub.environment["HF_TOKEN"] not in card
        assert str(folder) not in card


@pytest.fixture(scope="module")
def completed(hub: LoopbackHub, folder: Path) -> str:
    """What the command says while it pushes the folder of stock TRL, and of what it and `qtuning sft` have pushed."""
    script = f"""
from typer.testing import CliRunner
from qtuning_peft.cli import app
for arguments in (
    ["push", {str(folder / "out-trl")!r}, "qst/completed", "--dataset", "org/rows", "--dataset", "org/more",
     "--language", "en", "--license", "apache-2.0"],
    ["info", "qst/completed"],
    ["info", {SFT!r}],
):
    done = CliRunner().invoke(app, arguments, env={{"COLUMNS": "200"}})
    print(done.output)
    assert done.exit_code == 0
"""
    with _start(hub, folder / "command", "-c", script) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def test_the_command_completes_a_card_of_stock_trl(hub: LoopbackHub, completed: str) -> None:
    assert _card(hub, TRL)["library_name"] == "transformers"
    assert not [repo for repo in (TRAINER, TRL, SFT, "qst/completed") if "More Information" in _readme(hub, repo)]
    card = _card(hub, "qst/completed")
    assert (card["library_name"], card["base_model"], card["base_model_relation"]) == ("peft", BASE, "adapter")
    assert (card["datasets"], card["language"], card["license"]) == (["org/rows", "org/more"], ["en"], "apache-2.0")


def test_the_command_shows_how_it_was_trained(completed: str) -> None:
    first, _, second = completed.partition("base model")[2].partition("base model")
    assert "org/rows, org/more" in first
    assert "apache-2.0" in first
    for known in ("org/rows", "loss on org/rows, test", "pruning", "kept 8 of 16 samples", "steps", "peak memory"):
        assert known in second


@pytest.mark.parametrize("repo", [ADAPTER, SFT, "qst/completed"])
def test_a_reader_generates_with_nothing_but_the_card(
    repo: str, hub: LoopbackHub, folder: Path, completed: str
) -> None:
    card = _head(hub, repo).files["README.md"].content.decode()
    snippet = card.split("```python\n")[1].split("```")[0]
    generate = "import torch\nprint(model.generate(input_ids=torch.tensor([[6, 7, 8]]), max_new_tokens=4).shape[1] > 3)"
    with _start(hub, folder / "reader-of-card", "-c", snippet + generate) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    assert output.splitlines()[-1] == "True"


def test_the_command_pushes_what_is_shared_pulls_it_and_shows_it(hub: LoopbackHub, folder: Path) -> None:
    shutil.copytree(folder / "second", folder / "cli")
    (folder / "cli" / "optimizer.pt").write_bytes(b"mine")
    script = f"""
from typer.testing import CliRunner
from qtuning_peft.cli import app
for arguments in (
    ["push", {str(folder / "cli")!r}, "qst/cli", "-m", "by command"],
    ["pull", "qst/cli", "-o", {str(folder / "pulled")!r}],
    ["pull", "qst/cli", "-o", {str(folder / "pulled")!r}],
    ["pull", "qst/base", "-o", {str(folder / "no-adapter")!r}],
    ["info", "qst/cli"],
):
    done = CliRunner().invoke(app, arguments, env={{"COLUMNS": "200"}})
    print(done.exit_code, done.output)
"""
    with _start(hub, folder / "command", "-c", script) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    head = _head(hub, "qst/cli")
    assert set(head.files) == {"README.md", "adapter_config.json", WEIGHTS}
    assert b'from_pretrained("qst/cli")' in head.files["README.md"].content
    assert {file.name for file in (folder / "pulled").iterdir()} >= {"README.md", "adapter_config.json", WEIGHTS}
    assert not (folder / "pulled" / ".cache").exists()
    assert (folder / "pulled" / WEIGHTS).read_bytes() == (folder / "second" / WEIGHTS).read_bytes()
    # Where lines break depends on the length of the folder's name.
    assert "is not empty; name another folder" in " ".join(output.replace("│", "").split())
    assert not (folder / "no-adapter").exists()
    codes = [line.split()[0] for line in output.splitlines() if line[:2] in ("0 ", "1 ")]
    assert codes == ["0", "0", "1", "1", "0"], output
    assert BASE in output.split("base model")[1]
    assert "input gates" in output


@pytest.mark.parametrize("token", ["hf_wrong", None])
def test_who_is_not_logged_in_learns_how(token: str | None, hub: LoopbackHub, folder: Path) -> None:
    arguments = ["push", str(folder / "second"), "qst/refused"]
    script = f"""
import os
os.environ.pop("HF_TOKEN")
if {token!r}:
    os.environ["HF_TOKEN"] = {token!r}
from typer.testing import CliRunner
from qtuning_peft.cli import app
done = CliRunner().invoke(app, {arguments!r}, env={{"COLUMNS": "200"}})
print(done.exit_code, done.output)
"""
    with _start(hub, folder / "unknown", "-c", script) as process:
        output, _ = process.communicate()
    assert "1 Error: The Hub does not know you; run `hf auth login`, or set HF_TOKEN" in output
    assert "qst/refused" not in hub.repos


def test_a_base_in_a_folder_gets_its_name_on_the_hub_when_pushed(hub: LoopbackHub, folder: Path) -> None:
    mine = shutil.copytree(folder / "second", folder / "named")
    config = json.loads((mine / "adapter_config.json").read_text())
    (mine / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folder / "base")}))
    before = (mine / "adapter_config.json").read_bytes()
    command = f"from qtuning_peft.cli import app; app(['push', {str(mine)!r}, 'qst/named', '--base-model', {BASE!r}])"
    _run(hub, folder / "command", "-c", command)
    assert json.loads(_head(hub, "qst/named").files["adapter_config.json"].content)["base_model_name_or_path"] == BASE
    assert _card(hub, "qst/named")["base_model"] == BASE
    assert str(folder) not in _readme(hub, "qst/named")
    assert (mine / "adapter_config.json").read_bytes() == before


def test_a_killed_upload_leaves_the_repository_as_it_was_and_can_be_run_again(hub: LoopbackHub, folder: Path) -> None:
    before = _push(hub, "qst/killed", folder / "second")
    weights = (folder / "unpublished" / WEIGHTS).read_bytes()
    script = _push_script("qst/killed", folder / "unpublished")
    with hub.breaking("store", after=HALF) as broken, _start(hub, folder / "killed", "-c", script) as process:
        assert broken.wait(60)
        process.kill()
    assert _head(hub, "qst/killed") is before
    assert hashlib.sha256(weights).hexdigest() not in hub.large_files

    after = _push(hub, "qst/killed", folder / "unpublished")
    assert after.parent == before.oid
    assert after.files[WEIGHTS].content == weights


def test_a_commit_that_breaks_off_is_an_error_changes_nothing_and_can_be_run_again(
    hub: LoopbackHub, folder: Path
) -> None:
    before = _push(hub, "qst/broken", folder / "second")
    script = _push_script("qst/broken", folder / "unpublished")
    with hub.breaking("commit", after=100) as broken, _start(hub, folder / "broken", "-c", script) as process:
        output, _ = process.communicate()
    assert broken.is_set()
    assert process.returncode != 0
    assert "Error" in output.splitlines()[-1]
    assert _head(hub, "qst/broken") is before

    after = _push(hub, "qst/broken", folder / "unpublished")
    assert after.parent == before.oid
    assert after.files[WEIGHTS].content == (folder / "unpublished" / WEIGHTS).read_bytes()


def test_a_killed_download_leaves_no_part_of_a_file_in_the_cache_and_is_completed_later(
    hub: LoopbackHub, cached_when_killed: dict[str, bytes], loaded: dict[str, Any], published: dict[str, torch.Tensor]
) -> None:
    whole = {path: blob.content for path, blob in _head(hub, ADAPTER).files.items() if path != WEIGHTS}
    assert WEIGHTS not in cached_when_killed
    assert cached_when_killed.items() <= whole.items()
    assert torch.equal(loaded["after a broken download"], published["second"])


@pytest.mark.parametrize(("sent", "size"), [(b"WEIGHTS", 7), (b"weights", 8)])
def test_this_hub_refuses_a_large_file_that_is_not_what_was_announced(hub: LoopbackHub, sent: bytes, size: int) -> None:
    announced = hashlib.sha256(b"weights").hexdigest()
    request = urllib.request.Request(f"{hub.url}/lfs/{announced}/{size}", data=sent, method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert announced not in hub.large_files


def _push_script(repo: str, folder: Path) -> str:
    return (
        f"import huggingface_hub as hub; hub.create_repo({repo!r}, exist_ok=True); "
        f"hub.upload_folder(repo_id={repo!r}, folder_path={str(folder)!r})"
    )


def _push(hub: LoopbackHub, repo: str, folder: Path) -> Commit:
    _run(hub, folder.parent / "uploader", "-c", _push_script(repo, folder))
    return _head(hub, repo)


def _head(hub: LoopbackHub, repo: str) -> Commit:
    return hub.repos[repo].at("main")


def _readme(hub: LoopbackHub, repo: str) -> str:
    return _head(hub, repo).files["README.md"].content.decode()


def _card(hub: LoopbackHub, repo: str) -> dict[str, Any]:
    return yaml.safe_load(_readme(hub, repo).split("---")[1])


if __name__ == "__main__":
    {"publish": publish, "load": load}[sys.argv[1]](Path(sys.argv[2]))
