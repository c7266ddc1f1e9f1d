"""`python -m tests.training.strategies`: strategies on 2 and 4 CPU processes beside one process.

Prints the largest difference of a loss over 30 steps with accumulation and clipping, in fp32 and
bf16; then runs that are stopped and go on with other numbers of processes and strategies, with the
windows that were read counted.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import rwkvtune
from rwkvtune.training.zero import lacking
from tests.token_files import write_token_files
from tests.training.runs import flags, losses, metrics, run, start_ranks, trained_rows

SETTINGS = {
    "n_layer": 2, "n_embd": 64, "ctx_len": 32, "threads": 1, "accelerator": "cpu", "micro_bsz": 1,
    "epoch_steps": 30, "epoch_count": 1, "log_every": 1, "order": "shuffled", "grad_clip": 1.0,
    "engine": "torch",
}  # fmt: skip
WINDOWS = 8
"""Of a step, over all processes."""
LIMITS = {"fp32": 1e-5, "bf16": 5e-3}
STRATEGIES: tuple[dict[str, object], ...] = (
    {"strategy": "ddp"},
    {"strategy": "fsdp"},
    {"strategy": "deepspeed_stage_1"},
    {"strategy": "deepspeed_stage_1_offload"},
    {"strategy": "deepspeed_stage_2"},
    {"strategy": "deepspeed_stage_2_offload"},
    {"strategy": "deepspeed_stage_3"},
    {"strategy": "deepspeed_stage_3_offload"},
    {"strategy": "ddp", "context_parallel": 2},
    {"strategy": "fsdp", "context_parallel": 2},
)
ON_DEEPSPEED: tuple[dict[str, object], ...] = tuple(
    {"strategy": f"deepspeed_stage_{stage}", "engine": "deepspeed"}
    for stage in (1, 2, 3)
    if not lacking()
)
CHANGES: tuple[tuple[tuple[int, str], tuple[int, str]], ...] = (
    ((1, "auto"), (2, "ddp")),
    ((2, "ddp"), (1, "auto")),
    ((2, "ddp"), (2, "fsdp")),
    ((2, "deepspeed_stage_2"), (2, "ddp")),
    ((4, "deepspeed_stage_3"), (1, "auto")),
    ((2, "fsdp"), (4, "deepspeed_stage_1")),
)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="rwkvtune-strategies-") as folder:
        comparison = Comparison(Path(folder))
        held = [comparison.compare(precision) for precision in LIMITS]
        held += [comparison.go_on(*change) for change in CHANGES]
        return 0 if all(held) else 1


class Comparison:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = Path(rwkvtune.__file__).parent / "demo" / "tinyshakespeare.txt"
        text = source.read_text(encoding="utf-8")
        write_token_files(
            [text[i : i + 3000] for i in range(0, 30000, 3000)], folder / "t", "chars"
        )
        self.alone: dict[str, list[float]] = {}

    def args(self, name: str, processes: int, **changes: object) -> list[str]:
        shared = int(changes.get("context_parallel", 1))  # type: ignore[call-overload]
        sizes = {"accumulate_grad_batches": WINDOWS * shared // processes}
        data = {"data_file": self.folder / "t", "proj_dir": self.folder / name}
        return ["train", *flags(SETTINGS | data | sizes | changes)]

    def train(self, name: str, processes: int, **changes: object) -> list[float]:
        args, rows = self.args(name, processes, **changes), self.folder / f"rows-{name}"
        if processes == 1:
            ended = [run(args, self.folder / "out", rows=rows)]
        else:
            ranks = start_ranks(args, self.folder, processes, rows=rows)
            ended = [rank.wait(300) for rank in ranks]
        assert all(e.code == 0 for e in ended), ended
        return losses(self.folder / name)

    def compare(self, precision: str) -> bool:
        limit, ok = LIMITS[precision], True
        self.alone[precision] = self.train(f"alone-{precision}", 1, precision=precision)
        for changes in STRATEGIES + ON_DEEPSPEED:
            for processes in (2, 4):
                words = " ".join(f"{value}" for value in changes.values())
                name = f"{precision} {words} x{processes}"
                found = self.train(
                    name.replace(" ", "-"), processes, precision=precision, **changes
                )
                pairs = zip(found, self.alone[precision], strict=True)
                worst = max(abs(a - b) for a, b in pairs)
                ok = ok and worst < limit
                print(f"{name:<44}{worst:>10.1e}{'' if worst < limit else '  too far'}", flush=True)
        return ok

    def go_on(self, first: tuple[int, str], then: tuple[int, str]) -> bool:
        """Half of a run with one number of processes and strategy, the rest with another."""
        name = f"{first[1]} x{first[0]} -> {then[1]} x{then[0]}"
        folder = name.replace(" ", "-").replace(">", "")
        half = {"epoch_steps": 30, "exit_tokens": 13 * WINDOWS * 32, "lr_schedule": "constant"}
        whole = half | {"exit_tokens": 30 * WINDOWS * 32}
        alone = self.train(f"whole-{folder}", 1, precision="fp32", **whole)
        self.train(folder, first[0], precision="fp32", strategy=first[1], **half)
        found = self.train(folder, then[0], precision="fp32", strategy=then[1], **whole)
        worst = max(abs(a - b) for a, b in zip(found, alone, strict=True))
        steps = [int(row["step"]) for row in metrics(self.folder / folder)]
        counted = trained_rows(self.folder / f"rows-{folder}")
        is_exact = counted == trained_rows(self.folder / f"rows-whole-{folder}")
        ok = worst < LIMITS["fp32"] and steps == list(range(1, 31)) and is_exact
        print(
            f"{name:<44}{worst:>10.1e}  {counted.total()} windows, at most "
            f"{max(counted.values())} time each, those of one process: {is_exact}",
            flush=True,
        )
        return ok


if __name__ == "__main__":
    sys.exit(main())
