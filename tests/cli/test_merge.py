"""`rwkvtune merge`, and what `rwkvtune generate` makes of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rwkvtune.adapters.adapter import attach
from rwkvtune.adapters.settings import AdapterSettings
from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.cli.main import main
from rwkvtune.data.tokenizers import load_tokenizer, save_tokenizer
from rwkvtune.inference.load import load_model
from rwkvtune.models import RWKV6Config, RWKV7Config, build_model
from rwkvtune.models.frame import LanguageModel
from tests.adapters.bases import shake

pytest.importorskip("peft", reason="peft comes with the dev extra")

IDS = torch.tensor([[3, 17, 0, 200, 5, 5, 9]])


def make(folder: Path, settings: AdapterSettings, *, is_x060: bool = False) -> LanguageModel:
    """base.pth and run/adapter-final; returns the model that was trained."""
    made = RWKV6Config if is_x060 else RWKV7Config
    model = build_model(made(257, 2, 64, head_size=32), seed=1)
    shake(model, 1, 0.05)
    save_weights(folder / "base.pth", model.state_dict())
    (folder / "run").mkdir()
    save_tokenizer(load_tokenizer("bytes"), folder / "run")
    save_tokenizer(load_tokenizer("bytes"), folder)
    adapter = attach(model, settings, str(folder / "base.pth"))
    shake(model, 2, 0.3 if settings.kind == "state" else 0.05)
    tensors = {name: model.state_dict()[name] for name in adapter.tensors}
    adapter.save(model, tensors, folder / "run" / "adapter-0")
    adapter.save(model, tensors, folder / "run" / "adapter-final")
    return model.eval()


def test_a_run_folder_merges_into_weights_that_answer_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(tmp_path, AdapterSettings("lora", r=4, train_modules="ln_x"))
    base, out = str(tmp_path / "base.pth"), tmp_path / "out" / "merged.safetensors"
    assert main(["merge", base, str(tmp_path / "run"), str(out)]) == 0
    assert (load_model(out)(IDS)[0] - model(IDS)[0]).abs().max() < 1e-5
    assert load_weights(out).keys() == load_weights(tmp_path / "base.pth").keys()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    told = capsys.readouterr().err
    assert "adapter-final" in told
    assert main(["merge", base, str(tmp_path / "run"), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "merged.bin"], "end the name in .pth or .safetensors"),
        (["nothing", "merged.pth"], "there is no adapter folder"),
        ([".", "merged.pth"], "is no adapter folder: it has neither"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    make(tmp_path, AdapterSettings("lora", r=4))
    paths = [str(tmp_path / arg) for arg in ("base.pth", *args)]
    assert main(["merge", *paths]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "merged.pth").exists()


def test_an_adapter_run_tells_how_it_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, AdapterSettings("lora", r=4))
    assert main(["generate", str(tmp_path / "run"), "--prompt", "a"]) == 2
    assert "rwkvtune merge BASE" in capsys.readouterr().err


def test_a_tuned_state_changes_what_is_written_and_belongs_to_one_base(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    make(tmp_path, AdapterSettings("state"))
    base = tmp_path / "base.pth"

    def written(*args: str) -> bytes:
        args = (*args, "--prompt", "a", "--max_tokens", "12", "--temperature", "0", "--ignore_end")
        assert main(["generate", str(base), *args]) == 0
        return capfdbinary.readouterr().out

    with_state = written("--state", str(tmp_path / "run"))
    assert with_state == written("--state", str(tmp_path / "run" / "adapter-final" / "state.pth"))
    assert with_state != written()
    assert main(["merge", str(base), str(tmp_path / "run"), str(tmp_path / "merged.pth")]) == 2
    assert b"no RWKV-7 program reads one from the weights" in capfdbinary.readouterr().err
    weights = load_weights(base)
    other = tmp_path / "other.pth"
    save_weights(other, weights | {"ln_out.bias": weights["ln_out.bias"] + 0.01})
    flags = ["--state", str(tmp_path / "run"), "--prompt", "a"]
    assert main(["generate", str(other), *flags]) == 2
    assert b"same shapes but other values" in capfdbinary.readouterr().err


def test_a_tuned_state_of_x060_goes_into_the_weights(tmp_path: Path) -> None:
    make(tmp_path, AdapterSettings("state"), is_x060=True)
    paths = [str(tmp_path / name) for name in ("base.pth", "run", "merged.pth")]
    assert main(["merge", *paths]) == 0
    merged, base = load_weights(tmp_path / "merged.pth"), load_weights(tmp_path / "base.pth")
    added = {"blocks.0.att.time_state", "blocks.1.att.time_state"}
    assert merged.keys() - base.keys() == added
    assert all(torch.equal(merged[name], base[name]) for name in base)
