"""`python -m qtuning_peft.cli`, the command `qtuning`."""

from . import app

app()
