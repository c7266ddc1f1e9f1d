"""`python world_train.py`: the published command, and every published flag."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rwkvtune.cli.main import guarded
from rwkvtune.cli.world_train import DATA_TYPES, DEAD, FLAGS, translate
from rwkvtune.demo.vision_fixture import DATA, ENCODER, MODEL, write_fixture
from rwkvtune.errors import UserError
from rwkvtune.training.vision_config import PARTS, VisionConfig, setting_types
from tests.training.runs import metrics

# The training command of the published page "Stage 1: Vision Adapter Training Command", verbatim.
PUBLISHED = r"""
HF_ENDPOINT="https://hf-mirror.com" python world_train.py \
--load_model models/rwkv7-g1c-2.9b-20251231-ctx8192.pth \
--proj_dir out/vision-adapter-stage1-siglip \
--data_file datasets/LLaVA-CC3M-Pretrain-595K \
--data_type visual \
--vocab_size 65536 \
--n_layer 24 \
--n_embd 1024 \
--ctx_len 2048 \
--micro_bsz 256 \
--epoch_steps 10000 \
--epoch_count 1 \
--epoch_begin 0 \
--epoch_save 1 \
--lr_init 1e-3 \
--lr_final 0 \
--warmup_steps 100 \
--beta1 0.9 \
--beta2 0.99 \
--adam_eps 1e-8 \
--lr_schedule wsd \
--accelerator gpu \
--devices 1 \
--precision bf16 \
--strategy deepspeed_stage_1 \
--grad_cp 1 \
--encoder_path encoders/siglip2-so400m-patch14-384 \
--encoder_type siglip \
--my_testing "x070" \
--train_step adapter \
--quant 4bit
"""

# Flags of world_train.py in its versions of 2025, by what they do there.
MATTER = re.findall(
    r"\w+",
    """
    load_model proj_dir data_file data_type vocab_size n_layer n_embd dim_att dim_ffn
    head_size_a head_size_divisor ctx_len micro_bsz epoch_steps epoch_count epoch_begin
    epoch_save lr_init lr_final lr_schedule warmup_steps beta1 beta2 adam_eps weight_decay
    weight_decay_final layerwise_lr grad_cp precision accelerator devices num_nodes strategy
    accumulate_grad_batches encoder_path encoder_type train_step quant peft peft_config
    my_testing train_type fla op copy data_shuffle random_seed wandb my_exit magic_prime
    my_qa_mask my_random_steps my_pile_stage avg_loss num_workers persistent_workers
    prefetch_factor grad_cp_layers
    """,
)
DO_NOTHING = re.findall(
    r"\w+",
    """
    pre_ffn head_qk tiny_att_dim tiny_att_layer dropout my_pile_version my_pile_shift
    my_pile_edecay ds_bucket_mb my_sample_len my_ffn_shift my_att_shift my_pos_emb load_partial
    my_exit_tokens train_parts lora_config pissa_config bone_config dataload chunk_ctx loss_mask
    mask_id optim sft_field sft_split state_tune
    """,
)


def arguments(*more: str) -> list[str]:
    words = shlex.split(PUBLISHED.replace("\\\n", " "))
    return [*words[words.index("world_train.py") + 1 :], *more]


def settings(*argv: str) -> VisionConfig:
    return translate(list(argv))[0]


def test_every_published_flag_is_known() -> None:
    ours = {*setting_types(), *DEAD, *(flag.name for flag in FLAGS)}
    assert set(MATTER) | set(DO_NOTHING) <= ours
    assert set(DO_NOTHING) <= set(DEAD)


def test_the_published_command_says_what_its_page_says() -> None:
    config, notes = translate(arguments())
    assert notes == []
    assert config.problems() == []
    assert config.parts == {"adapter"} and config.quant == "4bit" and config.grad_cp is True
    assert (config.micro_bsz, config.epoch_steps, config.epoch_count) == (256, 10000, 1)
    assert (config.lr_init, config.lr_final, config.warmup_steps) == (1e-3, 0.0, 100)
    assert (config.beta1, config.beta2, config.adam_eps) == (0.9, 0.99, 1e-8)
    assert (config.n_layer, config.n_embd, config.vocab_size) == (24, 1024, 65536)
    assert (config.lr_schedule, config.precision, config.form) == ("wsd", "bf16", "prefix")


def test_a_run_without_flags_has_the_published_defaults() -> None:
    config = settings()
    published = {
        "ctx_len": 1024, "micro_bsz": 12, "epoch_steps": 1000, "epoch_count": 500,
        "epoch_begin": 0, "epoch_save": 5, "lr_init": 6e-4, "lr_final": 1e-5, "lr_schedule": "cos",
        "warmup_steps": -1, "beta1": 0.9, "beta2": 0.99, "adam_eps": 1e-8, "weight_decay": 0.0,
        "grad_cp": False, "accelerator": "gpu", "devices": 1, "num_nodes": 1, "strategy": "auto",
        "accumulate_grad_batches": 1, "quant": "none", "peft": "none", "data_shuffle": True,
        "proj_dir": "out", "wandb": "",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in published} == published


def test_the_last_of_a_repeated_flag_wins() -> None:
    config = settings(*arguments("--micro_bsz", "8", "--epoch_steps", "20"))
    assert (config.micro_bsz, config.epoch_steps) == (8, 20)


@pytest.mark.parametrize("name", DO_NOTHING)
def test_a_dead_flag_is_accepted_and_named(name: str) -> None:
    _, notes = translate(["--data_type", "visual", f"--{name}", "1"])
    assert len(notes) == 1 and notes[0].startswith("ignored") and name in notes[0]


@pytest.mark.parametrize("flag", [f for f in FLAGS if f.action != "takes effect"])
def test_a_flag_that_cannot_be_followed_warns_or_is_refused(flag: Any) -> None:
    assert translate([f"--{flag.name}", flag.default or "none"])[1] == [] or not flag.default
    if flag.action == "warns":
        note = translate([f"--{flag.name}", "77"])[1]
        assert note == [f"{flag.name}=77 does nothing: {flag.effect}"]
    else:
        with pytest.raises(UserError, match=re.escape(f"--{flag.name} 77: {flag.effect}")):
            translate([f"--{flag.name}", "77"])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--copy 3 --epoch_steps 10", {"epoch_steps": 30}),
        ("--my_exit 4", {"epoch_count": 5}),
        ("--my_exit 4 --epoch_begin 2", {"epoch_count": 3}),
        ("--head_size_a 32", {"head_size": 32}),
        ("--dim_att 2560 --n_embd 1024", {"dim_att": 2560, "n_embd": 1024}),
        ("--devices -1", {"devices": "auto"}),
        ("--random_seed -1", {"random_seed": VisionConfig().random_seed}),
        ("--random_seed 7", {"random_seed": 7}),
        ("--data_shuffle 0", {"data_shuffle": False}),
        ("--data_type img", {"form": "placeholder"}),
        ("--strategy deepspeed", {"strategy": "deepspeed_stage_2"}),
        ("--lr_init 1e-4 --lr_final 1e-4", {"lr_schedule": "constant"}),
        ("--train_step adapter rwkv", {"train_step": "adapter rwkv"}),
        ("--train_step proj llm --lr_schedule wsd", {"train_step": "proj llm"}),
        ("--strict_shape 1 --keep_image_tag 1", {"strict_shape": True, "keep_image_tag": True}),
    ],
)
def test_flags_that_are_spelled_otherwise_take_effect(argv: str, expected: dict[str, Any]) -> None:
    config = settings(*argv.split())
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "words", [("adapter", "proj", "projector"), ("rwkv", "llm"), ("encoder", "moda")]
)
def test_the_parts_of_every_version_have_their_aliases(words: tuple[str, ...]) -> None:
    assert {PARTS[word] for word in words} == {words[0]}
    assert all(settings("--train_step", word).parts == {words[0]} for word in words)


@pytest.mark.parametrize("kind", DATA_TYPES)
def test_other_data_types_are_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(UserError, match=f"--data_type {kind}: "):
        translate(["--data_type", kind])


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--my_testing x060", "only x070"),
        ("--quant fp8", "not there for vision runs"),
        ("--peft adalora", "not there for vision runs"),
        ("--copy x", "whole number"),
        ("--my_exit 1 --epoch_begin 2", "before the first mini-epoch"),
        ("--no_such_flag 1", "unknown flag --no_such_flag"),
        ("--micro_bzs 1", "did you mean --micro_bsz"),
    ],
)
def test_other_wishes_are_refused(argv: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        translate(argv.split())


def test_what_is_no_number_is_told_with_all_that_is_wrong() -> None:
    assert (
        "epoch_begin='x' must be" in settings("--epoch_begin", "x", "--my_exit", "3").problems()[0]
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_published_command_runs_as_printed_on_small_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fixture(tmp_path)
    assert all((tmp_path / name).exists() for name in (MODEL, ENCODER, DATA))
    monkeypatch.chdir(tmp_path)
    shorter = arguments("--micro_bsz", "8", "--epoch_steps", "20", "--throughput_log_steps", "10")
    assert guarded("world_train", shorter) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "out" / "vision-adapter-stage1-siglip"
    assert len(metrics(folder)) == 2, "every tenth step"
    assert {"adapter-0.safetensors", "adapter-final.safetensors", "adapter_config.json",
            "train_log.txt"} <= {p.name for p in folder.iterdir()}  # fmt: skip
    for part in (
        "n_layer 24 (the file's is 2), n_embd 1024 (the file's is 64); the file's are used",
        "nf4: 12 matrices packed", "48 samples", "8 samples = 1 device(s) x micro_bsz 8",
        "20 optimizer steps", "3.33 (160 samples)", "9 of pictures", "GB per device (estimate)",
        "lr_schedule wsd: world_train.py's curve",
    ):  # fmt: skip
        assert part in said, part
    samples, visual = re.findall(r"([\d.]+) (?:samples|visual tokens)/s", said)
    assert float(visual) == pytest.approx(9 * float(samples), rel=0.02), "9 tokens per picture"
