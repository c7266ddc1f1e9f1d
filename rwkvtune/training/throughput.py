"""How fast a run trains, in one line every so many steps; used by every training program."""

from __future__ import annotations

import time
from collections.abc import Callable

from rwkvtune.training.memory import PeakMemory


class Throughput:
    """Counts samples and tokens from step to step.

        meter = Throughput(every=50, device_type="cpu", write=print)
        meter.add(samples=8, tokens=4096)    # any number of times in a step
        meter.step()                         # at its end

    every: steps per line; 0 = never. The first step, which also pays for starting up, is left out.
    """

    def __init__(
        self,
        *,
        every: int,
        device_type: str,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.every, self._write, self._clock = every, write, clock
        self._total: Callable[[list[float]], list[float]] | None = None
        self._memory = PeakMemory(device_type) if every else None
        self._steps = -1
        self._counts = [0.0, 0.0, 0.0]
        self._began, self._seconds = clock(), 0.0

    def sum_with(self, total: Callable[[list[float]], list[float]]) -> None:
        """Turn counts of this process into those of all by `total` from now on."""
        self._total = total

    def add(self, *, samples: int, tokens: int, visual_tokens: int = 0) -> None:
        """Count what a micro-batch of this process holds; tokens: all that are no padding."""
        for i, count in enumerate((samples, tokens, visual_tokens)):
            self._counts[i] += count

    def step(self, seconds: float | None = None) -> dict[str, float] | None:
        """The end of a step: writes a line when one is due, and then returns its numbers.

        seconds: what the step took; None = all since the step before, whatever else was done.
        """
        if not self.every:
            return None
        now = self._clock()
        self._seconds += now - self._began if seconds is None else seconds
        self._began = now
        self._steps += 1
        if self._steps % self.every:
            return None
        measured = self._measure() if self._steps else None
        self._counts, self._seconds = [0.0, 0.0, 0.0], 0.0
        return measured

    def _measure(self) -> dict[str, float]:
        seconds = max(self._seconds, 1e-9)
        counts = self._total(self._counts) if self._total else self._counts
        samples, tokens, visual = (count / seconds for count in counts)
        measured = {
            "samples_per_s": samples,
            "tokens_per_s": tokens,
            "visual_tokens_per_s": visual,
            "step_ms": 1000 * seconds / self.every,
        }
        text = f"throughput over {self.every} steps: {samples:.2f} samples/s  {tokens:.0f} tokens/s"
        if visual:
            text += f"  {visual:.0f} visual tokens/s"
        text += f"  {measured['step_ms']:.1f} ms/step"
        used = self._memory.used() if self._memory else None
        if used is not None:
            measured["peak_memory_bytes"] = used
            text += f"  peak memory {used / 2**20:.0f} MiB"
        self._write(text)
        return measured
