"""`python train.py` and the demo scripts of RWKV-LM: every published flag, default and stage."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.cli import published_flags
from rwkvtune.cli.main import guarded
from rwkvtune.cli.published_flags import FLAGS, as_ours, family_of, make_parser, translate
from rwkvtune.cli.train import parse_settings
from rwkvtune.errors import UserError
from rwkvtune.models import RWKV7Config, build_model, recognise_version
from rwkvtune.training.config import TrainConfig, setting_types
from rwkvtune.training.plan import make_plan
from rwkvtune.training.run import make_schedule

ROOT = Path(__file__).resolve().parents[2]

# The flags of both programs with their defaults, as RWKV-LM (commit 524481d) prints them.
IN_BOTH = {
    "load_model": "", "wandb": "", "proj_dir": "out", "random_seed": -1, "data_file": "",
    "data_type": "utf-8", "vocab_size": 0, "ctx_len": 1024, "epoch_steps": 1000,
    "epoch_count": 500, "epoch_begin": 0, "epoch_save": 5, "micro_bsz": 12, "n_layer": 6,
    "n_embd": 512, "dim_att": 0, "dim_ffn": 0, "lr_init": 6e-4, "lr_final": 1e-5,
    "warmup_steps": -1, "beta1": 0.9, "beta2": 0.99, "grad_cp": 0, "weight_decay": 0,
    "grad_clip": 1.0, "ds_bucket_mb": 200, "load_partial": 0, "magic_prime": 0,
    "my_exit_tokens": 0,
}  # fmt: skip
V5_TREE = {
    "adam_eps": 1e-8, "my_testing": "x052", "head_size_a": 64, "my_pile_stage": 0,
    "train_type": "", "pre_ffn": 0, "head_qk": 0, "tiny_att_dim": 0, "tiny_att_layer": -999,
    "dropout": 0, "weight_decay_final": -1, "my_pile_version": 1, "my_pile_shift": -1,
    "my_pile_edecay": 0, "layerwise_lr": 1, "my_sample_len": 0, "my_ffn_shift": 1,
    "my_att_shift": 1, "head_size_divisor": 8, "my_pos_emb": 0, "my_qa_mask": 0,
    "my_random_steps": 0, "my_exit": 99999999,
}  # fmt: skip
TRAIN_TEMP = {
    "adam_eps": 1e-18, "my_testing": "x070", "head_size": 64, "train_stage": 0, "head_chunk": 0,
    "kernel": "",
}  # fmt: skip
# Trainer's arguments of pytorch-lightning 1.9.5, which both programs add to their own.
LIGHTNING = set(
    re.findall(
        r"\w+",
        """
        accelerator accumulate_grad_batches amp_backend amp_level auto_lr_find auto_scale_batch_size
        auto_select_gpus benchmark callbacks check_val_every_n_epoch default_root_dir detect_anomaly
        deterministic devices enable_checkpointing enable_model_summary enable_progress_bar
        fast_dev_run gpus gradient_clip_algorithm gradient_clip_val inference_mode ipus
        limit_predict_batches limit_test_batches limit_train_batches limit_val_batches
        log_every_n_steps logger max_epochs max_steps max_time min_epochs min_steps
        move_metrics_to_cpu multiple_trainloader_mode num_nodes num_processes num_sanity_val_steps
        overfit_batches plugins precision profiler reload_dataloaders_every_n_epochs
        replace_sampler_ddp resume_from_checkpoint strategy sync_batchnorm tpu_cores track_grad_norm
        val_check_interval
        """,
    )
)


def config_of(*argv: str) -> tuple[TrainConfig, list[str], dict[str, str]]:
    """Settings, notes and table rows that the door makes of published flags."""
    given = {arg[2:].partition("=")[0] for arg in argv if arg.startswith("--")}
    family = family_of(given)
    args, spelled = as_ours(argv)
    values = parse_settings(make_parser(family), args)
    config, notes, rows = translate(values, given, family)
    return config, [*spelled, *notes], dict(rows)


def settings_of(*argv: str) -> dict[str, Any]:
    return config_of(*argv)[0].to_flat()


def as_argv(flags: dict[str, Any]) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def test_every_published_flag_is_known_and_none_was_dropped() -> None:
    ours = FLAGS.keys() | setting_types().keys()
    assert LIGHTNING | IN_BOTH.keys() | V5_TREE.keys() | TRAIN_TEMP.keys() <= ours
    assert FLAGS.keys() <= IN_BOTH.keys() | V5_TREE.keys() | TRAIN_TEMP.keys() | LIGHTNING
    assert not FLAGS.keys() & setting_types().keys(), "a name with two meanings"


@pytest.mark.parametrize("family", ["train_temp", "v5 tree"])
def test_a_run_without_flags_has_the_published_defaults(family: str) -> None:
    published = IN_BOTH | (TRAIN_TEMP if family == "train_temp" else V5_TREE)
    select = ["--layerwise_lr", "1"] if family == "v5 tree" else []
    config, notes, rows = config_of("--data_file", "data/x", *select)
    found = config.to_flat()
    assert notes == [] and family in rows["flags"]
    same_name = published.keys() & found.keys()
    renamed = {  # where a value is written in another way, and what it means
        "vocab_size": None, "dim_ffn": None, "head_size": None, "kernel": "auto",
        "random_seed": TrainConfig().output.random_seed, "data_file": "data/x",
    }  # fmt: skip
    if family == "train_temp":  # it never uses its own two: mini-epochs have 40320 windows
        renamed |= {"epoch_steps": 0, "epoch_count": 0}
        assert found["epoch_samples"] == 40320
    for name in same_name:
        assert found[name] == renamed.get(name, published.get(name)), name
    assert found["version"] == published["my_testing"]
    assert (found["weight_decay_final"], found["layerwise_lr"]) == (-1, True)
    assert found["precision"] == "bf16"


def test_a_size_of_zero_is_no_default() -> None:
    for name in ("n_layer", "n_embd"):
        config, _, _ = config_of("--data_file", "x", f"--{name}", "0")
        assert config.problems() == [f"{name}=0 must be at least 1"]


def test_published_values_that_are_defaults_say_nothing() -> None:
    for flags in (IN_BOTH | TRAIN_TEMP, IN_BOTH | V5_TREE):
        given = flags | {"data_file": "data/x", "data_type": "binidx"}
        _, notes, _ = config_of(*as_argv(given), "--enable_progress_bar", "True")
        assert notes == []


@pytest.mark.parametrize("flag", [f for f in FLAGS.values() if f.action == "refused"], ids=str)
def test_what_cannot_be_done_is_refused_by_name_with_the_reason(
    flag: published_flags.Flag, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = "7" if flag.kind is not str else "utf-8"
    argv = ["--data_file", "data/x", "--proj_dir", str(tmp_path / "run"), f"--{flag.name}", value]
    assert guarded("published_flags", argv) == 2
    told = capsys.readouterr()
    shown = flag.kind(value)
    assert told.err == f"error: --{flag.name} {shown}: {flag.effect}\n" and told.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", [f for f in FLAGS.values() if f.action == "warns"], ids=str)
def test_what_has_no_effect_is_said(flag: published_flags.Flag) -> None:
    value = "7" if flag.kind is not str else "other"
    _, notes, _ = config_of("--data_file", "data/x", f"--{flag.name}", value)
    assert notes == [f"{flag.name}={flag.kind(value)} does nothing: {flag.effect}"]


def test_a_kernel_that_is_not_there_is_said_and_offloading_is_kept() -> None:
    for strategy in ("deepspeed_stage_2_offload", "deepspeed_stage_2"):
        config, notes, _ = config_of(
            "--data_file", "x", "--kernel", "@rwkv3", "--strategy", strategy
        )
        assert (config.device.kernel, config.device.strategy) == ("auto", strategy)
        assert notes[0] == "kernel=@rwkv3: rwkvtune chooses its kernel itself"


def test_all_that_is_refused_is_told_at_once() -> None:
    with pytest.raises(UserError, match=r"--head_qk 1: .*; --tiny_att_dim 8: .*"):
        config_of("--data_file", "x", "--head_qk", "1", "--tiny_att_dim", "8")
    with pytest.raises(UserError, match="--head_qk 1: .*; --my_testing mamba: .* x052, x060, x070"):
        config_of("--data_file", "x", "--head_qk", "1", "--my_testing", "mamba")
    with pytest.raises(UserError, match="head_size=32 and head_size_a=64 differ"):
        config_of("--data_file", "x", "--head_size", "32", "--head_size_a", "64")
    with pytest.raises(UserError, match="my_pile_stage .* and train_stage .* differ"):
        config_of("--data_file", "x", "--my_pile_stage", "1", "--train_stage", "3")
    with pytest.raises(UserError, match="train_stage=4 must be 0 to 3"):
        config_of("--data_file", "x", "--train_stage", "4")
    with pytest.raises(UserError, match="rwkvtune data build my.txt --output my"):
        config_of("--data_file", "my.txt")
    with pytest.raises(UserError, match=r"my_exit_toknes \(did you mean my_exit_tokens\?\)"):
        config_of("--data_file", "x", "--my_exit_toknes", "1")
    with pytest.raises(UserError, match="my_exit_tokens=many must be a whole number"):
        config_of("--data_file", "x", "--my_exit_tokens", "many")


LR_CASES = {
    name: case
    for name, case in json.loads((ROOT / "tests/golden/lr_schedule.json").read_text()).items()
    if "rows" in case
}


@pytest.mark.parametrize("name", LR_CASES)
def test_the_flags_of_a_published_run_give_its_learning_rates(name: str) -> None:
    args = LR_CASES[name]["args"]
    shared = ("epoch_steps", "epoch_count", "warmup_steps", "lr_init", "lr_final")
    flags = {n: args[n] for n in (*shared, "my_exit_tokens", "ctx_len", "weight_decay")}
    flags |= {"data_file": "data/x", "micro_bsz": args["real_bsz"]}
    if name.startswith("v5"):
        own = ("my_pile_edecay", "weight_decay_final", "layerwise_lr")
        flags |= {"my_pile_stage": 3, **{n: args[n] for n in own}}
    config, _, _ = config_of(*as_argv(flags))
    first = args["epoch_begin"] * args["epoch_steps"]
    plan = make_plan(config, world_size=1, num_slots=2926181)
    schedule = make_schedule(config, plan, restart_step=first)
    for row in LR_CASES[name]["rows"]:
        if "exit" not in row:
            step = first + row["global_step"]
            assert schedule.lr_at(step) == pytest.approx(row["lr"], rel=1e-13, abs=1e-20)
            assert schedule.weight_decay_at(step) == pytest.approx(row["wd"], rel=1e-13)
        elif args["my_exit_tokens"]:
            assert plan.total_steps <= first + row["global_step"]


def test_the_published_run_of_twelve_lines_is_planned_as_published() -> None:
    """Mini-epochs of 2520 steps, and the learning rates of published lines 0, 5 and 11."""
    config, _, _ = config_of(
        *shlex.split(
            "--train_stage 3 --data_file data/minipile --magic_prime 2926181 --ctx_len 512"
            " --my_exit_tokens 1498226207 --micro_bsz 16 --lr_init 6e-4 --lr_final 6e-5"
            " --warmup_steps 10 --epoch_count 999999"
        )
    )
    plan = make_plan(config, world_size=1, num_slots=2926181)
    assert plan.epoch_steps == 2520
    schedule = make_schedule(config, plan, restart_step=0)
    lines = {0: "0.00059975", 5: "0.00059096", 11: "0.00056441"}
    for epoch, lr in lines.items():
        assert f"{schedule.lr_at(2520 * (epoch + 1) - 1):.8f}" == lr


def test_an_epoch_count_that_stops_early_leaves_the_learning_rate_as_it_is() -> None:
    flags = shlex.split("--data_file x --my_exit_tokens 1498226207 --ctx_len 512 --micro_bsz 16")
    whole, _, _ = config_of(*flags)
    for early in (["--epoch_count", "1"], ["--my_exit", "0", "--my_pile_stage", "3"]):
        config, _, _ = config_of(*flags, *early)
        plan = make_plan(config, world_size=1, num_slots=2926181)
        assert plan.total_steps == 2520
        long = make_plan(whole, world_size=1, num_slots=2926181)
        lr = make_schedule(whole, long, restart_step=0).lr_at(2000)
        assert make_schedule(config, plan, restart_step=0).lr_at(2000) == lr


def test_stages_of_both_programs(tmp_path: Path) -> None:
    base = ["--data_file", "x", "--proj_dir", str(tmp_path)]
    found = settings_of(*base)
    assert (found["order"], found["resume"], found["init_only"]) == ("published", "auto", False)
    assert (found["version"], found["n_layer"], found["n_embd"]) == ("x070", 6, 512)
    found = settings_of(*base, "--train_stage", "1", "--load_model", "old.pth")
    assert found["init_only"] and found["interpolate"] and found["load_model"] == "old.pth"
    assert found["n_layer"] is None, "the file decides"
    for stage in ("2", "3"):
        found = settings_of(*base, "--train_stage", stage, "--load_model", "0")
        assert found["resume"] == "required" and found["load_model"] == ""
        assert (found["restart_warmup_steps"], found["stage2_lr"]) == (10, False)

    found = settings_of(*base, "--my_pile_stage", "0")
    assert found["order"] == "random"
    assert (found["epoch_steps"], found["epoch_count"], found["epoch_samples"]) == (1000, 500, 0)
    assert found["lr_schedule"] == "exponential"
    found = settings_of(*base, "--my_pile_stage", "2")
    assert (found["restart_warmup_steps"], found["stage2_lr"]) == (10, True)
    config, notes, rows = config_of(*base, "--my_pile_stage", "3", "--load_model", "a.pth")
    found = config.to_flat()
    assert (found["restart_warmup_steps"], found["order"]) == (30, "published")
    assert "a.pth is not used" in notes[0] and "because of my_pile_stage" in rows["flags"]
    found = settings_of(*base, "--my_pile_stage", "4")
    assert (found["order"], found["resume"]) == ("random", "required")
    assert found["epoch_samples"] == 40320
    assert settings_of(*base, "--my_pile_stage", "1", "--my_testing", "x060")["version"] == "x060"
    (tmp_path / "rwkv-init.pth").touch()
    found = settings_of(*base, "--my_pile_stage", "3")
    assert found["version"] is None and found["n_layer"] is None, "the file decides"


def test_settings_of_rwkvtune_train_work_in_train_py_too(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("val_every: 7\n")
    found = settings_of(
        "--data_file", "x", "--val_data_file", "y", "--config", str(tmp_path / "more.yaml"),
        "--order", "shuffled", "--my_pile_stage", "0", "--lr_schedule", "wsd", "--grad_cp", "1",
    )  # fmt: skip
    assert (found["val_data_file"], found["val_every"], found["order"]) == ("y", 7, "shuffled")
    assert (found["lr_schedule"], found["grad_cp"]) == ("wsd", True)


def test_help_names_every_flag_with_its_effect_and_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['train.py', '--help']\n"
    code += f"exec(open({str(ROOT / 'train.py')!r}).read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for name in FLAGS.keys() | setting_types().keys():
        assert f"--{name} " in text
    for flag in FLAGS.values():
        assert flag.effect in text, flag.name


SMALL = {"N_LAYER": "1", "N_EMBD": "64", "CTX_LEN": "32", "M_BSZ": "2", "PRECISION": "fp32"}


def demo_script(name: str, folder: Path, *flags: str, **variables: str) -> str:
    """Output of a published script, run as printed."""
    environment = {**os.environ, **SMALL, **variables, "PYTHON": sys.executable}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        ["sh", str(ROOT / name), *flags],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_scripts_prepare_and_train_and_go_on(text: Path, tmp_path: Path) -> None:
    variables = {"DATA": str(text), "EPOCH_STEPS": "3", "EPOCH_COUNT": "2"}
    told = demo_script("demo-training-prepare.sh", tmp_path, **variables)
    folder = tmp_path / "out" / "L1-D64-x070"
    assert "stage   " in told and "rwkv-init.pth" in told
    assert [p.name for p in folder.glob("rwkv-*.pth")] == ["rwkv-init.pth"]
    told = demo_script("demo-training-run.sh", tmp_path, **variables)
    assert "weights of out/L1-D64-x070/rwkv-init.pth" in told
    if not torch.cuda.is_available():
        assert "accelerator gpu: torch" in told and "this runs on the CPU" in told
    assert "strategy deepspeed_stage_2: one device" in told
    lines = (folder / "train_log.txt").read_text().splitlines()
    form = r"\d \d\.\d{6} \d+\.\d{4} 0\.000\d{5} \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} \d"
    assert [bool(re.fullmatch(form, line)) for line in lines] == [False, False, True, True]
    told = demo_script("demo-training-run.sh", tmp_path, **variables | {"EPOCH_COUNT": "3"})
    assert "resumed from" in told and "from 6" in told
    last = (folder / "train_log.txt").read_text().splitlines()[-1]
    assert last.startswith("2 ") and last.endswith(" 2")


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_the_v5_tree_flags_train_every_version(version: str, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [
        "--my_testing", version, "--data_file", str(text), "--proj_dir", str(run),
        "--ctx_len", "32", "--micro_bsz", "1", "--n_layer", "1", "--n_embd", "64",
        "--epoch_steps", "2", "--epoch_count", "1", "--precision", "fp32", "--threads", "1",
        "--weight_decay", "0.1",
    ]  # fmt: skip
    assert guarded("published_flags", ["--my_pile_stage", "1", *flags]) == 0
    assert recognise_version(load_weights(run / "rwkv-init.pth")).version == version
    assert guarded("published_flags", ["--my_pile_stage", "3", *flags]) == 0
    before, after = (load_weights(run / f"rwkv-{name}.pth") for name in ("init", "final"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["emb.weight"], after["emb.weight"])


def test_stage_3_goes_on_from_weights_that_rwkv_lm_left(text: Path, tmp_path: Path) -> None:
    """Numbered weights without a resume state: the highest one, mini-epochs counted on."""
    run = tmp_path / "run"
    run.mkdir()
    for number in (2, 10):
        weights = build_model(RWKV7Config(64, 1, 64), seed=number).state_dict()
        save_weights(run / f"rwkv-{number}.pth", weights, dtype="bf16")
    shutil.copy(run / "rwkv-2.pth", run / "rwkv-final.pth")
    flags = [
        "--train_stage", "3", "--data_file", str(text), "--proj_dir", str(run), "--ctx_len", "32",
        "--micro_bsz", "1", "--epoch_steps", "1", "--epoch_count", "12", "--precision", "fp32",
        "--lr_init", "0", "--lr_final", "0", "--vocab_size", "64", "--threads", "1",
    ]  # fmt: skip
    assert guarded("published_flags", flags) == 0
    assert (run / "train_log.txt").read_text().splitlines()[-1].split()[0] == "11"
    before, after = (load_weights(run / f"rwkv-{n}.pth") for n in (10, 11))
    assert all(torch.equal(before[name].float(), after[name]) for name in before)


def test_load_partial_fills_what_the_weights_lack(text: Path, tmp_path: Path) -> None:
    weights = build_model(RWKV7Config(64, 2, 64), seed=3).state_dict()
    lacking = "blocks.1.ffn.key.weight"
    save_weights(tmp_path / "part.pth", {n: w for n, w in weights.items() if n != lacking})
    flags = [
        "--train_stage", "1", "--data_file", str(text), "--proj_dir", str(tmp_path / "run"),
        "--load_model", str(tmp_path / "part.pth"), "--ctx_len", "32", "--micro_bsz", "1",
    ]  # fmt: skip
    assert guarded("published_flags", [*flags, "--load_partial", "1"]) == 0
    made = load_weights(tmp_path / "run" / "rwkv-init.pth")
    assert made[lacking].abs().sum() > 0
    assert all(torch.equal(made[n], w) for n, w in weights.items() if n != lacking)
