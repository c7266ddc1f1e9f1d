"""`python train.py` of RWKV-LM: its flags, as printed, onto the settings of `rwkvtune train`.

Two programs share that name: the one of RWKV-v5 (v5 tree) and the one of RWKV-v7/train_temp. One
parser takes every setting of `rwkvtune train`, with RWKV-LM's defaults, and beside them the flags
below, which have another name or another meaning here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rwkvtune.cli.train import OneLineParser, add_settings, parse_settings, start
from rwkvtune.errors import UserError
from rwkvtune.training.config import TrainConfig, Version

Family = Literal["v5 tree", "train_temp"]

VERSIONS = get_args(Version)

MINI_EPOCH_SAMPLES = 40320
"""Windows of one mini-epoch in RWKV-LM."""

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".npy", ".parquet")

DESCRIPTION = """Train RWKV with the flags of RWKV-LM's train.py (RWKV-v5 and RWKV-v7/train_temp).

  python train.py --data_file data/minipile --ctx_len 512 --train_stage 1 --proj_dir out/first
  python train.py --data_file data/minipile --ctx_len 512 --train_stage 3 --proj_dir out/first

Stage 1 writes rwkv-init.pth, stage 3 trains from the newest state in --proj_dir. The defaults are
train_temp's; a flag that only the v5 tree has selects the v5 tree's: adam_eps 1e-8 and x052. Every
setting of `rwkvtune train` works here too, with RWKV-LM's defaults."""

DEFAULTS: dict[str, Any] = {
    "ctx_len": 1024,
    "epoch_save": 5,
    "micro_bsz": 12,
    "lr_init": 6e-4,
    "lr_final": 1e-5,
    "warmup_steps": -1,
    "beta1": 0.9,
    "beta2": 0.99,
    "adam_eps": 1e-18,
    "weight_decay": 0.0,
    "grad_clip": 1.0,
    "grad_cp": False,
    "accelerator": "gpu",
    "devices": 1,
}
"""RWKV-LM's defaults of settings that have its names, where they matter or differ from ours."""
V5_DEFAULTS: dict[str, Any] = {"adam_eps": 1e-8}
FRESH_MODEL: dict[str, Any] = {"version": "x070", "n_layer": 6, "n_embd": 512}
"""RWKV-LM's model where it comes from no file."""
V5_FRESH_MODEL = FRESH_MODEL | {"version": "x052"}
EPOCHS_WITHOUT_STAGE = {"epoch_steps": 1000, "epoch_count": 500}
"""The v5 tree's at my_pile_stage 0, where no mini-epochs of 40320 windows are made."""
SEED_WHEN_UNSEEDED = TrainConfig().output.random_seed


@dataclass(frozen=True)
class Flag:
    """A published flag that is no setting of ours under the same name."""

    name: str
    kind: type
    default: Any
    """RWKV-LM's; None: it has none of its own."""
    effect: str
    """What it does here; goes into the help, and into the message where it does nothing."""
    action: Literal["takes effect", "warns", "refused"] = "takes effect"
    harmless: tuple[Any, ...] = ()
    """Values besides the default that ask for nothing; only others are warned of or refused."""

    def asks_for_something(self, value: object) -> bool:
        return value is not None and value != self.default and value not in self.harmless


def _refused(name: str, kind: type, default: Any, why: str, *harmless: Any) -> Flag:
    return Flag(name, kind, default, why, "refused", harmless)


def _warns(name: str, kind: type, default: Any, why: str, *harmless: Any) -> Flag:
    return Flag(name, kind, default, why, "warns", harmless)


BOTH = (
    Flag("my_testing", str, None, "RWKV version: x052, x060 or x070; the setting version"),
    Flag("my_exit_tokens", int, 0, "tokens until the end of the run, and of its cosine; below 0: "
         "lr is the mean of that cosine and the curve over the mini-epochs"),
    _refused("data_type", str, "binidx", "only token files are read here: make them with "
             "`rwkvtune data build`"),
    _refused("dim_att", int, 0, "the attention is as wide as n_embd here: leave it out or give "
             "n_embd"),
    _warns("epoch_begin", int, 0, "mini-epochs go on from what proj_dir holds"),
    _warns("ds_bucket_mb", int, 200, "torch chooses the size of its messages itself"),
)  # fmt: skip

V5_TREE = (
    Flag("my_pile_stage", int, 0, "0: windows at random, epoch_steps 1000 and epoch_count 500; "
         "1: write rwkv-init.pth; 2: go on, small parameters at 5 x lr; 3: go on; 4: go on, "
         "windows at random"),
    Flag("head_size_a", int, 64, "channels per head; the setting head_size"),
    Flag("my_pile_edecay", int, 0, "mini-epochs at lr_init before it falls, without "
         "my_exit_tokens; the setting hold_epochs"),
    Flag("my_exit", int, 99999999, "number of the last mini-epoch; needs my_exit_tokens"),
    _refused("head_size_divisor", int, 8, "the normalisation's eps is that of the divisor 8"),
    _refused("train_type", str, "", "only whole models are trained; there is no training of states "
             "alone"),
    _refused("pre_ffn", int, 0, "there is no pre_ffn module"),
    _refused("head_qk", int, 0, "there is no head_qk module"),
    _refused("tiny_att_dim", int, 0, "there is no tiny_att module"),
    _refused("tiny_att_layer", int, -999, "there is no tiny_att module"),
    _refused("dropout", float, 0.0, "there is no dropout"),
    _refused("my_pos_emb", int, 0, "there is no position embedding"),
    _refused("my_qa_mask", int, 0, "there is no masking of questions"),
    _refused("my_random_steps", int, 0, "windows are at random for a whole run or not at all: use "
             "--order random, or shuffled"),
    _refused("my_pile_version", int, 1, "several token files are given as --data_file a:0.7,b:0.3"),
    _refused("my_pile_shift", int, -1, "windows start at multiples of ctx_len; --order shuffled "
             "moves them in each pass", 0),
    _refused("my_sample_len", int, 0, "only token files are read here"),
    _warns("my_ffn_shift", int, 1, "RWKV-LM does not use it either"),
    _warns("my_att_shift", int, 1, "RWKV-LM does not use it either"),
)  # fmt: skip

V5_ONLY = frozenset({flag.name for flag in V5_TREE} | {"layerwise_lr", "weight_decay_final"})
"""Names that only the v5 tree has; the last two are settings of ours."""

TRAIN_TEMP = (
    Flag("train_stage", int, 0, "0: train; 1: write rwkv-init.pth; 2 and 3: go on with the newest "
         "in proj_dir"),
)  # fmt: skip

_NO_LIMIT = "the length of a run is set by epoch_steps, epoch_count and my_exit_tokens"
_OURS = "rwkvtune has its own: see README"
LIGHTNING = (
    _warns("enable_progress_bar", str, "True", "the progress bar is there on a terminal, and plain "
           "lines elsewhere", "true", "1"),
    _warns("logger", str, None, "train_log.txt and metrics.csv are always written; --wandb and "
           "--tensorboard add to them"),
    _warns("enable_checkpointing", str, None, "weights and resume states are always written"),
    _warns("enable_model_summary", str, None, "the table at the start shows the model"),
    _warns("default_root_dir", str, None, "everything goes into proj_dir"),
    _warns("num_sanity_val_steps", int, None, "validation data are checked before the run"),
    _warns("check_val_every_n_epoch", int, None, "--val_every says how often"),
    _warns("val_check_interval", str, None, "--val_every says how often"),
    _warns("log_every_n_steps", int, None, "--log_every says how often"),
    _warns("gradient_clip_val", float, None, "RWKV-LM overwrites it with grad_clip"),
    _warns("benchmark", str, None, "no convolution is there to be tuned"),
    _warns("deterministic", str, None, "CPU runs repeat to the bit at one thread count; GPU runs "
           "do not"),
    _warns("replace_sampler_ddp", str, None, "each rank reads its own windows, as RWKV-LM's do"),
    _warns("detect_anomaly", str, None, "a loss or gradient that is not finite stops the run"),
    _warns("move_metrics_to_cpu", str, None, _OURS),
    _warns("sync_batchnorm", str, None, "RWKV has no batch norm"),
    _warns("reload_dataloaders_every_n_epochs", int, None, _OURS),
    _warns("multiple_trainloader_mode", str, None, _OURS),
    _warns("inference_mode", str, None, _OURS),
    _warns("track_grad_norm", str, None, "the gradient norm is always logged", "-1"),
    _refused("gradient_clip_algorithm", str, "norm", "gradients are clipped by their norm"),
    _refused("gpus", str, None, "say --accelerator gpu --devices N"),
    _refused("num_processes", int, None, "say --devices N"),
    _refused("auto_select_gpus", str, None, "choose GPUs by CUDA_VISIBLE_DEVICES"),
    _refused("tpu_cores", str, None, "there is no TPU support"),
    _refused("ipus", str, None, "there is no IPU support"),
    _refused("max_epochs", int, None, _NO_LIMIT, -1),
    _refused("min_epochs", int, None, _NO_LIMIT),
    _refused("max_steps", int, None, _NO_LIMIT, -1),
    _refused("min_steps", int, None, _NO_LIMIT),
    _refused("max_time", str, None, _NO_LIMIT + "; SIGTERM stops a run that can go on later"),
    _refused("fast_dev_run", str, None, "use --epoch_steps 1 --epoch_count 1", "False", "0"),
    _refused("overfit_batches", str, None, _NO_LIMIT, "0", "0.0"),
    _refused("limit_train_batches", str, None, _NO_LIMIT, "1.0"),
    _refused("limit_val_batches", str, None, "use --val_windows", "1.0"),
    _refused("limit_test_batches", str, None, "there is no test loop", "1.0"),
    _refused("limit_predict_batches", str, None, "there is no prediction loop", "1.0"),
    _refused("resume_from_checkpoint", str, None, "the newest state in proj_dir is found by "
             "itself; --load_model takes weights"),
    _refused("profiler", str, None, "there is no profiler; torch.profiler can be put around "
             "rwkvtune.training.lm.train_language_model"),
    _refused("auto_lr_find", str, None, "there is no search for a learning rate", "False"),
    _refused("auto_scale_batch_size", str, None, "the memory of a batch is estimated at the start",
             "False"),
    _refused("plugins", str, None, "there are no Lightning plugins"),
    _refused("callbacks", str, None, "there are no Lightning callbacks"),
    _refused("amp_backend", str, "native", "mixed precision is torch's own"),
    _refused("amp_level", str, None, "mixed precision is torch's own"),
)  # fmt: skip

GROUPS = {
    "RWKV-LM, both programs": BOTH,
    "RWKV-LM, v5 tree only: one of these, layerwise_lr or weight_decay_final selects its "
    "defaults": V5_TREE,
    "RWKV-LM, train_temp only": TRAIN_TEMP,
    "Trainer flags of pytorch-lightning 1.9.5": LIGHTNING,
}
FLAGS = {flag.name: flag for flags in GROUPS.values() for flag in flags}


def main(argv: list[str]) -> int:
    given = {arg[2:].partition("=")[0] for arg in argv if arg.startswith("--")}
    family = family_of(given)
    parser = make_parser(family)
    args, spelled = as_ours(argv)
    values = parse_settings(parser, args)
    config, notes, rows = translate(values, given, family)
    is_default = "devices" not in given and config.device.devices == DEFAULTS["devices"]
    return start(config, notes=[*spelled, *notes], rows=rows, is_default_devices=is_default)


def family_of(given: Collection[str]) -> Family:
    """Whose defaults apply."""
    return "v5 tree" if V5_ONLY.intersection(given) else "train_temp"


def make_parser(family: Family = "train_temp") -> OneLineParser:
    """The parser of `rwkvtune train` with RWKV-LM's defaults, and the published flags beside."""
    parser = OneLineParser(
        command="python train.py", usage="python train.py [--FLAG VALUE ...]", about=DESCRIPTION
    )
    add_settings(parser)
    parser.set_defaults(DEFAULTS | (V5_DEFAULTS if family == "v5 tree" else {}))
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            text = flag.effect if flag.action == "takes effect" else f"{flag.action}: {flag.effect}"
            group.add_argument(f"--{flag.name}", type=flag.kind, default=flag.default, help=text)
            parser.types[flag.name] = flag.kind
    return parser


SPELLINGS: dict[str, dict[str, str]] = {
    "kernel": {"": "auto", "@rwkv3": "auto"},
    "devices": {"-1": "auto"},
    "strategy": {"deepspeed": "deepspeed_stage_2"},
    "load_model": {"0": ""},
    **dict.fromkeys(("vocab_size", "dim_ffn"), {"0": "null"}),
}
"""Values of shared names that RWKV-LM and Lightning spell in another way."""
NOT_THE_SAME = {"@rwkv3": "rwkvtune chooses its kernel itself"}
"""Those that ask for more than their spelling here does, and what happens instead."""


def as_ours(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The same arguments in our spelling, and a line for each that does something else here."""
    result: list[str] = []
    notes: list[str] = []

    def add(name: str, value: str) -> None:
        result.append(SPELLINGS[name].get(value, value))
        if value in NOT_THE_SAME:
            notes.append(f"{name}={value}: {NOT_THE_SAME[value]}")

    for arg in argv:
        name, equals, value = arg.partition("=")
        if equals and name[2:] in SPELLINGS:
            result.append(name)
            add(name[2:], value)
        elif result and result[-1][:2] == "--" and result[-1][2:] in SPELLINGS:
            add(result[-1][2:], arg)
        else:
            result.append(arg)
    return result, notes


def translate(
    values: Mapping[str, Any], given: Collection[str], family: Family
) -> tuple[TrainConfig, list[str], list[tuple[str, str]]]:
    """(settings, lines about what does something else or nothing, rows for the table of the run).

    values: of all settings and all published flags.  given: the names that were typed.
    UserError names every flag that is refused, at once.
    """
    published = {name: values[name] for name in FLAGS}
    settings = {name: value for name, value in values.items() if name not in FLAGS}
    problems = _refusals(published, settings, given)
    stage = _stage(published, given, problems)
    if problems:
        raise UserError("; ".join(problems))
    notes = [
        f"{name}={published[name]} does nothing: {flag.effect}"
        for name, flag in FLAGS.items()
        if flag.action == "warns" and flag.asks_for_something(published[name])
    ]
    if published["my_testing"] is not None:
        settings["version"] = published["my_testing"]
    if "head_size_a" in given:
        settings["head_size"] = published["head_size_a"]
    if settings["random_seed"] == -1:
        settings["random_seed"] = SEED_WHEN_UNSEEDED
    settings["hold_epochs"] = settings["hold_epochs"] or published["my_pile_edecay"]
    _set_length(settings, published, given, staged=family == "train_temp" or stage > 0)
    _set_schedule(settings, published, given, family)
    _set_stage(settings, stage, family, given, notes)
    chosen_by = sorted(V5_ONLY.intersection(given))
    rows = [
        (
            "flags",
            f"RWKV-LM's, with the defaults of its {family}"
            + (f" (because of {', '.join(chosen_by)})" if chosen_by else ""),
        ),
        ("stage", f"{stage}: {_stage_in_words(stage, family)}"),
    ]
    return TrainConfig.from_flat(settings), notes, rows


def _refusals(
    published: Mapping[str, Any], settings: Mapping[str, Any], given: Collection[str]
) -> list[str]:
    problems = [
        f"--{name} {published[name]}: {flag.effect}"
        for name, flag in FLAGS.items()
        if flag.action == "refused"
        and flag.asks_for_something(published[name])
        and not (name == "dim_att" and published[name] == settings["n_embd"])
    ]
    if published["my_testing"] not in (None, *VERSIONS):
        problems.append(
            f"--my_testing {published['my_testing']}: the models here are {', '.join(VERSIONS)}"
        )
    if Path(settings["data_file"]).suffix in TEXT_SUFFIXES and "data_type" not in given:
        source = settings["data_file"]
        problems.append(
            f"--data_file {source}: only token files are read here: make them with `rwkvtune data "
            f"build {source} --output {Path(source).with_suffix('')} --tokenizer world`"
        )
    heads = settings["head_size"], published["head_size_a"]
    if {"head_size", "head_size_a"} <= set(given) and heads[0] != heads[1]:
        problems.append(f"head_size={heads[0]} and head_size_a={heads[1]} differ: give one")
    if published["my_exit_tokens"] and settings["exit_tokens"]:
        problems.append("my_exit_tokens and exit_tokens are one setting: give one")
    if FLAGS["my_exit"].asks_for_something(published["my_exit"]) and not (
        published["my_exit_tokens"] or settings["exit_tokens"]
    ):
        problems.append(
            f"my_exit={published['my_exit']} without my_exit_tokens: say --epoch_count "
            f"{published['my_exit'] + 1} for a run of that length"
        )
    return problems


def _stage(published: Mapping[str, Any], given: Collection[str], problems: list[str]) -> int:
    stages = {"my_pile_stage": 4, "train_stage": 3}
    if set(stages) <= set(given) and published["my_pile_stage"] != published["train_stage"]:
        problems.append("my_pile_stage (v5 tree) and train_stage (train_temp) differ: give one")
    for name, highest in stages.items():
        if name in given:
            stage: int = published[name]
            if not 0 <= stage <= highest:
                problems.append(f"{name}={stage} must be 0 to {highest}")
            return stage
    return 0


def _set_length(
    settings: dict[str, Any], published: Mapping[str, Any], given: Collection[str], *, staged: bool
) -> None:
    """Mini-epochs of 40320 windows unless epoch_steps says otherwise, as many as one pass has."""
    settings["exit_tokens"] = settings["exit_tokens"] or abs(published["my_exit_tokens"])
    if staged:
        if not settings["epoch_steps"] and not settings["epoch_samples"]:
            settings["epoch_samples"] = MINI_EPOCH_SAMPLES
    else:
        for name, default in EPOCHS_WITHOUT_STAGE.items():
            if name not in given:
                settings[name] = settings[name] or default
    if published["my_exit"] != FLAGS["my_exit"].default:
        last = published["my_exit"] + 1
        settings["epoch_count"] = min(settings["epoch_count"] or last, last)


def _set_schedule(
    settings: dict[str, Any],
    published: Mapping[str, Any],
    given: Collection[str],
    family: Family,
) -> None:
    """The curve that RWKV-LM derives from its other flags."""
    if "lr_schedule" in given:
        return
    if published["my_exit_tokens"] < 0:
        settings["lr_schedule"] = "cosine_exponential_mean"
    elif family == "v5 tree" and not settings["exit_tokens"]:
        # train_temp has no curve without exit tokens and stops with an error; here its cosine
        # then ends with the run.
        same = settings["lr_final"] == settings["lr_init"]
        settings["lr_schedule"] = "constant" if same else "exponential"


def _set_stage(
    settings: dict[str, Any],
    stage: int,
    family: Family,
    given: Collection[str],
    notes: list[str],
) -> None:
    v5 = family == "v5 tree"
    if v5 and stage in (0, 4) and "order" not in given:
        settings["order"] = "random"
        if settings["magic_prime"]:
            notes.append(f"magic_prime={settings['magic_prime']} does nothing at stage {stage}")
            settings["magic_prime"] = 0
    if stage == 1:
        settings["init_only"] = True
        settings["interpolate"] = settings["interpolate"] or bool(settings["load_model"])
    if stage == 2:
        settings["stage2_lr"] = v5
    if stage >= 2:
        settings["resume"] = "required"
        if "restart_warmup_steps" not in given:
            settings["restart_warmup_steps"] = 30 if v5 and stage > 2 else 10
        if settings["load_model"]:
            notes.append(
                f"load_model={settings['load_model']} is not used: stage {stage} goes on with the "
                "newest in proj_dir"
            )
            settings["load_model"] = ""
    folder = Path(settings["proj_dir"])
    named = settings["load_model"] or settings["model_config"]
    from_file = named or (stage != 1 and any(folder.glob("rwkv-*.pth")))
    if not from_file:
        for name, value in (V5_FRESH_MODEL if v5 else FRESH_MODEL).items():
            if settings[name] is None:
                settings[name] = value


def _stage_in_words(stage: int, family: Family) -> str:
    if stage == 1:
        return "write rwkv-init.pth and stop"
    text = "train, from load_model or initial values" if stage == 0 else "go on with the newest"
    if family == "v5 tree" and stage == 2:
        text += ", small parameters at 5 x lr"
    return text + (", windows at random" if family == "v5 tree" and stage in (0, 4) else "")
