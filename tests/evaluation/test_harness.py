"""Our model under the lm-eval harness, against the rwkv package token by token and against sums by
hand."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rwkvtune.checkpoint import save_weights
from rwkvtune.data.tokenizers import ByteTokenizer
from rwkvtune.data.tokenizers.vocabulary import VocabularyTokenizer
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.inference.generate import generate
from rwkvtune.models import RWKV7Config, build_model
from rwkvtune.models.frame import LanguageModel

pytest.importorskip("lm_eval", reason="lm-eval comes with the dev extra")

from lm_eval.api.instance import Instance

from rwkvtune.evaluation.harness import HarnessModel, find_tasks, run_tasks

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Rome, I think"),
    ("", "no context at all"),
    ("spaces at the end go to the other side  ", "x"),
    ("q" * 70, " long"),
    ("Ünïcode", " 北京"),
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model = build_model(RWKV7Config(257, 2, 64), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


def harness(model: LanguageModel, batch_size: int = 8, window: int = 1024) -> HarnessModel:
    return HarnessModel(model, ByteTokenizer(), batch_size=batch_size, window=window)


def requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, arguments=args, idx=i) for i, args in enumerate(arguments)]


# Continuations of contexts, and whole texts, after token 0; one token at a time.
READER = """
import json, sys
import torch
from rwkv.model import RWKV

model = RWKV(model=sys.argv[1], strategy="cpu fp32")
answers = []
for context, continuation in json.load(open(sys.argv[2])):
    ids = [0] + [b + 1 for b in (context + continuation).encode()]
    start, total, greedy, state = 1 + len(context.encode()), 0.0, True, None
    for i, id in enumerate(ids[:-1]):
        logits, state = model.forward([id], state)
        if i + 1 >= start:
            total += float(torch.log_softmax(logits.double(), -1)[ids[i + 1]])
            greedy = greedy and int(logits.argmax()) == ids[i + 1]
    answers.append([total, greedy])
json.dump(answers, open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def answers(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """The rwkv package's log-likelihood of each continuation, and whether it is the likeliest."""
    pytest.importorskip("rwkv", reason="the rwkv package comes with the dev extra")
    folder = tmp_path_factory.mktemp("brute")
    save_weights(folder / "m.pth", model.state_dict())
    (folder / "pairs.json").write_text(json.dumps(PAIRS))
    paths = [str(folder / name) for name in ("m", "pairs.json", "answers.json")]
    settings = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER, *paths],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: list[list[Any]] = json.loads((folder / "answers.json").read_text())
    return found


@pytest.mark.parametrize(("batch_size", "window"), [(1, 1024), (8, 1024), (4, 16)])
def test_log_likelihoods_are_those_of_the_rwkv_package(
    model: LanguageModel, answers: list[list[Any]], batch_size: int, window: int
) -> None:
    ours = harness(model, batch_size, window).loglikelihood(
        requests("loglikelihood", PAIRS), disable_tqdm=True
    )
    for (found, is_greedy), (expected, their_greedy), pair in zip(
        ours, answers, PAIRS, strict=True
    ):
        spaces = len(pair[0]) - len(pair[0].rstrip())
        if not spaces:  # lm-eval counts those as part of the continuation
            assert found == pytest.approx(expected, abs=2e-4), pair
            assert is_greedy == their_greedy
    whole = harness(model, batch_size, window).loglikelihood_rolling(
        requests("loglikelihood_rolling", [(PAIRS[2][1],)])
    )
    assert whole == [pytest.approx(answers[2][0], abs=2e-4)]


def test_spaces_before_the_continuation_belong_to_it(model: LanguageModel) -> None:
    lm = harness(model)
    moved = lm.loglikelihood(requests("loglikelihood", [("ab  ", "x")]), disable_tqdm=True)
    same = lm.loglikelihood(requests("loglikelihood", [("ab", "  x")]), disable_tqdm=True)
    assert moved == same


def test_no_byte_is_lost_where_a_token_spans_the_boundary(model: LanguageModel) -> None:
    tokenizer = VocabularyTokenizer({1: b"a", 2: b"b", 3: b"ab", 4: b"c"})
    lm = HarnessModel(model, tokenizer, batch_size=1)
    assert lm._encode_pair("ca", "bc") == ([4, 1], [2, 4])  # [4, 3, 4] together
    assert lm._encode_pair("cc", "ab") == ([4, 4], [3])


def test_greedy_texts_are_those_of_one_prompt_alone_up_to_the_stop(model: LanguageModel) -> None:
    contexts = ["The", "A longer context than that", "", "x" * 40, "yes"]
    tokenizer = ByteTokenizer()
    alone = []
    for context in contexts:
        ids = [*generate(
            model, [0, *tokenizer.encode(context)], max_tokens=24, temperature=0.0, stop_ids=(0,),
        )]  # fmt: skip
        alone.append(tokenizer.decode(ids))
    stop = alone[1][3:5]  # two characters that the second text holds
    settings = {"until": [stop, "never"], "max_gen_toks": 24, "do_sample": False}
    found = harness(model, 3).generate_until(
        requests("generate_until", [(context, settings) for context in contexts])
    )
    assert found == [text.split(stop)[0] for text in alone]
    assert found[1] != alone[1]


def test_unknown_generation_settings_are_refused(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="asks for num_beams"):
        harness(model).generate_until(requests("generate_until", [("a", {"num_beams": 4})]))


# Tasks from local files


CHOICES = [
    {"question": "Capital of France?", "choices": ["Paris", "Rome"], "answer": 0},
    {"question": "Capital of Italy?", "choices": ["Paris", "Rome"], "answer": 1},
    {"question": "Capital of Norway?", "choices": ["Oslo", "Rome", "Lima"], "answer": 0},
    {"question": "2 + 2 =", "choices": ["3", "4", "5", "22"], "answer": 1},
    {"question": "Colour of snow?", "choices": ["white", "black"], "answer": 0},
]
QUIZ = """
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
FIRST = '{"question": "x", "choices": ["a", "b"], "answer": %s}\n'
LAST_WORDS = ["the cat sat on the mat", "one two three four", "to be or not to be"]
LAST_WORD = """
task: last_word
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' ' + text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "quiz.yaml").write_text(QUIZ)
    (folder / "quiz.jsonl").write_text("".join(json.dumps(x) + "\n" for x in CHOICES))
    (folder / "last_word.yaml").write_text(LAST_WORD)
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in LAST_WORDS))
    return folder


def log_likelihood(model: LanguageModel, context: str, continuation: str) -> float:
    ids = [0, *(byte + 1 for byte in (context + continuation).encode())]
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids[:-1]]))
    log_p = torch.log_softmax(logits[0].double(), dim=-1)
    start = len(context.encode())
    return sum(float(log_p[i, ids[i + 1]]) for i in range(start, len(ids) - 1))


def test_tasks_in_local_files_give_the_numbers_of_their_definitions(
    model: LanguageModel, task_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    tasks = [str(task_folder / "quiz.yaml"), str(task_folder / "last_word.yaml")]
    metrics, _ = run_tasks(harness(model), find_tasks(tasks))
    found = {(m.task, m.name): m for m in metrics}

    right = []
    for item in CHOICES:
        context = f"Q: {item['question']}\nA:"
        choices: Any = item["choices"]
        values = [log_likelihood(model, context, f" {choice}") for choice in choices]
        right.append(float(np.argmax(values) == item["answer"]))
    accuracy = found["quiz", "acc"]
    assert accuracy.estimate.value == np.mean(right) and accuracy.samples == 5
    # lm-eval: of a mean, the sample's standard deviation over the root of its size.
    assert accuracy.estimate.error == pytest.approx(np.std(right, ddof=1) / math.sqrt(5))
    low, high = accuracy.estimate.interval or (-1, 2)
    assert 0 <= low < np.mean(right) < high <= 1

    parts = [text.rpartition(" ") for text in LAST_WORDS]
    values = [log_likelihood(model, context, f" {word}") for context, _, word in parts]
    perplexity = found["last_word", "perplexity"].estimate
    assert perplexity.value == pytest.approx(math.exp(-np.mean(values)), rel=1e-4)
    assert perplexity.error is not None and perplexity.error > 0
    # Its few samples differ by orders of magnitude, and nothing is likelier than certain.
    reach = 1.96 * perplexity.error
    assert reach > perplexity.value
    assert perplexity.interval == (1.0, pytest.approx(perplexity.value + reach, rel=1e-4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"question": "x"', "a task does not fit its data: "),
        ("", "a file of it is empty"),
        ('{"q": "x", "choices": ["a", "b"], "answer": 0}\n', "'question' is undefined"),
        (FIRST % "2", "the answer of its first sample is none of its choices"),
        (FIRST % "1" + FIRST % "2", r"quiz: the answer of sample 1 is 2, .* of its 2 choices"),
        (FIRST % '"c"', "the answer of sample 0 is 'c'"),
        (FIRST % "null", "the answer of sample 0 is None"),
    ],
)
def test_data_that_does_not_fit_its_task_is_told_in_one_line(
    model: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: str,
    message: str,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "quiz.yaml").write_text(QUIZ)
    (tmp_path / "quiz.jsonl").write_text(data)
    with pytest.raises(UserError, match=message) as raised:
        run_tasks(harness(model), find_tasks([str(tmp_path / "quiz.yaml")]))
    assert "\n" not in str(raised.value)


def test_a_task_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="there is no task file nowhere.yaml"):
        find_tasks(["nowhere.yaml"])
    (tmp_path / "bad.yaml").write_text("task: [unclosed")
    with pytest.raises(UserError, match="cannot be read as a task"):
        find_tasks([str(tmp_path / "bad.yaml")])
