"""What README.md and the documents say is so: snippets run as printed, commands, options, links and numbers exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import pytest
import typer
import yaml
from qtuning_peft.integrations.blocks import EUPruningBlock, QSTTrainingBlock, read_block
from transformers import TrainingArguments

from qtuning_peft import add_few_shot_examples
from qtuning_peft.cli import app
from qtuning_peft.registry import Registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").glob("*.md"))
MADE = ("quality.md", "benchmarks.md")  # partly by programs, from rows that keep their words
MODEL, DATA = "HuggingFaceTB/SmolLM2-135M-Instruct", "trl-lib/Capybara"
# Everything that is Python: the package as a clone has it.
SOURCES = [path for folder in ("qtuning_peft", "integrations") for path in sorted((ROOT / folder).rglob("*.py"))]


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of `language`, without their indentation."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def run_in(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a fresh process in `folder`, offline and without a GPU."""
    surroundings = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=os.environ | surroundings, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the names that the README uses are folders: of a pico model and of its conversations."""
    folder = tmp_path_factory.mktemp("readme")
    pico.save_model(folder / MODEL)
    pico.write_chat(folder / DATA / "train.jsonl", 100)
    return folder


def test_its_python_runs_as_printed_one_snippet_after_the_other(workplace: Path) -> None:
    snippets = blocks(README, "python")
    assert "SFTTrainer(" in snippets[0]
    assert len(snippets) >= 3
    for snippet in snippets:
        finished = run_in(workplace, snippet)
        assert finished.returncode == 0, f"{snippet}\n{finished.stderr[-2000:]}"
    assert {file.name for file in (workplace / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"
    }  # fmt: skip


def test_it_is_short_and_has_a_place_for_the_demo() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    assert max(len(line) for line in lines if not line.startswith(("|", "!"))) <= 120 + len("**")
    assert "<!-- demo output -->" in README
    assert README.index("LoRA learns more") < README.index("```")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles(page: Path) -> None:
    for snippet in blocks(read(page), "python"):
        ast.parse(snippet.replace("SFTTrainer(..., ", "SFTTrainer("))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_blocks_are_what_our_reader_takes(page: Path) -> None:
    for text in blocks(read(page), "yaml"):
        content = yaml.safe_load(text)
        content = content.get("model_kwargs", content)
        for name, kind in (("qst", QSTTrainingBlock), ("eu_pruning", EUPruningBlock)):
            if name in content:
                read_block(name, kind, content[name])


def commands(page: Path) -> list[list[str]]:
    """Words of every `qtuning` command in fenced shell blocks and in code spans, without comments."""
    text = read(page)
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"(?<!`)`(qtuning [^`]+)`", text)
    return [shlex.split(line, comments=True) for line in lines if line.startswith("qtuning ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for words in commands(page):
        command: Any = group
        words = [word for word in words[1:] if word != "..."]
        while words and words[0] in getattr(command, "commands", ()):
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands") or words in ([], ["--version"]), f"qtuning has no command {words}"
        if command.name in ("sft", "serve") or hasattr(command, "commands"):  # TRL and vLLM know their options
            continue
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        if command.name == "train":
            known |= {f"--{field.name}" for field in fields(TrainingArguments)}
        assert {word for word in words if word.startswith("-") and word != "-"} <= known | {"--help"}, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_and_the_files_in_commands_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target
    for script in re.findall(r"\b(?:scripts|benchmarks|recipes)/[\w/.-]+\.(?:sh|yaml|py)\b", read(page)):
        assert (ROOT / script).exists(), script
    for target in re.findall(r"`make ([\w-]+)", text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target


def test_every_number_of_its_results_stands_in_a_table_of_a_page() -> None:
    section = README.partition("## Results")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| [^|-]", line)]
    # Losses, seconds and GiB with their decimals, and whole numbers of the last column.
    claimed = re.findall(r"\d+\.\d+|\d+(?= s )|(?<=\| )\d+(?= \|)", "\n".join(rows))
    assert len(claimed) >= 20
    measured = " ".join(line for page in ("quality", "benchmarks") for line in tables(ROOT / "docs" / f"{page}.md"))
    numbers = {float(number) for number in re.findall(r"\d+\.\d+|\d+", measured)}
    for text in claimed:
        decimals = len(text.partition(".")[2])
        assert any(round(number, decimals) == float(text) for number in numbers), text


def tables(page: Path) -> list[str]:
    return [line for line in read(page).splitlines() if line.startswith("|")]


def messages() -> str:
    """Every string of the package, parts in braces replaced by `…`."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


# Said by PEFT, transformers, bitsandbytes, the Hub and Python.
OF_OTHERS = ("KeyError", "Failed to load CPU", "Your setup", "We couldn't connect", "… 401", "No module named")


def test_the_messages_in_troubleshooting_are_messages_of_the_package() -> None:
    headings = re.findall(r"^### (.*)$", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    quoted = [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]
    assert len(quoted) >= 30
    known = messages()
    for message in quoted:
        if not message.startswith(OF_OTHERS):
            for part in re.split(r"…|\.$|qst\.r", message):
                assert part.strip() in known, message


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in MADE], ids=lambda page: page.name)
def test_it_uses_the_words_of_the_field(page: Path) -> None:
    """One dialect: that of PEFT and TRL."""
    ours = ("worked example", "kept states", "rows to choose by", "stranger", "by heart", "what all rows begin with")
    assert not [word for word in ours if word in read(page).lower()]


def test_few_shot_examples_as_the_page_has_them(workplace: Path) -> None:
    from transformers import AutoTokenizer

    page = read(ROOT / "docs" / "caching.md")
    call = next(block for block in blocks(page, "python") if "add_few_shot_examples(" in block)
    tree = ast.parse(call)
    examples = next(
        node.value.args[1] for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    )
    tokenizer = AutoTokenizer.from_pretrained(workplace / MODEL)
    add_few_shot_examples(tokenizer, ast.literal_eval(examples))
    assert "7 apples" in tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False)


def test_classifying_runs_as_printed(workplace: Path) -> None:
    """The second snippet in another process, from what the first one saved."""
    rows = [{"sentence": f"w{index % 7} w{index % 3}", "label": index % 2} for index in range(2016)]
    data = workplace / "stanfordnlp" / "sst2" / "train.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for snippet in blocks(read(ROOT / "docs" / "classifying.md"), "python"):
        finished = run_in(workplace, snippet.replace("num_train_epochs=3", "max_steps=3, use_cpu=True"))
        assert finished.returncode == 0, f"{snippet}\n{finished.stderr[-2000:]}"
    assert finished.stdout.split()[-1] in ("negative", "positive")


@pytest.fixture
def hooks() -> Any:
    """The module that MkDocs runs beside the pages."""
    pytest.importorskip("griffe", reason="needs the extra docs")
    specification = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_table_of_options_knows_a_choice_that_was_just_registered(hooks: Any) -> None:
    kinds: Registry[object] = Registry("kind")

    @dataclass
    class Options:
        """Options.

        Args:
            size: Said by the docstring.
        """

        kind: str = field(default="plain", metadata={"help": "What | is made.", "choices": kinds})
        size: int = 3

    @kinds.register("striped")
    def striped() -> None:
        """with stripes."""

    table = hooks.options(Options)
    assert "| `kind` | `plain` | What \\| is made. |" in table
    assert "| `size` | `3` | Said by the docstring. |" in table
    assert "| `striped` | with stripes |" in table


def test_pages_get_their_tables_and_links_that_lead_somewhere(hooks: Any) -> None:
    page = "<!-- options: qtuning_peft.SideTuningConfig -->\n[a](../benchmarks/x.py) [b](quality.md)"
    for address, link in (("https://example.org/q", "[a](https://example.org/q/blob/main/benchmarks/x.py)"), ("", "a")):
        made = hooks.on_page_markdown(page, config=SimpleNamespace(repo_url=address))
        assert made.endswith(f"\n{link} [b](quality.md)")
        assert "| `reduction_factor` | `4` |" in made
        assert "base_num_layers" not in made


ARCHITECTURE = ROOT / "docs" / "architecture.md"


def test_every_file_and_name_of_the_map_exists() -> None:
    rows = [
        re.findall(r"`([^`]+)`", line)
        for line in read(ARCHITECTURE).partition("| you look for")[2].partition("\n\n")[0].splitlines()
    ]
    files = {name for row in rows for name in row if name.endswith(".py")}
    assert len(files) >= 30
    names: set[str] = set()
    for row in rows:
        folder = Path()
        for name in row:
            if name.endswith(".py"):
                # A bare name follows one in the same folder.
                near = [ROOT / "qtuning_peft" / folder / name, ROOT / "qtuning_peft" / name, ROOT / name]
                found = next((file for file in near if file.is_file()), None)
                assert found is not None, name
                folder = Path(name).parent if "/" in name else folder
                names |= set(re.findall(r"^(?:class |def |    def |)(\w+)", read(found), re.MULTILINE))
    for name in (name for row in rows for name in row if re.fullmatch(r"[A-Za-z_.]+", name) and "." not in name):
        if name not in ("tap_storage", "get_peft_model", "unload", "qtuning"):
            assert name in names, name


def test_what_it_says_of_adding_a_choice_is_enough() -> None:
    """In a process of its own, as registered names stay."""
    additions = "\n".join(blocks(read(ARCHITECTURE), "python"))
    check = (
        "from qtuning_peft.integrations.blocks import EUPruningBlock, QSTBlock, read_block\n"
        "read_block('qst', QSTBlock, {'downsample': 'strided'})\n"
        "read_block('eu_pruning', EUPruningBlock, {'strategy': 'fewest', 'sample_ratio': 0.5})\n"
        "import torch\n"
        "states = torch.arange(12.0).view(1, 1, 12)\n"
        "assert Strided(12, 3, 1)(states).tolist() == [[[0, 4, 8]]]\n"
    )
    finished = run_in(ROOT, f"{additions}\n{check}")
    assert finished.returncode == 0, finished.stderr[-2000:]


def test_every_package_is_installed() -> None:
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    assert listed is not None
    folders = [file.parent.relative_to(ROOT) for file in (ROOT / "qtuning_peft").rglob("__init__.py")]
    beside = [file.parent for top in ("integrations", "recipes") for file in (ROOT / top).rglob("__init__.py")]
    folders += [Path("qtuning_peft") / folder.relative_to(ROOT) for folder in beside]
    assert sorted(re.findall(r'"(.+?)"', listed[1])) == sorted(".".join(folder.parts) for folder in folders)
