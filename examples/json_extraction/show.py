"""The demo's figures and examples on the screen."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .run import DemoResult

EXAMPLES = 3


def show(result: DemoResult, console: Console) -> None:
    """Print what changed, the first test rows side by side, and what it cost."""
    before, after, pruned = result.before, result.after, result.pruned
    examples = Table("message", "4-bit base", "with side network", title="The first held-out messages", show_lines=True)
    for row, *answers in list(zip(result.rows, before.answers, after.answers, strict=True))[:EXAMPLES]:
        # As plain text: the model's brackets are not markup.
        cells = [Text(answer.strip(), style="green" if answer == row["completion"] else "") for answer in answers]
        examples.add_row(row["message"], *cells)
    console.print(examples)

    table = Table(f"{len(result.rows)} held-out messages", "4-bit base", "with side network")
    table.add_row("answers right to the letter", f"{before.exact:.0%}", f"{after.exact:.0%}")
    table.add_row("fields right", f"{before.fields:.0%}", f"{after.fields:.0%}")
    table.add_row("loss (nats/token)", f"{before.loss:.3f}", f"{after.loss:.3f}")
    console.print(table)

    score_seconds, train_seconds, seconds = result.seconds
    adapter_bytes = (result.adapter / "adapter_model.safetensors").stat().st_size
    for name, value in (
        ("training data", f"{pruned}"),
        ("corrupted rows", f"{result.corrupted} were put among them, {result.corrupted_kept} were kept"),
        ("scoring", f"{score_seconds:.0f} s; every sample on the plane: {result.report}"),
        ("training", f"{train_seconds:.0f} s, everything {seconds:.0f} s"),
        ("peak memory", f"{result.peak_memory / 2**20:.0f} MiB" if result.peak_memory else "unknown"),
        ("adapter", f"{adapter_bytes / 2**20:.1f} MiB in {result.adapter}, loaded in a fresh process by PEFT"),
    ):
        console.print(f"{name:16} {value}", highlight=False, markup=False)
