"""When the files of a run are written: at once, or in a thread while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress

from torch import Tensor

from rwkvtune.checkpoint import whole


class Writer:
    """Does what is given to it in order, one thing at a time.

    in_background: in a thread, with copies of the tensors, so that training waits for the copies
    and, when the files of an earlier step are still being written, for these; an error of the
    thread is raised by the next call.
    """

    def __init__(self, *, in_background: bool = False) -> None:
        self.in_background = in_background
        self.waits: list[float] = []
        """Seconds that training has waited, one number for each step that saved."""
        self._thread = ThreadPoolExecutor(1, "save") if in_background else None
        self._pending: list[Future[object]] = []
        self._step = -1
        self._copies: dict[str, Tensor] = {}

    def take(self, step: int, tensors: Mapping[str, Tensor], *, write: bool) -> dict[str, Tensor]:
        """The tensors as `run` may use them later: copies in the CPU's memory if it is in a thread,
        gathered where they are sharded, which all ranks must take part in.

        Tensors of one step and name are copied once.  write: False gives nothing to a rank that
        only helps.
        """
        if not self.in_background:
            return dict(tensors)
        if step != self._step:
            self.finish()
            self._step = step
        for name, tensor in tensors.items():
            if name not in self._copies:
                one = whole(tensor).detach()
                self._copies[name] = one.to("cpu", copy=True) if write else one.new_empty(0)
        return {name: self._copies[name] for name in tensors} if write else {}

    def run(self, task: Callable[[], object]) -> None:
        if self._thread is None:
            task()
            return
        for done in [one for one in self._pending if one.done()]:
            self._pending.remove(done)
            done.result()
        self._pending.append(self._thread.submit(task))

    def finish(self) -> None:
        """Wait until everything is written."""
        while self._pending:
            self._pending.pop(0).result()
        self._copies = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Nothing that was begun is left half-written; an error of the block is the one to tell."""
        with nullcontext() if error is None else suppress(Exception):
            self.finish()

    def timed(self, save: Callable[[], object]) -> None:
        """Do one step's saving and note how long training has waited for it."""
        begin = time.perf_counter()
        save()
        self.waits.append(time.perf_counter() - begin)

    def in_words(self) -> str:
        """What saving has cost."""
        how = "while training went on" if self.in_background else "before training went on"
        return (
            f"saved {len(self.waits)} times, {how}: waited {sum(self.waits):.2f} s, at most "
            f"{max(self.waits, default=0.0):.2f} s at once"
        )
