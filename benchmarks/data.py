"""Speed and memory of `rwkvtune data build` with the World tokenizer.

    python -m benchmarks.data [--out benchmarks/results] [--megabytes 256] [--repeats 3]

The text is the bundled Shakespeare with some text of other scripts, again and again, as one .txt
and as .jsonl of 3,000 characters a document. Measured are megabytes of text per second with one
process and with two, from the call to the finished files; the same, in turns with ours, for a plain
loop of the kind of RWKV-LM's make_data over the trie tokenizer of the `rwkv` package, and for the
World tokenizer's library alone; and peak memory for two sizes of text. Each measurement is a
process of its own, whose peak would otherwise never fall. One process is also counted in processor
time (user + system), which other programs on the machine disturb less than the time on the clock;
the ratios of one process are of that.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import rwkvtune
from rwkvtune.data.build import build_token_files
from rwkvtune.data.tokenizers import load_tokenizer

T = TypeVar("T")

OTHER_SCRIPTS = (
    "Die Bürger zögern: „Wofür kämpfen wir überhaupt?“ — Œuvre complète, naïve façon.\n"
    "Граждане, прежде чем мы пойдём дальше, выслушайте меня. Говори, говори.\n"
    "公民们，在我们继续前进之前，请听我说。说吧，说吧。\n"
    "皆さん、先へ進む前に話を聞いてください。 🎭\n"
)
DOCUMENT_CHARACTERS = 3000
PLAIN_LOOP_BYTES = 2_000_000


def write_text(folder: Path, megabytes: int) -> dict[str, Path]:
    """The same text as one .txt and as .jsonl."""
    shakespeare = (Path(rwkvtune.__file__).parent / "demo" / "tinyshakespeare.txt").read_text()
    text = shakespeare + OTHER_SCRIPTS * 150  # some 8 % of the bytes
    lines = "".join(
        json.dumps({"text": text[i : i + DOCUMENT_CHARACTERS]}, ensure_ascii=False) + "\n"
        for i in range(0, len(text), DOCUMENT_CHARACTERS)
    )
    times = -(-megabytes * 1_000_000 // len(text.encode()))
    paths = {}
    for kind, content in ((".txt", text), (".jsonl", lines)):
        paths[kind] = folder / f"{megabytes}{kind}"
        with open(paths[kind], "w", encoding="utf-8") as file:
            for _ in range(times):
                file.write(content)
    return paths


def build(path: Path, workers: int, options: dict[str, Any]) -> dict[str, float]:
    """One build. With one worker, which is this process, its tokenizer is loaded before; two load
    theirs within the time."""
    tokenizer = load_tokenizer("world")
    if workers == 1:
        tokenizer.encode("loads what it needs only to encode")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        built = build_token_files(path, Path(folder) / "x", tokenizer, workers=workers, **options)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    text_bytes = built.train.text_bytes
    peak, peak_of_worker = (
        resource.getrusage(who).ru_maxrss / 1e3  # kilobytes, on Linux
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {
        "megabytes": text_bytes / 1e6,
        "megabytes_per_s": text_bytes / wall / 1e6,
        "megabytes_per_cpu_s": text_bytes / cpu / 1e6,
        "bytes_per_token": built.train.bytes_per_token,
        "peak_megabytes": peak,
        "peak_megabytes_of_a_worker": peak_of_worker,
    }


def plain_loop(path: Path) -> float:
    """Megabytes per second of the processor of what make_data does for each line, on the first
    lines of a .jsonl."""
    import numpy as np
    from rwkv import rwkv_tokenizer

    vocabulary = Path(rwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
    trie = rwkv_tokenizer.TRIE_TOKENIZER(str(vocabulary))
    with open(path, encoding="utf-8") as file:
        lines = file.readlines(PLAIN_LOOP_BYTES)
    text_bytes = 0
    begin = time.process_time()
    with tempfile.TemporaryFile() as file:
        for line in lines:
            text = json.loads(line)["text"]
            ids = trie.encode(text)
            assert trie.decode(ids) == text
            file.write(np.array([*ids, 0], dtype=np.uint16).tobytes())
            text_bytes += len(text.encode())
    return text_bytes / (time.process_time() - begin) / 1e6


def bare_encode(path: Path) -> float:
    """Megabytes per second of the processor of the World tokenizer's library alone, on the first
    32 MB of a .txt."""
    from pyrwkv_tokenizer import RWKVTokenizer

    rust = RWKVTokenizer()
    rust.encode("loads what it needs only to encode")
    with open(path, encoding="utf-8") as file:
        pieces = list(iter(lambda: file.read(1 << 20), ""))[:32]
    begin = time.process_time()
    for piece in pieces:
        rust.encode(piece)
    taken = time.process_time() - begin
    return sum(len(piece.encode()) for piece in pieces) / taken / 1e6


def apart(work: Callable[..., T], *arguments: Any) -> T:
    """In a fresh process, which may have children of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def measure_speed(paths: dict[str, Path], repeats: int) -> list[dict[str, Any]]:
    cases = [(kind, workers) for kind in paths for workers in (1, 2)]
    runs: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    plain, bare = [], []
    for _ in range(repeats):
        plain.append(apart(plain_loop, paths[".jsonl"]))
        bare.append(apart(bare_encode, paths[".txt"]))
        for kind, workers in cases:
            runs[kind, workers].append(apart(build, paths[kind], workers, {}))
    rows = []
    for (kind, workers), results in runs.items():
        speeds = [result["megabytes_per_s"] for result in results]
        row: dict[str, Any] = {
            "input": kind,
            "workers": workers,
            "megabytes": round(results[0]["megabytes"]),
            "bytes_per_token": round(results[0]["bytes_per_token"], 3),
            "megabytes_per_s": round(statistics.median(speeds), 1),
            "megabytes_per_s_fastest": round(max(speeds), 1),
        }
        if workers == 1:
            speeds = [result["megabytes_per_cpu_s"] for result in results]
            row["megabytes_per_cpu_s"] = round(statistics.median(speeds), 1)
            row["megabytes_per_cpu_s_fastest"] = round(max(speeds), 1)
        row["ratio_to_plain_loop"] = round(statistics.median(speeds) / statistics.median(plain), 1)
        row["ratio_to_bare_encode"] = round(statistics.median(speeds) / statistics.median(bare), 2)
        rows.append(row)
    rows.append(
        {
            "plain_loop_megabytes_per_cpu_s": round(statistics.median(plain), 2),
            "bare_encode_megabytes_per_cpu_s": round(statistics.median(bare), 1),
            "bare_encode_megabytes_per_cpu_s_fastest": round(max(bare), 1),
        }
    )
    return rows


def measure_memory(sizes: dict[int, dict[str, Path]]) -> list[dict[str, Any]]:
    """With all that a build can do: drawn validation, two shuffled epochs."""
    rows = []
    options = {"seed": 1, "n_epoch": 2, "val_share": 0.1}
    for kind in (".txt", ".jsonl"):
        for workers in (1, 2):
            for megabytes, paths in sizes.items():
                result = apart(build, paths[kind], workers, options)
                rows.append(
                    {
                        "input": kind,
                        "workers": workers,
                        "megabytes": megabytes,
                        "peak_megabytes": round(result["peak_megabytes"]),
                    }
                )
                if workers > 1:
                    rows[-1]["peak_megabytes_of_a_worker"] = round(
                        result["peak_megabytes_of_a_worker"]
                    )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            size: write_text(Path(folder), size)
            for size in (options.megabytes // 4, options.megabytes)
        }
        for name, rows in (
            ("speed", measure_speed(sizes[options.megabytes], options.repeats)),
            ("memory", measure_memory(sizes)),
        ):
            for row in rows:
                print(json.dumps(row), flush=True)
            measured[name] = rows
    from benchmarks import machine  # imports torch: a child's peak begins with its parent's memory

    result = machine.describe("cpu")
    for name in ("pyrwkv-tokenizer", "numpy", "rwkv"):
        result["versions"][name] = metadata.version(name)
    machine.write(options.out, "data-cpu", result | measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
