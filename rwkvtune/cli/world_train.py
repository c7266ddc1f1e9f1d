"""`python world_train.py` of WorldRWKV: its flags, as printed, onto the settings of a vision run.

Flags of the same name and meaning are settings of `rwkvtune vision train`; the tables below hold
the others. Source: WorldRWKV at its stages of 2025 and its forks, read flag by flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rwkvtune.cli.arguments import OneLineParser
from rwkvtune.cli.vision import add_settings, parse_settings, start
from rwkvtune.errors import UserError
from rwkvtune.training.vision_config import VisionConfig, from_flat

ABOUT = """Train a vision adapter with the flags of WorldRWKV's world_train.py.

  python world_train.py --load_model rwkv7.pth --encoder_path siglip --encoder_type siglip \\
      --data_file data --data_type visual --train_step adapter --quant 4bit --my_testing x070

Every setting of `rwkvtune vision train` works here too, with world_train.py's defaults. The last
of a repeated flag wins."""

DEFAULTS: dict[str, Any] = {
    "ctx_len": 1024,
    "micro_bsz": 12,
    "epoch_steps": 1000,
    "epoch_count": 500,
    "epoch_save": 5,
    "lr_init": 6e-4,
    "lr_final": 1e-5,
    "lr_schedule": "cos",
    "warmup_steps": -1,
    "accelerator": "gpu",
}
"""world_train.py's defaults of settings that have its names, where they differ from ours. Not
taken over: precision fp16, with which its own kernel refuses to run."""


@dataclass(frozen=True)
class Flag:
    """A published flag that is no setting of ours under the same name."""

    name: str
    default: str
    """Asks for nothing, like the values in `harmless`."""
    effect: str
    action: Literal["takes effect", "warns", "refused"] = "takes effect"
    harmless: tuple[str, ...] = ()


def _refused(name: str, default: str, why: str, *harmless: str) -> Flag:
    return Flag(name, default, why, "refused", harmless)


def _warns(name: str, default: str, why: str, *harmless: str) -> Flag:
    return Flag(name, default, why, "warns", harmless)


FLAGS = (
    Flag("data_type", "visual", "visual, or img: the form with placeholders"),
    Flag("my_testing", "x070", "the model's version; only x070 is trained here"),
    Flag("head_size_a", "64", "confirms the file's channels per head; the setting head_size"),
    Flag("copy", "1", "times that epoch_steps counts"),
    Flag("my_exit", "99999999", "number of the last mini-epoch"),
    _refused("head_size_divisor", "8", "the normalisation's eps is that of the divisor 8"),
    _refused("weight_decay_final", "-1", "it stops the published program with an error; the weight "
             "decay is constant", "-1.0", "0"),
    _refused("train_type", "", "states alone and endless contexts are not trained here", "none"),
    _refused("my_pile_stage", "0", "no parameters learn faster here", "1", "3"),
    _refused("grad_cp_layers", "0", "blocks are recomputed all or none: use --grad_cp"),
    _refused("my_qa_mask", "0", "the user's turns are never learned"),
    _warns("magic_prime", "0", "adapter-final.safetensors is always written at the end"),
    _warns("my_random_steps", "0", "it only moves the save of magic_prime in the published "
           "program"),
    _warns("layerwise_lr", "1", "no parameter of RWKV-7 has a rate of its own in the published "
           "program either", "0"),
    _warns("op", "cuda", "rwkvtune chooses its kernel itself"),
    _warns("fla", "0", "rwkvtune chooses its kernel itself"),
    _warns("persistent_workers", "", "the threads that read pictures always stay"),
    _warns("prefetch_factor", "", "one step is always prepared ahead"),
)  # fmt: skip

SWITCHES = ("fla", "persistent_workers")
"""Flags that may stand without a value."""

DEAD = (
    "pre_ffn", "head_qk", "tiny_att_dim", "tiny_att_layer", "dropout", "my_pile_version",
    "my_pile_shift", "my_pile_edecay", "ds_bucket_mb", "my_sample_len", "my_ffn_shift",
    "my_att_shift", "my_pos_emb", "load_partial", "my_exit_tokens", "train_parts", "lora_config",
    "pissa_config", "bone_config", "dataload", "chunk_ctx", "loss_mask", "mask_id", "optim",
    "sft_field", "sft_split", "state_tune", "avg_loss",
)  # fmt: skip
"""Accepted and used by nothing in the published program."""

DATA_TYPES = {
    "utf-8": "it is that program's default and reads text; give --data_type visual",
    "hf_img": "the published program has dropped it; chat.jsonl with images/ is read as visual",
    "arrow": "write its records as chat.jsonl with picture files: visual",
    "autoimg": "pictures are not cut into tiles here",
    "jsonl": "it is text alone: rwkvtune train or rwkvtune sft",
    "binidx": "it is text alone: rwkvtune train",
    **dict.fromkeys(("hf", "cnasr", "qa", "cnqa", "tts", "wav"), "sound is not trained here"),
    "state": "it has no working encoder in the published program either",
    "video": "films are not trained here",
}
"""Refused values of data_type, with the reason."""

STRATEGIES = {
    "deepspeed": "deepspeed_stage_2",
    "deepspeed_stage_2_offload": "deepspeed_stage_2",
    "deepspeed_stage_3_offload": "deepspeed_stage_3",
}
"""Lightning's other names; nothing is moved to the CPU."""


def main(argv: list[str]) -> int:
    config, notes = translate(argv)
    is_said = any(arg.partition("=")[0] == "--devices" for arg in argv) or config.devices != 1
    rows = [("flags", "those of world_train.py")]
    return start(config, is_default_devices=not is_said, notes=notes, rows=rows)


def make_parser() -> OneLineParser:
    parser = OneLineParser("python world_train.py", ABOUT)
    add_settings(parser)
    group = parser.add_argument_group("world_train.py's own")
    for flag in FLAGS:
        text = flag.effect if flag.action == "takes effect" else f"{flag.action}: {flag.effect}"
        alone: dict[str, Any] = {"nargs": "?", "const": "1"} if flag.name in SWITCHES else {}
        group.add_argument(f"--{flag.name}", metavar="X", help=text, **alone)
    dead = parser.add_argument_group("ignored, as in the published program")
    for name in DEAD:
        dead.add_argument(f"--{name}", nargs="*", metavar="X")
    return parser


def translate(argv: list[str]) -> tuple[VisionConfig, list[str]]:
    """(settings, lines about what does something else or nothing).

    UserError names every flag that is refused, at once.
    """
    given = parse_settings(make_parser(), argv)
    published = {flag.name: str(given.pop(flag.name, flag.default)) for flag in FLAGS}
    ignored = [name for name in DEAD if given.pop(name, None) is not None]
    values = DEFAULTS | given
    problems = _refusals(published, values)
    if problems:
        raise UserError("; ".join(problems))
    notes = [
        f"{flag.name}={published[flag.name]} does nothing: {flag.effect}"
        for flag in FLAGS
        if flag.action == "warns" and _asks_for_something(flag, published)
    ]
    if ignored:
        notes.append(f"ignored, as in the published program: {', '.join(ignored)}")
    if published["head_size_a"] != "64" and "head_size" not in given:
        values["head_size"] = int(published["head_size_a"])
    _translate_length(published, values)
    strategy = values.get("strategy", "auto")
    if strategy in STRATEGIES:
        values["strategy"] = STRATEGIES[strategy]
        notes.append(f"strategy={strategy}: nothing is moved to the CPU")
    if values.get("random_seed") == -1:
        del values["random_seed"]
    if values["lr_init"] == values["lr_final"]:
        values["lr_schedule"] = "constant"
        notes.append("lr_init and lr_final are equal: the learning rate is constant")
    if published["data_type"] == "img" and "form" not in given:
        values["form"] = "placeholder"
    return from_flat(values), notes


def _asks_for_something(flag: Flag, published: Mapping[str, str]) -> bool:
    return published[flag.name] not in (flag.default, *flag.harmless)


def _refusals(published: Mapping[str, str], values: Mapping[str, Any]) -> list[str]:
    problems = [
        f"--{flag.name} {published[flag.name]}: {flag.effect}"
        for flag in FLAGS
        if flag.action == "refused" and _asks_for_something(flag, published)
    ]
    data_type = published["data_type"]
    if data_type not in ("visual", "img"):
        reason = DATA_TYPES.get(
            data_type, f"unknown; there are visual, img, {', '.join(DATA_TYPES)}"
        )
        problems.append(f"--data_type {data_type}: {reason}")
    if "x070" not in published["my_testing"]:
        problems.append(f"--my_testing {published['my_testing']}: only x070 is trained here")
    numbers = ("copy", "my_exit", "head_size_a")
    problems += [
        f"--{name} {published[name]}: give a whole number"
        for name in numbers
        if not published[name].isdecimal()
    ]
    for name in ("peft", "quant"):
        if values.get(name) in ("adalora", "prefix", "fp8"):
            problems.append(f"--{name} {values[name]}: is not there for vision runs")
    return problems


def _translate_length(published: Mapping[str, str], values: dict[str, Any]) -> None:
    if isinstance(values["epoch_steps"], int):
        values["epoch_steps"] *= int(published["copy"])
    begin = values.get("epoch_begin", 0)
    if not isinstance(begin, int):
        return  # told with all that is wrong
    last = int(published["my_exit"]) + 1 - begin
    if last < 1:
        raise UserError(
            f"--my_exit {published['my_exit']} lies before the first mini-epoch, --epoch_begin "
            f"{begin}: nothing would be trained"
        )
    if isinstance(values["epoch_count"], int):
        values["epoch_count"] = min(values["epoch_count"], last)
