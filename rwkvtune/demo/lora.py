"""Four ways to fine-tune one tiny model, side by side, and the way out to other programs.

The base is a model that has learned to follow a few instructions; then it learns the same in other
words. Uses nothing that a user's own run could not: fine-tuning, merging, export and evaluation,
with lora_recipe.yaml beside this file. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rwkvtune.demo.run import faster_precision, shown_path
from rwkvtune.demo.sft import exact_match
from rwkvtune.demo.tasks import LETTER_TASKS, REWORDED, Task, write_tasks

if TYPE_CHECKING:
    from rwkvtune.data.tokenizers import Tokenizer
    from rwkvtune.models.frame import LanguageModel

RECIPE = Path(__file__).parent / "lora_recipe.yaml"
CONVERSATIONS = 1200
QUESTION = "cab begins with, big?"
ANSWER_TOKENS = 12

# The package reads its settings from the environment when it is imported, and switches torch's
# scripting for the whole process, so it runs in one of its own.
READER = """
import json, os, sys

os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
from rwkv.model import RWKV

path, ids, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = RWKV(model=path.removesuffix(".pth"), strategy="cpu fp32")
logits, state = model.forward(ids, None)
answer = []
for _ in range(count):
    answer.append(int(logits.argmax()))
    logits, state = model.forward(answer[-1:], state)
print(json.dumps(answer))
"""


@dataclass(frozen=True)
class Result:
    name: str
    exact: float
    """Share of the held-out questions that are answered to the letter."""
    trained: int
    """Numbers that were trained."""
    peak_mb: float
    """Of the whole process, Python and its libraries included."""
    seconds: float
    """Of training steps."""


def run_lora_demo(folder: Path) -> int:
    """Train into `folder`, or go on there; show the result. Returns the exit code: 1 when something
    does not hold."""
    recipe = yaml.safe_load(RECIPE.read_text())
    base, ways = folder / "base", recipe.pop("ways")
    precision = {"precision": faster_precision(base)}
    print(f"1. A base that follows instructions, into {base}", flush=True)
    settings = recipe["common"] | recipe["base"] | precision | _data(folder, "known", LETTER_TASKS)
    _command(settings | {"proj_dir": str(base)})
    weights = base / "rwkv-final.pth"
    data = _data(folder, "reworded", REWORDED)
    held_out = Path(data["val_data_file"])
    common = recipe["common"] | recipe["tuned"] | precision | data | {"load_model": str(weights)}
    results = []
    for i, (name, own) in enumerate(ways.items(), start=2):
        run = folder / name.replace(" ", "-")
        print(f"\n{i}. {name}, into {run}", flush=True)
        peak_mb = _command(common | own | {"proj_dir": str(run)})
        results.append(_result(name, run, weights, held_out, peak_mb))
    untouched = exact_match(_loaded(weights), held_out, REWORDED)
    problems = _show(results, sum(untouched.values()) / len(untouched))
    problems += _way_out(folder, weights, folder / "lora" / "adapter-final")
    for problem in problems:
        print(f"something is wrong: {problem}")
    best = ", ".join(f"{r.name} {r.exact:.3f}" for r in results)
    print(f"demo lora: held-out exact match {best}")
    return 1 if problems else 0


def _data(folder: Path, name: str, tasks: Mapping[str, Task]) -> dict[str, str]:
    """Conversations to train on and to hold out; made once."""
    training, held_out = (folder / "data" / f"{name}{part}.jsonl" for part in ("", "-held-out"))
    if not (training.exists() and held_out.exists()):
        write_tasks(
            training, held_out, count=CONVERSATIONS, tasks=tasks, letters="abcdefgh", lengths=(2, 3)
        )
    return {"data_file": str(training), "val_data_file": str(held_out)}


def _command(settings: dict[str, object]) -> float:
    """Run `rwkvtune sft` with these settings in a process of its own; its peak memory, MB.

    Ends this process with that one's exit code, where it is not 0.
    """
    config = Path(str(settings["proj_dir"])).parent / "settings.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(settings))
    process = subprocess.Popen([sys.executable, "-m", "rwkvtune", "sft", "--config", str(config)])
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:  # it has got the same signal, and saves its state
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    config.unlink()
    if process.returncode:
        sys.exit(process.returncode)
    return usage.ru_maxrss / 1e3


def _loaded(weights: Path) -> LanguageModel:
    from rwkvtune.inference.load import load_model

    return load_model(weights)


def _result(name: str, run: Path, base: Path, held_out: Path, peak_mb: float) -> Result:
    """What a run has reached. Its peak memory is kept beside it, for the next time it is shown."""
    from rwkvtune.adapters.adapter import merge
    from rwkvtune.checkpoint import load_weights
    from rwkvtune.training.log import read_metrics

    kept = run / "peak_mb.json"
    if kept.exists():
        peak_mb = json.loads(kept.read_text())
    else:
        kept.write_text(json.dumps(peak_mb))
    adapter = run / "adapter-final"
    model = _loaded(base if adapter.exists() else run / "rwkv-final.pth")
    state = max(run.glob("resume/step-*")) / "state.safetensors"
    tensors = load_weights(state, verify=False)
    trained = sum(t.numel() for n, t in tensors.items() if re.match(r"optimizer\.exp_avg\.", n))
    if adapter.exists():
        model = merge(model, str(base), adapter)
    shares = exact_match(model.eval(), held_out, REWORDED)
    seconds = read_metrics(run / "metrics.csv")[-1].values["seconds"]
    return Result(name, sum(shares.values()) / len(shares), trained, peak_mb, seconds)


def _show(results: list[Result], before: float) -> list[str]:
    """Print the table; returns what does not hold."""
    print(
        f"\n{'':<20}{'exact match':>12}{'trained':>12}{'peak memory':>14}{'training':>11}\n"
        f"{'before':<20}{before:>12.1%}"
    )
    for r in results:
        print(
            f"{r.name:<20}{r.exact:>12.1%}{r.trained:>12,}{r.peak_mb:>11,.0f} MB{r.seconds:>9.0f} s"
        )
    print("(peak memory is nearly all Python and its libraries: docs/adapters.md has real sizes)")
    least = yaml.safe_load(RECIPE.read_text())["least"]
    return [
        f"{r.name} answers {r.exact:.1%}, expected at least {least[r.name]:.0%}"
        for r in results
        if r.exact < least[r.name]
    ]


def _way_out(folder: Path, base: Path, adapter: Path) -> list[str]:
    """Merge and export, and let the `rwkv` package answer; returns what does not hold."""
    from rwkvtune.export import FORMATS
    from rwkvtune.export.convert import export_weights
    from rwkvtune.export.source import open_source

    print("\nThe way out:")
    out = folder / "exported"
    merged = out / "merged.pth"
    merged.unlink(missing_ok=True)
    merge = [sys.executable, "-m", "rwkvtune", "merge", str(base), str(adapter), str(merged)]
    subprocess.run(merge, check=True)
    source = open_source(merged)
    for name, form in FORMATS.items():
        path = out / f"model-{name}{form.suffix}"
        done = export_weights(source, path, name, tokenizer=_tokenizer(merged), overwrite=True)
        print(f"  {name:<12}{shown_path(done.path)}, {done.num_bytes / 1e6:.1f} MB")
    return _same_answer(base, adapter, merged)


def _tokenizer(merged: Path) -> Tokenizer:
    from rwkvtune.data.tokenizers import find_tokenizer

    tokenizer = find_tokenizer(merged)
    assert tokenizer is not None, "merging takes the run's tokenizer along"
    return tokenizer


def _same_answer(base: Path, adapter: Path, merged: Path) -> list[str]:
    """The likeliest answer of three: the adapter beside its base, the merged file here, and that
    file in the `rwkv` package."""
    from rwkvtune.adapters.adapter import load
    from rwkvtune.data.tokenizers import END_OF_DOCUMENT
    from rwkvtune.inference.generate import generate

    tokenizer = _tokenizer(merged)
    ids = [END_OF_DOCUMENT, *tokenizer.encode(f"User: {QUESTION}\n\nAssistant:")]

    def answer_of(model: Any) -> list[int]:
        return list(generate(model, ids, max_tokens=ANSWER_TOKENS, temperature=0.0))

    done = subprocess.run(
        [sys.executable, "-c", READER, str(merged), json.dumps(ids), str(ANSWER_TOKENS)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return [f"the rwkv package does not read {merged}: {done.stderr.splitlines()[-1]}"]
    answers = {
        "adapter beside its base": answer_of(load(_loaded(base), str(base), adapter).eval()),
        "merged.pth, here": answer_of(_loaded(merged)),
        "merged.pth, in the rwkv package": json.loads(done.stdout.splitlines()[-1]),
    }
    print(f"\nThe likeliest answer to {QUESTION!r}:")
    for name, answer in answers.items():
        end = answer.index(END_OF_DOCUMENT) if END_OF_DOCUMENT in answer else len(answer)
        print(f"  {name:<36}{tokenizer.decode(answer[:end])!r}")
    first, *others = answers.values()
    return [] if all(a == first for a in others) else ["the three answers are not the same"]
