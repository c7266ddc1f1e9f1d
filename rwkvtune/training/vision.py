"""Training of a vision adapter, and of the language model with it: the recipe, what a run saves,
and how it is put together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkvtune.adapters.adapter import Adapter as Peft
from rwkvtune.adapters.adapter import attach, store_frozen
from rwkvtune.adapters.base import Base, base_of
from rwkvtune.adapters.quant import quantize
from rwkvtune.checkpoint import load_resume_meta, save_weights
from rwkvtune.data.batch import IGNORED_TARGET
from rwkvtune.data.prefetch import prefetched
from rwkvtune.data.tokenizers import save_tokenizer
from rwkvtune.data.visual import BucketedOrder, VisualBatch, VisualDataset
from rwkvtune.errors import UserError
from rwkvtune.files import RunFolderLock, atomic_write, remove_leftovers
from rwkvtune.inference.generate import evaluating
from rwkvtune.inference.vision import (
    ABOUT_FILE,
    EARLIER_STAGE,
    describe,
    language_model_weights,
)
from rwkvtune.kernels.dispatch import announce, resolve
from rwkvtune.kernels.fused.cross_entropy import head_cross_entropy
from rwkvtune.models import (
    build_model,
    fill_model,
)
from rwkvtune.models.vision.model import (
    PUBLISHED_PREFIX,
    Adapter,
    VisionLanguageModel,
    labelled_rows,
)
from rwkvtune.training.config import OptimizerOptions
from rwkvtune.training.fabric import (
    finish,
    launched,
    make_fabric,
    planned_world_size,
    unwrapped,
)
from rwkvtune.training.log import RunLog
from rwkvtune.training.loop import fit
from rwkvtune.training.memory import PeakMemory, free_memory, keep_freed_memory
from rwkvtune.training.optim import build_optimizer
from rwkvtune.training.plan import Plan
from rwkvtune.training.run import draw_if_outdated, write_settings
from rwkvtune.training.run_state import Progress, RunState, read_state
from rwkvtune.training.schedule import Schedule
from rwkvtune.training.vision_config import VisionConfig
from rwkvtune.training.vision_data import data_files, fill_caches
from rwkvtune.training.vision_job import VisionJob, prepare
from rwkvtune.training.vision_plan import largest_fitting, memory_estimate

LR_KINDS = {"wsd": "wsd_cosine", "wsd_stable": "wsd"}
"""Names of schedules here -> in Schedule, where they differ."""
DATA_SEED = 7919
"""Beside the seed of the initial adapter, so that both may be drawn from one number."""
LONG_LOOK_BYTES = 50_000_000
"""Records of so many bytes take a minute or more to look at, which is announced."""


class VisionRecipe:
    """The answers of dialogues about pictures, predicted token by token."""

    def __init__(
        self,
        config: VisionConfig,
        plan: Plan,
        data: VisualDataset,
        validation: VisualDataset | None,
        fabric: Any,
        log: RunLog,
    ) -> None:
        self.config, self.plan, self.data = config, plan, data
        self.validation, self.fabric, self.log = validation, fabric, log
        self.measured: dict[str, float] = {}
        """The latest validation."""
        self.order = BucketedOrder(
            data.lengths,
            global_bsz=plan.global_bsz,
            window_steps=config.bucket_steps if config.data_shuffle else 1,
            seed=config.random_seed + DATA_SEED,
            shuffle=config.data_shuffle,
        )

    def batches(self, progress: Progress) -> Iterator[list[VisualBatch]]:
        return prefetched(map(self._batches_of, count(progress.step)))

    def _batches_of(self, step: int) -> list[VisualBatch]:
        """This rank's micro-batches of one step."""
        shares = self.order.micro_batches(
            step,
            micro_bsz=self.plan.micro_bsz,
            rank=self.fabric.global_rank,
            world_size=self.plan.world_size,
        )
        return [self.data.batch(numbers.tolist()) for numbers in shares]

    def loss(
        self, model: nn.Module, batch: VisualBatch, carry: None
    ) -> tuple[Tensor, int, None, dict[str, float]]:
        for news in self.data.problems.take_news():
            self.log.line(news)
        return _loss_sum(model, batch), batch.target_tokens, None, {}

    def validate(self, model: nn.Module) -> dict[str, float]:
        if self.validation is None:
            return {}
        ranks, total = self.plan.world_size, torch.zeros(2, dtype=torch.float64)
        with evaluating(model):
            size = self.plan.micro_bsz
            for first in range(0, len(self.validation), size * ranks):
                mine = range(first + self.fabric.global_rank, len(self.validation), ranks)[:size]
                # A rank that has run out still takes part.
                batch = self.validation.batch(list(mine) or [first]).to(self.fabric.device)
                if mine:
                    loss = _loss_sum(model, batch)
                    total += torch.tensor([float(loss), batch.target_tokens])
        if ranks > 1:
            total = self.fabric.all_reduce(total.to(self.fabric.device), reduce_op="sum").cpu()
        mean = float(total[0] / total[1].clamp_min(1))
        self.measured = {"val_loss": mean, "val_perplexity": float(torch.tensor(mean).exp())}
        return self.measured

    def sample(self, model: nn.Module, step: int) -> str | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}  # batches are a pure function of the step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state, f"a vision recipe has no state of its own, found {list(state)}"


def _loss_sum(model: nn.Module, batch: VisualBatch) -> Tensor:
    """Sum of the cross entropies of a batch's targets; the head runs on their positions alone."""

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        rows, targets = labelled_rows(hidden, batch.targets, IGNORED_TARGET)
        return head_cross_entropy(rows, weight, targets, l2wrap=0.0)

    loss, _ = model(
        batch.input_ids,
        image_positions=batch.image_positions,
        image_rows=batch.image_rows,
        pixels=batch.pixels,
        features=batch.features,
        head=head,
    )
    total: Tensor = loss
    return total


@dataclass(kw_only=True)
class VisionState(RunState):
    """Saves what is trained; the frozen rest is referred to."""

    config: VisionConfig
    about: dict[str, Any]
    """For adapter_config.json."""
    peft: Peft | None
    keeps_encoder: bool
    """The encoder is not that of its folder, so its tensors are saved too."""
    written_at: int = -1
    """The step of the newest adapter-<k>."""

    def save(self, run_folder: Path, *, write: bool) -> Path:
        """The resume state, and, where no other adapter is of its step, adapter-latest.safetensors,
        so that a run that was stopped can be used."""
        saved = super().save(run_folder, write=write)
        if write and self.progress.step and self.written_at != self.progress.step:
            self._write_adapter(run_folder, "latest")
        elif write:
            (run_folder / "adapter-latest.safetensors").unlink(missing_ok=True)
        return saved

    def weights(self) -> dict[str, Tensor]:
        model = unwrapped(self.model)
        kept = {
            name: p
            for name, p in model.named_parameters()
            if p.requires_grad or (self.keeps_encoder and name.startswith("encoder."))
        }
        if self.peft is not None:  # its buffers too
            tensors = model.get_submodule("llm").state_dict()
            kept |= {f"llm.{name}": tensors[name] for name in self.peft.tensors}
        return {name: p.detach() for name, p in kept.items()}

    def write_weights(self, run_folder: Path, label: str, *, dtype: str, write: bool) -> None:
        """adapter-<k>.safetensors, and rwkv-<k>.pth or lora-<k>/ for what else was trained."""
        if label == "init" or not write:  # nothing is sharded
            return
        if label.isdecimal():
            label = str(self.config.epoch_begin + int(label))
        model, adapter, encoder = self._parts()
        # Last the adapter: it is what tells that the others are there.
        if self.peft is not None:
            tensors = model.llm.state_dict()
            own = {name: tensors[name] for name in self.peft.tensors}
            self.peft.save(model.llm, own, run_folder / f"lora-{label}")
        if self.config.save_full or ("rwkv" in self.config.parts and self.peft is None):
            full = self._language_model(model, run_folder / f"lora-{label}")
            full |= {PUBLISHED_PREFIX + name: tensor for name, tensor in adapter.items()}
            full |= {f"modality.world_encoder.model.{n}": t for n, t in encoder.items()}
            save_weights(run_folder / f"rwkv-{label}.pth", full, dtype=dtype)
        self._write_adapter(run_folder, label)
        self.written_at = self.progress.step

    def _parts(self) -> tuple[VisionLanguageModel, dict[str, Tensor], dict[str, Tensor]]:
        """(the model, its adapter's tensors, the encoder's where they are trained)."""
        model = unwrapped(self.model)
        assert isinstance(model, VisionLanguageModel)
        adapter = {n: t.detach() for n, t in model.adapter.state_dict().items()}
        inner = model.encoder.get_submodule("model")
        return model, adapter, dict(inner.state_dict()) if self.keeps_encoder else {}

    def _write_adapter(self, run_folder: Path, label: str) -> None:
        _, adapter, encoder = self._parts()
        about = self.about | {"step": self.progress.step}
        atomic_write(run_folder / ABOUT_FILE, lambda file: file.write(describe(about)))
        save_weights(
            run_folder / f"adapter-{label}.safetensors",
            adapter | {f"encoder.{name}": tensor for name, tensor in encoder.items()},
        )

    def _language_model(self, model: VisionLanguageModel, lora_folder: Path) -> dict[str, Tensor]:
        """All of it, in full precision: what was trained, or the file that it came from."""
        if "rwkv" not in self.config.parts:
            return language_model_weights(Path(self.config.load_model))[0]
        if self.peft is None:
            return {name: p.detach() for name, p in model.llm.state_dict().items()}
        from rwkvtune.adapters.adapter import merge
        from rwkvtune.inference.vision import load_language_model

        base = self.config.load_model
        return dict(merge(load_language_model(Path(base)), base, lora_folder).state_dict())


def train_vision(
    config: VisionConfig, *, notes: Sequence[str] = (), rows: Sequence[tuple[str, str]] = ()
) -> int:
    """Train an adapter, or go on training it, as `config` says; docs/vision.md lists the files that
    appear in proj_dir. Returns the exit code.

    notes: lines to print at the start.  rows: names and values to print above the table of the run.
    All that can be refused is refused before the run folder is touched. UserError says what is
    wrong. In a distributed run this does not return: each process ends here with the exit code.
    """
    problems = config.problems()
    if problems:
        raise UserError("; ".join(problems))
    said = list(notes)
    fabric = _fabric(config, said)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    files = data_files(Path(config.data_file))
    num_bytes = sum(map(os.path.getsize, files))
    if fabric.is_global_zero and num_bytes > LONG_LOOK_BYTES:
        print(f"looking at all records of {config.data_file} first, some minutes", flush=True)
    job = prepare(config, files, planned_world_size(fabric), said)
    if job.progress.step >= job.plan.total_steps:
        if fabric.is_global_zero:
            print(
                f"{config.proj_dir}: this run is finished, at step {job.progress.step} "
                f"({job.plan.total_steps} asked for); a larger epoch_count goes on from here"
            )
        return 0
    summary = f"step {job.progress.step} of {job.plan.total_steps}, {job.settings['data']}"
    with launched(fabric, threads=config.threads, same_for_all=summary):
        try:
            exit_code = _run(config, job, fabric, rows)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory: {str(error).splitlines()[0]} A smaller --micro_bsz with more "
                "--accumulate_grad_batches needs less, and so does --grad_cp"
            ) from error
        finish(fabric, exit_code)
    return exit_code


def _fabric(config: VisionConfig, notes: list[str]) -> Any:
    devices = config.device_options
    fabric = make_fabric(devices, say=notes.append)
    if config.strategy in ("auto", "ddp"):
        return fabric
    if planned_world_size(fabric) > 1:
        notes.append(
            f"strategy {config.strategy}: every device keeps the whole model, and gradients are "
            "averaged (ddp); the optimizer's states belong to what is trained, with the same "
            "mathematics"
        )
    else:
        notes.append(
            f"strategy {config.strategy}: one device has nothing to shard, so this is a plain run, "
            "with the same mathematics"
        )
    return fabric


def _build_model(
    config: VisionConfig, job: VisionJob
) -> tuple[VisionLanguageModel, Base, Peft | None, str]:
    """(the model as the run begins, its base, LoRA if any, how the base is kept, in words)."""
    saved = None if job.resume is None else read_state(job.resume)
    torch.manual_seed(config.random_seed)
    adapter = Adapter(job.adapter)
    if job.start is not None:
        adapter.load_state_dict(job.start.weights)
    llm = build_model(job.llm, initial_values=False)
    fill_model(llm, job.llm_weights, config.load_model, copy=config.quant == "none")
    llm.grad_cp, llm.backend = config.grad_cp, config.kernel
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    peft, words = None, "in full precision"
    if config.peft != "none":
        values = None
        if saved is not None:
            values = {n[4:]: t for n, t in saved.model.items() if n.startswith("llm.")}
        settings = config.adapter
        assert settings is not None
        peft = attach(llm, settings, config.load_model, saved=values, compute_dtype=dtype)
        base = peft.base
        words = peft.quantized.in_words() if peft.quantized else words
    else:
        base = base_of(llm, config.load_model)
        if "rwkv" not in config.parts:
            llm.requires_grad_(False)
            if config.quant != "none":
                words = quantize(llm, config.quant).in_words()
            store_frozen(llm, dtype)
    job.encoder.requires_grad_("encoder" in config.parts)
    adapter.requires_grad_("adapter" in config.parts)
    model = VisionLanguageModel(llm, job.encoder, adapter)
    if saved is not None:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        trained |= {f"llm.{name}" for name in peft.tensors} if peft is not None else set()
        if trained != {name for name in saved.model if name in trained or not job.keeps_encoder}:
            raise UserError(f"{job.resume} holds other tensors than this run trains")
        model.load_state_dict(saved.model, strict=False)
    return model, base, peft, words


def _run(config: VisionConfig, job: VisionJob, fabric: Any, rows: Sequence[tuple[str, str]]) -> int:
    """Put the run together and train; returns the exit code."""
    folder, plan, is_zero = Path(config.proj_dir), job.plan, fabric.is_global_zero
    memory = PeakMemory(fabric.device.type)
    log = RunLog(
        folder,
        total_steps=plan.total_steps,
        log_every=config.log_every,
        is_rank_zero=is_zero,
        tensorboard=config.tensorboard,
        wandb_project=config.wandb,
    )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, torch.float32)
    kernel = resolve(job.llm.kernel, fabric.device.type, dtype, job.llm.head_size, config.kernel)
    announce(job.llm.kernel, kernel, is_known=True)  # the table shows it
    with RunFolderLock(folder) if is_zero else nullcontext():
        if is_zero and job.earlier is not None:
            _move_aside(folder, job.notes)
        model, base, peft, kept = _build_model(config, job)
        _check_base(job, base)
        recipe = VisionRecipe(config, plan, job.data, job.validation, fabric, log)
        state = _build_state(config, job, fabric, recipe, model, _about(config, job, base), peft)
        if is_zero:
            remove_leftovers(folder)
            remove_leftovers(folder / "resume")
            write_settings(dataclasses.asdict(config), folder / "config.yaml")
            save_tokenizer(job.tokenizer, folder)
        log.start(
            dataclasses.asdict(config),
            f"vision L{job.llm.n_layer} D{job.llm.n_embd}",
            step=job.progress.step,
            epoch=job.progress.epoch,
        )
        try:
            for note in [*job.notes, *job.data.problems.take_news()]:
                log.line(note)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            kernel_words = f"{job.llm.kernel} {kernel.backend} ({kernel.reason})"
            table = _table(config, job, fabric.device, memory, trained, kept)
            log.table([*rows, *table, ("kernel", kernel_words), ("run folder", config.proj_dir)])
            fill_caches(job.caches, job.encoder, fabric, log)
            stopped = fit(
                fabric,
                state,
                recipe,
                plan,
                make_schedule(config, plan),
                OptimizerOptions(grad_clip=config.grad_clip),
                config.output_options,
                log,
            )
            for news in job.data.problems.take_news():
                log.line(news)
            if job.data.problems.counts:
                log.line(f"left out: {job.data.problems.in_words()}")
            if (used := memory.used()) is not None:
                log.line(f"memory used {used / 1e9:.2f} GB")
        finally:
            log.close()
        if is_zero:
            draw_if_outdated(folder)
    if stopped is None and is_zero:
        print(f"done: {folder / 'adapter-final.safetensors'}")
    return stopped.exit_code if stopped else 0


def _check_base(job: VisionJob, base: Base) -> None:
    """UserError when a run goes on with other weights than it began with; notes them."""
    before = load_resume_meta(job.resume)["settings"] if job.resume else {}
    if before.get("base", base.content) != base.content:
        raise UserError(
            f"load_model={base.path} has other values than the weights that {job.resume} belongs "
            "to: give these"
        )
    job.settings["base"] = base.content


def _move_aside(folder: Path, notes: list[str]) -> None:
    """Put what a run of another stage has written into a folder of its own, where its adapter is
    still found."""
    target = folder / EARLIER_STAGE
    number = 1
    while target.exists():
        number += 1
        target = folder / f"stage-{number}"
    target.mkdir()
    names = ("adapter*", "rwkv-*.pth", "lora-*", "resume", "*.csv", "*.png", "config.yaml")
    # Adapters last: until they have moved, a start after a crash finds the same ones.
    found = {path for name in names for path in folder.glob(name)}
    for path in sorted(found, key=lambda path: (path.suffix == ".safetensors", path.name)):
        path.rename(target / path.name)
    notes.append(f"the files of the stage before are in {target} now")


def _build_state(
    config: VisionConfig,
    job: VisionJob,
    fabric: Any,
    recipe: VisionRecipe,
    model: VisionLanguageModel,
    about: dict[str, Any],
    peft: Peft | None,
) -> VisionState:
    wrapped = fabric.setup_module(model)
    optimizer = build_optimizer(
        unwrapped(wrapped).named_parameters(),
        lr_init=config.lr_init,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        layerwise_lr=False,
        # torch's fused kernel would unscale fp16 gradients by itself, after they were clipped.
        fused=False if config.precision == "fp16" else "auto",
    )
    state = VisionState(
        wrapped,
        fabric.setup_optimizers(optimizer),
        recipe,
        job.progress,
        job.settings,
        fabric.strategy.precision,
        config=config,
        about=about,
        peft=peft,
        keeps_encoder=job.keeps_encoder,
    )
    if job.resume is not None:
        state.restore(read_state(job.resume))
    return state


def _about(config: VisionConfig, job: VisionJob, base: Base) -> dict[str, Any]:
    """adapter_config.json: all that is needed to use the adapter again."""
    return {
        "folder": os.getcwd(),  # where relative paths begin
        "adapter": dataclasses.asdict(job.adapter),
        "encoder": {
            "path": config.encoder_path,
            "type": config.encoder_type,
            "fingerprint": job.encoder.fingerprint,
            "tokens": job.encoder.num_tokens,
        },
        "tokens_per_picture": job.data.assembly.image_tokens,
        "template": {"form": config.form, "keep_image_tag": config.keep_image_tag},
        "tokenizer": config.tokenizer,
        "base": dataclasses.asdict(base),
        "quant": config.quant,
        "peft": config.peft,
        "trained": sorted(config.parts),
    }


def make_schedule(config: VisionConfig, plan: Plan) -> Schedule:
    """The learning rate of a run, by optimizer steps."""
    return Schedule(
        kind=LR_KINDS.get(config.lr_schedule, config.lr_schedule),  # type: ignore[arg-type]
        lr_init=config.lr_init,
        lr_final=config.lr_final,
        warmup_steps=config.warmup_steps,
        total_tokens=plan.total_steps,
        tokens_per_step=1,
        decay_share=config.decay_share,
        weight_decay=config.weight_decay,
    )


def _table(
    config: VisionConfig,
    job: VisionJob,
    device: torch.device,
    memory: PeakMemory,
    trained: int,
    kept: str,
) -> list[tuple[str, str]]:
    """What the run prints at its start."""
    m, plan, data = job.llm, job.plan, job.data
    parts = ", ".join(sorted(config.parts))
    peft = "" if config.peft == "none" else f" by {config.peft}"
    seen = plan.total_steps * plan.global_bsz
    return [
        ("language model", f"{m.version} L{m.n_layer} D{m.n_embd} V{m.vocab_size}, {kept}"),
        (
            "encoder",
            f"{config.encoder_path}: {job.encoder.num_tokens} tokens of width {job.encoder.width} "
            f"per picture of {job.encoder.shape[1]} x {job.encoder.shape[0]}",
        ),
        (
            "adapter",
            f"{job.adapter.num_parameters:,} parameters, {data.assembly.image_tokens} tokens of "
            f"width {m.n_embd} per picture",
        ),
        ("trained", f"{parts}{peft}: {trained:,} parameters"),
        ("start", f"resumed from {job.resume}" if job.resume else _start_in_words(job)),
        ("data", f"{', '.join(map(str, job.data_files))}: {len(data):,} samples"),
        (
            "tokens per sample",
            f"{data.visual_tokens:.0f} of pictures, {data.text_tokens:.1f} of text, of which "
            f"{data.label_tokens:.1f} are learned",
        ),
        (
            "global batch",
            f"{plan.global_bsz} samples = {plan.world_size} device(s) x micro_bsz "
            f"{plan.micro_bsz} x {plan.accumulate} accumulated",
        ),
        (
            "steps",
            f"{plan.total_steps:,} optimizer steps, {plan.epoch_steps:,} per mini-epoch, from "
            f"{job.progress.step:,}",
        ),
        ("passes over data", f"{seen / len(data):.2f} ({seen:,} samples)"),
        ("memory", _memory_in_words(config, job, device, memory)),
        ("precision", f"{config.precision}, {torch.get_num_threads()} CPU threads"),
    ]


def _start_in_words(job: VisionJob) -> str:
    return f"adapter {job.start.path}" if job.start else "a new adapter"


def _memory_in_words(
    config: VisionConfig, job: VisionJob, device: torch.device, memory: PeakMemory
) -> str:
    """The estimate, and whether it fits."""
    needed = memory_estimate(config, job.sizes, device.type) + memory.before
    words = f"about {needed / 1e9:.2f} GB per device (estimate)"
    there = free_memory(device.type)
    if there is None or needed <= there + memory.before:
        return words
    words += f"; THIS DOES NOT FIT: the device has {there / 1e9:.1f} GB"
    fitting = largest_fitting(config, job.plan, job.sizes, device.type, there)
    if fitting is None:
        return words + (", also not with micro_bsz 1" if config.grad_cp else "; try --grad_cp 1")
    micro_bsz, accumulate, bytes_ = fitting
    return words + (
        f"; --micro_bsz {micro_bsz} --accumulate_grad_batches {accumulate} keeps the global batch "
        f"of {job.plan.global_bsz} and needs about {bytes_ / 1e9:.1f} GB"
    )
