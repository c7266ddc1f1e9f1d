"""The order in which a run is put together, whatever it trains."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from rwkvtune.adapters.adapter import Adapter, Sizes, attach, sizes
from rwkvtune.checkpoint import save_weights
from rwkvtune.data.tokenizers import Tokenizer
from rwkvtune.errors import UserError
from rwkvtune.files import RunFolderLock, atomic_write, remove_leftovers
from rwkvtune.kernels.dispatch import Choice, announce, resolve
from rwkvtune.kernels.working_weights import keep_copies
from rwkvtune.models import CONFIGS, ModelConfig, build_model, fill_model
from rwkvtune.models.frame import LanguageModel
from rwkvtune.training import starting_point
from rwkvtune.training.config import TrainConfig, changes_refused
from rwkvtune.training.fabric import (
    finish,
    launched,
    make_fabric,
    planned_world_size,
    runs_on_deepspeed,
    set_up,
    zero_of,
)
from rwkvtune.training.frozen import trained_names
from rwkvtune.training.log import RunLog
from rwkvtune.training.loop import Recipe, fit
from rwkvtune.training.memory import PeakMemory, keep_freed_memory
from rwkvtune.training.optim import build_optimizer
from rwkvtune.training.plan import Plan, make_plan, memory_estimate, replicas_of
from rwkvtune.training.run_state import Progress, RunState, SavedState, read_state
from rwkvtune.training.saving import Writer
from rwkvtune.training.schedule import Schedule
from rwkvtune.training.starting_point import StartingPoint


class RunData(Protocol):
    """What a run asks about its data; the rest is between the data and its recipe."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    def num_slots(self, global_bsz: int) -> int:
        """Rows in one pass over the training data, in steps of global_bsz rows."""

    @property
    def row_tokens(self) -> int:
        """Tokens of a row; on average where rows differ."""

    @property
    def validation_columns(self) -> list[str]:
        """Columns of metrics.csv besides those that every run has."""

    @property
    def fingerprint(self) -> str:
        """Tells other training data under the same names, and the same under others."""

    @property
    def validation_fingerprint(self) -> str:
        """The same of the validation data."""

    def check(self, vocab_size: int) -> None:
        """UserError for data that a model of this vocabulary cannot be trained or validated on."""

    def save_beside(self, folder: Path) -> None:
        """Keep in the run folder what its weights are used with: the tokenizer."""

    def in_words(self, plan: Plan) -> list[tuple[str, str]]:
        """Rows of the table that a run prints at its start: `data` first."""


class TaskRecipe(Recipe, Protocol):
    """A recipe that a run can be made of."""

    measured: dict[str, float]
    """The latest validation."""

    def begins(self, model: nn.Module, progress: Progress, log: RunLog) -> None:
        """Called before the first step, and at every resume."""

    def ends(self, model: nn.Module, log: RunLog) -> None:
        """Called after the last step, not where a run is stopped before."""


OpenData = Callable[[Any, list[str]], RunData]
"""(config, notes) -> the data; adds lines to be told. UserError for what cannot be read."""

MakeRecipe = Callable[[Any, Plan, Any, Any], TaskRecipe]
"""(config, plan, data, fabric) -> the recipe."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    exit_code: int
    steps: int
    seconds: float
    """Of training steps, over all processes of the run."""
    tokens: int
    validation: dict[str, float]
    """val_loss (nats per token), val_perplexity, val_bits_per_byte where known; empty without
    validation data."""


def train(
    config: TrainConfig,
    open_data: OpenData,
    make_recipe: MakeRecipe,
    *,
    notes: Sequence[str] = (),
    rows: Sequence[tuple[str, str]] = (),
) -> RunResult:
    """Train, or go on training, as `config` says; the README lists the files that appear in
    proj_dir.

    notes: lines to print at the start.  rows: names and values to print above the table of the run.
    All that can be refused is refused before the run folder is touched or another process started.
    UserError says what is wrong. In a distributed run this does not return: each process ends here
    with the exit code.
    """
    problems = config.problems()
    if problems:
        raise UserError("; ".join(problems))
    said = list(notes)
    fabric = make_fabric(config.device, say=said.append)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    job = _prepare(config, open_data, planned_world_size(fabric), fabric.device, said)
    progress, total_steps = job.start.progress, job.plan.total_steps
    if config.output.init_only:
        if fabric.is_global_zero:
            _write_initial_weights(config, job, rows)
        return RunResult(0, 0, 0.0, 0, {})
    if progress.step >= total_steps:
        if fabric.is_global_zero:
            print(
                f"{config.output.proj_dir}: this run is finished, at step {progress.step} "
                f"({total_steps} asked for); it goes on when more epochs or tokens are asked for"
            )
            draw_if_outdated(Path(config.output.proj_dir))
        return RunResult(0, progress.step, progress.seconds, progress.tokens, {})
    with launched(fabric, threads=config.device.threads, same_for_all=job.summary):
        try:
            exit_code, measured = _run(config, job, make_recipe, fabric, rows)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory: {str(error).splitlines()[0]} A smaller --micro_bsz with more "
                "--accumulate_grad_batches needs less, and so does --grad_cp"
            ) from error
        finish(fabric, exit_code)
    return RunResult(exit_code, progress.step, progress.seconds, progress.tokens, measured)


@dataclass(frozen=True)
class _Job:
    """A run that nothing speaks against, before anything of it exists."""

    data: RunData
    start: StartingPoint
    plan: Plan
    settings: dict[str, Any]
    schedule: Schedule
    kernel: Choice
    trained: list[str]
    """Names of the parameters that are; of no use where an adapter is."""
    adapter: Sizes | None
    notes: list[str]

    @property
    def summary(self) -> str:
        """What all processes must agree on."""
        steps = f"steps {self.start.progress.step} to {self.plan.total_steps}"
        return f"{self.start.source}, {steps}, {self.data.fingerprint}"


def _prepare(
    config: TrainConfig,
    open_data: OpenData,
    world_size: int,
    device: torch.device,
    notes: list[str],
) -> _Job:
    """Look at all that the run needs, and raise UserError for what is wrong; writes nothing."""
    data = open_data(config, notes)
    start = starting_point.find(config, data.tokenizer, notes)
    data.check(start.model_config.vocab_size)
    _check_sampling(config, data.tokenizer, start.model_config.vocab_size, notes)
    notes += config.without_effect()
    s = config.schedule
    global_bsz = replicas_of(config, world_size) * s.micro_bsz * s.accumulate_grad_batches
    plan = make_plan(
        config,
        world_size=world_size,
        num_slots=data.num_slots(global_bsz),
        row_tokens=data.row_tokens,
    )
    settings = _settings(config, plan, start.model_config, data)
    if start.resume_state is not None:
        refused = start.problems + changes_refused(start.settings, settings, type(config)())
        if refused:
            raise UserError(
                f"{config.output.proj_dir} holds a run with other settings: {'; '.join(refused)}. "
                "Give the old values to go on, or another proj_dir for a new run"
            )
    else:
        progress = start.progress
        progress.epoch = start.epochs_behind
        progress.step = progress.restart_step = start.epochs_behind * plan.epoch_steps
        progress.tokens = progress.step * plan.tokens_per_step
    schedule = make_schedule(config, plan, restart_step=start.progress.restart_step)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.device.precision)
    m = start.model_config
    kernel = resolve(
        m.kernel,
        device.type,
        dtype or torch.float32,
        m.head_size,
        config.device.kernel,
        config.device.kernel_precision,
    )
    if config.device.kernel_precision == "high" and not kernel.backend.startswith("triton_gpu"):
        notes.append(
            f"kernel_precision='high' does nothing with the kernel {kernel.backend}: its products "
            "are as exact as fp32 anyway"
        )
    _check_devices(config, world_size)
    if config.output.log_layers and runs_on_deepspeed(config.device, world_size):
        notes.append(
            "log_layers does nothing on DeepSpeed, which keeps gradients in buffers of its own"
        )
    _check_compiler(config, device)
    adapter = config.adapter.settings()
    adapter_sizes = None
    if adapter is not None:
        adapter_sizes = sizes(m, adapter, _frozen_dtype(config))
    trained = trained_names(
        list(CONFIGS[m.version].tensor_shapes(m)),
        freeze=config.model.freeze,
        train_only=config.model.train_only,
    )
    return _Job(data, start, plan, settings, schedule, kernel, trained, adapter_sizes, notes)


def _check_devices(config: TrainConfig, world_size: int) -> None:
    """UserError for what several devices cannot do."""
    if world_size == 1:
        return
    if config.optimizer.fused_backward:
        raise UserError(
            f"fused_backward moves a parameter before the {world_size} devices have added up their "
            "gradients: use one device, or leave it out"
        )
    shared = config.device.context_parallel
    if shared > 1 and config.schedule.chunk_len:
        raise UserError(
            f"chunk_len={config.schedule.chunk_len} and context_parallel={shared} both make long "
            "windows fit: leave one out (chunk_len stops gradients between chunks, "
            "context_parallel does not)"
        )
    if shared > 1 and config.adapter.peft == "state":
        raise UserError(
            f"peft=state and context_parallel={shared}: only the first part of a window begins "
            "with the trained state; leave context_parallel out"
        )
    if runs_on_deepspeed(config.device, world_size):
        for name, is_asked in (
            (f"optimizer={config.optimizer.optimizer}", config.optimizer.optimizer != "adamw"),
            ("compile=true", config.device.compile),
        ):
            if is_asked:
                raise UserError(
                    f"{name} does not run on DeepSpeed: use --engine torch, or leave it out"
                )
    for name, is_asked in (
        (f"peft={config.adapter.peft}", config.adapter.peft != "none"),
        (f"chunk_len={config.schedule.chunk_len}", config.schedule.chunk_len > 0),
        ("working_weights=kept", config.device.working_weights == "kept"),
    ):
        if _is_sharded(config, world_size) and is_asked:
            raise UserError(
                f"{name} does not run with strategy={config.device.strategy}, which shards the "
                "model: use --strategy ddp"
            )


def _keeps_working_weights(config: TrainConfig, world_size: int) -> bool:
    return config.keeps_working_weights and not _is_sharded(config, world_size)


def _is_sharded(config: TrainConfig, world_size: int) -> bool:
    return world_size > 1 and config.device.strategy not in ("auto", "ddp")


def _check_compiler(config: TrainConfig, device: torch.device) -> None:
    """UserError where torch.compile would only fail after the start."""
    if not config.device.compile or device.type != "cpu":
        return
    if not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        raise UserError(
            "compile=true needs a C++ compiler on a CPU, and neither g++ nor clang++ is on the "
            "PATH: install one, or leave --compile out"
        )


def _frozen_dtype(config: TrainConfig) -> torch.dtype:
    """The type of the products, in which frozen projections may be kept."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        config.device.precision, torch.float32
    )


def _write_initial_weights(config: TrainConfig, job: _Job, rows: Sequence[tuple[str, str]]) -> None:
    """rwkv-init.pth and the tokenizer, and nothing else."""
    folder, start = Path(config.output.proj_dir), job.start
    log = RunLog(folder, total_steps=0)
    for note in job.notes:
        log.line(note)
    log.table([*rows, *_weights_rows(config, job), ("run folder", config.output.proj_dir)])
    with RunFolderLock(folder):
        weights = _build_model(config, start).state_dict()
        save_weights(folder / "rwkv-init.pth", weights, dtype=config.output.save_dtype)
        job.data.save_beside(folder)
    log.line(f"wrote {folder / 'rwkv-init.pth'}; a run in this folder starts from it")


def _run(
    config: TrainConfig,
    job: _Job,
    make_recipe: MakeRecipe,
    fabric: Any,
    rows: Sequence[tuple[str, str]],
) -> tuple[int, dict[str, float]]:
    """Put the run together and train; returns the exit code and the latest validation."""
    folder, start, plan = Path(config.output.proj_dir), job.start, job.plan
    is_zero = fabric.is_global_zero
    memory = PeakMemory(fabric.device.type)
    log = RunLog(
        folder,
        total_steps=plan.total_steps,
        log_every=config.output.log_every,
        extra_columns=job.data.validation_columns,
        is_rank_zero=is_zero,
        tensorboard=config.output.tensorboard,
        wandb_project=config.output.wandb,
    )
    announce(start.model_config.kernel, job.kernel, is_known=True)  # the table shows it
    with RunFolderLock(folder) if is_zero else nullcontext():
        if is_zero and starting_point.contents(folder) != start.seen:
            raise UserError(
                f"another run has just been using {folder}: run the same command again to go on "
                "where it has stopped"
            )
        recipe = make_recipe(config, plan, job.data, fabric)
        state = _build_state(config, job, fabric, recipe)
        if is_zero:
            remove_leftovers(folder)
            remove_leftovers(folder / "resume")
            write_settings(
                config.to_flat() | _model_settings(start.model_config), folder / "config.yaml"
            )
            job.data.save_beside(folder)
        m = start.model_config
        log.start(
            config.to_flat() | _model_settings(m),
            f"{m.vocab_size} ctx{plan.ctx_len} L{m.n_layer} D{m.n_embd}",
            step=start.progress.step,
            epoch=start.progress.epoch,
        )
        try:
            for note in job.notes:
                log.line(note)
            log.table([*rows, *_table(config, job, memory)])
            if state.adapter is not None and state.adapter.quantized is not None:
                log.line(state.adapter.quantized.in_words())
            recipe.begins(state.model, start.progress, log)
            stopped = fit(
                fabric, state, recipe, plan, job.schedule, config.optimizer, config.output, log
            )
            if stopped is None:
                recipe.ends(state.model, log)
            if (used := memory.used()) is not None:
                log.line(
                    f"memory used {used / 1e9:.2f} GB, estimated "
                    f"{_memory_estimate(config, job, memory) / 1e9:.2f} GB"
                )
        finally:
            log.close()
        if is_zero:
            draw_if_outdated(folder)
    if stopped is None and is_zero:
        last = "rwkv-final.pth" if job.adapter is None else "adapter-final"
        print(f"done: {folder / last}, loss curve in {folder / 'loss_curve.png'}")
    return stopped.exit_code if stopped else 0, recipe.measured


def draw_if_outdated(folder: Path) -> None:
    """Draw loss_curve.png from metrics.csv, unless it is the newer one: a run may have been killed
    between its last save and its picture."""
    metrics, picture = folder / "metrics.csv", folder / "loss_curve.png"
    if not metrics.exists() or (
        picture.exists() and picture.stat().st_mtime_ns > metrics.stat().st_mtime_ns
    ):
        return
    from rwkvtune.training.report import draw_loss_curve  # matplotlib, half a second

    draw_loss_curve(metrics, picture)


def _build_state(config: TrainConfig, job: _Job, fabric: Any, recipe: Recipe) -> RunState:
    """Model and optimizer on their devices, as the starting point has them."""
    start, o = job.start, config.optimizer
    torch.manual_seed(config.output.random_seed)
    saved = None if start.resume_state is None else read_state(start.resume_state)
    model = _build_model(config, start, saved)
    model.backend = job.kernel.backend
    adapter = _attach(config, start, model, saved)
    if adapter is None:
        trained = set(job.trained)
        for name, parameter in model.named_parameters():
            if name not in trained:  # what nothing reads is frozen already
                parameter.requires_grad_(False)
    if config.device.compile:
        model.compile_blocks()

    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if _keeps_working_weights(config, job.plan.world_size):
            keep_copies(model.parameters())
        return build_optimizer(
            model.named_parameters(),
            lr_init=config.schedule.lr_init,
            betas=(o.beta1, o.beta2),
            eps=o.adam_eps,
            weight_decay=o.weight_decay,
            layerwise_lr=o.layerwise_lr,
            stage2=o.stage2_lr,
            # torch's fused kernel would unscale fp16 gradients by itself, after they were clipped.
            fused=False if config.device.precision == "fp16" else "auto",
            kind=o.optimizer,
            in_backward=o.fused_backward,
        )

    wrapped, optimizer = set_up(fabric, model, make_optimizer, grad_clip=o.grad_clip)
    state = RunState(
        wrapped,
        optimizer,
        recipe,
        start.progress,
        job.settings,
        fabric.strategy.precision,
        adapter,
        Writer(in_background=config.output.async_save),
        zero_of(fabric),
    )
    if saved is not None:
        state.restore(saved)
    return state


def _build_model(
    config: TrainConfig, start: StartingPoint, saved: SavedState | None = None
) -> LanguageModel:
    """The model with the weights that training starts from."""
    model = build_model(
        start.model_config,
        seed=config.output.random_seed,
        initial_values=start.weights is None and saved is None or start.has_gaps,
    )
    model.grad_cp = config.device.grad_cp
    if saved is not None and saved.base is None:
        fill_model(model, saved.model, str(saved.folder))
    elif start.weights is not None:
        initial = model.state_dict() if start.has_gaps else {}
        # What is packed is read from the file tensor by tensor, and never there as a whole in fp32.
        is_packed = config.adapter.quant != "none"
        fill_model(model, {**initial, **start.weights}, start.source, copy=not is_packed)
    return model


def _attach(
    config: TrainConfig, start: StartingPoint, model: LanguageModel, saved: SavedState | None
) -> Adapter | None:
    """Put the run's adapter into its base, with the values that it had."""
    settings = config.adapter.settings()
    if settings is None:
        return None
    return attach(
        model,
        settings,
        start.base_path,
        saved=None if saved is None else saved.model,
        saved_base=None if saved is None else saved.base,
        compute_dtype=_frozen_dtype(config),
    )


def _check_sampling(
    config: TrainConfig, tokenizer: Tokenizer | None, vocab_size: int, notes: list[str]
) -> None:
    """UserError when the samples that are asked for could not be made later."""
    if not config.output.sample_every:
        return
    if tokenizer is None:
        notes.append("no samples: the data has no tokenizer beside it, and --tokenizer names none")
        return
    ids = tokenizer.encode(config.output.sample_prompt)
    if max(ids, default=0) >= vocab_size:
        raise UserError(
            f"sample_prompt has the id {max(ids)} with the tokenizer {tokenizer.name}, the model "
            f"knows 0 to {vocab_size - 1}: give the tokenizer that the data was made with"
        )


def _settings(config: TrainConfig, plan: Plan, model: ModelConfig, data: RunData) -> dict[str, Any]:
    """What a resume compares: the flags, with what was left open replaced by what it came to."""
    flags = {k: v for k, v in config.to_flat().items() if k not in starting_point.DIMENSIONS}
    return flags | {
        "epoch_steps": plan.epoch_steps,
        "global_bsz": plan.global_bsz,
        "data": data.fingerprint,
        "val_data": data.validation_fingerprint,
        "version": model.version,
        "model": dataclasses.asdict(model),
    }


def make_schedule(config: TrainConfig, plan: Plan, *, restart_step: int) -> Schedule:
    """The learning rate of a run.

    restart_step: where it went on from bare weights; 0 = nowhere.
    """
    s, o = config.schedule, config.optimizer
    length = plan.total_steps * plan.tokens_per_step
    warmup = s.warmup_steps
    if restart_step and warmup < 0:
        warmup = s.restart_warmup_steps
    return Schedule(
        kind=s.lr_schedule,
        lr_init=s.lr_init,
        lr_final=s.lr_final,
        warmup_steps=warmup,
        total_tokens=s.exit_tokens or length,
        tokens_per_step=plan.tokens_per_step,
        decay_share=s.decay_share,
        weight_decay=o.weight_decay,
        weight_decay_final=o.weight_decay_final,
        hold_steps=s.hold_epochs * plan.epoch_steps,
        epoch_schedule_steps=plan.epoch_schedule_steps,
        restart_step=restart_step,
    )


def _table(config: TrainConfig, job: _Job, memory: PeakMemory) -> list[tuple[str, str]]:
    """What the run prints at its start."""
    estimate = _memory_estimate(config, job, memory) / 1e9
    plan, start, data = job.plan, job.start, job.data
    m, d = start.model_config, config.device
    return [
        *_weights_rows(config, job),
        *data.in_words(plan)[1:],
        (
            "tokens per step",
            f"{plan.tokens_per_step:,} = {plan.world_size} device(s) x micro_bsz {plan.micro_bsz} "
            f"x {plan.accumulate} accumulated x {_length_in_words(config, plan)}",
        ),
        (
            "steps",
            f"{plan.total_steps:,}, {plan.epoch_steps:,} per mini-epoch, from "
            f"{start.progress.step:,}",
        ),
        ("memory", f"about {estimate:.2f} GB per device (estimate)"),
        ("kernel", f"{m.kernel} {job.kernel.backend} ({job.kernel.reason})"),
        ("fused pieces", _fused_in_words(config, job, memory.device_type)),
        ("precision", f"{d.precision}, {torch.get_num_threads()} CPU threads"),
        ("run folder", config.output.proj_dir),
    ]


def _fused_in_words(config: TrainConfig, job: _Job, device_type: str) -> str:
    """What runs around the recurrence."""
    is_triton = job.kernel.backend.startswith("triton_gpu") and device_type == "cuda"
    words = ["Triton" if is_triton and not config.device.compile else "PyTorch"]
    if config.device.compile:
        words.append("blocks compiled by torch.compile")
    if _keeps_working_weights(config, job.plan.world_size):
        words.append(f"matrices in {config.device.precision} written once per step")
    return ", ".join(words)


def _length_in_words(config: TrainConfig, plan: Plan) -> str:
    if plan.ctx_len == config.data.ctx_len:
        shared = plan.context_parallel
        split = f", each over {shared} devices" if shared > 1 else ""
        return f"ctx_len {plan.ctx_len}{split}"
    return f"{plan.ctx_len} on average"


def _trained_in_words(job: _Job) -> str:
    m = job.start.model_config
    if job.adapter is not None:
        share = job.adapter.trained / m.num_parameters
        return f", frozen; {job.adapter.trained:,} trained beside them ({share:.2%})"
    shapes = CONFIGS[m.version].tensor_shapes(m)
    if len(job.trained) == len(shapes):
        return ""
    return f", {sum(prod(shapes[name]) for name in job.trained):,} of them trained"


def _weights_rows(config: TrainConfig, job: _Job) -> list[tuple[str, str]]:
    """What a run and the writing of its initial weights both print."""
    m = job.start.model_config
    return [
        *starting_point.preset_rows(config),
        (
            "model",
            f"{m.version} L{m.n_layer} D{m.n_embd} V{m.vocab_size}, heads: {m.num_heads} of "
            f"{m.head_size}",
        ),
        ("parameters", f"{m.num_parameters:,}" + _trained_in_words(job)),
        ("start", job.start.source),
        *_adapter_rows(config),
        job.data.in_words(job.plan)[0],
    ]


def _adapter_rows(config: TrainConfig) -> list[tuple[str, str]]:
    settings = config.adapter.settings()
    if settings is None:
        return []
    words = [settings.kind]
    if settings.kind != "state":
        words += [f"rank {settings.rank}", f"targets {settings.targets or 'all of att and ffn'}"]
    if settings.train_modules:
        words.append(f"in full {settings.train_modules}")
    words.append("base in " + (settings.quant if settings.quant != "none" else "full precision"))
    return [("adapter", ", ".join(words))]


def _memory_estimate(config: TrainConfig, job: _Job, memory: PeakMemory) -> int:
    """Bytes of one process, or of one GPU."""
    m = job.start.model_config
    if job.adapter is not None:
        trained, frozen_bytes = job.adapter.trained, job.adapter.frozen_bytes
    else:
        shapes = CONFIGS[m.version].tensor_shapes(m)
        trained = sum(prod(shapes[name]) for name in job.trained)
        frozen_bytes = 4 * (m.num_parameters - trained)
    added = memory_estimate(
        m,
        config,
        memory.device_type,
        world_size=job.plan.world_size * job.plan.context_parallel,
        trained=trained,
        frozen_bytes=frozen_bytes,
    )
    return memory.before + added


def _model_settings(model: ModelConfig) -> dict[str, Any]:
    """The settings that ask for such a model."""
    return {"version": model.version} | dataclasses.asdict(model)


def write_settings(settings: Mapping[str, Any], path: Path) -> None:
    """A run's settings as YAML that --config takes."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text such as 1e3 too, which the flag parser would read as a number."""

    def text(dumper: Any, value: str) -> Any:
        is_number = re.fullmatch(r"[-+.\d][-+.\d_eE]*", value)
        return dumper.represent_scalar(
            "tag:yaml.org,2002:str", value, style='"' if is_number else None
        )

    Dumper.add_representer(str, text)
    content = yaml.dump(dict(settings), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    atomic_write(path, lambda file: file.write(content.encode()))
