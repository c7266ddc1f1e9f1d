"""Answers about pictures: the state over turns, and the way from a run folder to an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.cli.main import guarded
from rwkvtune.data.images import PictureStore
from rwkvtune.data.visual import Sample, collate
from rwkvtune.demo.vision_fixture import DATA, ENCODER, MODEL
from rwkvtune.errors import UserError
from rwkvtune.evaluation.vision import greedy
from rwkvtune.inference.vision import (
    VisionChat,
    VisionSystem,
    find_adapter,
    load_vision,
    log_likelihoods,
    read_adapter,
)
from rwkvtune.models.vision.model import Adapter
from rwkvtune.training.vision import train_vision
from rwkvtune.training.vision_config import from_flat
from tests.vision_files import settings, vision_files

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    assert train_vision(from_flat(settings(run, epoch_steps=3))) == 0
    return run


@pytest.fixture(scope="module")
def system(folder: Path) -> VisionSystem:
    return load_vision(folder)


def picture(number: int) -> Image.Image:
    return PictureStore(vision_files() / DATA).open(f"GCC_train_{number:09d}.jpg")


def logits_of(system: VisionSystem, sample: Sample, pictures: list[Image.Image]) -> Any:
    batch = collate([sample], 10_000)
    with torch.no_grad():
        logits, _ = system.model(
            batch.input_ids,
            image_positions=batch.image_positions,
            features=system.features(pictures),
        )
    return logits[0].float()


def test_a_dialogue_with_carried_state_is_one_long_text(system: VisionSystem) -> None:
    chat, asked = VisionChat(system), ["What is it?", "Where?", "Sure?"]
    pictures = [picture(0), picture(1)]
    said = [
        list(chat.ask(text, pictures if i == 0 else (), max_tokens=5, temperature=0))
        for i, text in enumerate(asked)
    ]
    assert all(len(ids) == 5 for ids in said)
    ids = system.assembly.question(asked[0], pictures=2).ids.tolist()
    starts = []
    for i, text in enumerate(asked):
        if i:
            ids += system.assembly.question(text).ids.tolist()
        starts.append(len(ids))
        ids += [*said[i], 24]  # \x17
    is_image = torch.arange(len(ids)) < 18
    whole = Sample(torch.tensor(ids).numpy(), torch.tensor(ids).numpy(), is_image.numpy())
    logits = logits_of(system, whole, pictures)
    for begin, answer in zip(starts, said, strict=True):
        for offset, id in enumerate(answer):
            row = logits[begin + offset - 1]
            assert row[id] >= row.max() - 1e-3, "greedy: what one pass over all finds likeliest"


def test_no_answer_has_ids_that_stand_for_no_text(folder: Path) -> None:
    system = load_vision(folder)
    sample, features = system.assembly.question("What?", pictures=1), system.features([picture(1)])
    logits = logits_of(system, sample, [picture(1)])[len(sample.ids) - 1]
    order = logits.argsort(descending=True).tolist()
    letter = next(id for id in order if system.tokenizer.decode([id]).isalpha())
    system.tokenizer.unused_ids = order[: order.index(letter)]  # all that are likelier
    assert len(system.tokenizer.unused_ids)
    assert greedy(system, [sample], features, 1) == [system.tokenizer.decode([letter])]
    chat = list(VisionChat(system).ask("What?", [picture(1)], max_tokens=1, temperature=0))
    assert chat == [letter]


def test_log_likelihoods_are_sums_over_the_labelled_tokens(system: VisionSystem) -> None:
    samples = []
    for answer in ("red", "a blue wall"):
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}]
        samples.append(system.assembly.sample({"image": "x", "conversations": turns}))
    found = log_likelihoods(system, samples, system.features([picture(0), picture(1)]))
    for i, sample in enumerate(samples):
        log_p = F.log_softmax(logits_of(system, sample, [picture(i)]), dim=-1)
        expected = sum(
            log_p[t - 1, sample.ids[t]] for t in range(len(sample.ids)) if sample.labels[t] != -100
        )
        torch.testing.assert_close(found[i], torch.as_tensor(expected), rtol=1e-4, atol=1e-3)


def test_generate_answers_each_question_on_a_line_of_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(vision_files() / DATA / "GCC_train_000000000.jpg")
    args = ["generate", str(folder), "--image", name, "--max_tokens", "4", "--prompt", "What?"]
    assert guarded("vision", args) == 0
    once = capsys.readouterr().out
    assert guarded("vision", [*args, "--prompt", "And?"]) == 0
    twice = capsys.readouterr().out
    assert once.endswith("\n") and twice.startswith(once) and twice.endswith("\n")
    assert guarded("vision", ["generate", str(folder), "--image", "no.jpg", "--prompt", "x"]) == 2
    assert "no.jpg: no readable picture (No such file" in capsys.readouterr().err


def test_eval_scores_exact_match_and_the_likeliest_option(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], system: VisionSystem
) -> None:
    image = "GCC_train_000000001.jpg"
    said = list(VisionChat(system).ask("What?", [picture(1)], max_tokens=4, temperature=0))
    right = system.tokenizer.decode(said).strip()
    options = ["zebra quartz", "a green wall in the sun"]
    questions = [
        {"image": image, "text": "What?", "answer": right, "group": "g"},
        {"image": image, "text": "What?", "answers": ["nothing", "never"]},
        {"image": "gone.jpg", "text": "What?", "answer": "x"},
        {"text": "Only words?", "answer": "a green wall in the sun", "options": options},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in questions))
    args = ["eval", str(folder), "--questions", str(path), "--max_tokens", "4"]
    args += ["--image_folder", str(vision_files() / DATA), "--output", str(tmp_path / "r.json")]
    assert guarded("vision", args) == 0
    out = capsys.readouterr().out
    assert "skipped 1: question 3: gone.jpg: no such picture" in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert [a["is_right"] for a in result["answers"]] == [True, False, False]
    assert result["scores"][0]["exact match"]["accuracy"] == pytest.approx(1 / 3)
    assert result["scores"][0]["exact match"]["error"] == pytest.approx((2 / 9 / 3) ** 0.5)
    assert result["scores"][1]["questions"] == "g" and result["scores"][1]["count"] == 1
    chosen = result["answers"][2]["chosen"]
    scores = log_likelihoods(
        system,
        [
            system.assembly.sample(
                {"conversations": [{"from": "human", "value": "Only words?"},
                                   {"from": "gpt", "value": option}]}
            )
            for option in options
        ],
        None,
    )  # fmt: skip
    head = system.tokenizer.encode("\x16Assistant:")
    # The name before the answer is the same for both, so it does not change which is likelier.
    assert len(head) > 0 and chosen == options[int(scores.argmax())]


def test_eval_without_a_picture_to_ask_about_is_an_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"image": "a.jpg", "text": "What?", "answer": "x"}\n')
    args = ["eval", str(folder), "--questions", str(path)]
    assert guarded("vision", args) == 2
    assert "none of the questions can be asked: question 1: a.jpg" in capsys.readouterr().err
    assert guarded("vision", [*args, "--image_folder", str(tmp_path / "no")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_what_does_not_belong_together_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no adapter-"):
        load_vision(tmp_path)
    with pytest.raises(UserError, match="has no adapter in it"):
        load_vision(vision_files() / MODEL)
    bare = tmp_path / "bare.safetensors"
    weights = load_weights(folder / "adapter-final.safetensors")
    save_weights(bare, weights)
    with pytest.raises(UserError, match="does not say which language model"):
        load_vision(bare)
    model = str(vision_files() / MODEL)
    with pytest.raises(UserError, match="does not say which encoder"):
        load_vision(bare, load_model=model)
    del weights["proj.2.bias"]
    save_weights(bare, weights)
    with pytest.raises(UserError, match=r"not whole: proj\.2\.bias is missing"):
        read_adapter(bare)


@pytest.mark.parametrize(
    ("llm", "adapter", "encoder"),
    [
        ("", "modality.world_encoder.adapter.", "modality.world_encoder.model."),
        ("llm.", "proj.", "encoder.model."),
        ("llm.", "proj.", "encoder.model.vision_model."),
    ],
)
def test_an_encoder_in_a_published_file_is_the_one_that_sees(
    llm: str, adapter: str, encoder: str, folder: Path, tmp_path: Path
) -> None:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "image_size": 42, "patch_size": 14}
    config = SiglipVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    whole: Any = SiglipVisionModel(config).eval()  # the originals save its pooling head, too
    named = {
        llm: load_weights(vision_files() / MODEL),
        adapter: load_weights(folder / "adapter-final.safetensors"),
        encoder: whole.state_dict(),
    }
    every = {prefix + name: t for prefix, part in named.items() for name, t in part.items()}
    assert any(".head." in name for name in every)
    path = tmp_path / "rwkv-0.pth"
    options: Any = {"encoder_path": str(vision_files() / ENCODER), "tokenizer": "bytes"}
    save_weights(path, every)
    system = load_vision(path, **options)
    pixels = torch.from_numpy(system.preprocessing.pixels(picture(0)))
    with torch.no_grad():
        expected = whole(pixel_values=(pixels[None] / 255 - 0.5) / 0.5).last_hidden_state
    torch.testing.assert_close(system.features([picture(0)]), expected, rtol=1e-4, atol=1e-4)
    save_weights(path, {n: t for n, t in every.items() if not n.endswith("layers.1.mlp.fc2.bias")})
    with pytest.raises(UserError, match=r"fc2\.bias is missing there"):
        load_vision(path, **options)


def test_the_projector_whose_norm_is_never_used_is_read_as_it_computes(tmp_path: Path) -> None:
    conv, first, last = nn.Conv1d(8, 8, 6, 5, bias=False), nn.Linear(8, 32), nn.Linear(32, 16)
    parts = {"conv": conv, "mlp.0": first, "mlp.2": last, "pre_norm": nn.LayerNorm(16)}
    path = tmp_path / "rwkv-0.pth"
    save_weights(
        path,
        {f"proj.{n}.{k}": t for n, part in parts.items() for k, t in part.state_dict().items()},
    )
    saved = read_adapter(path)
    adapter = Adapter(saved.config)
    adapter.load_state_dict(saved.weights)
    x = torch.randn(2, 16, 8)
    # Joluck/WorldRWKV, `VlProj`: exact GELU, and the norm left out
    expected = last(F.gelu(first(conv(x.mT).mT)))
    torch.testing.assert_close(adapter(x), expected)


def test_relative_paths_of_a_run_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(tmp_path / "run", epoch_steps=1)
    for name in ("load_model", "encoder_path", "data_file"):
        given[name] = str(Path(given[name]).relative_to(vision_files()))
    monkeypatch.chdir(vision_files())
    assert train_vision(from_flat(given)) == 0
    monkeypatch.chdir(tmp_path)
    assert load_vision(Path("run")).notes == ()


def test_another_encoder_than_that_of_the_training_is_told(folder: Path, tmp_path: Path) -> None:
    from rwkvtune.models.vision.tiny import save_siglip, tiny_siglip

    save_siglip(tiny_siglip(seed=5), tmp_path / "other", side=42)
    [note] = load_vision(folder, encoder_path=str(tmp_path / "other")).notes
    assert "trained with another encoder" in note
    assert load_vision(folder).notes == ()


def test_the_newest_adapter_of_a_folder_is_the_final_one_or_the_latest(tmp_path: Path) -> None:
    import os

    assert find_adapter(tmp_path) is None
    for time, name in enumerate(("stage-1/adapter-final", "adapter-9", "adapter-10")):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (time, time))
        assert find_adapter(tmp_path) == path
    final = tmp_path / "adapter-final.safetensors"
    final.write_bytes(b"")
    os.utime(final, (0, 0))
    assert find_adapter(tmp_path) == final
