"""Witness: full attention weights of the eager attention, sums by hand, and closed forms."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from rwkvtune.cli.alternating import _schedules
from rwkvtune.cli.main import guarded
from rwkvtune.demo.alternating_checkpoints import make
from rwkvtune.errors import UserError
from rwkvtune.evaluation.alternating import (
    Accuracy,
    Answered,
    LastRowAttention,
    Prompts,
    Question,
    answer,
    confusion,
    paired_difference,
    read_questions,
    visual_attention,
)
from rwkvtune.evaluation.alternating_view import AttentionTable, layer_views, mask_as_text
from rwkvtune.inference.alternating import processor_of
from rwkvtune.models.alternating.tokenizer import byte_tokenizer
from rwkvtune.models.alternating.variants import Variant
from tests.models.alternating.tiny import GOLDEN, composed_model, golden_embeddings, golden_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints; and questions with one and two pictures in both forms."""
    made = tmp_path_factory.mktemp("made")
    make(made)
    talk = [
        {"from": "human", "value": "<image>\nA or B?"},
        {"from": "gpt", "value": "B"},
    ]
    llava = [
        {"id": "x", "image": "images/0.png", "conversations": talk, "options": ["A", "BB", "B"]}
    ]
    (made / "llava.json").write_text(json.dumps(llava))
    blink = {
        "idx": "val_1", "question": "Which point is it?", "image_1": "images/1.png",
        "image_2": "images/2.png", "choices": ["p", "q", "r", "s"], "answer": "(C)",
    }  # fmt: skip
    (made / "blink.jsonl").write_text(json.dumps(blink) + "\n")
    return made


@pytest.mark.parametrize("attention", ["split", "sdpa", "eager"])
@pytest.mark.parametrize("variant", ["alternating", "alternating_cross"])
def test_the_last_row_is_that_of_the_full_attention_weights(
    variant: Variant, attention: str
) -> None:
    ids = torch.tensor([GOLDEN["modality_ids"]])
    inputs = {"inputs_embeds": golden_embeddings(), "modality_ids": ids}
    with torch.no_grad():
        whole = golden_model(variant, attention="eager")(**inputs, output_attentions=True)
        model = golden_model(variant, attention=attention)
        with LastRowAttention(model) as seen:
            model(**inputs)
    expected = torch.stack([weights[0, :, -1] for weights in whole.attentions])
    torch.testing.assert_close(seen.weights, expected, atol=1e-6, rtol=0.0)


def test_shares_of_images_add_up_to_the_share_of_all_visual_tokens() -> None:
    model = composed_model("alternating_cross")
    inputs = {
        "input_ids": torch.tensor([[3, -200, 4, -200, 5]]),
        "images": [torch.randn(1, 3, 28, 28), torch.randn(1, 3, 28, 28)],
        "image_sizes": [(28, 28)] * 2,
    }
    seen = visual_attention(model, inputs)
    assert seen.by_head.shape == (4, 4) and seen.by_image.shape == (4, 2)
    torch.testing.assert_close(seen.by_image.sum(1), seen.by_head.mean(1))
    # In a cross layer a last text token sees visual tokens and itself; plain layers see text too.
    assert seen.by_head[1].mean() > seen.by_head[0].mean()


def test_options_are_scored_by_the_likelihood_of_their_whole_text(folder: Path) -> None:
    """Witness: one forward pass for each option, and the sum of its tokens' log-probabilities."""
    from rwkvtune.inference.alternating import Checkpoint, load

    model, _ = load(Checkpoint.open(folder / "path_or_repo_with_alternating_attn"))
    for parameter in model.parameters():
        parameter.data.mul_(4.0)  # a fresh model finds all options alike
    prompts = Prompts(byte_tokenizer(), processor_of(model.config))
    (question,) = read_questions(folder / "llava.json")
    (given,) = answer(model, prompts, [question])
    for option, score in zip(question.options, given.log_likelihoods, strict=True):
        inputs = prompts.inputs(question)
        ids = torch.cat([inputs.pop("input_ids"), torch.tensor([list(option.encode())])], 1)
        with torch.no_grad():
            logits = model(input_ids=ids, **inputs).logits[0].double().log_softmax(-1)
        tail = logits[-len(option) - 1 : -1]
        expected = sum(float(row[token]) for row, token in zip(tail, option.encode(), strict=True))
        assert score == pytest.approx(expected, abs=1e-4)
    assert question.answer == 2 and given.choice == int(np.argmax(given.log_likelihoods))


def test_blinks_questions_become_prompts_with_numbered_images(folder: Path) -> None:
    (question,) = read_questions(folder / "blink.jsonl")
    assert question.text.startswith("Image 1: <image>\nImage 2: <image>\nWhich point is it?")
    assert question.options == ("A", "B", "C", "D") and question.answer == 2
    assert [p.name for p in question.pictures] == ["1.png", "2.png"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "x", "answer": "A"}, "neither `conversations` nor `image_1`"),
        ({"question": "x", "image_1": "images/0.png", "answer": "?"}, "has no letter"),
        ({"question": "x", "image_1": "gone.png", "answer": "A"}, "no picture .*gone.png"),
        ({"conversations": [{"value": "q"}, {"value": "Z"}]}, "none of the options"),
        ({"conversations": [{"value": "<image>"}, {"value": "A"}]}, "0 images for 1"),
    ],
)
def test_a_bad_question_is_named(folder: Path, record: dict[str, Any], reason: str) -> None:
    path = folder / "bad.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"sample 1.*{reason}"):
        read_questions(path)


def test_intervals_and_differences_are_the_known_ones() -> None:
    # Wilson's interval for 8 of 10, Brown, Cai and DasGupta (2001): 0.490 to 0.943
    low, high = Accuracy(8, 10).interval
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
    assert Accuracy(0, 20).interval[0] == 0.0 and Accuracy(20, 20).interval[1] == 1.0
    question = Question("q", "", (), ("A", "B"), 0)
    right, wrong = Answered(question, (0.0, -1.0)), Answered(question, (-1.0, 0.0))
    mean, low, high = paired_difference([right] * 30 + [wrong] * 10, [wrong] * 40)
    assert mean == 0.75 and 0.6 < low < 0.75 < high < 0.9
    assert paired_difference([right, wrong], [right, wrong]) == (0, 0, 0)
    assert confusion([right, right, wrong]) == [[2, 1], [0, 0]]


def test_views_of_masks_count_the_golden_pairs() -> None:
    model = golden_model("alternating_cross")
    views = layer_views(model.config, torch.tensor(GOLDEN["modality_ids"]))
    assert [view.kind for view in views] == ["causal", "alternating_cross"] * 2 + ["causal"]
    pairs = "".join(GOLDEN["masks"]["cross"]).count("1")
    assert (views[0].pairs, views[1].pairs) == (78, pairs)
    drawn = mask_as_text(views[1].mask, 64).split("\n")
    expected = [
        row.replace("1", "#").replace("0", " ").rstrip() for row in GOLDEN["masks"]["cross"]
    ]
    assert drawn == expected
    coarse = mask_as_text(torch.tril(torch.ones(8, 8)).bool(), 4).split("\n")
    assert coarse == ["+", "#+", "##+", "###+"]
    uneven = mask_as_text(torch.tril(torch.ones(7, 7)).bool(), 4).split("\n")
    assert uneven == ["+", "#+", "##+", "####"]  # the last cell is a single pair


def test_an_attention_table_streams_and_adds_up(tmp_path: Path) -> None:
    model = composed_model("base")
    rows = []
    for i in range(3):
        torch.manual_seed(i)
        inputs = {
            "input_ids": torch.tensor([[3, -200, 4]]),
            "images": [torch.randn(1, 3, 28, 28)],
            "image_sizes": [(28, 28)],
        }
        rows.append((f"s{i}", visual_attention(model, inputs)))
    table = AttentionTable()
    table.write(tmp_path / "a.csv", iter(rows))
    with open(tmp_path / "a.csv", newline="") as file:
        read = list(csv.reader(file))
    assert len(read) == 1 + 3 * 4 and read[0][:3] == ["sample", "layer", "mean"]
    stacked = torch.stack([seen.by_head for _, seen in rows])
    mean, spread = table.mean_and_spread()
    torch.testing.assert_close(mean.float(), stacked.mean(0))
    (image,) = table.mean_by_image()
    torch.testing.assert_close(image.float(), stacked.mean((0, 2)))
    torch.testing.assert_close(spread.float(), stacked.std(0, correction=0), atol=1e-4, rtol=1e-3)
    first = stacked[0, 0].mean().item()
    assert float(read[1][2]) == pytest.approx(first, abs=1e-6)


def run(folder: Path, command: str) -> int:
    return guarded("alternating", command.replace("F/", f"{folder}/").split())


def test_the_commands_run_and_write_what_they_say(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = "--model F/path_or_repo_with_alternating_cross_attn"
    assert run(folder, f"masks {model} --data_path F/laion_subset.json --output m.png") == 0
    out = capsys.readouterr().out
    assert "layer 1: alternating_cross," in out and "visual" in out
    assert PIL.Image.open("m.png").size[0] > 300
    assert run(folder, f"attention {model} --data_path F/blink.jsonl --output a") == 0
    assert "layer 3 (special): " in capsys.readouterr().out
    assert PIL.Image.open("a.png").size[0] > 300 and Path("a.csv").read_text().startswith("sample")
    base = "--baseline F/lmms-lab/llava-onevision-qwen2-0.5b-ov"
    assert run(folder, f"eval {model} --data_path F/blink.jsonl {base} --output o.jsonl") == 0
    out = capsys.readouterr().out
    assert "1 questions: accuracy" in out and "difference: " in out
    assert json.loads(Path("o.jsonl").read_text())["right"] == "C"
    assert run(folder, f"export {model} --naming hf --output exported") == 0
    assert json.loads(Path("exported/config.json").read_text())["model_type"].startswith(
        "llava_one"
    )


def test_a_sweep_trains_every_cell_once_and_prints_a_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "sweep --model F/lmms-lab/llava-onevision-qwen2-0.5b-ov --data_path F/laion_subset.json "
        f"--test_path F/llava.json --output {tmp_path} --variants base,alternating "
        "--schedules alternate,first_k:1 -- --max_steps 1 --per_device_train_batch_size 2"
    )
    assert run(folder, command) == 0
    out = capsys.readouterr().out
    table = out[out.index("variant  ") :].splitlines()
    assert [line.split()[:2] for line in table[1:]] == [
        ["base", "none"], ["alternating", "alternate"], ["alternating", "first_k:1"],
    ]  # fmt: skip
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert run(folder, command) == 0
    assert "wrote the model" not in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert run(folder, command.replace("max_steps 1", "max_steps 2")) == 2
    assert "max_steps: 1 -> 2" in capsys.readouterr().err


def test_schedules_of_a_sweep_may_be_lists_of_layers() -> None:
    assert _schedules("alternate,first_k:2") == ["alternate", "first_k:2"]
    assert _schedules("first_k:2,1,3;2,4,none") == ["first_k:2", "1,3", "2,4", "none"]


def test_wrong_commands_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, reason in (
        ("mask", "no command 'mask'"),
        ("masks --model M --data_path D --variant cross", "invalid choice: 'cross'"),
        ("eval --model M --data_path D --limit -1", "-1: give a whole number, 0 = all"),
        ("eval --model F/qwen2-base-or-local --data_path F/blink.jsonl", "language model alone"),
        ("masks --model F/gone --data_path F/laion_subset.json", "no folder"),
        (
            "masks --model F/qwen2-base-or-local --data_path F/laion_subset.json --index 99",
            "0 to 11",
        ),
    ):
        assert run(folder, command) == 2
        assert reason in capsys.readouterr().err
