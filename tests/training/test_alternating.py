"""Witness: a run that was never stopped, groups and rates by hand, and plain AdamW."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rwkvtune.cli.alternating_train import parse
from rwkvtune.cli.main import guarded
from rwkvtune.data.llava_dataset import DataArguments, LlavaCollator, LlavaDataset
from rwkvtune.demo.alternating_checkpoints import make
from rwkvtune.errors import UserError
from rwkvtune.inference.alternating import Checkpoint, load
from rwkvtune.models.alternating.tokenizer import load_tokenizer
from rwkvtune.training.alternating import (
    checkpoints,
    choose_trainable,
    parameter_groups,
    prepare,
    processor_of,
    synthetic_batch,
)
from rwkvtune.training.alternating_config import AlternatingSettings, TuneOptions
from tests.models.alternating.tiny import composed_model, golden_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoints")
    make(made)
    return made


def flags(folder: Path, output: Path, *more: str) -> list[str]:
    words = f"--model_name_or_path {folder}/path_or_repo_with_alternating_attn"
    words += f" --data_path {folder}/laion_subset.json --output_dir {output}"
    words += " --per_device_train_batch_size 2 --num_train_epochs 2 --learning_rate 1e-3"
    words += " --save_steps 2 --logging_steps 1 --group_by_modality_length --throughput_log_steps 0"
    return [*words.split(), *more]


def weights(output: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = safetensors.torch.load_file(output / "model.safetensors")
    return found


LORA = ("--lora_enable", "--lora_r", "4", "--lora_dropout", "0.3")
"""Dropout: the random state has to come back too."""


@pytest.mark.parametrize("more", [(), LORA, (*LORA, "--bits", "4")])
def test_a_run_killed_in_the_middle_ends_with_the_bits_of_one_that_was_not(
    folder: Path, tmp_path: Path, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded("alternating_train", flags(folder, tmp_path / "whole", *more)) == 0
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_alternating.py", *flags(folder, killed, *more)],
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + 600
    while not (killed / "checkpoint-4").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (killed / "checkpoint-999").mkdir()  # of a program that writes in place, and was killed
    capsys.readouterr()
    assert guarded("alternating_train", flags(folder, killed, *more)) == 0
    assert "resuming from" in capsys.readouterr().out
    whole = weights(tmp_path / "whole")
    for name, tensor in weights(killed).items():
        assert torch.equal(tensor, whole[name]), name
    kept = [path.name for path in checkpoints(killed)]
    assert kept == ["checkpoint-12", "checkpoint-10"]
    state = json.loads((killed / "checkpoint-12" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == list(range(1, 13))


def test_ctrl_c_saves_and_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-u", ROOT / "train_alternating.py"),
            *flags(folder, tmp_path, "--num_train_epochs", "1000"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait() == 130
    assert "the same command goes on from there" in rest
    assert checkpoints(tmp_path) and not (tmp_path / "model.safetensors").exists()


def test_each_part_learns_at_its_own_rate_and_only_matrices_decay() -> None:
    model = composed_model("alternating")
    tune = TuneOptions(
        mm_tunable_parts="mm_mlp_adapter,mm_vision_tower,mm_language_model",
        learning_rate=1.0,
        mm_projector_lr=2.0,
        mm_vision_tower_lr=3.0,
    )
    choose_trainable(model, tune)
    decays = [n for n, p in model.named_parameters() if p.dim() > 1]
    groups = parameter_groups(model, tune, 0.1, decays)
    rate_of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rate_of) == len(list(model.parameters()))
    inner = model.model
    assert rate_of[id(inner.multi_modal_projector.linear_1.weight)] == (2.0, 0.1)
    assert rate_of[id(inner.vision_tower.post_layernorm.bias)] == (3.0, 0.0)
    assert rate_of[id(model.lm_head.weight)] == (1.0, 0.1)
    assert rate_of[id(inner.image_newline)] == (1.0, 0.0)


@pytest.mark.parametrize(
    ("tune", "learning"),
    [
        ({}, {"lm", "projector", "newline"}),
        ({"freeze_backbone": True}, {"projector"}),
        ({"tune_mm_mlp_adapter": True}, {"projector"}),
        ({"unfreeze_mm_vision_tower": True}, {"lm", "projector", "newline", "vision"}),
        ({"mm_tunable_parts": "mm_language_model"}, {"lm", "newline"}),
        ({"mm_tunable_parts": "mm_vision_tower", "freeze_backbone": True}, {"vision"}),
    ],
)
def test_the_tunable_parts_are_llavas(tune: dict[str, Any], learning: set[str]) -> None:
    from rwkvtune.models.alternating.naming import group_of

    model = composed_model("base")
    choose_trainable(model, TuneOptions(**tune))
    assert {group_of(n) for n, p in model.named_parameters() if p.requires_grad} == learning


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(UserError, match="nothing would learn"):
        choose_trainable(golden_model("base"), TuneOptions(tune_mm_mlp_adapter=True))


def test_only_the_projector_leaves_an_mm_projector_bin_and_the_rest_as_it_was(
    folder: Path, tmp_path: Path
) -> None:
    only = ("--mm_tunable_parts", "mm_mlp_adapter", "--max_steps", "2")
    argv = flags(folder, tmp_path / "out", *only)
    assert guarded("alternating_train", argv) == 0
    before = weights(folder / "path_or_repo_with_alternating_attn")
    after = weights(tmp_path / "out")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.mm_projector.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    stored = torch.load(tmp_path / "out" / "mm_projector.bin")
    assert all(torch.equal(tensor, after[name]) for name, tensor in stored.items())
    again = flags(
        folder,
        tmp_path / "next",
        *("--pretrain_mm_mlp_adapter", str(tmp_path / "out" / "mm_projector.bin")),
        *("--mm_tunable_parts", "mm_vision_tower", "--max_steps", "1"),
    )
    assert guarded("alternating_train", again) == 0
    assert torch.equal(
        weights(tmp_path / "next")["model.mm_projector.2.weight"],
        after["model.mm_projector.2.weight"],
    )


def test_accumulated_batches_give_the_step_of_one_large_batch(folder: Path, tmp_path: Path) -> None:
    for name, batch, steps in (("one", 4, 1), ("four", 1, 4)):
        argv = flags(folder, tmp_path / name, "--max_steps", "1", "--gradient_accumulation_steps")
        argv += [str(steps), "--per_device_train_batch_size", str(batch)]
        argv.remove("--group_by_modality_length")
        assert guarded("alternating_train", argv) == 0
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for name, tensor in one.items():
        # Adam's first step is lr times the sign of each gradient; near zero the sign may differ.
        differs = (tensor - four[name]).abs() > 1e-4
        assert differs.float().mean() < 0.01, name


def test_the_loss_is_the_mean_over_the_labels_that_are_left_when_images_fill_the_row(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(limit: int, *more: str) -> float:
        argv = flags(folder, tmp_path / f"{limit}{len(more)}", "--max_steps", "1")
        argv += ["--model_max_length", str(limit), "--per_device_train_batch_size", "12", *more]
        assert guarded("alternating_train", argv) == 0
        told = capsys.readouterr().out
        assert ("no answer lies within model_max_length=60" in told) == bool(more)
        return float(re.findall(r"^step 1/1  loss (\S+)", told, re.M)[0])

    checkpoint = Checkpoint.open(folder / "path_or_repo_with_alternating_attn")
    model, _ = load(checkpoint)
    tokenizer = load_tokenizer(checkpoint.folder)
    for limit in (2048, 60):  # the second ends within the images
        tokenizer.model_max_length = model.config.tokenizer_model_max_length = limit
        dataset = LlavaDataset(tokenizer, DataArguments(str(folder / "laion_subset.json")))
        dataset.processor = processor_of(model.config)
        batch = LlavaCollator(tokenizer, dataset.processor)([dataset[i] for i in range(12)])
        with torch.no_grad():
            mean = model(**batch).loss  # transformers', when it is not told a number
        assert trained(limit) == pytest.approx(float(mean), abs=1e-4)
    assert trained(60, "--label_mode", "assistant_only") == 0.0


def test_gradient_checkpointing_and_bf16_train(folder: Path, tmp_path: Path) -> None:
    argv = flags(folder, tmp_path, "--gradient_checkpointing", "True", "--bf16", "True")
    assert guarded("alternating_train", [*argv, "--max_steps", "2"]) == 0
    assert weights(tmp_path)["model.norm.weight"].dtype == torch.float32


def test_a_second_run_in_the_same_folder_is_kept_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rwkvtune.files import RunFolderLock

    with RunFolderLock(tmp_path):
        assert guarded("alternating_train", flags(folder, tmp_path)) == 2
    assert "another run" in capsys.readouterr().err


def test_a_folder_of_another_run_is_refused_and_one_that_is_done_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--max_steps", "2", "--logging_steps", "1"]
    assert guarded("alternating_train", flags(folder, tmp_path, *short)) == 0
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^step \d/2  loss (\S+)", out, re.MULTILINE)]
    mean = re.search(r"^2 steps done, mean loss (\S+)$", out, re.MULTILINE)
    assert len(losses) == 2 and mean
    assert float(mean[1]) == pytest.approx(sum(losses) / 2, abs=1e-4)
    before = weights(tmp_path)
    assert guarded("alternating_train", flags(folder, tmp_path, *short)) == 0
    out = capsys.readouterr().out
    assert "all 2 steps were done before" in out and mean[0] in out
    words = flags(folder, tmp_path, *short, "--seed", "7")
    cross = [word.replace("alternating_attn", "alternating_cross_attn") for word in words]
    assert guarded("alternating_train", cross) == 2
    error = capsys.readouterr().err
    assert "seed: 42 -> 7" in error and "-> 'LlavaQwenWithAlternatingCrossAttnModel'" in error
    after = weights(tmp_path)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_fp16_without_a_gpu_is_refused() -> None:
    settings = AlternatingSettings.from_flat({"fp16": True, "use_cpu": True})
    with pytest.raises(UserError, match="fp16"):
        prepare(golden_model("base"), settings, "base")


def test_settings_without_effect_are_told_and_wrong_ones_listed_together() -> None:
    settings = AlternatingSettings.from_flat(
        {"mm_resampler_type": "qformer", "early_mix_text": True, "model_name_or_path": "x"}
    )
    assert len(settings.without_effect()) == 2
    wrong = AlternatingSettings.from_flat(
        {"learning_rate": -1.0, "group_by_length": True, "group_by_varlen": True, "bits": 4}
    )
    found = wrong.problems()
    assert len(found) == 4 and any("add --lora_enable" in problem for problem in found)
    assert "learning_rate=-1.0" in found[0]


def test_the_flags_of_llavas_training_scripts_are_known() -> None:
    words = """--deepspeed zero3.json --model_name_or_path M --version qwen_1_5 --data_path d.yaml
        --image_folder I --video_folder V --vision_tower T --mm_projector_type mlp2x_gelu
        --mm_tunable_parts=mm_vision_tower,mm_mlp_adapter,mm_language_model,mm_vision_resampler
        --mm_vision_tower_lr=2e-6 --mm_projector_lr 1e-3 --mm_vision_select_layer -2
        --mm_use_im_start_end False --mm_use_im_patch_token False --mm_patch_merge_type
        spatial_unpad --image_aspect_ratio anyres_max_9 --image_grid_pinpoints (1x1),...,(6x6)
        --group_by_modality_length True --bf16 True --run_name r --output_dir o
        --num_train_epochs 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 4
        --gradient_accumulation_steps 2 --evaluation_strategy no --save_strategy steps
        --save_steps 1000 --save_total_limit 1 --learning_rate 1e-5 --weight_decay 0.
        --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
        --model_max_length 32768 --gradient_checkpointing True --dataloader_num_workers 4
        --lazy_preprocess True --report_to wandb --torch_compile True
        --torch_compile_backend inductor --dataloader_drop_last True --frames_upbound 32
        --lora_enable True --lora_r 32 --lora_alpha 64 --lora_dropout 0.05
        --attn_implementation eager --mm_newline_position grid"""
    settings = parse(words.split())
    assert settings.problems() == []
    told = settings.without_effect()
    assert [line.split("=")[0].split(":")[0] for line in told] == [
        "mm_vision_select_layer", "mm_use_im_patch_token", "per_device_eval_batch_size",
        "mm_tunable_parts",
    ]  # fmt: skip


def test_a_made_up_sample_fits_a_model_with_and_without_a_tower() -> None:
    from rwkvtune.models.alternating.tokenizer import byte_tokenizer

    model = composed_model("alternating")
    # letters beyond the tiny vocabulary
    tokenizer = byte_tokenizer()
    batch = synthetic_batch(model, tokenizer, processor_of(model.config))
    assert batch["images"][0].shape == (1, 3, 28, 28)
    assert "images" not in synthetic_batch(
        golden_model("base"), tokenizer, processor_of(model.config)
    )
