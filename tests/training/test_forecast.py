"""`rwkvtune plan`: against sizes and traffic worked out by hand, and refusals."""

from __future__ import annotations

import dataclasses

import pytest

from rwkvtune.cli.main import main
from rwkvtune.models import RWKV7Config
from rwkvtune.training.config import DeviceOptions, TrainConfig
from rwkvtune.training.forecast import devices as known_devices
from rwkvtune.training.forecast import forecast, sent_per_step, tokens_per_second
from rwkvtune.training.plan import memory_estimate, memory_parts

MODEL = RWKV7Config(n_layer=2, n_embd=64, vocab_size=100, head_size=64)
P = MODEL.num_parameters


def config(accumulate: int = 1, **device: object) -> TrainConfig:
    whole = TrainConfig()
    options = dataclasses.replace(DeviceOptions(), **device)  # type: ignore[arg-type]
    schedule = dataclasses.replace(whole.schedule, accumulate_grad_batches=accumulate, micro_bsz=3)
    return dataclasses.replace(whole, device=options, schedule=schedule)


def test_a_ring_sends_what_the_textbook_says() -> None:
    assert sent_per_step(MODEL, config(), 1) == 0
    assert sent_per_step(MODEL, config(strategy="ddp"), 4) == int(2 * 3 / 4 * 4 * P)
    assert sent_per_step(MODEL, config(2, strategy="ddp"), 4) == int(2 * 3 / 4 * 4 * P)
    # Weights forward and backward for each micro-batch, gradients once.
    assert sent_per_step(MODEL, config(2, strategy="fsdp"), 4) == int((4 + 1) * 3 / 4 * 4 * P)
    shared = config(strategy="ddp", context_parallel=2, precision="fp32")
    maps, tokens = 2 * 2 * (3 * 64 * 64 * 4), 4 * 3 * 64 * 4  # a head of 64 x 64, fp32
    extra = sent_per_step(MODEL, shared, 2) - int(2 * 1 / 2 * 4 * P)
    assert extra == 2 * (maps + tokens)


def test_what_a_strategy_shards_is_divided_by_the_devices() -> None:
    ddp, stage_1, fsdp = forecast(MODEL, config(), count=4, kind="cuda")
    assert [f.strategy for f in (ddp, stage_1, fsdp)] == ["ddp", "deepspeed_stage_1", "fsdp"]
    for part, size in (("weights", 4 * P), ("gradients", 4 * P), ("moments", 8 * P)):
        assert ddp.memory[part] == size
        assert stage_1.memory[part] == fsdp.memory[part] == size // 4
    assert ddp.memory["gathered"] == 0 < fsdp.memory["gathered"] <= stage_1.memory["gathered"]
    halves = memory_parts(MODEL, config(context_parallel=2), "cuda", world_size=2)
    whole = memory_parts(MODEL, config(), "cuda", world_size=2)
    assert halves["activations"] == pytest.approx(whole["activations"] / 2)
    assert memory_estimate(MODEL, config(), "cuda") == sum(
        memory_parts(MODEL, config(), "cuda").values()
    )


def test_tokens_per_second_follow_from_a_timed_step_or_are_not_made_up() -> None:
    cpu = known_devices()["cpu"]
    timed = RWKV7Config(n_layer=4, n_embd=768, vocab_size=16384)
    found = tokens_per_second(cpu, timed, config(precision="fp32"))
    assert found is not None and found[0] == pytest.approx(608)
    twice = tokens_per_second(
        cpu, RWKV7Config(n_layer=8, n_embd=768, vocab_size=16384), config(precision="fp32")
    )
    head, all_of_it = 768 * 16384, timed.matmul_parameters
    expected = 608 * all_of_it / (head + 2 * (all_of_it - head))
    assert twice is not None and twice[0] == pytest.approx(expected, rel=0.01)
    assert tokens_per_second(known_devices()["h200"], timed, config()) is None


def test_the_command_prints_a_plan_and_refuses_what_makes_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["plan", "--model_config", "1.5b", "--gpus", "8", "--gpu", "h200", "--tokens", "1e9"]
    assert main([*argv, "--tokens_per_s", "20000"]) == 0
    told = capsys.readouterr().out
    assert "fsdp" in told and "141 GB" in told and "160,000 together" in told
    assert "days              0.07 for 1,000,000,000 tokens" in told
    assert main(argv) == 0 and "not measured on h200" in capsys.readouterr().out
    for wrong, reason in (
        (["--gpu", "h900"], "gpu=h900 is not known"),
        (["--gpus", "0"], "gpus=0 must be at least 1"),
        (["--gpus", "3", "--context_parallel", "2"], "does not divide the 3 processes"),
    ):
        assert main(["plan", *wrong]) == 2
        assert reason in capsys.readouterr().err
