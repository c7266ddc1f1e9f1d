"""`rwkvtune plan`: what a run would take on machines that are not here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkvtune.cli.train import OneLineParser, add_settings, parse_settings
from rwkvtune.errors import UserError
from rwkvtune.training.config import TrainConfig

if TYPE_CHECKING:
    from rwkvtune.models import ModelConfig
    from rwkvtune.training.forecast import StrategyForecast

ABOUT = """Memory, speed, traffic and days of a training run, before renting a machine for it.

  rwkvtune plan --config out/first/config.yaml --gpus 8 --gpu h200
  rwkvtune plan --model_config 1.5b --ctx_len 4096 --micro_bsz 4 --gpus 16 --gpu h100 \\
      --tokens 20e9 --tokens_per_s 21000

Settings are those of `rwkvtune train`. Memory and traffic are worked out for each strategy; tokens
per second come from a timed step of such a device, or from --tokens_per_s: a short run there prints
them. Nothing is written."""


def main(argv: list[str]) -> int:
    values = parse_settings(make_parser(), argv)
    own = {name: values.pop(name) for name in ("gpus", "gpu", "tokens", "tokens_per_s")}
    values["data_file"] = values["data_file"] or "not read"
    config = TrainConfig.from_flat(values)
    problems = config.problems()
    for name in ("tokens", "tokens_per_s"):
        if not 0 <= own[name] < float("inf"):
            problems.append(f"{name}={own[name]} must be a number from 0 up")
    if problems:
        raise UserError("; ".join(problems))
    from rwkvtune.training.forecast import check_count, devices, forecast
    from rwkvtune.training.starting_point import model_config_of

    known = devices()
    if own["gpu"] not in known:
        raise UserError(f"gpu={own['gpu']} is not known: there are {', '.join(known)}")
    count: int = own["gpus"]
    check_count(config, count)
    device = known[own["gpu"]]
    model = model_config_of(config.model)
    print(
        f"{model.version} L{model.n_layer} D{model.n_embd} V{model.vocab_size}, "
        f"{model.num_parameters:,} parameters, on {count} x {device.name}"
    )
    kind = "cpu" if device.name == "cpu" else "cuda"
    _show_memory(forecast(model, config, count=count, kind=kind), device.memory)
    _show_time(model, config, own, count)
    return 0


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        "rwkvtune plan",
        usage="rwkvtune plan [--config FILE] --gpus N --gpu KIND [--SETTING VALUE ...]",
        about=ABOUT,
    )
    own = (
        ("gpus", int, 1, "how many devices, over all machines"),
        ("gpu", str, "cpu", "their kind: h200, h100, a100, ... or cpu"),
        ("tokens", float, 0.0, "tokens to train on; 0 = exit_tokens"),
        ("tokens_per_s", float, 0.0, "of one device, as a short run prints it; 0 = not known"),
    )
    for name, kind, default, text in own:
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        parser.types[name] = kind
    add_settings(parser)
    return parser


def _show_memory(found: list[StrategyForecast], available: int) -> None:
    parts = list(found[0].memory)
    print("\nGB on each device, beside what the libraries take")
    width = max(len(one.strategy) for one in found)
    header = [f"{part:>12}" for part in [*parts, "together"]]
    print(" " * width + "".join(header) + f"{'sent per step':>15}")
    for one in found:
        needed = sum(one.memory.values())
        numbers = [*one.memory.values(), needed]
        fits = "" if not available else "  fits" if needed < available else "  does not fit"
        print(
            f"{one.strategy:<{width}}"
            + "".join(f"{number / 1e9:>12.2f}" for number in numbers)
            + f"{one.sent_per_step / 1e9:>12.2f} GB{fits}"
        )
    if available:
        print(f"a device has {available / 1e9:.0f} GB")


def _show_time(model: ModelConfig, config: TrainConfig, own: dict[str, float], count: int) -> None:
    from rwkvtune.training.forecast import devices, tokens_per_second
    from rwkvtune.training.plan import replicas_of

    s = config.schedule
    replicas = replicas_of(config, count)
    per_step = replicas * s.micro_bsz * s.accumulate_grad_batches * config.data.ctx_len
    print(f"\ntokens per step   {per_step:,}")
    rate, origin = own["tokens_per_s"], "as given"
    if not rate:
        found = tokens_per_second(devices()[str(own["gpu"])], model, config)
        if found is None:
            print(
                f"tokens per second not measured on {own['gpu']} in {config.device.precision}: a "
                "short run there prints them, give them as --tokens_per_s"
            )
            return
        rate, step = found
        origin = (
            f"by the arithmetic of a timed step of L{step['n_layer']} D{step['n_embd']} "
            f"V{step['vocab_size']}: {step['tokens_per_s']:,} on {step['origin']}"
        )
    together = rate * count
    print(f"tokens per second {rate:,.0f} a device ({origin}), {together:,.0f} together")
    print("                  if nothing waits for the traffic between devices")
    tokens = own["tokens"] or s.exit_tokens
    if tokens:
        print(f"days              {tokens / together / 86400:.2f} for {tokens:,.0f} tokens")
