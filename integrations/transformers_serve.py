"""`qtuning serve --engine transformers`: transformers' own OpenAI server, which knows one model a folder.

So each adapter becomes a folder of links to the base's files and to its own; its name is the folder's, and the model's
in requests. Every model that is asked for has the whole base in memory: it runs what vLLM does not, for few adapters.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from qtuning_peft.loading import side_tuning_config


def join(base: Path, adapters: Mapping[str, str], folder: Path) -> None:
    """Make `folder` hold a model for the base, by its own name, and one for each adapter.

    Raises:
        ValueError: when the base is not a folder, or an adapter is none, or its name is the base's or a path.
    """
    if not (base / "config.json").is_file():
        raise ValueError(f"{base} is no folder of a model, which --engine transformers needs; download it first.")
    for name, path in {base.name: None, **adapters}.items():
        if Path(name).name != name or name.startswith(".") or "@" in name or (path and name == base.name):
            raise ValueError(f"--adapter gives the name {name!r}; choose one without / and @ that is not the base's.")
        (folder / name).mkdir()
        for file in base.iterdir():
            (folder / name / file.name).symlink_to(file.resolve())
        if path:
            side_tuning_config(Path(path))
            for file_name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                (folder / name / file_name).symlink_to((Path(path) / file_name).resolve())


def serve(base: str, adapters: Mapping[str, str], options: Sequence[str]) -> None:
    """Run transformers' server until it is stopped.

    Args:
        base: A folder.
        adapters: Folders by name.
        options: Further ones of `transformers serve`, as on the command line.

    Raises:
        ValueError: before the server starts, when an adapter cannot be served.
    """
    from transformers.cli.transformers import app

    with TemporaryDirectory(prefix="qtuning-serve-") as folder:
        join(Path(base).resolve(), {name: str(Path(path).resolve()) for name, path in adapters.items()}, Path(folder))
        os.chdir(folder)  # a model's name is a path from here
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # which leaves no folder behind
        sys.argv = ["transformers", "serve", *options]
        app()
