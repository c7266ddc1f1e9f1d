from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rwkvtune.errors import UserError
from rwkvtune.training.schedule import Kind, Schedule

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "lr_schedule.json"
CASES = {name: case for name, case in json.loads(GOLDEN.read_text()).items() if "rows" in case}


def published_schedule(args: dict[str, Any]) -> Schedule:
    """Our settings for a run of RWKV-LM with these arguments."""
    tokens_per_step = args["ctx_len"] * args["real_bsz"]
    steps_by_epochs = args["epoch_count"] * args["epoch_steps"]
    exit_tokens = args["my_exit_tokens"]
    kind: Kind = "cosine" if exit_tokens > 0 else "exponential"
    if exit_tokens < 0:
        kind = "cosine_exponential_mean"
    return Schedule(
        kind=kind,
        lr_init=args["lr_init"],
        lr_final=args["lr_final"],
        warmup_steps=args["warmup_steps"],
        total_tokens=abs(exit_tokens) or steps_by_epochs * tokens_per_step,
        tokens_per_step=tokens_per_step,
        weight_decay=args["weight_decay"],
        weight_decay_final=args["weight_decay_final"],
        hold_steps=args["my_pile_edecay"] * args["epoch_steps"],
        epoch_schedule_steps=steps_by_epochs if exit_tokens < 0 else 0,
        restart_step=args["epoch_begin"] * args["epoch_steps"],
    )


@pytest.mark.parametrize("name", CASES)
def test_every_step_of_the_published_schedules_is_reproduced(name: str) -> None:
    args = CASES[name]["args"]
    schedule = published_schedule(args)
    first = args["epoch_begin"] * args["epoch_steps"]
    for row in CASES[name]["rows"]:
        step = first + row["global_step"]
        if "exit" in row:
            assert schedule.is_finished(step)
            continue
        assert schedule.lr_at(step) == pytest.approx(row["lr"], rel=1e-13, abs=1e-20)
        assert schedule.weight_decay_at(step) == pytest.approx(row["wd"], rel=1e-13)
        assert args["my_exit_tokens"] == 0 or not schedule.is_finished(step)


def test_linear_is_the_published_line_to_zero_and_also_runs_between_other_values() -> None:
    case = CASES["v5_linear_to_zero"]
    length = {"warmup_steps": 10, "total_tokens": 10080 * 4096, "tokens_per_step": 4096}
    to_zero = Schedule("linear", lr_init=6e-4, lr_final=0.0, **length)
    for row in case["rows"]:
        assert to_zero.lr_at(row["global_step"]) == pytest.approx(row["lr"], rel=1e-13, abs=1e-20)
    raised = Schedule("linear", lr_init=7e-4, lr_final=1e-4, **length)
    for step in (10, 3000, 10079, 12000):
        assert raised.lr_at(step) == pytest.approx(to_zero.lr_at(step) + 1e-4, rel=1e-12)


def test_the_published_minipile_run_logs_this_learning_rate_after_its_first_mini_epoch() -> None:
    schedule = Schedule("cosine", 6e-4, 6e-5, 10, 1498226207, 512 * 16)
    assert f"{schedule.lr_at(2519):.8f}" == "0.00059975"


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.0),
        (10, 1.09e-5),
        (50, 2.53e-4),
        (99, 9.80e-4),
        (100, 1e-3),
        (1000, 9.80e-4),
        (5000, 5.08e-4),
    ],
)
def test_wsd_cosine_is_the_curve_of_world_train(step: int, lr: float) -> None:
    schedule = Schedule("wsd_cosine", 1e-3, 1e-4, 100, 10000 * 512, 512)
    # The witness has three digits.
    assert schedule.lr_at(step) == pytest.approx(lr, rel=5e-3)
    assert schedule.lr_at(9999) == pytest.approx(0, abs=1e-9)


def test_wsd_warms_up_stays_and_decays_as_one_minus_root() -> None:
    schedule = Schedule("wsd", 1e-3, 1e-4, 50, 1000 * 64, 64, decay_share=0.2)
    assert schedule.lr_at(0) == pytest.approx(1e-5)
    assert schedule.lr_at(25) == pytest.approx(1e-3 * 0.505)
    assert {schedule.lr_at(step) for step in range(50, 801)} == {1e-3}
    for step in (801, 850, 900, 999):
        fallen = math.sqrt((step - 800) / 200)
        assert schedule.lr_at(step) == pytest.approx(1e-3 - 9e-4 * fallen, rel=1e-12)
    assert schedule.lr_at(1000) == pytest.approx(1e-4)
    assert schedule.total_steps == 1000


@pytest.mark.parametrize("kind", ["cosine", "linear", "exponential", "constant", "wsd"])
def test_a_learning_rate_of_zero_stays_zero(kind: Kind) -> None:
    schedule = Schedule(kind, 0.0, 0.0, 3, 1000, 10)
    assert [schedule.lr_at(step) for step in (0, 1, 3, 50, 99, 100)] == [0.0] * 6
    if kind != "constant":
        rising = Schedule(kind, 0.0, 1e-3, 0, 1000, 10, decay_share=1.0)
        assert rising.lr_at(100) == pytest.approx(1e-3)


@pytest.mark.parametrize("kind", ["cosine", "linear", "exponential", "wsd", "wsd_cosine"])
@pytest.mark.parametrize("total_steps", [1, 5, 10])
def test_a_run_shorter_than_its_warmup_only_warms_up(kind: Kind, total_steps: int) -> None:
    schedule = Schedule(kind, 1e-3, 1e-3, 10, total_steps * 8, 8)
    assert not schedule.is_finished(total_steps - 1) and schedule.is_finished(total_steps)
    for step in range(total_steps):
        warmup = 0.01 + 0.99 * step / 10
        rise = step / 100 if kind == "wsd_cosine" else 1.0
        assert schedule.lr_at(step) == pytest.approx(1e-3 * warmup * rise)


def test_the_last_step_may_reach_past_the_end_but_none_begins_there() -> None:
    schedule = Schedule("cosine", 1e-3, 1e-4, 0, total_tokens=1001, tokens_per_step=100)
    assert schedule.total_steps == 11
    assert not schedule.is_finished(10) and schedule.is_finished(11)
    assert Schedule("cosine", 1e-3, 1e-4, 0, 1000, 100).total_steps == 10


def test_only_a_restart_from_bare_weights_warms_up_again() -> None:
    run = Schedule("cosine", 1e-3, 1e-4, 10, 100_000, 100)
    restarted = Schedule("cosine", 1e-3, 1e-4, 10, 100_000, 100, restart_step=500)
    assert restarted.lr_at(500) == pytest.approx(0.01 * run.lr_at(500))
    assert restarted.lr_at(505) == pytest.approx(0.505 * run.lr_at(505))
    assert restarted.lr_at(510) == run.lr_at(510)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"kind": "cosin"}, "not one of cosine, linear"),
        ({"total_tokens": 0}, "total_tokens=0"),
        ({"tokens_per_step": 0}, "tokens_per_step=0"),
        ({"decay_share": 0.0}, "decay_share=0.0"),
        ({"weight_decay_final": 0.1}, "needs a weight_decay above 0"),
        ({"kind": "cosine_exponential_mean"}, "epoch_schedule_steps"),
    ],
)
def test_settings_without_a_meaning_are_refused(wrong: dict[str, Any], reason: str) -> None:
    right: dict[str, Any] = {
        "kind": "cosine",
        "lr_init": 1e-3,
        "lr_final": 1e-4,
        "warmup_steps": 10,
        "total_tokens": 1000,
        "tokens_per_step": 10,
    }
    with pytest.raises(UserError, match=reason):
        Schedule(**(right | wrong))
