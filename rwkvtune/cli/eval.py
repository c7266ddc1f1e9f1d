"""`rwkvtune eval`: perplexity of text files, and tasks of the lm-eval harness."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkvtune.cli import output
from rwkvtune.cli.arguments import OneLineParser
from rwkvtune.cli.generate import load, note, vocab_size_of, weights_of
from rwkvtune.errors import UserError
from rwkvtune.files import atomic_write, check_writable

if TYPE_CHECKING:
    from rwkvtune.data.tokenizers import Tokenizer
    from rwkvtune.evaluation.harness import Metric
    from rwkvtune.evaluation.texts import Estimate, TextResult
    from rwkvtune.models.frame import LanguageModel

ABOUT = """Measure a model: perplexity and bits per byte of text files, accuracy and more on tasks.

  rwkvtune eval out/first --files book.txt news.jsonl
  rwkvtune eval RWKV-x070-World-0.1B.pth --tasks quiz.yaml --json results.json
  rwkvtune eval RWKV-x070-World-0.1B.pth --include_path my_tasks --tasks quiz capitals

Every document and every sample is read after token 0, from its beginning, however long it is. All
numbers come with a 95 % confidence interval. Tasks are those of the lm-eval harness
(pip install 'rwkvtune[eval]')."""


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    check_arguments(args)
    path = weights_of(args.file)
    vocab_size = vocab_size_of(path)
    from rwkvtune.inference.tokenizer import tokenizer_for, without_text

    tokenizer = tokenizer_for(path, vocab_size, args.tokenizer, note)
    if args.json:
        check_writable(args.json)
    tasks = None
    if args.tasks:
        from rwkvtune.evaluation.harness import HarnessModel, find_tasks, run_tasks

        tasks = find_tasks(args.tasks, args.include_path)
    texts = read_texts(args.files, args.text_key, args.limit, tokenizer)
    model = load(path, args.device, args.dtype, args.threads)

    found: dict[str, Any] = {"model": str(path), "tokenizer": tokenizer.name, "dtype": args.dtype}
    if texts:
        results = measure(model, texts, tokenizer, args.batch_size, args.window)
        output.write(text_table(results))
        found["texts"] = {name: text_json(result) for name, result in results.items()}
    if tasks is not None:
        harness = HarnessModel(
            model,
            tokenizer,
            batch_size=args.batch_size,
            window=args.window,
            banned_ids=sorted(without_text(tokenizer, vocab_size)),
        )
        metrics, raw = run_tasks(
            harness, tasks, limit=args.limit or None, num_fewshot=args.num_fewshot
        )
        output.write("\n" * bool(texts) + task_table(metrics))
        found["tasks"] = [
            {"task": m.task, "num_fewshot": m.num_fewshot, "metric": m.name, "samples": m.samples}
            | estimate_json(m.estimate)
            for m in metrics
        ]
        found["lm_eval"] = {key: raw[key] for key in ("results", "versions") if key in raw}
    if args.json:
        content = json.dumps(found, indent=1, ensure_ascii=False, default=str) + "\n"
        atomic_write(args.json, lambda file: file.write(content.encode()))
    return 0


def make_parser() -> OneLineParser:
    parser = OneLineParser("rwkvtune eval", ABOUT)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="weights (.pth, .safetensors) or a run folder")
    add("--files", nargs="+", default=[], metavar="TEXT", help=".txt (a document each), .jsonl "
        "(one on each line) or .parquet, folders and globs of them")  # fmt: skip
    add("--text_key", default="text", metavar="NAME", help="field of .jsonl, column of .parquet "
        "(text)")  # fmt: skip
    add("--tasks", nargs="+", default=[], metavar="TASK", help="YAML files, or names of tasks and "
        "groups of lm-eval")  # fmt: skip
    add("--include_path", type=Path, metavar="DIR", help="folder of task files of your own")
    add("--num_fewshot", type=int, metavar="N", help="solved samples before each (the task's own)")
    add("--limit", type=int, default=0, metavar="N", help="only the first N documents of each file "
        "and samples of each task (0 = all)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    add("--batch_size", type=int, default=8, metavar="N", help="texts read together (8)")
    add("--window", type=int, default=1024, metavar="N", help="tokens of each that are read at "
        "once; memory, not results, depends on it (1024)")  # fmt: skip
    add("--tokenizer", default="", metavar="bytes|world|FILE", help="default: the one kept with "
        "the weights; world for weights of 65536 ids that have none")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto = a GPU that torch "
        "sees, else the CPU")  # fmt: skip
    add("--threads", type=int, default=0, metavar="N", help="CPU threads, 0 = torch's choice (0)")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the matrices (fp32)")
    return parser


def check_arguments(args: Any) -> None:
    """UserError for what cannot be asked for, before anything is read."""
    if not args.files and not args.tasks:
        raise UserError("there is nothing to measure: give --files or --tasks")
    for name, least in (("batch_size", 1), ("window", 1), ("limit", 0), ("threads", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}: give {least} or more")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num_fewshot is {args.num_fewshot}: give 0 or more")
    if args.include_path and not args.include_path.is_dir():
        raise UserError(f"--include_path {args.include_path} is no folder")
    if args.tasks and find_spec("lm_eval") is None:
        raise UserError("--tasks needs the lm-eval harness: pip install 'rwkvtune[eval]'")
    if not args.tasks and (args.include_path or args.num_fewshot is not None):
        raise UserError("--include_path and --num_fewshot are for --tasks, which is not given")


def read_texts(
    names: Sequence[str], key: str, limit: int, tokenizer: Tokenizer
) -> dict[str, list[str]]:
    """File -> its documents; UserError for a file without any."""
    from itertools import islice

    from rwkvtune.data.text import find_files
    from rwkvtune.evaluation.texts import documents_of

    if not names:
        return {}
    files, notes = find_files(names)
    for text in notes:
        note(text)
    texts = {}
    for file in files:
        documents = list(islice(documents_of(file, key, tokenizer), limit or None))
        if not documents:
            raise UserError(f"{file.path} holds no text to measure")
        texts[str(file.path)] = documents
    return texts


def measure(
    model: LanguageModel,
    texts: dict[str, list[str]],
    tokenizer: Tokenizer,
    batch_size: int,
    window: int,
) -> dict[str, TextResult]:
    """The result of each file."""
    from rwkvtune.evaluation.texts import measure_texts

    results = {}
    for name, documents in texts.items():
        begin = time.perf_counter()
        try:
            result = measure_texts(
                model, documents, tokenizer, batch_size=batch_size, window=window
            )
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        rate = result.tokens / (time.perf_counter() - begin)
        note(f"{name}: {result.tokens:,} tokens, {rate:,.0f} tokens/s")
        results[name] = result
    return results


def text_table(results: dict[str, TextResult]) -> str:
    head = ("file", "documents", "tokens", "bytes", "loss", "perplexity", "bits per byte", "over")
    rows = [
        (
            name,
            f"{r.documents:,}",
            f"{r.tokens:,}",
            f"{r.num_bytes:,}",
            shown(r.loss),
            f"{r.perplexity:.4g}" + interval_text(r.perplexity_interval),
            shown(r.bits_per_byte),
            r.unit,
        )
        for name, r in results.items()
    ]
    return aligned_table([head, *rows])


def task_table(metrics: Sequence[Metric]) -> str:
    head = ("task", "shots", "samples", "metric", "value", "stderr", "95 % interval")
    rows = []
    for m in metrics:
        error = m.estimate.error
        rows.append(
            (
                m.task,
                str(m.num_fewshot),
                f"{m.samples:,}",
                m.name,
                f"{m.estimate.value:.4g}",
                "-" if error is None else f"{error:.2g}",
                interval_text(m.estimate.interval).strip(" []") or "-",
            )
        )
    return aligned_table([head, *rows])


def shown(estimate: Estimate) -> str:
    return f"{estimate.value:.4f}" + interval_text(estimate.interval)


def interval_text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.4g}, {interval[1]:.4g}]"


def aligned_table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def text_json(result: TextResult) -> dict[str, Any]:
    return {
        "documents": result.documents,
        "tokens": result.tokens,
        "bytes": result.num_bytes,
        "loss": estimate_json(result.loss),
        "perplexity": result.perplexity,
        "perplexity_interval": result.perplexity_interval,
        "bits_per_byte": estimate_json(result.bits_per_byte),
        "errors_over": result.unit,
    }


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": estimate.value,
        "stderr": estimate.error,
        "interval_95": estimate.interval,
    }
