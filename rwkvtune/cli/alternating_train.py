"""`python train_alternating.py`: every field of training/alternating_config.py as a flag."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkvtune.cli.train import OneLineParser, with_plain_booleans
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.models.alternating.variants import read_config, variant_of_config
from rwkvtune.training.alternating_config import AlternatingSettings
from rwkvtune.training.config import option_groups

if TYPE_CHECKING:
    from rwkvtune.data.llava_dataset import LlavaDataset
    from rwkvtune.inference.alternating import Checkpoint, LoadReport

ABOUT = """Train LLaVA-OneVision/Qwen2 models some of whose layers attend within one modality
(alternating) or across (alternating_cross), or look before you train:

  what is this checkpoint?      --model_name_or_path FOLDER --dry_run
  what is in my data?           --model_name_or_path FOLDER --data_path FILE --inspect_data
  what would be copied?         --backbone_model FOLDER --init_from_backbone --variant alternating
                                --inspect_weights
  does one step work?           --model_name_or_path FOLDER --data_path FILE --dry_run_step
  train                         --model_name_or_path FOLDER --data_path FILE --output_dir FOLDER
  train from a language model   --backbone_model FOLDER --init_from_backbone --variant alternating
                                --data_path FILE --output_dir FOLDER

Exit codes: 0 done; 2 a flag, a file or the data is wrong; 3 the checkpoint is not of the
--variant (--force goes on with its own class, --force_class changes the class); 4 the step of
--dry_run_step failed; 130, 143 stopped, and the same command goes on."""

MISMATCH, STEP_FAILED = 3, 4
SHOWN = 20
"""Names that --inspect_weights prints of each kind."""


def main(argv: list[str]) -> int:
    settings = parse(argv)
    # Says at its import what it cannot do, though nothing here asked for it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    problems = settings.problems()
    if problems:
        raise UserError("; ".join(problems))
    return _Run(settings).run()


def parse(argv: list[str]) -> AlternatingSettings:
    """The settings of a command line; UserError for what cannot be understood."""
    config_class: Any = AlternatingSettings
    parser = OneLineParser(
        "train_alternating.py",
        usage="python train_alternating.py [--FLAG VALUE ...]",
        about=ABOUT,
        config_class=config_class,
    )
    for options in option_groups(config_class).values():
        parser.add_class_arguments(options, None)
    args = with_plain_booleans(argv, parser.types)
    return AlternatingSettings.from_flat(parser.parse_args(args).as_dict())


class _Run:
    """One call: prints lines, or with --json one object at the end."""

    def __init__(self, settings: AlternatingSettings) -> None:
        self.settings = settings
        self.result: dict[str, Any] = {}
        # torchrun's other processes would say everything again.
        self._speaks = os.environ.get("RANK", "0") == "0"

    def say(self, text: str) -> None:
        if self._speaks:
            print(text, file=sys.stderr if self.settings.task.json else sys.stdout, flush=True)

    def done(self, code: int = 0) -> int:
        if self.settings.task.json and self._speaks:
            print(json.dumps({**self.result, "exit_code": code}, default=str))
        return code

    def run(self) -> int:
        task = self.settings.task
        for line in self.settings.without_effect():
            self.say(f"note: {line}")
        if not (task.dry_run or task.inspect_weights or task.dry_run_step):
            self._check_data_path()
            if not (task.inspect_data or self.settings.trainer.output_dir):
                raise UserError("--output_dir is missing: name the folder for the trained model")
        folder = Path(self._name())
        if task.dry_run and folder.is_dir():
            # Without torch and transformers, whose imports take seconds.
            raw = read_config(folder)
            self._detected(raw.get("model_type"), variant_of_config(raw))
            return self._end_of_dry_run()
        checkpoint = self._open()
        self._detected(checkpoint.model_type, checkpoint.variant)
        if task.dry_run:
            return self._end_of_dry_run()
        if not self._is_variant(checkpoint):
            return self.done(MISMATCH)
        if task.inspect_data:
            return self._inspect_data(checkpoint)
        return self._with_model(checkpoint)

    def _detected(self, model_type: str | None, variant: str | None) -> None:
        self.say(f"Detected model_type: {model_type}")
        self.result |= {"model_type": model_type, "variant": variant}

    def _end_of_dry_run(self) -> int:
        self.say("dry run: nothing was loaded")
        return self.done()

    def _check_data_path(self) -> None:
        path = self.settings.data.data_path
        if not path:
            raise UserError("--data_path is missing: give a LLaVA manifest (.json, .jsonl, .yaml)")
        if not Path(path).exists() and "{" not in path:
            raise MissingFileError(f"--data_path {path}: there is no such file")

    def _open(self) -> Checkpoint:
        from rwkvtune.inference.alternating import Checkpoint  # torch and transformers: seconds

        task = self.settings.task
        return Checkpoint.open(
            self._name(), allow_download=task.allow_download, config_only=task.dry_run
        )

    def _name(self) -> str:
        """Of the checkpoint that is looked at."""
        model = self.settings.model
        if self.from_backbone:
            return model.backbone_model
        return model.alt_checkpoint or model.model_name_or_path or model.backbone_model

    @property
    def from_backbone(self) -> bool:
        return self.settings.task.init_from_backbone and not self.settings.model.alt_checkpoint

    def _is_variant(self, checkpoint: Checkpoint) -> bool:
        """Whether to go on; says what does not match."""
        task = self.settings.task
        wanted, found = task.variant, checkpoint.variant
        if task.force_class:
            self.say(f"class: {task.force_class} is built instead of {found} (--force_class)")
            return True
        if self.from_backbone:
            if found == "base" and wanted != "base":
                kind = "alternating" if wanted == "auto" else wanted
                self.say(f"class: {kind} will be filled from this backbone")
                return True
            if wanted in ("auto", found):
                return True
        elif wanted in ("auto", found):
            return True
        if task.force:
            self.say(f"warning: going on with {found} although {wanted} was asked for (--force)")
            return True
        print(
            f"error: the checkpoint is not of the requested variant\n"
            f"  requested --variant: {wanted}\n"
            f"  detected model_type: {checkpoint.model_type} ({found or 'unknown'})\n"
            "  give another checkpoint, leave --variant out, go on with the checkpoint's own class "
            f"(--force), or build the other one from its weights (--force_class {wanted})",
            file=sys.stderr,
        )
        return False

    def _inspect_data(self, checkpoint: Checkpoint) -> int:
        from rwkvtune.data.llava_dataset import DataArguments, LlavaDataset
        from rwkvtune.models.alternating.tokenizer import load_tokenizer

        data = self.settings.data
        arguments = DataArguments(
            data_path=data.data_path,
            image_folder=data.image_folder,
            video_folder=data.video_folder,
            version=data.version,
            label_mode=data.label_mode,
            image_aspect_ratio=data.image_aspect_ratio or "square",
            frames_upbound=data.frames_upbound,
            seed=self.settings.trainer.seed,
        )
        dataset = LlavaDataset(load_tokenizer(checkpoint.folder), arguments)
        self.say(f"Dataset loaded. Number of samples: {len(dataset)}")
        self.result |= {"samples": len(dataset)}
        if len(dataset):
            first = dataset.list_data_dict[0]
            self.say(f"First sample (raw): {first}")
            self.result["first_sample"] = first
            if self.settings.task.inspect_data_verbose:
                self._describe_first(dataset)
        self.say("data inspected: no model was loaded")
        return self.done()

    def _describe_first(self, dataset: Any) -> None:
        item = dataset[0]
        learned = int((item["labels"] != -100).sum())
        images = [f"{kind} {size[0]}x{size[1]}: {len(v)} views" for v, size, kind in item["image"]]
        self.say(
            f"First sample (prepared): {len(item['input_ids'])} ids, {learned} of them learned; "
            + ("; ".join(images) or "no images")
        )
        self.result["first_sample_ids"] = item["input_ids"].tolist()
        self.result["first_sample_labels"] = item["labels"].tolist()

    def _with_model(self, checkpoint: Checkpoint) -> int:
        """Build and load the model, and do what is asked with it."""
        from rwkvtune.inference.alternating import (
            Checkpoint,
            from_backbone,
            into_checkpoint,
            load,
        )
        from rwkvtune.models.alternating.tokenizer import load_tokenizer

        settings, task = self.settings, self.settings.task
        checkpoint.check_family()
        if settings.adapter:
            from rwkvtune.adapters.alternating import check_packages

            check_packages(settings.adapter)
        tokenizer = None if task.inspect_weights else load_tokenizer(checkpoint.folder)
        dataset = self._samples(tokenizer)
        attention = settings.model.attn_implementation or None
        common: dict[str, Any] = {
            "vision_tower": settings.model.vision_tower,
            "attention": attention,
            "llava": settings.llava,
            **settings.mask_settings,
        }
        naming = checkpoint.naming
        if self.from_backbone:
            import torch

            torch.manual_seed(settings.trainer.seed)  # initial values of the projector
            variant: Any = task.force_class or task.variant
            variant = "alternating" if variant == "auto" else variant
            if settings.model.model_name_or_path:
                target = Checkpoint.open(
                    settings.model.model_name_or_path, allow_download=task.allow_download
                )
                model, report, notes = into_checkpoint(target, checkpoint, variant, **common)
            else:
                model, report, notes = from_backbone(
                    checkpoint, variant, allow_download=task.allow_download, **common
                )
            for note in notes:
                self.say(note)
            naming = "llava"
            self._refuse_gaps(model, checkpoint, report)
        else:
            model, report = load(checkpoint, variant=task.force_class, **common)
            self.say(f"loaded {len(report.matched)} of {report.total} tensors, bit for bit")
        self.result["tensors"] = report.counts()
        if task.inspect_weights:
            self._print_report(report)
            return self.done()
        if settings.model.lora_weight_path:
            from rwkvtune.adapters.alternating import merge_adapter

            lora = settings.model.lora_weight_path
            model = merge_adapter(model, lora, str(checkpoint.folder))
        if task.dry_run_step:
            return self._dry_run_step(model, tokenizer, dataset, report)
        return self._train(model, tokenizer, dataset, checkpoint, naming)

    def _samples(self, tokenizer: Any) -> LlavaDataset | None:
        """Those to train on, looked at before any weights are loaded; None where nothing needs
        them."""
        task, path = self.settings.task, self.settings.data.data_path
        if task.inspect_weights or (task.dry_run_step and not path):
            return None
        from rwkvtune.training.alternating import checked_samples

        self._check_data_path()
        dataset = checked_samples(tokenizer, self.settings)
        self.say(f"Dataset loaded. Number of samples: {len(dataset)}")
        return dataset

    def _refuse_gaps(self, model: Any, checkpoint: Checkpoint, report: LoadReport) -> None:
        """A language model that a backbone does not fill whole is not trained on; inspecting it is
        allowed."""
        from rwkvtune.inference.alternating import differing_dimensions, problems
        from rwkvtune.models.alternating.naming import group_of

        gaps = [name for name in report.missing if group_of(name) == "lm"]
        if (gaps or report.mismatched) and not self.settings.task.inspect_weights:
            differing = differing_dimensions(model, checkpoint)
            raise UserError(
                f"the backbone {checkpoint.folder} does not fit "
                + (f"this decoder: {differing}; " if differing else "its own config.json: ")
                + problems(report)
            )

    def _print_report(self, report: LoadReport) -> None:
        counts = report.counts()
        columns = ("matched", "shape-mismatched", "missing", "skipped", "unexpected")
        self.say(f"tensors in the model: {report.total}, matched: {len(report.matched)}")
        self.say("  ".join([f"{'group':<10}", *columns]))
        for group, row in counts.items():
            cells = [f"{row[column]:>{len(column)}}" for column in columns]
            self.say("  ".join([f"{group:<10}", *cells]))
        self._list("matched (copied)", report.matched)
        self._list(
            "shape-mismatched (not copied)",
            [f"{n}: {list(a)} in the file, {list(b)} here" for n, a, b in report.mismatched],
        )
        self._list("missing (keep their initial values)", report.missing)
        self._list("skipped (multimodal parts of the checkpoint)", report.skipped)
        self._list("unexpected (the model has no place for them)", report.unexpected)
        self.say("weights inspected: nothing was trained or written")

    def _list(self, heading: str, names: list[str]) -> None:
        if names:
            shown = f", first {SHOWN}" if len(names) > SHOWN else ""
            self.say(f"{heading}, {len(names)}{shown}:")
            for name in names[:SHOWN]:
                self.say(f"  {name}")

    def _dry_run_step(
        self, model: Any, tokenizer: Any, dataset: LlavaDataset | None, report: LoadReport
    ) -> int:
        from rwkvtune.inference.alternating import variant_of_model
        from rwkvtune.training import alternating

        settings = self.settings
        kind, decoder = type(model), model.get_decoder()
        self.result |= {
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "decoder_class": type(decoder).__qualname__,
            "variant": variant_of_model(model),
            "built_model_type": model.config.model_type,
            "schedule": alternating.schedule_in_words(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "missing": report.missing,
            "unexpected": report.unexpected,
        }
        self.say(f"class: {self.result['class']}")
        self.say(f"decoder: {self.result['decoder_class']}, schedule {self.result['schedule']}")
        self.say(f"variant: {self.result['variant']}, model_type: {model.config.model_type}")
        self.say(
            f"parameters: {self.result['parameters']:,}; tensors missing: {len(report.missing)}, "
            f"unexpected: {len(report.unexpected)}"
        )
        if dataset is not None:
            collate = alternating.data_module(model, dataset)["data_collator"]
            batch = collate([dataset[0]])
            self.say("one step on the first sample of the data")
        else:
            processor = alternating.processor_of(model.config)
            batch = alternating.synthetic_batch(model, tokenizer, processor)
            self.say("one step on a made-up sample (no --data_path)")
        try:
            step = alternating.one_step(model, batch, settings, self._name())
        except (RuntimeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            print(f"error: the step failed: {' '.join(str(error).split())}", file=sys.stderr)
            return self.done(STEP_FAILED)
        self.result["step"] = step
        self.say(
            f"loss {step['loss']:.4f}  gradient norm {step['grad_norm']:.4f}  "
            f"{step['seconds']:.2f} s; nothing was written"
        )
        if not alternating.is_finite(step):
            print("error: the step gave no finite loss and gradient", file=sys.stderr)
            return self.done(STEP_FAILED)
        return self.done()

    def _train(
        self, model: Any, tokenizer: Any, dataset: Any, checkpoint: Checkpoint, naming: Any
    ) -> int:
        from rwkvtune.training import alternating

        settings = self.settings
        if settings.trainer.save_naming != "auto":
            naming = settings.trainer.save_naming
        module = alternating.data_module(model, dataset)
        self.say(
            f"decoder: {type(model.get_decoder()).__name__}, {alternating.schedule_in_words(model)}"
        )
        outcome = alternating.train(
            model,
            tokenizer,
            module,
            settings,
            naming=naming,
            tokenizer_from=checkpoint.folder,
            say=self.say,
        )
        self.result |= {"steps": outcome.steps, "loss": outcome.loss}
        self.say(f"{outcome.steps} steps done, mean loss {outcome.loss:.4f}")
        return self.done(outcome.stopped.exit_code if outcome.stopped else 0)
