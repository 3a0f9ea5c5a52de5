"""Work that the processes of `accelerate launch` or torchrun share: each takes the next piece that nobody has taken.

By the store of torch's process group, a counter and a word, and not by collectives: pieces differ in length, and a
process that fails is told of at once.
"""

import itertools
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

# Every process shares the same works in the same order, so they number them alike.
_works = itertools.count()
FAILED, SECONDS = "failed", 0.05
AGAIN = "start again, which keeps what is finished."


class SharedWork:
    """Work that all processes of the process group enter, or this process alone: `with SharedWork() as work`.

    Who leaves the context has seen all others come to its end. An error in one process is one in all.

    Attributes:
        main: Whether this is the first process.
        count: How many share the work.
    """

    def __init__(self, shared: bool = True) -> None:
        grouped = shared and dist.is_available() and dist.is_initialized()
        self.count, self._rank = (dist.get_world_size(), dist.get_rank()) if grouped else (1, 0)
        self.main = self._rank == 0
        self._steps = itertools.count()
        if self.count > 1:
            store: Any = distributed_c10d._get_default_store()
            self._store: Any = distributed_c10d.PrefixStore(f"qtuning_peft {next(_works)}", store)

    def __enter__(self) -> "SharedWork":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.meet()
        elif self.count > 1 and not self._store.check([FAILED]):
            self._store.set(FAILED, f"Process {self._rank} of {self.count} failed ({type(error).__name__}: {error})")

    def pieces(self, count: int) -> Iterator[int]:
        """The indices below `count` that this process is to do: whenever it is done with one, the next nobody has."""
        step = next(self._steps)
        if self.count == 1:
            yield from range(count)
            return
        while (index := self._store.add(f"piece {step}", 1) - 1) < count:
            self._require_all()
            yield index

    def meet(self) -> None:
        """Wait for all processes.

        Raises:
            RuntimeError: when one has failed, or does not come within the time limit of the process group.
        """
        step = next(self._steps)
        if self.count == 1:
            return
        self._store.add(f"here {step}", 1)
        self._wait(f"here {step}", self.count)
        # The first process may be the one that holds the store: it leaves last.
        if self.main:
            self._wait(f"left {step}", self.count - 1)
        else:
            self._store.add(f"left {step}", 1)

    def _wait(self, counter: str, wanted: int) -> None:
        limit = self._store.timeout.total_seconds()
        ends = time.monotonic() + limit
        while (here := self._store.add(counter, 0)) < wanted:
            self._require_all()
            if time.monotonic() > ends:
                gone = f"{wanted - here} of {self.count} processes did not come within {limit:.0f} seconds"
                raise RuntimeError(f"{gone}; {AGAIN}")
            time.sleep(SECONDS)

    def _require_all(self) -> None:
        if self._store.check([FAILED]):
            raise RuntimeError(f"{self._store.get(FAILED).decode()}; {AGAIN}")
