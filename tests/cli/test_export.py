"""`rwkvtune export` as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.cli.main import main
from rwkvtune.data.chat import TEMPLATES, save_template
from rwkvtune.data.tokenizers import ByteTokenizer, find_tokenizer, save_tokenizer
from rwkvtune.models import RWKV7Config, build_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder `run` of a small model, and the working folder it lies in."""
    save_weights(
        tmp_path / "run" / "rwkv-final.pth",
        build_model(RWKV7Config(300, 2, 64), seed=1).state_dict(),
    )
    save_tokenizer(ByteTokenizer(), tmp_path / "run")
    save_template(TEMPLATES["g1"], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(*words: str) -> int:
    return main(["export", *words])


def test_a_run_folder_becomes_a_hugging_face_folder_and_weights_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("run", "model", "--to", "hf") == 0
    assert "x070, 72 tensors of run/rwkv-final.pth, 0.7 MB" in capsys.readouterr().out
    assert (
        "Assistant:" in json.loads(Path("model/tokenizer_config.json").read_text())["chat_template"]
    )
    card = (folder / "model" / "README.md").read_text()
    assert "`rwkv-final.pth`" in card and "AutoTokenizer" in card
    assert export("model", "back.pth", "--to", "pth", "--dtype", "bf16") == 0
    back, original = load_weights("back.pth"), load_weights("run/rwkv-final.pth")
    assert torch.equal(back["head.weight"], original["head.weight"].bfloat16())
    assert isinstance(find_tokenizer("back.pth"), ByteTokenizer)
    assert main(["inspect", "back.pth"]) == 0


def test_nothing_is_replaced_unless_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(expected: str, *words: str) -> None:
        assert export(*words) == 2
        assert expected in capsys.readouterr().err

    (folder / "mine").mkdir()
    (folder / "mine" / "letter.txt").write_text("dear")
    assert export("run", "model", "--to", "hf") == 0
    assert export("run", "m.st", "--to", "st") == 0
    refused("is there already", "run", "model", "--to", "hf")
    refused("is there already", "run", "m.st", "--to", "st")
    refused("is not replaced", "run", "mine", "--to", "hf", "--overwrite")
    refused("the source itself", "model", "model", "--to", "hf", "--overwrite")
    shutil.copytree("mine", "d.gguf")
    refused("is a folder, gguf is a file", "run", "d.gguf", "--to", "gguf")
    assert (folder / "mine" / "letter.txt").read_text() == "dear"
    (folder / "model" / "README.md").write_text("old")
    assert export("run", "model", "--to", "hf", "--overwrite") == 0
    assert (folder / "model" / "README.md").read_text() != "old"
    assert json.loads((folder / "model" / "config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "m.bin", "--to", "gguf"], "the name of a gguf file ends in .gguf"),
        (["run", "m.pth", "--to", "hf"], "hf is a folder, its name does not end in .pth"),
        (["run", "m.st", "--to", "st", "--dtype", "bf16"], "st cannot hold bf16: choose fp16"),
        (["run", "m.pth", "--to", "pth", "--dtype", "q8_0"], "choose fp32 or bf16 or fp16"),
        (["run", "m.pth", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["none.gguf", "m.pth", "--to", "pth"], "there is no file none.gguf"),
        (["run", "m.gguf", "--to", "gguf", "--tokenizer", "world"], "ids up to 65529"),
        (["run", "m", "--to", "hf", "--shard_gb", "0"], "--shard_gb is 0"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert export(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert [p.name for p in folder.iterdir()] == ["run"]


def test_another_form_given_as_weights_tells_of_export(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    assert export("run", "m.gguf", "--to", "gguf") == export("run", "folder", "--to", "hf") == 0
    for name in ("m.gguf", "folder"):
        assert main(["generate", name]) == 2
        assert f"rwkvtune export {name} NAME.pth --to pth" in capsys.readouterr().err
