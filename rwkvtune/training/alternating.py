"""Training of alternating and LLaVA-OneVision models on transformers' Trainer.

What is ours: which parts learn and how fast, the order of samples, checkpoints that a kill cannot
damage, and what is printed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.utils import logging

from rwkvtune.adapters.alternating import Adapted, adapt
from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.data.llava_dataset import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    DataArguments,
    LlavaCollator,
    LlavaDataset,
)
from rwkvtune.data.llava_images import ImageProcessor
from rwkvtune.data.llava_sampler import GroupedSampler, Grouping
from rwkvtune.errors import UserError
from rwkvtune.files import (
    RunFolderLock,
    atomic_directory,
    atomic_write,
    remove_directory,
    remove_leftovers,
)
from rwkvtune.inference.alternating import (
    Checkpoint,
    export,
    fill,
    is_composed,
    load_adapter,
    processor_of,
    save_adapter,
)
from rwkvtune.models.alternating.masks import special_layers
from rwkvtune.models.alternating.naming import Naming, group_of
from rwkvtune.training.alternating_config import AlternatingSettings, TuneOptions
from rwkvtune.training.loop import Stopped, StopRequest
from rwkvtune.training.throughput import Throughput

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
TRAINABLE_FILE = "trainable.safetensors"
PROJECTOR_FILE = "mm_projector.bin"
SETTINGS_FILE = "run_settings.json"

Say = Callable[[str], None]


def checked_samples(tokenizer: Any, settings: AlternatingSettings) -> LlavaDataset:
    """The data set; UserError, before any image is read, for samples that cannot be trained on."""
    data = settings.data
    tokenizer.model_max_length = data.model_max_length
    arguments = DataArguments(
        data_path=data.data_path,
        image_folder=data.image_folder,
        video_folder=data.video_folder,
        version=data.version,
        label_mode=data.label_mode,
        is_multimodal=data.is_multimodal,
        mm_use_im_start_end=settings.model.mm_use_im_start_end,
        video_fps=data.video_fps,
        frames_upbound=data.frames_upbound,
        add_time_instruction=data.add_time_instruction,
        seed=settings.trainer.seed,
    )
    dataset = LlavaDataset(tokenizer, arguments)
    dataset.check()
    return dataset


def data_module(model: Any, dataset: LlavaDataset) -> dict[str, Any]:
    """Data set and collator as `model` wants its images; UserError when it takes none."""
    if dataset.has_pictures and not is_composed(model):
        raise UserError(
            f"{dataset.arguments.data_path} has images, but this model is a language model alone: "
            "give a checkpoint with a vision tower, or --vision_tower FOLDER with "
            "--init_from_backbone"
        )
    model.config.tokenizer_model_max_length = dataset.tokenizer.model_max_length
    dataset.processor = processor_of(model.config)
    collator = LlavaCollator(dataset.tokenizer, dataset.processor)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}


def module_of(name: str) -> str:
    """The tunable part that a parameter belongs to, by LLaVA's names for them."""
    place = name.removeprefix("base_model.model.")
    group = group_of(place)
    return {"projector": "mm_mlp_adapter", "vision": "mm_vision_tower"}.get(
        group, "mm_language_model"
    )


def choose_trainable(model: Any, tune: TuneOptions) -> list[str]:
    """Let the chosen parts learn, and no others; returns their names.

    Without a choice the language model (with image_newline and head) and the projector learn.
    UserError when nothing would.
    """
    parts = [p for p in tune.mm_tunable_parts.split(",") if p]
    if not parts:
        parts = ["mm_mlp_adapter"]
        if not (tune.freeze_backbone or tune.tune_mm_mlp_adapter):
            parts.append("mm_language_model")
        if tune.unfreeze_mm_vision_tower:
            parts.append("mm_vision_tower")
    count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(module_of(name) in parts)
        count += parameter.requires_grad
    if not count:
        raise UserError(f"nothing would learn: this model has none of {', '.join(parts)}")
    return parts


def parameter_groups(
    model: nn.Module, tune: TuneOptions, weight_decay: float, decays: Sequence[str]
) -> list[dict[str, Any]]:
    """Groups for the optimizer: language model, projector and vision tower at their own rates, each
    with and without weight decay. decays: names of the parameters that decay."""
    rates = {
        "mm_language_model": tune.learning_rate,
        "mm_mlp_adapter": tune.mm_projector_lr or tune.learning_rate,
        "mm_vision_tower": tune.mm_vision_tower_lr or tune.learning_rate,
    }
    groups = []
    for part, rate in rates.items():
        for decays_here in (True, False):
            chosen = [
                p
                for n, p in model.named_parameters()
                if p.requires_grad and module_of(n) == part and (n in decays) == decays_here
            ]
            decay = weight_decay if decays_here else 0.0
            groups.append({"params": chosen, "weight_decay": decay, "lr": rate})
    return [group for group in groups if group["params"]]


class AlternatingTrainer(Trainer):
    """transformers' Trainer with our groups, order of samples, and checkpoints."""

    def __init__(
        self,
        settings: AlternatingSettings,
        naming: Naming,
        meter: Throughput,
        say: Say,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings, self.naming, self.meter, self.say = settings, naming, meter, say
        self._staging: Path | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        grouping: Grouping = "none"
        if self.settings.groupings:
            grouping = self.settings.groupings[0]  # type: ignore[assignment]
        return GroupedSampler(
            dataset.modality_lengths if grouping != "none" else [1] * len(dataset),
            grouping,
            batch_size=self.args.train_batch_size,
            world_size=self.args.world_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed,
        )

    def create_optimizer(self, model: Any = None) -> Any:
        target: Any = self.model if model is None else model
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            groups = parameter_groups(
                target,
                self.settings.tune,
                self.args.weight_decay,
                self.get_decay_parameter_names(target),
            )
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> Tensor:
        collator: Any = self.data_collator
        widths = collator.widths(inputs)
        self.meter.add(
            samples=len(widths),
            tokens=int(widths.sum()),
            visual_tokens=int(widths[inputs["input_ids"] == IMAGE_TOKEN_INDEX].sum()),
        )
        loss: Tensor = super().training_step(model, inputs, *args)
        if not torch.isfinite(loss):
            saved = checkpoints(Path(str(self.args.output_dir)))
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is {float(loss)}, so the optimizer "
                "was not moved"
                + (f"; the newest checkpoint, {saved[0]}, is good" if saved else "")
                + ". A lower learning_rate may help"
            )
        return loss

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Any:
        """What the loss of a step is divided by: the labels that are left once the images are in
        and the rows cut. transformers would count those of the batch as it was given."""
        collator: Any = self.data_collator
        left = []
        for batch in batch_samples:
            labels = batch["labels"].masked_fill(collator.widths(batch) == 0, IGNORE_INDEX)
            labels[:, 0] = IGNORE_INDEX  # nothing predicts it
            left.append({"labels": labels})
        count: Any = super()._get_num_items_in_batch(left, device)
        if count is not None and not count.any():
            self.say(
                f"step {self.state.global_step + 1}: no answer lies within "
                f"model_max_length={self.settings.data.model_max_length}: nothing is learned"
            )
            return torch.ones_like(count)
        return count

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """checkpoint-N gets its name once it is whole on the disk; older ones go after that."""
        final = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.world_size > 1:  # each process writes into the folder that all know
            self._staging = final.parent / f".saving-{final.name}"
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if final.exists():
                    remove_directory(final)
                (self._staging / final.name).rename(final)
                self._staging.rmdir()
            self.accelerator.wait_for_everyone()
        else:
            with atomic_directory(final) as temporary:
                self._staging = temporary
                super()._save_checkpoint(model, trial)
                inner = temporary / final.name
                for path in inner.iterdir():
                    path.rename(temporary / path.name)
                inner.rmdir()
        self._staging = None
        if self.args.should_save:
            for old in checkpoints(final.parent)[self.settings.trainer.save_total_limit :]:
                remove_directory(old)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        model: Any = self.accelerator.unwrap_model(self.model)
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if self.settings.adapter:
            weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
            save_weights(folder / TRAINABLE_FILE, weights)
        else:
            export(model, folder, self.naming)
        tokenizer: Any = self.processing_class
        tokenizer.save_pretrained(folder)

    def is_done(self, checkpoint: Path) -> bool:
        """Are all steps of the run in this checkpoint? Its weights and state are taken then.

        transformers would do one step more where the last one is not the end of an epoch.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        total = self.args.max_steps
        if total <= 0:
            accumulated = self.args.gradient_accumulation_steps
            updates = max(math.ceil(len(self.get_train_dataloader()) / accumulated), 1)
            total = math.ceil(self.args.num_train_epochs * updates)
        if state.global_step < total:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target: Any = self.accelerator.unwrap_model(self.model if model is None else model)
        folder = Path(resume_from_checkpoint)
        if not self.settings.adapter:
            fill(target, Checkpoint.open(folder))
            return
        parameters = dict(target.named_parameters())
        for name, tensor in load_weights(folder / TRAINABLE_FILE).items():
            parameters[name].data.copy_(tensor)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run folder, the newest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match and (path / TRAINER_STATE_NAME).exists():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


class Reporter(TrainerCallback):
    """Prints the loss, counts the steps for the throughput, and stops when asked to."""

    def __init__(self, say: Say, meter: Throughput, stop: StopRequest) -> None:
        self.say, self.meter, self.stop = say, meter, stop

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            text = f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}"
            text += f"  lr {float(logs['learning_rate']):.2e}"
            if "grad_norm" in logs:
                text += f"  norm {float(logs['grad_norm']):.3f}"
            self.say(text)

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.meter.step()
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self.stop.requested is not None:
            control.should_log = True  # the loss so far belongs to the run's mean
            control.should_save = True
            control.should_training_stop = True


@dataclasses.dataclass(frozen=True)
class Outcome:
    steps: int
    loss: float
    """Mean over all steps of the run, those before it was stopped included."""
    stopped: Stopped | None


def train(
    model: Any,
    tokenizer: Any,
    module: dict[str, Any],
    settings: AlternatingSettings,
    *,
    naming: Naming,
    tokenizer_from: Path,
    say: Say,
) -> Outcome:
    """Train a model, from its last checkpoint in output_dir if there is one, and write it there.

    naming: of the weights. UserError when another run uses the folder, or the loss is not finite.
    """
    logging.set_verbosity_error()  # its warnings are about what is done here on purpose
    folder = Path(settings.trainer.output_dir)
    run = settings.fixed_in_a_run | {
        "class": type(model.get_decoder()).__name__,
        "schedule": schedule_in_words(model),
        "samples": len(module["train_dataset"]),
    }
    every = sum(p.numel() for p in model.parameters())
    model, parts, adapted = prepare(model, settings, str(tokenizer_from))
    if adapted and adapted.quantized:
        say(adapted.quantized.in_words())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"learning: {', '.join(parts)}: {learning:,} parameters; the model has {every:,}")
    arguments = _training_arguments(settings)
    is_first = arguments.process_index == 0
    with RunFolderLock(folder) if is_first else nullcontext(), StopRequest() as stop:
        if is_first:
            remove_leftovers(folder)
        found = checkpoints(folder)
        if found:
            _refuse_another_run(folder, run)
            say(f"resuming from {found[0]}")
        elif is_first:
            atomic_write(folder / SETTINGS_FILE, lambda file: file.write(json.dumps(run).encode()))
        meter = Throughput(
            every=settings.task.throughput_log_steps,
            device_type=arguments.device.type,
            write=say if is_first else lambda line: None,
        )
        trainer = AlternatingTrainer(
            settings,
            naming,
            meter,
            say,
            model=model,
            args=arguments,
            processing_class=tokenizer,
            callbacks=[Reporter(say, meter, stop)],
            **module,
        )
        if arguments.world_size > 1:
            meter.sum_with(lambda counts: _over_ranks(trainer, counts))
        trainer.remove_callback(PrinterCallback)
        if not (found and trainer.is_done(found[0])):
            trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
        steps, loss = trainer.state.global_step, mean_loss(trainer.state.log_history)
        if found and found[0].name == f"checkpoint-{steps}":
            say(f"all {steps} steps were done before")
        stopped = stop.answer() if stop.requested is not None else None
        if stopped and steps < trainer.state.max_steps:
            say(f"stopped after step {steps}; the same command goes on from there")
            return Outcome(steps, loss, stopped)
        if is_first:
            if adapted:
                adapted.save(folder / "adapter")
                model = adapted.merged()
            if parts == ["mm_mlp_adapter"]:
                save_adapter(model, folder / PROJECTOR_FILE)
            export(model, folder, naming, tokenizer_from=tokenizer_from)
            say(f"wrote the model to {folder}")
        return Outcome(steps, loss, None)


def prepare(
    model: Any, settings: AlternatingSettings, path: str
) -> tuple[Any, list[str], Adapted | None]:
    """(the model with what the settings start it from and add to it, the parts that learn, the
    adapters if there are any). path: where it lies."""
    tune = settings.tune
    if settings.trainer.fp16 and (settings.trainer.use_cpu or not torch.cuda.is_available()):
        raise UserError("fp16 computes on a GPU only: leave it out, or take --bf16")
    torch.manual_seed(settings.trainer.seed)  # initial values of adapters
    parts = choose_trainable(model, tune)
    if settings.model.pretrain_mm_mlp_adapter:
        load_adapter(model, settings.model.pretrain_mm_mlp_adapter)
    if settings.adapter is None:
        return model, parts, None
    adapted = adapt(model, settings.adapter, path, dropout=tune.lora_dropout, bias=tune.lora_bias)
    return adapted.model, parts, adapted


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each setting that was another one before; those not known from then are none."""
    return [f"{n}: {before[n]!r} -> {now[n]!r}" for n in now if before.get(n, now[n]) != now[n]]


def _refuse_another_run(folder: Path, run: dict[str, Any]) -> None:
    path = folder / SETTINGS_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if changed := changes(before, run):
        raise UserError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}. Give the old values "
            "to go on, or another output_dir for a new run"
        )


def mean_loss(history: Sequence[dict[str, Any]]) -> float:
    """Over all steps, from the trainer's log: each entry is the mean since the one before."""
    total, before = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += float(entry["loss"]) * (entry["step"] - before)
            before = entry["step"]
    return total / before if before else math.nan


def _over_ranks(trainer: Trainer, counts: list[float]) -> list[float]:
    values = torch.tensor(counts, device=trainer.accelerator.device)
    total: list[float] = trainer.accelerator.reduce(values, reduction="sum").tolist()
    return total


def _training_arguments(settings: AlternatingSettings) -> TrainingArguments:
    t, tune = settings.trainer, settings.tune
    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    checkpointing = (  # renamed in transformers 5
        "activation_checkpointing"
        if "activation_checkpointing" in names
        else "gradient_checkpointing"
    )
    values: dict[str, Any] = {
        "output_dir": t.output_dir,
        "per_device_train_batch_size": t.per_device_train_batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation_steps,
        "num_train_epochs": t.num_train_epochs,
        "max_steps": t.max_steps,
        "learning_rate": tune.learning_rate,
        "weight_decay": t.weight_decay,
        "warmup_steps": t.warmup_steps or t.warmup_ratio,
        "lr_scheduler_type": t.lr_scheduler_type,
        "optim": t.optim,
        "max_grad_norm": t.max_grad_norm,
        "bf16": t.bf16,
        "fp16": t.fp16,
        "tf32": t.tf32,
        checkpointing: t.gradient_checkpointing,
        "logging_steps": t.logging_steps,
        "save_steps": t.save_steps,
        "save_strategy": t.save_strategy,
        "seed": t.seed,
        "dataloader_num_workers": t.dataloader_num_workers,
        "dataloader_drop_last": t.dataloader_drop_last,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": [] if t.report_to == "none" else t.report_to.split(","),
        "run_name": t.run_name or None,
        "deepspeed": t.deepspeed or None,
        "ddp_find_unused_parameters": t.ddp_find_unused_parameters,
        "torch_compile": t.torch_compile,
        "torch_compile_backend": t.torch_compile_backend or None,
        "use_cpu": t.use_cpu or not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }
    try:
        return TrainingArguments(**values)
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(
            f"transformers refuses a setting: {' '.join(str(error).split())}"
        ) from error


def one_step(
    model: Any, batch: dict[str, Any], settings: AlternatingSettings, path: str
) -> dict[str, float]:
    """Forward, backward and one optimizer step on a batch: loss, gradient norm, seconds.

    path: where the model lies."""
    model = prepare(model, settings, path)[0]
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=settings.tune.learning_rate)
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.trainer.bf16):
        loss = model(**batch).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
    optimizer.step()
    return {
        "loss": float(loss.detach()),
        "grad_norm": float(norm),
        "seconds": time.perf_counter() - began,
    }


def synthetic_batch(model: Any, tokenizer: Any, processor: ImageProcessor) -> dict[str, Any]:
    """A sample that needs no data: an image of noise, if the model takes images, and a sentence."""
    ids = tokenizer.encode("A step on a made-up sample.", add_special_tokens=False)
    if not is_composed(model):
        row = torch.tensor([ids])
        return {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}
    row = torch.tensor([[IMAGE_TOKEN_INDEX, *ids]])
    size = processor.view_size
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": row,
        "labels": torch.tensor([[IGNORE_INDEX, *ids]]),
        "attention_mask": torch.ones_like(row),
        "images": [torch.randn(1, 3, size, size, generator=generator)],
        "image_sizes": [(size, size)],
        "modalities": ["image"],
    }


def schedule_in_words(model: Any) -> str:
    """The special layers of a model, such as "alternate_keep_last: 1, 3 of 6"."""
    text = model.config.get_text_config()
    schedule = getattr(text, "mask_schedule", "none")
    special = special_layers(schedule, text.num_hidden_layers)
    layers = ", ".join(str(i) for i, is_special in enumerate(special) if is_special) or "none"
    return f"{schedule}: layers {layers} of {text.num_hidden_layers}"


def is_finite(step: dict[str, float]) -> bool:
    return math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"])
