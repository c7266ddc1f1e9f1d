"""A model of ours as one of the lm-eval harness, and its tasks run on it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from torch import nn

from rwkvtune.data.tokenizers import END_OF_DOCUMENT, Tokenizer
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.evaluation.scoring import WINDOW, score
from rwkvtune.evaluation.texts import CONFIDENCE_95, Estimate, wilson
from rwkvtune.inference.batch import generate_batch
from rwkvtune.inference.generate import until

BOOTSTRAP_ITERATIONS = 1000
"""For the standard errors of metrics that are no means, such as LAMBADA's perplexity."""
_SAMPLING = ("temperature", "top_k", "top_p")
_SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""Metrics that say of each sample yes or no, of which the mean is taken."""


class HarnessModel(TemplateLM):
    """What lm-eval asks of a model: log-likelihoods of texts, and texts that go on.

    Every text begins after END_OF_DOCUMENT, as in training; released models score worse without it.
    Contexts have any length: nothing is cut off.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        window: int = WINDOW,
        banned_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self.batch_size = batch_size
        self._window = window
        self._banned_ids = banned_ids
        """Ids that stand for no text and are never written."""

    @property
    def eot_token_id(self) -> int:
        return END_OF_DOCUMENT

    @property
    def max_gen_toks(self) -> int:
        """Tokens written for a task that does not say how many."""
        return 256

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self._tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As in lm-eval, but where a token of both together spans the boundary they are encoded
        apart, so that no byte is left out or comes twice."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        first, whole = self.tok_encode(stripped), self.tok_encode(stripped + continuation)
        if whole[: len(first)] == first:
            return first, whole[len(first) :]
        return first, self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        sequences, starts = [], []
        for _, context, continuation in requests:
            # An empty context is END_OF_DOCUMENT already.
            before = context if context[:1] == [END_OF_DOCUMENT] else [END_OF_DOCUMENT, *context]
            sequences.append(before + continuation)
            starts.append(len(before))
        scores = score(
            self._model, sequences, starts, batch_size=self.batch_size, window=self._window
        )
        return [(float(s.log_probs.sum(dtype="f8")), bool(s.is_likeliest.all())) for s in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        sequences = [[END_OF_DOCUMENT, *self.tok_encode(*request.args)] for request in requests]
        starts = [1] * len(sequences)
        scores = score(
            self._model, sequences, starts, batch_size=self.batch_size, window=self._window
        )
        return [float(s.log_probs.sum(dtype="f8")) for s in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)

        def settings(number: int) -> str:
            return repr(sorted(requests[number].args[1].items()))

        for _, same in groupby(sorted(range(len(requests)), key=settings), key=settings):
            numbers = list(same)
            for begin in range(0, len(numbers), self.batch_size):
                some = numbers[begin : begin + self.batch_size]
                contexts = [requests[number].args[0] for number in some]
                texts = self._continued(contexts, requests[some[0]].args[1])
                for number, text in zip(some, texts, strict=True):
                    answers[number] = text
        return answers

    def _continued(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        asked = normalize_gen_kwargs(settings, self.max_gen_toks)
        stops = [stop for stop in asked.pop("until", []) if stop]
        max_tokens, sampled = asked.pop("max_gen_toks"), asked.pop("do_sample", False)
        sampling = {name: asked.pop(name) for name in _SAMPLING if asked.get(name) is not None}
        unknown = [name for name, value in asked.items() if value is not None]
        if unknown:
            raise UserError(
                f"the task asks for {', '.join(unknown)} in its generation_kwargs; known are "
                f"until, max_gen_toks, do_sample, {', '.join(_SAMPLING)}: take the others out"
            )
        # A stop can end inside the last token: enough of the end is looked at to hold it.
        longest = max((len(stop.encode()) for stop in stops), default=0)

        def is_finished(_: int, ids: Sequence[int]) -> bool:
            end = self._tokenizer.decode(ids[-longest - 4 :]) if longest else ""
            return any(stop in end for stop in stops)

        written = generate_batch(
            self._model,
            [[END_OF_DOCUMENT, *self.tok_encode(context)] for context in contexts],
            max_tokens=max_tokens,
            is_finished=is_finished,
            banned_ids=self._banned_ids,
            **(sampling if sampled else {"temperature": 0.0}),
        )
        return ["".join(until([self._tokenizer.decode(ids)], stops)) for ids in written]


class Metric(NamedTuple):
    task: str
    num_fewshot: int
    name: str
    """Of the metric, with its filter where that is not lm-eval's default."""
    estimate: Estimate
    samples: int


class _Manager(TaskManager):
    """lm-eval's, with a look at the answers: it would count one that is no choice as never found,
    or end with an error of its own."""

    def load(self, *args: Any, **kwargs: Any) -> Any:
        try:
            loaded = super().load(*args, **kwargs)
        except IndexError as error:  # it tries the first sample
            raise UserError(
                "a task does not fit its data: the answer of its first sample is none of its "
                "choices, which are counted from 0"
            ) from error
        for name, task in loaded["tasks"].items():
            if task.OUTPUT_TYPE == "multiple_choice":
                _check_answers(name, task)
        return loaded


def _check_answers(name: str, task: Any) -> None:
    for number, doc in enumerate(task.eval_docs):
        choices = task.doc_to_choice(doc)
        answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        for each in answer if isinstance(answer, list) else [answer]:
            if not (each in choices if isinstance(each, str) else each in range(len(choices))):
                raise UserError(
                    f"{name}: the answer of sample {number} is {each!r}, which is none of its "
                    f"{len(choices)} choices: give a number from 0 to {len(choices) - 1} or the "
                    "text of a choice"
                )


class Tasks(NamedTuple):
    """Tasks that are there, not yet loaded."""

    manager: TaskManager
    asked: list[str | dict[str, Any]]
    """Names and configurations."""


def find_tasks(names: Sequence[str], include_path: Path | None = None) -> Tasks:
    """Tasks of lm-eval; UserError for one that is not there, without looking for its data.

    names: YAML files, or names of tasks and groups, in include_path or that lm-eval brings.
    Relative data_files of a task in a YAML file are looked for beside that file, too.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    files = {name: Path(name) for name in names if name.endswith((".yaml", ".yml"))}
    for path in files.values():
        if not path.is_file():
            raise MissingFileError(f"there is no task file {path}.")
    manager = _Manager(include_path=include_path, include_defaults=False)
    if unknown := [name for name in names if name not in files and not _known(manager, name)]:
        manager = _Manager(include_path=include_path)  # with lm-eval's own, some seconds more
        unknown = [name for name in unknown if not _known(manager, name)]
    if unknown:
        raise UserError(
            f"there is no task {', '.join(unknown)}: give a .yaml file, the name of a task in "
            "--include_path, or one of lm-eval's (`lm-eval ls tasks` lists them)"
        )
    asked = [_with_data_beside(files[name]) if name in files else name for name in names]
    return Tasks(manager, asked)


def run_tasks(
    model: HarnessModel,
    tasks: Tasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> tuple[list[Metric], dict[str, Any]]:
    """Run tasks; returns the metrics and lm-eval's own results.

    limit: only the first so many samples of each.
    UserError for data that is not there, cannot be read, or lacks what a task asks for.
    """
    from lm_eval.evaluator import simple_evaluate

    try:
        with redirect_stdout(sys.stderr):  # it tells there of its progress
            results = simple_evaluate(
                model,
                tasks=tasks.asked,
                task_manager=tasks.manager,
                limit=limit,
                num_fewshot=num_fewshot,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                log_samples=False,
            )
    except FileNotFoundError as error:
        raise MissingFileError(f"a task's data cannot be found: {error}") from error
    except (DatasetsError, TemplateError, StopIteration) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or "a file of it is empty"
        raise UserError(f"a task does not fit its data: {reason[:300]}") from error
    assert results is not None
    return metrics_of(results), results


def metrics_of(results: dict[str, Any]) -> list[Metric]:
    """The numbers of lm-eval's results with their standard errors."""

    def samples_of(task: str) -> int:
        if task in results.get("n-samples", {}):
            return int(results["n-samples"][task]["effective"])
        return sum(map(samples_of, results.get("group_subtasks", {}).get(task, ())))

    found = []
    for task, values in results["results"].items():
        samples = samples_of(task)
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{filtered}")
            error = error if isinstance(error, int | float) else None
            estimate = Estimate(float(value), error, _ends(name, value, error, samples))
            label = name if filtered == "none" else f"{name} ({filtered})"
            num_fewshot = results.get("n-shot", {}).get(task) or 0
            found.append(Metric(task, num_fewshot, label, estimate, samples))
    return found


def _ends(name: str, value: float, error: float | None, samples: int) -> tuple[float, float] | None:
    """Of a metric's 95 % interval, None = equally far to both sides."""
    if name in _SHARES and samples and 0 <= value <= 1:
        return wilson(value, samples)
    if name.endswith("perplexity") and error is not None:
        reach = CONFIDENCE_95 * error
        return max(value - reach, 1.0), value + reach  # certainty is 1
    return None


def _known(manager: Any, task: str) -> bool:
    return task in manager.all_tasks or bool(manager.match_tasks([task]))


def _with_data_beside(path: Path) -> str | dict[str, Any]:
    """A task's configuration with its data files found, or its path for what is no single task."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        content: dict[str, Any] = load_yaml(path)
    except Exception as error:  # what a YAML file with functions raises has no common type
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as a task: {reason}") from error
    data = content.get("dataset_kwargs") or {}
    if not isinstance(content.get("task"), str) or "data_files" not in data:
        return str(path)

    def found(name: Any) -> Any:
        if isinstance(name, dict):
            return {split: found(files) for split, files in name.items()}
        if isinstance(name, list):
            return [found(file) for file in name]
        beside = path.parent / str(name)
        if Path(str(name)).exists() or not beside.exists():
            return name
        return str(beside)

    return content | {"dataset_kwargs": data | {"data_files": found(data["data_files"])}}
