"""`rwkvtune train`: every setting as a flag and as a YAML key, and what is refused before anything
happens."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml

from rwkvtune.checkpoint import save_weights
from rwkvtune.cli.main import main
from rwkvtune.cli.train import (
    make_parser,
    parse_settings,
)
from rwkvtune.data.binidx import BinIdxWriter
from rwkvtune.models import RWKV7Config, build_model
from rwkvtune.training.config import TrainConfig, Version, setting_types

TYPES = setting_types()
DEFAULTS = TrainConfig().to_flat()


def parse(*argv: str) -> dict[str, Any]:
    return TrainConfig.from_flat(parse_settings(make_parser(), argv)).to_flat()


def another(name: str) -> Any:
    """A valid value of a setting that is not its default."""
    hint, default = TYPES[name], DEFAULTS[name]
    if get_origin(hint) is Literal:
        return get_args(hint)[-1]
    if hint is bool:
        return not default
    if hint in (float, float | None):
        return 0.125
    if hint is str:
        return "a: [b, 'c'] #\n\"d\" 1e3 ü"
    if hint == Version | None:
        return "x052"
    assert hint == int | None or hint is int or hint == int | Literal["auto"]
    return 7


# Not model_config, which changes what others are: tests/configs/test_training.py.
@pytest.mark.parametrize("name", [name for name in TYPES if name != "model_config"])
def test_every_setting_is_a_flag_and_a_yaml_key(name: str, tmp_path: Path) -> None:
    value = another(name)
    expected = DEFAULTS | {name: value}
    assert value != DEFAULTS[name]
    written = str(value).lower() if isinstance(value, bool) else str(value)
    assert parse(f"--{name}", written) == expected
    assert parse(f"--{name}={written}") == expected
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({name: value}))
    assert parse("--config", str(tmp_path / "run.yaml")) == expected


def test_flags_win_over_the_file_in_either_place(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr_init: 6e-5\nmicro_bsz: 3\n")
    for argv in (
        ["--config", str(file), "--micro_bsz", "5"],
        ["--micro_bsz", "5", "--config", str(file)],
    ):
        found = parse(*argv)
        assert (found["lr_init"], found["micro_bsz"]) == (6e-5, 5), argv


def test_print_config_gives_a_file_that_means_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = ["--lr_init", "1e-18", "--grad_cp", "--sample_prompt", "10", "--devices", "2"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *changed, "--print_config"])
    assert ended.value.code == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert parse("--config", str(tmp_path / "run.yaml")) == parse(*changed)


def test_booleans_are_written_as_upstream_writes_them() -> None:
    for argv in (["--grad_cp", "1"], ["--grad_cp"], ["--grad_cp=1"], ["--grad_cp", "true"]):
        assert parse(*argv, "--micro_bsz", "2") == DEFAULTS | {"grad_cp": True, "micro_bsz": 2}
        assert parse("--micro_bsz", "2", *argv)["grad_cp"] is True
    for argv in (["--layerwise_lr", "0"], ["--layerwise_lr=0"], ["--layerwise_lr", "false"]):
        assert parse(*argv)["layerwise_lr"] is False


def test_the_type_and_doc_of_every_setting_are_in_the_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in TYPES:
        assert f"--{name} " in text
    assert "Tokens per window." in text and "Blocks (12 for a fresh model)." in text


@dataclasses.dataclass
class Refusal:
    argv: list[str]
    told: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with token files, YAML files and weights."""
    folder = tmp_path_factory.mktemp("files")
    with BinIdxWriter(folder / "data", 300) as writer:
        writer.add_document([1 + i % 250 for i in range(1000)])
    weights = build_model(RWKV7Config(300, 2, 64)).state_dict()
    save_weights(folder / "w.pth", weights)
    del weights["blocks.1.att.k_a"]
    save_weights(folder / "incomplete.pth", weights)
    (folder / "misspelled.yaml").write_text("lr_intt: 1.0e-3\n")
    (folder / "wrong_type.yaml").write_text("micro_bsz: many\n")
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "broken.yaml").write_text("a: [\n")
    (folder / "empty.yaml").write_text("")
    return folder


DATA = ["--data_file", "data", "--ctx_len", "32", "--vocab_size", "300"]
REFUSALS = {
    "unknown flag": Refusal([*DATA, "--foo", "1"], "unknown settings: foo"),
    "misspelled flag": Refusal([*DATA, "--lr_intt", "1"], "lr_intt (did you mean lr_init?)"),
    "abbreviated flag": Refusal([*DATA, "--epoch_st", "1"], "epoch_st (did you mean epoch_steps?)"),
    "stray word": Refusal([*DATA, "word"], "unrecognized arguments: word"),
    "flag without value": Refusal([*DATA, "--lr_init"], "--lr_init: expected one argument"),
    "wrong number": Refusal([*DATA, "--micro_bsz", "2.5"], "micro_bsz=2.5 must be a whole number"),
    "wrong optional": Refusal([*DATA, "--n_layer", "two"], "n_layer=two must be a whole number"),
    "wrong word": Refusal([*DATA, "--precision", "bf15"], "must be one of bf16, fp32, tf32, fp16"),
    "not finite": Refusal([*DATA, "--lr_init", "nan"], "lr_init=nan must be a number"),
    "infinite": Refusal([*DATA, "--lr_init", ".inf"], "lr_init=inf must be a number from 0 up"),
    "all at once": Refusal(
        ["--micro_bsz", "0", "--beta1", "1"],
        "data_file is missing: give the prefix of a .bin/.idx pair; micro_bsz=0 must be at least 1;"
        " beta1=1.0 must be in [0, 1)",
    ),
    "negative decay": Refusal([*DATA, "--weight_decay", "-1"], "weight_decay=-1.0 must be"),
    "decay from nothing": Refusal(
        [*DATA, "--weight_decay", "0", "--weight_decay_final", "0.1"], "needs a weight_decay above"
    ),
    "yaml key": Refusal(["--config", "misspelled.yaml"], "lr_intt (did you mean lr_init?)"),
    "yaml type": Refusal(["--config", "wrong_type.yaml"], "micro_bsz=many must be a whole number"),
    "yaml list": Refusal(["--config", "list.yaml"], "list.yaml: expected lines such as"),
    "yaml syntax": Refusal(["--config", "broken.yaml"], "broken.yaml: this is no YAML"),
    "yaml empty": Refusal(["--config", "empty.yaml"], "empty.yaml: expected lines such as"),
    "yaml folder": Refusal(["--config", "."], "--config .: cannot be read"),
    "yaml missing": Refusal(["--config", "nothing.yaml"], "nothing.yaml"),
    "data missing": Refusal(["--data_file", "nothing"], "nothing"),
    "validation missing": Refusal([*DATA, "--val_data_file", "nothing"], "nothing"),
    "tokenizer missing": Refusal([*DATA, "--tokenizer", "nothing.json"], "nothing.json"),
    "ids beyond the vocabulary": Refusal(
        [*DATA, "--vocab_size", "250"], "data.bin: byte 498 (token 249): id 250 is not in"
    ),
    "disagreeing flag": Refusal(
        [*DATA, "--load_model", "w.pth", "--n_layer", "3", "--n_embd", "128"],
        "the model settings disagree with w.pth: n_layer: flag 3, file 2; n_embd: flag 128, file",
    ),
    "weights missing": Refusal([*DATA, "--load_model", "nothing.pth"], "nothing.pth"),
    "weights incomplete": Refusal(
        [*DATA, "--n_layer", "2", "--load_model", "incomplete.pth"],
        'incomplete.pth does not fit an x070 model of its own dimensions: Missing key(s) in '
        'state_dict: "blocks.1.att.k_a"',
    ),
    "version of the file": Refusal(
        [*DATA, "--load_model", "w.pth", "--version", "x060"], "version: flag x060, file x070"
    ),
    "dimension of another version": Refusal(
        [*DATA, "--version", "x052", "--g_rank", "8"], "an x052 model has no g_rank: leave it out"
    ),
    "unknown version": Refusal(
        [*DATA, "--version", "x051"], "version=x051 must be one of x052, x060, x070"
    ),
    "width and heads": Refusal([*DATA, "--n_embd", "100"], "n_embd=100 is not a multiple"),
    "window too long": Refusal([*DATA, "--ctx_len", "2000"], "tokens are too few"),
    "window too long, shuffled": Refusal(
        [*DATA, "--ctx_len", "2000", "--order", "shuffled"], "tokens are too few"
    ),
    "batch larger than the data": Refusal([*DATA, "--micro_bsz", "64"], "less than one step of 64"),
    "prime that does not fit": Refusal([*DATA, "--magic_prime", "12"], "magic_prime=12 does not"),
    "prime of other data": Refusal([*DATA, "--magic_prime", "11"], "Was it made for other"),
    "prime without use": Refusal(
        [*DATA, "--order", "shuffled", "--magic_prime", "29"], "has no meaning for order=shuffled"
    ),
    "no GPU": Refusal([*DATA, "--accelerator", "cuda"], "sees no GPU; use --accelerator cpu"),
    "fp16": Refusal(
        [*DATA, "--accelerator", "cpu", "--precision", "fp16"], "no loss scaling to keep small"
    ),
    "no devices": Refusal([*DATA, "--devices", "0"], "devices=0 must be at least 1"),
    "half devices": Refusal(
        [*DATA, "--devices", "x"], "devices=x must be a whole number or auto"
    ),
    "kernel": Refusal([*DATA, "--kernel", "fast"], "wkv7 backend 'fast' is unknown"),
    "prompt": Refusal(
        [*DATA, "--sample_every", "1", "--tokenizer", "world", "--sample_prompt", "Shakespeare"],
        "sample_prompt has the id",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_one_line_and_leaves_no_folder(
    case: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    refusal = REFUSALS[case]
    small = [] if "w.pth" in refusal.argv else ["--n_layer", "1", "--n_embd", "64"]
    assert main(["train", "--proj_dir", "run", *small, *refusal.argv]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ") and told.err.count("\n") == 1
    assert refusal.told in told.err
    assert sorted(files.iterdir()) == before


def test_the_config_that_a_run_writes_goes_on_with_it_and_begins_another_like_it(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    folder, other = tmp_path / "run", tmp_path / "other"
    argv = [
        "train", "--data_file", str(text), "--proj_dir", str(folder), "--n_layer", "1", "--n_embd",
        "64", "--ctx_len", "32", "--micro_bsz", "2", "--exit_tokens", "128", "--threads", "1",
        "--devices", "auto", "--precision", "fp32", "--sample_prompt", "1e3",
        "--log_every", "1",
    ]  # fmt: skip
    assert main(argv) == 0
    config = str(folder / "config.yaml")
    capsys.readouterr()
    assert main(["train", "--config", config]) == 0
    assert "is finished, at step 2 (2 asked for)" in capsys.readouterr().out
    assert main(["train", "--config", config, "--exit_tokens", "192"]) == 0
    assert "from 2" in capsys.readouterr().out
    shutil.copy(config, tmp_path / "first.yaml")
    assert main(["train", "--config", config, "--proj_dir", str(other)]) == 0
    first = yaml.safe_load((tmp_path / "first.yaml").read_text())
    assert first | {"proj_dir": str(other)} == yaml.safe_load((other / "config.yaml").read_text())
    rows = [(other / "metrics.csv").read_text().splitlines()[i].split(",")[:4] for i in (1, 2)]
    assert rows[0][:3] == ["1", "0", "64"]
    torch.set_num_threads(threads)
