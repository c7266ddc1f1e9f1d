"""From drawn pictures to a model that answers about new ones, on the CPU, in minutes.

    text -> a small language model that answers about what it has read, but sees nothing
    stage 1: an adapter between a frozen encoder and the frozen language model
    stage 2: adapter and language model together
    then questions about combinations of colour, thing and place that training never showed

Uses nothing that a user's own run could not. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rwkvtune.demo.pictures import SIDE, write_data, write_questions
from rwkvtune.files import atomic_write

if TYPE_CHECKING:
    from rwkvtune.evaluation.vision import Scores

RECIPE = Path(__file__).parent / "vision.yaml"
NEEDED_POINTS = 25.0
"""By which the answers must beat the better of the two baselines."""


def run_vision_demo(folder: Path) -> int:
    """Train into `folder`, or go on there; show what it reached. Returns the exit code: 1 when the
    answers are not NEEDED_POINTS better than the baselines."""
    begin = time.perf_counter()
    recipe = yaml.safe_load(RECIPE.read_text())
    _prepare(folder, recipe)
    for stage in ("language_model", "stage_1", "stage_2"):
        print(f"\n== {stage.replace('_', ' ')}", flush=True)
        if code := _train(stage, recipe[stage], folder):
            return code
    return _judge(folder, begin)


def _prepare(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Data, encoder and text, made once."""
    from rwkvtune.data.build import build_token_files
    from rwkvtune.models.vision.tiny import save_siglip, tiny_siglip

    done = folder / "data" / "text.idx"
    if done.exists():
        return
    write_data(folder / "data", pictures=recipe["pictures"], seed=1)
    write_questions(folder / "test", pictures=recipe["test_pictures"], seed=2)
    save_siglip(tiny_siglip(side=SIDE, **recipe["encoder"]), folder / "encoder", side=SIDE)
    data = folder / "data"
    build_token_files(data / "text.jsonl", data / "text", str(data / "vocabulary.txt"))


def _train(stage: str, settings: Mapping[str, Any], folder: Path) -> int:
    if stage == "language_model":
        from rwkvtune.training.config import TrainConfig
        from rwkvtune.training.lm import train_language_model

        own = {"data_file": str(folder / "data" / "text"), "proj_dir": str(folder / stage)}
        return train_language_model(TrainConfig.from_flat({**settings, **own})).exit_code
    from rwkvtune.training.vision import train_vision
    from rwkvtune.training.vision_config import from_flat

    own = {
        "load_model": str(folder / "language_model" / "rwkv-final.pth"),
        "encoder_path": str(folder / "encoder"),
        "data_file": str(folder / "data"),
        "proj_dir": str(folder / stage),
    }
    if stage == "stage_2":
        own["load_adapter"] = str(folder / "stage_1" / "adapter-final.safetensors")
    return train_vision(from_flat({**settings, **own}))


def _judge(folder: Path, begin: float) -> int:
    """Ask about pictures that are new in every way; print the scores, and draw some answers."""
    from rwkvtune.evaluation.vision import evaluate_questions, read_questions, table
    from rwkvtune.inference.vision import load_vision

    questions = read_questions(folder / "test" / "questions.jsonl")
    asked: dict[str, Any] = {"picture_folder": folder / "test", "batch_size": 64, "max_tokens": 16}
    scores = {}
    for stage in ("stage_1", "stage_2"):
        system = load_vision(folder / stage)
        scores[stage] = evaluate_questions(system, questions, **asked)
        print(f"\n== held-out combinations after {stage.replace('_', ' ')}\n{table(scores[stage])}")
        scores[stage].write(folder / f"{stage}.json")
    blind = load_vision(folder / "stage_1")  # its language model is the one trained on text alone
    text_only = evaluate_questions(blind, questions, **asked, with_pictures=False)
    baselines = {
        "text-only model": accuracy(text_only),
        "most frequent answer": majority(folder / "data" / "chat.json", scores["stage_2"]),
    }
    reached, best = accuracy(scores["stage_2"]), max(baselines.values())
    contact_sheet(scores["stage_2"], folder / "test", folder / "answers.png")
    print(f"\npictures, questions and answers: {folder / 'answers.png'}")
    for name, value in baselines.items():
        print(f"{name:<21} {value:5.1f} %")
    print(f"{'after stage 1':<21} {accuracy(scores['stage_1']):5.1f} %")
    passed = reached - best >= NEEDED_POINTS
    print(
        f"demo-vision: {reached:.1f} % of {len(questions)} questions about combinations never "
        f"seen in training, {reached - best:+.1f} points against the better baseline "
        f"({NEEDED_POINTS:.0f} needed: {'reached' if passed else 'NOT REACHED'}); "
        f"{time.perf_counter() - begin:.0f} s"
    )
    return 0 if passed else 1


def accuracy(scores: Scores) -> float:
    """Exact match over all questions, in per cent."""
    return 100 * sum(bool(a.is_right) for a in scores.answers) / len(scores.answers)


def majority(chat: Path, scores: Scores) -> float:
    """What saying each question's most frequent answer of the training data gets, in per cent."""
    counts: dict[str, Counter[str]] = {}
    for record in json.loads(chat.read_text(encoding="utf-8")):
        turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            counts.setdefault(question, Counter())[answer] += 1
    common = {question: of.most_common(1)[0][0] for question, of in counts.items()}
    right = [common[a.question.text] in a.question.answers for a in scores.answers]
    return 100 * sum(right) / len(right)


def contact_sheet(scores: Scores, pictures: Path, path: Path, *, columns: int = 6) -> None:
    """A PNG of the first pictures with their questions and the answers given, wrong ones in red."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from rwkvtune.data.images import PictureStore

    by_picture: dict[str, list[Any]] = {}
    for answer in scores.answers:
        by_picture.setdefault(answer.question.pictures[0], []).append(answer)
    shown: Sequence[str] = list(by_picture)[: 4 * columns]
    store = PictureStore(pictures)
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(2 * columns, 2.6 * -(-len(shown) // columns)))
        FigureCanvasAgg(figure)
        for place, name in enumerate(shown, 1):
            axes = figure.add_subplot(-(-len(shown) // columns), columns, place)
            axes.imshow(store.open(name))
            axes.set_axis_off()
            for line, a in enumerate(by_picture[name]):
                text = f"{a.question.text} {a.said}"
                if not a.is_right:
                    text += f" ({a.question.answers[0]})"
                axes.text(
                    0, SIDE + 5 * (line + 1), text, color="black" if a.is_right else "red",
                    parse_math=False,
                )  # fmt: skip
        atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=90))
