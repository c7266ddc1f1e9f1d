"""RWKVTrainingPipeline: from sequences to a trained model, all in one folder."""

from __future__ import annotations

import dataclasses
import filecmp
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkvtune.data.binidx import BinIdx
from rwkvtune.data.sampler import PublishedOrder
from rwkvtune.data.sequences import (
    SHUFFLE_SEED,
    DataPipeline,
    as_tokenizer,
    load_array,
    prime_or_none,
    sequences_of,
)
from rwkvtune.data.tokenizers import END_OF_DOCUMENT, Tokenizer
from rwkvtune.data.tokenizers.generic import GenericTokenizer
from rwkvtune.data.tokenizers.integers import IntegerTokenizer, whole_number
from rwkvtune.errors import UserError
from rwkvtune.files import atomic_write
from rwkvtune.pipeline.checkpoints import (
    DetectedModelConfig,
    detect,
    inspect_rwkv_checkpoint,
    validate_checkpoint_compatibility,
)
from rwkvtune.pipeline.config import (
    DataConfig,
    ModelConfig,
    TrainingConfig,
    checked,
    overridden,
)
from rwkvtune.pipeline.config_file import (
    CONFIG_FILE,
    Dataset,
    read_config,
    stored_tokenizer,
    tokenizer_facts,
    write_config,
)
from rwkvtune.pipeline.training import (
    TrainingResult,
    in_even_batches,
    run_training,
    training_result,
)
from rwkvtune.training.config import TrainConfig
from rwkvtune.weights_header import newest_weights, numbered_weights


class RWKVTrainingPipeline:
    """Prepares data, makes a model and trains it in one folder, and goes on where it was left.

    work_dir: configs/config.json, data/ and out/ are made in it. One that holds an earlier
    pipeline's gives its settings, tokenizer, data and run; arguments given here win.
    tokenizer: an object, or a name for load_tokenizer such as "world"; None = the folder's, else
    IntegerTokenizer(359).
    wandb_project: also log to this project of wandb.
    """

    def __init__(
        self,
        work_dir: str | os.PathLike[str],
        model_config: ModelConfig | None = None,
        training_config: TrainingConfig | None = None,
        data_config: DataConfig | None = None,
        tokenizer: Tokenizer | str | None = None,
        wandb_project: str | None = None,
    ) -> None:
        if not isinstance(wandb_project, str | None):
            raise UserError(f"wandb_project={wandb_project!r} must be the name of a project")
        self.work_dir = Path(work_dir).expanduser().resolve()
        self.data_dir = self.work_dir / "data"
        self.output_dir = self.work_dir / "out"
        self.config_dir = self.work_dir / CONFIG_FILE.parent
        stored = read_config(self.work_dir)
        self.data_config = checked(DataConfig, data_config or stored.get("data") or DataConfig())
        self.training_config = checked(
            TrainingConfig, training_config or stored.get("training") or TrainingConfig()
        )
        self.wandb_project = wandb_project or stored.get("wandb_project")
        self.seed: int = stored.get("seed", SHUFFLE_SEED)
        self._dataset: Dataset | None = stored.get("dataset")
        self.tokenizer = self._choose_tokenizer(tokenizer, stored)
        self.model_config = _with_rows_for(
            self.tokenizer,
            checked(ModelConfig, model_config or stored.get("model") or ModelConfig()),
            before=0 if model_config else stored.get("vocab_size", 0),
        )
        of_run = stored.get("model", self.model_config)
        if self._epochs_done() and model_config and self.model_config != of_run:
            raise UserError(
                f"{self.output_dir} holds a run of another model, {of_run}: leave model_config out "
                "to go on with it, or choose another work_dir"
            )
        try:
            for folder in (self.data_dir, self.output_dir, self.config_dir):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"work_dir: cannot make {folder}: {error.strerror}") from None
        if not (stored and self._has_run()):  # what it was trained with stays until it goes on
            self._save_config()

    # What was prepared, under the published names.

    @property
    def data_prepared(self) -> bool:
        return self._dataset is not None

    @property
    def data_prefix(self) -> str | None:
        return None if self._dataset is None else self._dataset.prefix

    @property
    def magic_prime(self) -> int | None:
        """The prime of RWKV-LM's order for these data; None for fewer than 3 windows."""
        return None if self._dataset is None else self._dataset.magic_prime

    @property
    def my_exit_tokens(self) -> int | None:
        """Tokens of the data: of one pass."""
        return None if self._dataset is None else self._dataset.exit_tokens

    @property
    def model_initialized(self) -> bool:
        return (self.output_dir / "rwkv-init.pth").exists()

    def prepare_data(self, data: Any, data_name: str = "train") -> dict[str, Any]:
        """Write data/<data_name>.jsonl, .bin and .idx and data/vocab.txt; returns their paths,
        num_sequences, total_tokens and magic_prime.

        data: an array [sequences, length] or [values] of whole numbers, or a list of rows.
        UserError, before anything is written, for a value that is no whole number or has no id.
        """
        return self._prepare(
            lambda folder: DataPipeline(self.tokenizer).process_numpy(
                data,
                folder,
                data_name,
                self.data_config.sequence_length,
                self.data_config.n_epochs_duplication,
                ctx_len=self.model_config.ctx_len,
                val_share=self.data_config.val_share,
                random_seed=self.seed,
            )
        )

    def prepare_data_from_file(
        self, file_path: str | os.PathLike[str], data_name: str = "train"
    ) -> dict[str, Any]:
        """prepare_data with the array of a .npy file."""
        return self.prepare_data(load_array(file_path), data_name)

    def prepare_data_from_jsonl(
        self,
        jsonl_path: str | os.PathLike[str],
        data_name: str = "train",
        n_epochs: int | None = None,
        vocab_file_path: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any]:
        """The same for a file of lines {"text": "..."}.

        n_epochs: how often each line is written; None = data_config.n_epochs_duplication.
        vocab_file_path: make a GenericTokenizer of this file the pipeline's tokenizer.
        """
        before = self.tokenizer, self.model_config
        if vocab_file_path is not None:
            self.tokenizer = GenericTokenizer(vocab_file_path)
            self.model_config = _with_rows_for(
                self.tokenizer, self.model_config, before=before[0].vocab_size
            )
        try:
            return self._prepare(
                lambda folder: DataPipeline(self.tokenizer).process_jsonl(
                    jsonl_path,
                    folder,
                    data_name,
                    self.data_config.n_epochs_duplication if n_epochs is None else n_epochs,
                    self.model_config.ctx_len,
                    val_share=self.data_config.val_share,
                    random_seed=self.seed,
                )
            )
        except BaseException:
            self.tokenizer, self.model_config = before
            raise

    def use_existing_data(
        self,
        binidx_prefix: str | os.PathLike[str],
        magic_prime: int | None = None,
        exit_tokens: int | None = None,
    ) -> None:
        """Train on token files that are there already.

        magic_prime, exit_tokens: as computed by other programs; they are checked and kept, but an
        epoch is a shuffled pass over all windows. None = computed here.
        """
        data = BinIdx(binidx_prefix)
        data.check_ids(self.model_config.vocab_size)
        if magic_prime is not None:
            PublishedOrder(len(data), self.model_config.ctx_len, magic_prime)
        computed = prime_or_none(len(data), self.model_config.ctx_len)
        if exit_tokens is not None and exit_tokens != len(data):
            print(f"exit_tokens={exit_tokens}: num_epochs decides the length, at {len(data)} each")
        self._dataset = Dataset(
            str(Path(data.prefix).resolve()),
            len(data),
            len(data.sizes),
            magic_prime or computed,
            exit_tokens or len(data),
        )
        self._save_config()

    def initialize_model(self, force: bool = False, random_seed: int = -1) -> str:
        """Write out/rwkv-init.pth, unless it is there; returns its path.

        force: write it anew. A run that has begun in out/ is kept in another folder, out-1.
        random_seed: of the initial values; -1 = the pipeline's, 42 at first.
        """
        path = self.output_dir / "rwkv-init.pth"
        if path.exists() and not force:
            return str(path)
        self._need_data()
        self._set_seed(random_seed)
        config = self._train_config(1, init_only=True)
        if self._has_run():
            aside = _free_name(self.output_dir)
            self.output_dir.rename(aside)
            print(f"the run in {self.output_dir} was moved to {aside}")
        run_training(config)
        return str(path)

    def train(
        self,
        data: Any = None,
        num_epochs: int = 100,
        continue_training: bool = False,
        random_seed: int = -1,
    ) -> TrainingResult:
        """Train for num_epochs passes over the sequences, in another order each time.

        data: given, it is prepared first.
        continue_training: go on with the run in out/, optimizer and all; num_epochs is then the
        total, passes before included. Without it a run that is there is left alone (UserError).
        random_seed: of initial values and orders; -1 = the pipeline's, 42 at first.
        Ctrl-C saves and then raises KeyboardInterrupt.
        """
        num_epochs = _checked_epochs(num_epochs)
        if continue_training and not (self._has_run() or self.model_initialized):
            raise UserError(
                f"{self.output_dir} holds no run to go on with: leave continue_training out, or "
                "check work_dir"
            )
        if not continue_training and self._has_run():
            raise UserError(
                f"{self.output_dir} holds a run of {self._epochs_done()} epochs. To go on to a "
                "larger number: train(num_epochs=..., continue_training=True); to begin again: "
                "initialize_model(force=True), which keeps the old run; or choose another work_dir"
            )
        seed, config_file = self.seed, self.work_dir / CONFIG_FILE
        settings_of_run = config_file.read_bytes() if self._has_run() else None
        try:
            self._set_seed(random_seed)
            if data is not None:
                self.prepare_data(data)
            config = self._train_config(num_epochs)
            self._check_initial_weights()
            run_training(config)
        except UserError:
            if settings_of_run:  # settings that it does not go on with are not kept
                self.seed = seed
                atomic_write(config_file, lambda file: file.write(settings_of_run))
            raise
        return training_result(self.output_dir, self.list_checkpoints())

    def train_from_checkpoint(
        self,
        checkpoint_path: str | os.PathLike[str],
        num_epochs: int = 100,
        auto_detect: bool = True,
        override_config: Mapping[str, Any] | None = None,
    ) -> TrainingResult:
        """Train on from the weights of any RWKV-LM checkpoint, which are copied to
        out/rwkv-init.pth.

        auto_detect: take version and dimensions from the file; False: model_config must name them.
        override_config: fields of ModelConfig and TrainingConfig to set, such as ctx_len.
        A tokenizer of fewer ids than the checkpoint has rows leaves rows unused; UserError for one
        of more, for dimensions that differ, and where out/ holds a run.
        """
        num_epochs = _checked_epochs(num_epochs)
        self._need_data()
        if self._has_run():
            raise UserError(
                f"{self.output_dir} holds a run, which would go on instead of {checkpoint_path}: "
                "use another work_dir, or train(continue_training=True) to go on with it"
            )
        detected = detect(checkpoint_path)
        self._check_rows(detected, checkpoint_path)
        model, training = overridden(
            dataclasses.replace(
                self.model_config,
                **{n: v for n, v in detected.to_dict().items() if n != "ctx_len"},
            )
            if auto_detect
            else dataclasses.replace(self.model_config, vocab_size=detected.vocab_size),
            self.training_config,
            override_config or {},
        )
        fits, differing = validate_checkpoint_compatibility(detected, dataclasses.asdict(model))
        if not fits:
            raise UserError(
                f"{checkpoint_path} does not fit the settings: {'; '.join(differing)}. Leave these "
                "fields to auto_detect, or give the checkpoint's values"
            )
        from rwkvtune.checkpoint import load_weights, save_weights

        weights = load_weights(Path(checkpoint_path).expanduser())
        self.model_config, self.training_config = model, training
        save_weights(self.output_dir / "rwkv-init.pth", weights)
        self._save_config()
        return self.train(num_epochs=num_epochs)

    def inspect_checkpoint(self, checkpoint_path: str | os.PathLike[str]) -> dict[str, Any]:
        """What a weights file holds; see inspect_rwkv_checkpoint."""
        return inspect_rwkv_checkpoint(checkpoint_path)

    def list_checkpoints(self) -> list[str]:
        """Weights in out/, from the initial ones by their epochs to the final ones."""
        numbered = [path for _, path in numbered_weights(self.output_dir)]
        ends = [self.output_dir / f"rwkv-{name}.pth" for name in ("init", "final")]
        return [str(p) for p in (ends[0], *numbered, ends[1]) if p.exists()]

    def get_latest_checkpoint(self) -> str | None:
        """The furthest weights in out/; None when there are none."""
        return next(reversed(self.list_checkpoints()), None)

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        length: int = 100,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """What the model says comes after the prompt, up to `length` tokens or the end of the
        sequence.

        prompt: text, or values for a tokenizer of whole numbers; None = a new sequence.
        temperature: 0 = always the likeliest.  checkpoint_path: None = the latest.
        Returns text for text; a list of values for values, or for None with such a tokenizer.
        """
        from rwkvtune.inference.generate import generate

        if (number := whole_number(length)) is None or number < 0:
            raise UserError(f"length={length!r} must be a whole number from 0 up")
        of_values = getattr(self.tokenizer, "encode_sequence", None)
        is_text = isinstance(prompt, str) or of_values is None
        if is_text:
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt or [])
        else:
            assert of_values is not None
            ids = of_values([] if prompt is None else prompt)
        model = self._load(checkpoint_path)
        no_text = set(self.tokenizer.unused_ids)
        no_text |= set(range(self.tokenizer.vocab_size, model.config.vocab_size))
        made = list(
            generate(
                model,
                # Sequences begin after the end of another one.
                [END_OF_DOCUMENT, *ids],
                max_tokens=number,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop_ids=[END_OF_DOCUMENT],
                banned_ids=no_text,
            )
        )
        if is_text:
            return self.tokenizer.decode(made)
        return self.tokenizer.decode_sequence(made)  # type: ignore[attr-defined]

    def next_value_probabilities(
        self, sequences: Any, *, checkpoint_path: str | os.PathLike[str] | None = None
    ) -> np.ndarray:
        """[rows, length, max_value + 1] fp32: at each position, how likely each value is to come
        next, given the values up to there.

        sequences: [rows, length] whole numbers, for a tokenizer of whole numbers.
        """
        import torch

        found = sequences_of(sequences)
        found.check_fits(self.tokenizer)
        lengths = {len(row) for row in found.rows}
        if not isinstance(self.tokenizer, IntegerTokenizer) or found.cut_from or len(lengths) > 1:
            raise UserError(
                "next_value_probabilities takes rows of one length, [rows, length], and a "
                f"tokenizer of whole numbers; given were rows of {sorted(lengths)[:3]} values and "
                f"the tokenizer {self.tokenizer.name}"
            )
        model = self._load(checkpoint_path)
        ids = torch.from_numpy(np.pad(np.stack(found.rows).astype(np.int64) + 1, ((0, 0), (1, 0))))
        parts = []
        with torch.no_grad():
            for rows in ids.split(self.training_config.micro_bsz):
                logits, _ = model(rows.to(next(model.parameters()).device))
                of_values = logits[:, 1:, 1 : self.tokenizer.max_value + 2].float()
                parts.append(of_values.softmax(-1).cpu())
        probabilities: np.ndarray = torch.cat(parts).numpy()
        return probabilities

    def evaluate(
        self, data: Any = None, *, checkpoint_path: str | os.PathLike[str] | None = None
    ) -> dict[str, float]:
        """loss (nats per token), perplexity and tokens of the latest weights, or of
        checkpoint_path.

        data: as for prepare_data, or a list of texts; None = the validation data, or the training
        data where there are none.
        """
        from rwkvtune.evaluation.perplexity import evaluate
        from rwkvtune.kernels.fused.cross_entropy import head_cross_entropy

        tokens = self._tokens_of(data)
        model = self._load(checkpoint_path)
        found = evaluate(
            model,
            tokens,
            ctx_len=self.model_config.ctx_len,
            batch_size=self.training_config.micro_bsz,
            device=next(model.parameters()).device,
            loss_head=lambda hidden, weight, targets: head_cross_entropy(
                hidden, weight, targets=targets, l2wrap=0.0
            ),
            reset_at_documents=self.training_config.reset_at_documents,
        )
        return {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}

    def _tokens_of(self, data: Any) -> np.ndarray:
        """[n] ids of data that evaluate was given."""
        if data is None:
            dataset = self._need_data()
            return BinIdx(dataset.val_prefix or dataset.prefix).tokens
        if isinstance(data, list) and data and all(isinstance(text, str) for text in data):
            return self.tokenizer.encode_documents(data).ids
        sequences = sequences_of(data)
        sequences.check_fits(self.tokenizer)
        return self.tokenizer.encode_documents(list(sequences.texts())).ids

    def _load(self, checkpoint_path: str | os.PathLike[str] | None) -> Any:
        import torch

        from rwkvtune.inference.load import load_model

        path = newest_weights(self.output_dir) if checkpoint_path is None else Path(checkpoint_path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(path.expanduser(), device=device)
        if model.config.vocab_size < self.tokenizer.vocab_size:
            raise UserError(
                f"{path} has {model.config.vocab_size} rows, the tokenizer {self.tokenizer.name} "
                f"needs {self.tokenizer.vocab_size}: give the tokenizer it was trained with"
            )
        return model

    def _prepare(self, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Have the files written into data/ and take them up.

        Under a run in out/ only the very same files may be written: it could not go on with others.
        """
        if self._has_run() and self._dataset is not None:
            with tempfile.TemporaryDirectory(dir=self.data_dir) as folder:
                made = write(Path(folder))["binidx_prefix"]
                if not filecmp.cmp(f"{made}.bin", f"{self._dataset.prefix}.bin", shallow=False):
                    raise UserError(
                        f"{self.output_dir} holds a run on other data, {self._dataset.prefix}.bin, "
                        "which it needs to go on: use another work_dir for these data, or begin "
                        "again with initialize_model(force=True), which keeps the old weights"
                    )
        result = write(self.data_dir)
        self._dataset = Dataset(
            str(Path(result["binidx_prefix"]).resolve()),
            result["total_tokens"],
            result["num_sequences"],
            result["magic_prime"],
            result["total_tokens"],
            result["val_prefix"] and str(Path(result["val_prefix"]).resolve()),
            result["val_tokens"],
        )
        self._save_config()
        kept = result["val_sequences"]
        print(
            f"prepared {result['num_sequences']} sequences, {result['total_tokens']} tokens"
            + (f"; {kept} more are kept for validation" if kept else "")
        )
        return result

    def _need_data(self) -> Dataset:
        if self._dataset is None:
            raise UserError(
                f"{self.work_dir} has no data yet: call prepare_data, prepare_data_from_jsonl or "
                "use_existing_data first, or give train the data"
            )
        return self._dataset

    def _check_rows(
        self, detected: DetectedModelConfig, checkpoint_path: str | os.PathLike[str]
    ) -> None:
        needed, rows = self.tokenizer.vocab_size, detected.vocab_size
        if needed > rows:
            raise UserError(
                f"the tokenizer needs {needed} rows and {checkpoint_path} has {rows}: use a "
                f"tokenizer of at most {rows} ids, such as IntegerTokenizer(max_value={rows - 2}), "
                "or a checkpoint with more rows"
            )
        if needed < rows:
            print(f"the tokenizer has {needed} ids, the checkpoint {rows} rows: the rest is unused")

    def _check_initial_weights(self) -> None:
        """UserError for those of another model, where training is to begin from them."""
        path = self.output_dir / "rwkv-init.pth"
        if self._has_run() or not path.exists():
            return
        _, differing = validate_checkpoint_compatibility(
            detect(path), dataclasses.asdict(self.model_config)
        )
        if differing:
            raise UserError(
                f"{path} holds the initial values of another model: {'; '.join(differing)}. "
                "initialize_model(force=True) writes those of this one; else give a model_config "
                "that fits them"
            )

    def _has_run(self) -> bool:
        """Whether training has begun in out/."""
        names = ("rwkv-final.pth", "resume/*")
        started = any(next(self.output_dir.glob(name), None) for name in names)
        return started or bool(numbered_weights(self.output_dir))

    def _epochs_done(self) -> int:
        numbered = numbered_weights(self.output_dir)
        return numbered[-1][0] + 1 if numbered else 0

    def _set_seed(self, random_seed: int) -> None:
        number = whole_number(random_seed)
        if number is None or number < -1:
            raise UserError(f"random_seed={random_seed!r} must be a whole number, or -1")
        if number != -1:
            self.seed = number
            self._save_config()

    def _train_config(self, num_epochs: int, *, init_only: bool = False) -> TrainConfig:
        """Everything that the trainer is to be told."""
        dataset = self._need_data()
        if (now := len(BinIdx(dataset.prefix))) != dataset.total_tokens:
            raise UserError(
                f"{dataset.prefix}.bin has {now} tokens, and had {dataset.total_tokens} when it "
                "was taken up: take it up again with use_existing_data, or prepare the data again"
            )
        self.model_config = _with_rows_for(
            self.tokenizer,
            checked(ModelConfig, self.model_config),
            before=self.tokenizer.vocab_size,
        )
        self.training_config = checked(TrainingConfig, self.training_config)
        self._save_config()
        flat: dict[str, Any] = {
            **self.model_config.settings(),
            **self.training_config.settings(),
            "data_file": dataset.prefix,
            "val_data_file": dataset.val_prefix or "",
            "order": "shuffled",
            "epoch_count": num_epochs,
            "proj_dir": str(self.output_dir),
            "random_seed": self.seed,
            "init_only": init_only,
            "wandb": self.wandb_project or "",
        }
        return in_even_batches(TrainConfig.from_flat(flat), dataset.total_tokens)

    def _choose_tokenizer(
        self, given: Tokenizer | str | None, stored: Mapping[str, Any]
    ) -> Tokenizer:
        """The given one or the folder's; prepared data are dropped where the two differ."""
        known = stored.get("tokenizer")
        if given is None:
            return as_tokenizer(None) if known is None else stored_tokenizer(self.work_dir, known)
        chosen = as_tokenizer(given)
        if known is not None and tokenizer_facts(chosen) != known and self._dataset:
            if self._has_run():
                raise UserError(
                    f"{self.work_dir} holds a run with another tokenizer, {known}: leave tokenizer "
                    "out to go on with it, or choose another work_dir"
                )
            print(f"another tokenizer than before ({known}): the data have to be prepared again")
            self._dataset = None
        return chosen

    def _save_config(self) -> None:
        """Keep all that the next object needs."""
        write_config(
            self.work_dir,
            model=self.model_config,
            training=self.training_config,
            data=self.data_config,
            tokenizer=self.tokenizer,
            dataset=self._dataset,
            more={"wandb_project": self.wandb_project, "seed": self.seed},
        )


def _with_rows_for(tokenizer: Tokenizer, model: ModelConfig, *, before: int = 0) -> ModelConfig:
    """The model with at least a row for each id; UserError for a size of the user's own that is too
    small.

    before: the size of the tokenizer that was there before. Where it is the same, rows that are
    enough stay: they may be those of a checkpoint.
    """
    needed = tokenizer.vocab_size
    if before == needed <= model.vocab_size:
        return model
    is_own = model.vocab_size not in (ModelConfig.vocab_size, before)
    if is_own and model.vocab_size < needed:
        raise UserError(
            f"ModelConfig: vocab_size={model.vocab_size} is less than the {needed} ids of the "
            f"tokenizer {tokenizer.name}: leave it out, or give {needed} or more"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size if is_own else needed)


def _checked_epochs(num_epochs: Any) -> int:
    """As a plain int, of numpy's numbers too."""
    if isinstance(num_epochs, bool) or (whole_number(num_epochs) or 0) < 1:
        raise UserError(f"num_epochs={num_epochs!r} must be a whole number from 1 up")
    return int(num_epochs)


def _free_name(folder: Path) -> Path:
    number = 1
    while (free := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return free
