"""One folder from data to a model: reopened, continued, begun from other weights, refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rwkvtune.data.sequences import DataPipeline
from rwkvtune.data.tokenizers.custom import BaseTokenizer
from rwkvtune.data.tokenizers.generic import GenericTokenizer, create_vocab_file_from_tokens
from rwkvtune.data.tokenizers.integers import AngleTokenizer, IntegerTokenizer
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.pipeline import (
    DataConfig,
    ModelConfig,
    RWKVTrainingPipeline,
    TrainingConfig,
    load_checkpoint_for_training,
)

MODEL = ModelConfig("x070", n_layer=1, n_embd=32, ctx_len=16, head_size_a=16)
TRAINING = TrainingConfig(micro_bsz=4, precision="fp32", grad_cp=0, lr_schedule="constant")
DATA = np.arange(120).reshape(12, 10) % 20
TOKENIZER = IntegerTokenizer(19)


def pipeline(folder: Path, **changes: Any) -> RWKVTrainingPipeline:
    options = {"model_config": MODEL, "training_config": TRAINING, "tokenizer": TOKENIZER}
    return RWKVTrainingPipeline(folder, **{**options, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work_dir after two epochs with validation; copy it before changing it."""
    folder = tmp_path_factory.mktemp("trained") / "work"
    made = pipeline(folder, data_config=DataConfig(val_share=0.25))
    made.train(DATA, num_epochs=2)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "moved"))


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return found


def same(one: str | Path, other: str | Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(folder: Path) -> list[dict[str, str]]:
    header, *rows = (folder / "out" / "metrics.csv").read_text().splitlines()
    return [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]


def test_training_leaves_the_published_files(trained: Path) -> None:
    published = [
        "configs/config.json",
        *(f"data/{name}" for name in ("train.jsonl", "train.bin", "train.idx", "vocab.txt")),
        *(f"out/rwkv-{name}.pth" for name in ("init", "0", "1", "final")),
        "out/train_log.txt",
        "out/loss_curve.png",
    ]
    assert [name for name in published if not (trained / name).is_file()] == []
    assert same(trained / "out/rwkv-1.pth", trained / "out/rwkv-final.pth")


def test_the_result_tells_what_the_logs_say(trained: Path) -> None:
    opened = RWKVTrainingPipeline(trained)
    result = opened.train(num_epochs=2, continue_training=True)  # nothing is left to do
    lines = (trained / "out/train_log.txt").read_text().splitlines()
    assert result.epoch_losses == [float(line.split()[1]) for line in lines[-2:]]
    assert result.final_loss == result.epoch_losses[-1]
    last = metrics(trained)[-1]
    assert result.steps == int(last["step"])
    assert result.val_loss == pytest.approx(float(last["val_loss"]), rel=1e-6)
    names = ["rwkv-init.pth", "rwkv-0.pth", "rwkv-1.pth", "rwkv-final.pth"]
    assert [Path(p).name for p in opened.list_checkpoints()] == names
    assert opened.get_latest_checkpoint() == str(trained / "out/rwkv-final.pth")


def test_epochs_are_passes_over_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 12 sequences of 10 values and their ends are 132 tokens: 8 windows of 16, in batches of 4.
    result = pipeline(tmp_path).train(DATA, num_epochs=3)
    assert result.steps == 3 * 2 and result.tokens == 3 * 8 * 16
    assert "micro_bsz" not in capsys.readouterr().out.split("model ")[0]
    # Batches of 7 would be 14 windows: 4 are read twice as evenly.
    other = pipeline(
        tmp_path / "other", training_config=dataclasses.replace(TRAINING, micro_bsz=7)
    ).train(DATA, num_epochs=1)
    assert other.tokens == 8 * 16
    assert "micro_bsz 4 instead of 7" in capsys.readouterr().out
    # 8 windows of 15 are 120 of 131 targets.
    fifteen = dataclasses.replace(MODEL, ctx_len=15)
    pipeline(tmp_path / "fifteen", model_config=fifteen).train(DATA, num_epochs=1)
    assert "each pass leaves out 11 of 132 tokens" in capsys.readouterr().out


def test_a_new_object_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole = pipeline(tmp_path / "whole", data_config=DataConfig(val_share=0.25))
    expected = whole.train(DATA, num_epochs=4)
    stopped = pipeline(tmp_path / "stopped", data_config=DataConfig(val_share=0.25))
    stopped.train(DATA, num_epochs=2)
    (tmp_path / "stopped").rename(tmp_path / "moved")
    reopened = RWKVTrainingPipeline(tmp_path / "moved")
    assert reopened.data_prepared and reopened.model_initialized
    assert reopened.model_config == whole.model_config
    assert reopened.training_config == TRAINING and reopened.data_config.val_share == 0.25
    assert isinstance(reopened.tokenizer, IntegerTokenizer) and reopened.tokenizer.max_value == 19
    assert reopened.magic_prime == whole.magic_prime
    result = reopened.train(num_epochs=4, continue_training=True)
    assert same(result.final_checkpoint, expected.final_checkpoint)
    assert result.epoch_losses == expected.epoch_losses and len(result.epoch_losses) == 4
    assert Path(result.checkpoints[-2]).name == "rwkv-3.pth"


def test_a_run_is_not_begun_again_by_mistake(copy: Path) -> None:
    opened = RWKVTrainingPipeline(copy)
    with pytest.raises(UserError, match=r"holds a run of 2 epochs.*continue_training=True"):
        opened.train(num_epochs=5)
    with pytest.raises(UserError, match="holds a run on other data"):
        opened.prepare_data(DATA[:5])
    with pytest.raises(UserError, match="holds a run of another model"):
        pipeline(copy, model_config=dataclasses.replace(MODEL, n_layer=2))
    with pytest.raises(UserError, match="holds a run with another tokenizer"):
        pipeline(copy, tokenizer=IntegerTokenizer(18))
    before = (copy / "data/train.bin").read_bytes()
    opened.prepare_data(DATA)  # the same data may come again
    assert (copy / "data/train.bin").read_bytes() == before
    old = weights(copy / "out/rwkv-final.pth")
    opened.initialize_model(force=True, random_seed=7)
    assert torch.equal(weights(copy / "out-1/rwkv-final.pth")["emb.weight"], old["emb.weight"])
    assert not same(copy / "out/rwkv-init.pth", copy / "out-1/rwkv-init.pth")
    assert opened.train(num_epochs=1).steps == 2
    assert RWKVTrainingPipeline(copy).seed == 7


def test_settings_that_a_run_does_not_go_on_with_are_not_kept(copy: Path) -> None:
    other = dataclasses.replace(TRAINING, lr_init=1.0)
    with pytest.raises(UserError, match=r"lr_init: 0.0006 -> 1.0"):
        pipeline(copy, training_config=other).train(num_epochs=3, continue_training=True)
    opened = RWKVTrainingPipeline(copy)
    with pytest.raises(UserError, match=r"random_seed: 42 -> 7"):
        opened.train(num_epochs=3, continue_training=True, random_seed=7)
    assert opened.seed == 42
    assert RWKVTrainingPipeline(copy).train(num_epochs=3, continue_training=True).steps == 6


def test_the_trainer_speaks_of_settings_by_the_pipelines_names(copy: Path) -> None:
    folder = copy.rename(copy.with_name("epoch_count"))
    smaller = dataclasses.replace(TRAINING, micro_bsz=2)
    with pytest.raises(UserError) as caught:
        pipeline(folder, training_config=smaller).train(num_epochs=3, continue_training=True)
    assert str(caught.value) == (
        f"{folder}/out holds a run with other settings: steps of an epoch: 2 -> 3; windows per "
        "step: 3 -> 2. Give the old values to go on, or another work_dir for a new run"
    )
    with pytest.raises(UserError, match="use precision bf16 or fp32$"):
        pipeline(folder.parent / "new", training_config=TrainingConfig(precision="fp16")).train(
            DATA, num_epochs=1
        )


def test_a_model_can_be_made_before_it_is_trained(tmp_path: Path) -> None:
    made = pipeline(tmp_path)
    made.prepare_data(DATA, "train")
    path = made.initialize_model()
    first = weights(path)
    assert made.initialize_model() == path and same(path, path)
    other = pipeline(tmp_path, model_config=dataclasses.replace(MODEL, n_layer=2))
    with pytest.raises(UserError, match=r"n_layer: checkpoint 1, pipeline 2\. initialize_model"):
        other.train(num_epochs=1)
    made = pipeline(tmp_path)
    made.train(num_epochs=1)
    # The value matrix's initial value is orthogonal; a run starts from exactly what was written.
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(path).items())


def test_a_sequence_is_learned_and_goes_on(tmp_path: Path) -> None:
    counting = np.array([[(start + i) % 10 for i in range(31)] for start in range(32)])
    made = pipeline(
        tmp_path,
        tokenizer=IntegerTokenizer(9),
        training_config=dataclasses.replace(TRAINING, lr_init=1e-2, lr_final=1e-2, epoch_save=0),
        data_config=DataConfig(val_share=0.25),
    )
    made.train(counting, num_epochs=12)
    assert made.generate([3, 4], 5, temperature=0) == [5, 6, 7, 8, 9]
    assert made.generate("3 4", 5, temperature=0) == "5 6 7 8 9"
    assert made.generate(length=4, seed=1) == made.generate(length=4, seed=1)
    held_out = made.evaluate()
    assert held_out["loss"] < 0.5 < math.log(10) < made.evaluate(counting[:, ::-1])["loss"]
    assert held_out["perplexity"] == pytest.approx(math.exp(held_out["loss"]))


def test_untrained_weights_know_nothing(tmp_path: Path) -> None:
    made = pipeline(tmp_path)
    made.prepare_data(DATA)
    path = made.initialize_model()
    # Initial embeddings are tiny, but normalised; the head is orthogonal: close to even odds.
    assert made.evaluate(checkpoint_path=path)["loss"] == pytest.approx(math.log(21), rel=0.15)


def test_text_by_a_vocabulary_of_ones_own(tmp_path: Path) -> None:
    vocabulary = create_vocab_file_from_tokens(["hello", "world", " "], tmp_path / "words.txt")
    lines = tmp_path / "my.jsonl"
    lines.write_text('{"text": "hello world hello"}\n' * 30)
    made = pipeline(tmp_path / "work", tokenizer=None)
    with pytest.raises(UserError, match=r"my.jsonl: line 1: 'hello' at position 0.*GenericToken"):
        made.prepare_data_from_jsonl(lines)
    made.prepare_data_from_jsonl(lines, vocab_file_path=vocabulary)
    made.train(num_epochs=1)
    reopened = RWKVTrainingPipeline(tmp_path / "work")
    assert isinstance(reopened.tokenizer, GenericTokenizer)
    assert reopened.model_config.vocab_size == 4
    others = create_vocab_file_from_tokens(["world", "hello", " "], tmp_path / "others.txt")
    with pytest.raises(UserError, match="holds a run with another tokenizer"):
        RWKVTrainingPipeline(tmp_path / "work", tokenizer=GenericTokenizer(others))
    assert set(reopened.generate("hello", 5, seed=0)) <= set("helo wrd")


def test_the_world_tokenizer_works_by_its_name(tmp_path: Path) -> None:
    made = pipeline(tmp_path / "work", tokenizer="world")
    assert made.model_config.vocab_size == 65536
    lines = tmp_path / "my.jsonl"
    lines.write_text('{"text": "Hello, world!"}\n')
    made.prepare_data_from_jsonl(lines)
    assert GenericTokenizer(tmp_path / "work/data/vocab.txt").encode("Hello") == [33155]
    assert RWKVTrainingPipeline(tmp_path / "work").tokenizer.name == "world"


class Letters(BaseTokenizer):
    vocab_size = 3

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(96 + id) for id in ids)


def test_a_tokenizer_of_ones_own_class_trains_and_is_asked_for_again(tmp_path: Path) -> None:
    lines = tmp_path / "my.jsonl"
    lines.write_text('{"text": "abba"}\n' * 20)
    made = pipeline(tmp_path / "work", tokenizer=Letters())
    made.prepare_data_from_jsonl(lines)
    made.train(num_epochs=1)
    assert set(made.generate("ab", 5, seed=0)) <= {"a", "b"}
    with pytest.raises(UserError, match="your class Letters: give tokenizer="):
        RWKVTrainingPipeline(tmp_path / "work")
    assert pipeline(tmp_path / "work", tokenizer=Letters()).data_prepared


def test_token_files_that_are_there_already(tmp_path: Path, trained: Path) -> None:
    made = pipeline(tmp_path / "work.v2")
    made.use_existing_data(trained / "data" / "train", magic_prime=5, exit_tokens=99)
    assert (made.magic_prime, made.my_exit_tokens) == (5, 99)
    assert made.train(num_epochs=1).steps == 2
    with pytest.raises(UserError, match="no such file"):
        made.use_existing_data("absent", 5, 99)
    with pytest.raises(UserError, match="magic_prime=7 does not fit"):
        made.use_existing_data(trained / "data" / "train", 7, 99)
    small = pipeline(tmp_path / "small", tokenizer=IntegerTokenizer(9))
    with pytest.raises(UserError, match="vocabulary|vocab_size|id"):
        small.use_existing_data(trained / "data" / "train")


def test_token_files_that_were_written_anew_are_not_trained_on_by_their_old_length(
    tmp_path: Path,
) -> None:
    made = pipeline(tmp_path / "work")
    made.prepare_data(DATA)
    made.use_existing_data(shutil.copytree(tmp_path / "work/data", tmp_path / "own") / "train")
    DataPipeline(TOKENIZER).process_numpy(DATA[:6], tmp_path / "own", "train")
    reopened = RWKVTrainingPipeline(tmp_path / "work")
    with pytest.raises(UserError, match=r"train\.bin has 66 tokens, and had 132 when"):
        reopened.train(num_epochs=1)
    reopened.use_existing_data(tmp_path / "own/train")
    assert reopened.train(num_epochs=1).steps == 1  # 4 windows of 16 in one batch of 4


def test_weights_of_any_origin_are_taken_up(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "any name.pth"
    shutil.copy(trained / "out/rwkv-final.pth", source)
    made = pipeline(tmp_path / "work", model_config=ModelConfig("x070"), tokenizer=None)
    made.tokenizer = IntegerTokenizer(9)
    made.prepare_data(DATA % 10)
    result = made.train_from_checkpoint(
        source, num_epochs=1, override_config={"ctx_len": 8, "lr_init": 1e-4, "grad_cp": 1}
    )
    assert same(tmp_path / "work/out/rwkv-init.pth", source)
    assert result.tokens % 8 == 0 and float(metrics(tmp_path / "work")[0]["lr"]) < 1e-4
    stored = json.loads((tmp_path / "work/configs/config.json").read_text())
    assert stored["model"] == {**dataclasses.asdict(MODEL), "ctx_len": 8, "vocab_size": 21}
    assert stored["training"]["lr_init"] == 1e-4
    # Rows that no id of the tokenizer has are never generated.
    assert max(made.generate(length=50, seed=0), default=0) <= 9
    with pytest.raises(UserError, match="holds a run, which would go on instead"):
        made.train_from_checkpoint(source)


def test_rows_of_a_checkpoint_stay_also_where_they_are_as_many_as_the_default(
    tmp_path: Path,
) -> None:
    of_angles = pipeline(tmp_path / "angles", tokenizer=AngleTokenizer())
    of_angles.prepare_data(DATA)
    source = of_angles.initialize_model()
    assert weights(source)["emb.weight"].shape[0] == ModelConfig.vocab_size == 361
    made = pipeline(tmp_path / "work")
    made.prepare_data(DATA)
    made.train_from_checkpoint(source, num_epochs=1)
    RWKVTrainingPipeline(tmp_path / "work").train(num_epochs=2, continue_training=True)
    assert weights(tmp_path / "work/out/rwkv-final.pth")["emb.weight"].shape[0] == 361


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"override_config": {"lr_int": 1}}, "lr_int .did you mean lr_init"),
        ({"override_config": {"lr_init": "fast"}}, "lr_init='fast' must be a number"),
        ({"override_config": {"n_layer": 5}}, "n_layer: checkpoint 1, pipeline 5"),
        ({"auto_detect": False}, "n_layer: checkpoint 1, pipeline 3"),
        ({"num_epochs": 0}, "num_epochs=0 must be a whole number from 1 up"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_changes(
    trained: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    made = pipeline(tmp_path, model_config=ModelConfig("x070"))
    made.prepare_data(DATA)
    before = (tmp_path / "configs/config.json").read_text()
    with pytest.raises(UserError, match=said):
        made.train_from_checkpoint(trained / "out/rwkv-final.pth", **options)
    assert (tmp_path / "configs/config.json").read_text() == before
    assert not made.model_initialized


def test_versions_that_are_not_trained_are_refused_by_name(tmp_path: Path) -> None:
    made = pipeline(tmp_path / "work")
    made.prepare_data(DATA)
    key = torch.zeros(8, 8)
    for evidence, name in (("att.time_first", "RWKV-4"), ("att.time_maa_rkvw_w1", "x060b")):
        path = tmp_path / "weights.pth"
        torch.save({"emb.weight": key, f"blocks.0.{evidence}": key}, path)
        assert name in made.inspect_checkpoint(path)["detected_config"]["model_type"]
        for call in (load_checkpoint_for_training, made.train_from_checkpoint):
            with pytest.raises(UserError, match=rf"weights.pth: these weights are .*{name}"):
                call(path)


def test_weights_with_a_tensor_missing_are_refused_before_they_are_copied(
    trained: Path, tmp_path: Path
) -> None:
    broken = weights(trained / "out/rwkv-final.pth")
    del broken["ln_out.weight"]
    torch.save(broken, tmp_path / "broken.pth")
    made = pipeline(tmp_path / "work")
    made.prepare_data(DATA)
    with pytest.raises(UserError, match=r"broken\.pth does not fit an x070 .*ln_out\.weight"):
        made.train_from_checkpoint(tmp_path / "broken.pth")
    assert not made.model_initialized
    assert "ln_out.weight" in made.inspect_checkpoint(tmp_path / "broken.pth")["odd"][0]


def test_a_tokenizer_of_more_ids_than_rows_is_refused_with_both_numbers(
    trained: Path, tmp_path: Path
) -> None:
    made = pipeline(tmp_path, tokenizer=IntegerTokenizer(29))
    made.prepare_data(DATA)
    with pytest.raises(UserError, match=r"needs 31 rows and .* has 21.*max_value=19"):
        made.train_from_checkpoint(trained / "out/rwkv-final.pth")


def test_nothing_is_trained_on_nothing(tmp_path: Path) -> None:
    made = pipeline(tmp_path)
    for call in (made.train, made.initialize_model, lambda: made.train_from_checkpoint("x.pth")):
        with pytest.raises(UserError, match="has no data yet"):
            call()
    with pytest.raises(UserError, match="holds no run to go on with"):
        made.train(continue_training=True)
    with pytest.raises(UserError, match="num_epochs=0"):
        made.train(DATA, num_epochs=0)
    for seed in ("7", 1.5, -2):
        with pytest.raises(UserError, match="random_seed=.* must be a whole number"):
            made.train(DATA, random_seed=seed)  # type: ignore[arg-type]
    for length in ("3", -1, 2.5):
        with pytest.raises(UserError, match="length=.* must be a whole number from 0 up"):
            made.generate(length=length)  # type: ignore[arg-type]
    for name in ("../train", "", 5):
        with pytest.raises(UserError, match="is no name for data"):
            made.prepare_data(DATA, name)  # type: ignore[arg-type]
    assert list((tmp_path / "data").iterdir()) == []
    assert made.get_latest_checkpoint() is None and made.list_checkpoints() == []
    made.model_config.ctx_len = 1000
    with pytest.raises(UserError, match="132 tokens are too few for ctx_len 1000"):
        made.train(DATA)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ModelConfig("x050"), "model_type='x050' must be one of x052, x060, x070"),
        (lambda: ModelConfig(n_embd=100), "n_embd=100 is not a multiple of head_size_a=64"),
        (lambda: ModelConfig(n_layer=0), "n_layer=0 must be at least 1"),
        (lambda: TrainingConfig(precision="bf8"), "precision='bf8' must be one of"),
        (lambda: TrainingConfig(lr_init="1e-3", micro_bsz=0), "lr_init='1e-3'"),  # type: ignore[arg-type]
        (lambda: TrainingConfig(strategy="zero"), "strategy='zero' must be one of"),
        (lambda: TrainingConfig(grad_cp=2), "grad_cp=2 must be 0 or 1"),
        (lambda: DataConfig(val_share=1.0), "val_share=1.0"),
        (lambda: DataConfig(sequence_length=0), "sequence_length=0"),
        (lambda: ModelConfig(head_size_a=0), "head_size_a=0 must be at least 1"),
        (lambda: RWKVTrainingPipeline("x", TrainingConfig()), "given where a ModelConfig is"),  # type: ignore[arg-type]
        (lambda: RWKVTrainingPipeline("/dev/null/x"), "/dev/null/x"),
        (lambda: RWKVTrainingPipeline(__file__), "is a file: give a folder"),
        (lambda: RWKVTrainingPipeline("x", wandb_project=5), "wandb_project=5 must be"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_the_model_gets_rows_for_the_tokenizer_and_the_callers_object_stays(tmp_path: Path) -> None:
    given = dataclasses.replace(MODEL)
    assert pipeline(tmp_path / "a", model_config=given).model_config.vocab_size == 21
    assert given.vocab_size == 361
    padded = dataclasses.replace(MODEL, vocab_size=64)
    assert pipeline(tmp_path / "b", model_config=padded).model_config.vocab_size == 64
    with pytest.raises(UserError, match="vocab_size=20 is less than the 21 ids"):
        pipeline(tmp_path / "c", model_config=dataclasses.replace(MODEL, vocab_size=20))
    # A size that came from a tokenizer follows the next one.
    pipeline(tmp_path / "d", tokenizer=IntegerTokenizer(9))
    again = RWKVTrainingPipeline(tmp_path / "d", tokenizer=AngleTokenizer())
    assert again.model_config.vocab_size == 361
    assert type(RWKVTrainingPipeline(tmp_path / "d").tokenizer) is AngleTokenizer


def test_a_damaged_folder_is_told(copy: Path) -> None:
    stored = json.loads((copy / "configs/config.json").read_text())
    wrong = {**stored, "dataset": {**stored["dataset"], "prefix": None}}
    (copy / "configs/config.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=r"config\.json: dataset: "):
        RWKVTrainingPipeline(copy)
    (copy / "configs/config.json").write_text(json.dumps(stored))
    (copy / "data/train.idx").unlink()
    with pytest.raises(MissingFileError, match="names the token files"):
        RWKVTrainingPipeline(copy)
    (copy / "configs/config.json").write_text('{"model": {"layers": 3}}')
    with pytest.raises(UserError, match="is no ModelConfig"):
        RWKVTrainingPipeline(copy)
    (copy / "configs/config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        RWKVTrainingPipeline(copy)
    (copy / "configs/config.json").unlink()
    assert not pipeline(copy).data_prepared  # all can be said again


SCRIPT = """
import os, signal, threading, time
from rwkv_trainer import *
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job of a shell
print("SCRIPT BEGINS")
p = RWKVTrainingPipeline({work!r}, ModelConfig("x070", 1, 32, ctx_len=16, head_size_a=16),
    TrainingConfig(micro_bsz=2, precision="fp32", devices=2, grad_cp=0),
    tokenizer=IntegerTokenizer(19))
p.prepare_data([[i % 20 for i in range(10)]] * 12)
p.initialize_model()

def interrupt():  # this process alone, once the other two have made a step
    metrics = p.output_dir / "metrics.csv"
    while not (metrics.exists() and metrics.read_text().count("\\n") > 1):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    p.train(num_epochs=100_000)
except KeyboardInterrupt as stop:
    print("SCRIPT GOES ON:", stop)
p.training_config.lr_init = 1.0
p.train(num_epochs=100_000, continue_training=True)
"""


def test_two_devices_from_a_script_without_a_guard_and_from_a_notebook(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(work=str(tmp_path / "work")))
    done = subprocess.run(
        # -i: Lightning takes it for a notebook, in which it makes no Fabric of several devices.
        [sys.executable, "-i", str(script)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert done.stdout.count("SCRIPT BEGINS") == 1
    assert "2 device(s)" in done.stdout and "stopped after step" in done.stdout
    assert "SCRIPT GOES ON: stopped and saved" in done.stdout
    assert "UserError: " in done.stderr and "lr_init: 0.0006 -> 1.0" in done.stderr
