"""Vision training: what a step computes, what changes, what is saved, and how the stages follow."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rwkvtune.checkpoint import load_weights, newest_resume_state, save_weights
from rwkvtune.cli.main import guarded
from rwkvtune.demo.vision_fixture import DATA, MODEL
from rwkvtune.errors import UserError
from rwkvtune.inference.vision import find_adapter, load_vision, read_adapter
from rwkvtune.models.vision.model import VisionLanguageModel
from rwkvtune.training import vision
from rwkvtune.training.plan import Plan
from rwkvtune.training.vision import make_schedule, train_vision
from rwkvtune.training.vision_config import VisionConfig, from_flat
from rwkvtune.training.vision_data import data_files
from rwkvtune.training.vision_plan import memory_estimate
from tests.training.runs import losses, metrics
from tests.vision_files import settings, vision_files

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Seen:
    """The model of a run, with a copy of all its tensors before the first step."""

    model: VisionLanguageModel
    before: dict[str, Tensor]

    def changed(self) -> set[str]:
        now = self.model.state_dict()
        assert now.keys() == self.before.keys()
        return {name for name, old in self.before.items() if not torch.equal(old, now[name])}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    result, build = Seen(), vision._build_model

    def build_and_look(*args: Any) -> Any:
        made = build(*args)
        result.model = made[0]
        result.before = {n: t.clone() for n, t in made[0].state_dict().items()}
        return made

    monkeypatch.setattr(vision, "_build_model", build_and_look)
    yield result


def train(proj_dir: Path, **changes: Any) -> int:
    return train_vision(from_flat(settings(proj_dir, **changes)))


def first_batch(proj_dir: Path, **changes: Any) -> Any:
    """Of a run with these settings, and the dataset that it comes from."""
    config = from_flat(settings(proj_dir, **changes))
    job = vision.prepare(config, data_files(Path(config.data_file)), 1, [])
    return job, job.data.batch(list(range(4)))


@pytest.mark.parametrize("quant", ["none", "nf4", "fp4", "int8"])
def test_stage_1_changes_the_adapter_and_nothing_else(
    quant: str, tmp_path: Path, seen: Seen
) -> None:
    assert train(tmp_path, quant=quant) == 0
    assert seen.changed() == {
        "adapter.proj.0.weight", "adapter.proj.0.bias", "adapter.proj.2.weight",
        "adapter.proj.2.bias", "adapter.pre_norm.weight", "adapter.pre_norm.bias",
    }  # fmt: skip
    assert len(seen.before) > 60, "language model and encoder were looked at too"
    first, *_, last = losses(tmp_path)
    assert last < first, "and it has learned something"


def test_loss_and_gradients_are_those_of_the_plain_formula(tmp_path: Path) -> None:
    """By concatenation, with all logits, as the formula is written in upstream."""
    job, batch = first_batch(tmp_path)
    model = vision._build_model(from_flat(settings(tmp_path)), job)[0]
    ours = vision._loss_sum(model, batch)
    ours.backward()
    adapter = dict(model.adapter.named_parameters())
    gradients = {name: p.grad.clone() for name, p in adapter.items() if p.grad is not None}
    assert gradients.keys() == adapter.keys()
    model.zero_grad()

    pixels = batch.pixels.float() / 127.5 - 1
    features = model.encoder.model(pixel_values=pixels).last_hidden_state  # type: ignore[operator]
    W1, b1 = adapter["proj.0.weight"], adapter["proj.0.bias"]
    W2, b2 = adapter["proj.2.weight"], adapter["proj.2.bias"]
    z = torch.relu(features @ W1.T + b1) @ W2.T + b2
    mean, variance = z.mean(-1, keepdim=True), z.var(-1, keepdim=True, unbiased=False)
    normed = (z - mean) / (variance + 1e-5).sqrt()
    seen = z + normed * adapter["pre_norm.weight"] + adapter["pre_norm.bias"]
    words = model.llm.emb(batch.input_ids[:, 9:])
    logits, _ = model.llm(inputs_embeds=torch.cat([seen, words], dim=1))
    plain = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    plain.backward()
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
    for name, p in adapter.items():
        assert p.grad is not None
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-5)


def test_a_step_divides_by_all_labels_however_it_is_accumulated(tmp_path: Path) -> None:
    assert train(tmp_path / "whole", micro_bsz=8, epoch_steps=3) == 0
    assert train(tmp_path / "parts", micro_bsz=2, accumulate_grad_batches=4, epoch_steps=12) == 0
    assert train(tmp_path / "named", micro_bsz=2, global_bsz=8, epoch_steps=12) == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(parts) == 3, "epoch_steps counts micro-batches"
    assert parts == pytest.approx(whole, rel=1e-5)
    assert losses(tmp_path / "named") == parts


def test_a_batch_without_labels_gives_no_nan(tmp_path: Path) -> None:
    job, batch = first_batch(tmp_path)
    model = vision._build_model(from_flat(settings(tmp_path)), job)[0]
    batch.targets.fill_(-100)
    loss = vision._loss_sum(model, batch)
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.adapter.parameters())

    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(data / "good.png")
    (data / "broken.png").write_bytes(b"no picture")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a wall"}]
    pictures = ["broken.png"] * 4 + ["good.png"] * 4
    (data / "chat.json").write_text(
        json.dumps([{"image": name, "conversations": turns} for name in pictures])
    )
    half = tmp_path / "half"
    assert train(half, data_file=str(data), data_shuffle=False, epoch_steps=2) == 0
    first, second = losses(half)
    assert first == 0 and 0 < second < 20, "of the first four nothing can be read"
    final = load_weights(half / "adapter-final.safetensors")
    assert all(t.isfinite().all() for t in final.values())


def test_text_only_records_and_several_pictures_train_together(tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(vision_files() / DATA, data)
    records = json.loads((data / "chat.json").read_text())
    for record in records[::3]:
        del record["image"]
    for record in records[1::3]:
        record["image"] = [record["image"], "GCC_train_000000000.jpg"]
    (data / "chat.json").unlink()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (data / "chat.jsonl").write_text(lines)
    assert train(tmp_path / "run", data_file=str(data), micro_bsz=1, epoch_steps=12) == 0
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))


def test_a_run_that_went_on_ends_with_the_bits_of_one_that_never_stopped(tmp_path: Path) -> None:
    assert train(tmp_path / "whole", epoch_count=2, epoch_steps=3) == 0
    assert train(tmp_path / "parts", epoch_count=1, epoch_steps=3) == 0
    assert train(tmp_path / "parts", epoch_count=2, epoch_steps=3) == 0
    names = sorted(p.name for p in (tmp_path / "whole").glob("[!.]*"))
    assert names == [
        "adapter-0.safetensors", "adapter-1.safetensors", "adapter-final.safetensors",
        "adapter_config.json", "config.yaml", "loss_curve.png", "metrics.csv", "resume",
        "tokenizer.json", "train_log.txt",
    ]  # fmt: skip
    for name in names[:3]:
        whole, parts = ((tmp_path / run / name).read_bytes() for run in ("whole", "parts"))
        assert whole == parts, name
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_sigterm_saves_and_the_same_command_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    loss, calls = vision.VisionRecipe.loss, []

    def loss_with_a_signal(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)

    monkeypatch.setattr(vision.VisionRecipe, "loss", loss_with_a_signal)
    assert train(folder) == 143
    assert len(metrics(folder)) == 3
    assert newest_resume_state(folder) == folder / "resume" / "step-00000003"
    assert find_adapter(folder) == folder / "adapter-latest.safetensors"
    assert train(folder) == train(whole) == 0
    assert metrics(folder) == metrics(whole)
    name = "adapter-final.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not (folder / "adapter-latest.safetensors").exists()


def test_other_settings_are_refused_at_resume(tmp_path: Path) -> None:
    assert train(tmp_path, epoch_steps=1) == 0
    with pytest.raises(UserError, match="lr_init: 0.01 -> 0.02"):
        train(tmp_path, epoch_steps=2, lr_init=0.02)
    other = load_weights(vision_files() / MODEL)
    other["ln_out.bias"] = other["ln_out.bias"] + 1
    save_weights(tmp_path / "other.pth", other)
    with pytest.raises(UserError, match="has other values than the weights"):
        train(tmp_path, epoch_steps=1, epoch_count=2, load_model=str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="already holds a run"):
        train(tmp_path, resume="never")


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    assert train(folder, save_full=True) == 0
    return folder


def test_stage_2_refuses_to_start_without_a_trained_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="begins with a trained adapter, and there is none"):
        train(tmp_path, train_step="adapter rwkv")
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="has no adapter in it"):
        train(tmp_path, train_step="adapter rwkv", load_adapter=str(vision_files() / MODEL))


def test_stage_2_takes_the_given_adapter_and_trains_all_but_the_encoder(
    stage_1: Path, tmp_path: Path, seen: Seen
) -> None:
    adapter = stage_1 / "adapter-final.safetensors"
    assert train(tmp_path, train_step="proj llm", load_adapter=str(adapter), lr_init=1e-4) == 0
    trained = load_weights(adapter)
    for name, tensor in trained.items():
        assert torch.equal(seen.before[f"adapter.{name}"], tensor), "it began with that adapter"
    changed = seen.changed()
    assert {n for n in seen.before if n.startswith("adapter.")} <= changed
    unused = {f"llm.blocks.0.att.v{i}" for i in range(3)}
    llm = {n for n in seen.before if n.startswith("llm.")} - unused
    assert llm <= changed and not any(n.startswith("encoder.") for n in changed)
    full = load_weights(tmp_path / "rwkv-final.pth")
    now = seen.model.state_dict()
    assert all(torch.equal(full[n.removeprefix("llm.")], now[n]) for n in llm)


def test_stage_2_in_the_same_folder_takes_the_newest_adapter_and_keeps_stage_1(
    stage_1: Path, tmp_path: Path, seen: Seen
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stage_1, folder)
    assert train(folder, train_step="adapter rwkv", lr_init=1e-4) == 0
    old = load_weights(folder / "stage-1" / "adapter-final.safetensors")
    assert all(torch.equal(seen.before[f"adapter.{name}"], tensor) for name, tensor in old.items())
    assert (folder / "stage-1" / "resume").is_dir() and len(metrics(folder)) == 6
    new = load_weights(folder / "adapter-final.safetensors")
    assert not torch.equal(new["proj.0.weight"], old["proj.0.weight"])
    assert train(folder, train_step="adapter rwkv", lr_init=1e-4) == 0, "it is finished"


def test_a_packed_base_is_trained_by_lora_only(stage_1: Path, tmp_path: Path, seen: Seen) -> None:
    adapter = str(stage_1 / "adapter-final.safetensors")
    with pytest.raises(UserError, match="packed weights cannot be trained"):
        train(tmp_path, train_step="adapter rwkv", quant="nf4", load_adapter=adapter)
    options = {"train_step": "adapter rwkv", "quant": "nf4", "load_adapter": adapter}
    peft_config = '{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}'
    run_settings = options | {"peft": "lora", "peft_config": peft_config}
    assert train(tmp_path, **run_settings, save_full=True) == 0
    changed = seen.changed()
    lora = {name for name in seen.before if ".lora_" in name}
    assert lora and changed == lora | {n for n in seen.before if n.startswith("adapter.")}
    assert all(4 in seen.before[name].shape for name in lora)
    estimates = []
    for rank in (4, 8):  # twice the rank, twice LoRA's parameters; 4 bytes, gradient, two moments
        changes = options | {"peft": "lora", "peft_config": json.dumps({"r": rank})}
        job, _ = first_batch(tmp_path / f"r{rank}", **changes)
        config = from_flat(settings(tmp_path, **changes))
        estimates.append(memory_estimate(config, job.sizes, "cpu"))
    assert estimates[1] - estimates[0] == 16 * sum(seen.before[name].numel() for name in lora)
    assert (tmp_path / "lora-final" / "adapter_model.safetensors").exists()
    merged = load_vision(tmp_path).model.llm  # of rwkv-final.pth
    with torch.no_grad():
        x = torch.randn(1, 5, 64)
        theirs = seen.model.llm.eval()(inputs_embeds=x)[0]
        torch.testing.assert_close(merged(inputs_embeds=x)[0], theirs, rtol=1e-4, atol=1e-4)


def test_a_pissa_run_goes_on_to_the_same_bits_and_on_no_other_base(
    stage_1: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base.pth"
    weights = load_weights(vision_files() / MODEL)
    save_weights(base, weights)
    options: dict[str, Any] = {
        "train_step": "adapter rwkv", "peft": "pissa", "peft_config": '{"r": 4}', "epoch_steps": 1,
        "load_adapter": str(stage_1 / "adapter-final.safetensors"), "load_model": str(base),
        "lr_schedule": "constant", "lr_init": 1e-3,
    }  # fmt: skip
    assert train(tmp_path / "whole", **options, epoch_count=2) == 0
    for epochs in (1, 2):
        assert train(tmp_path / "parts", **options, epoch_count=epochs) == 0
    file = "lora-final/adapter_model.safetensors"
    whole, parts = (load_weights(tmp_path / name / file) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    base.unlink()
    save_weights(base, weights | {"ln_out.bias": weights["ln_out.bias"] + 1e-3})
    with pytest.raises(UserError, match="has other values than the weights"):
        train(tmp_path / "parts", **options, epoch_count=3)


def test_the_encoder_is_trained_and_saved_where_that_was_asked_for(
    stage_1: Path, tmp_path: Path, seen: Seen
) -> None:
    adapter = str(stage_1 / "adapter-final.safetensors")
    assert train(tmp_path, train_step="adapter moda", load_adapter=adapter, lr_init=1e-3) == 0
    changed = seen.changed()
    assert any(n.startswith("encoder.") for n in changed)
    assert not any(n.startswith("llm.") for n in changed)
    saved = read_adapter(tmp_path)
    now = seen.model.encoder.model.state_dict()  # type: ignore[union-attr]
    assert saved.encoder_weights.keys() == now.keys()
    loaded = load_vision(tmp_path).model.encoder.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(loaded[n], now[n]) for n in now)

    # Frozen again it stays what it has become, over a resume and into the next adapter's file.
    trained = {n: t.clone() for n, t in now.items()}
    last = {"load_adapter": str(tmp_path / "adapter-final.safetensors"), "epoch_steps": 1}
    for epochs in (1, 2):
        assert train(tmp_path / "next", **last, epoch_count=epochs) == 0
        assert not any(n.startswith("encoder.") for n in seen.changed())
        loaded = load_vision(tmp_path / "next").model.encoder.model.state_dict()  # type: ignore[union-attr]
        assert all(torch.equal(loaded[n], trained[n]) for n in trained)


def test_a_full_file_holds_the_base_untouched_and_the_adapter(stage_1: Path) -> None:
    full, base = load_weights(stage_1 / "rwkv-final.pth"), load_weights(vision_files() / MODEL)
    assert all(torch.equal(full[name], tensor.float()) for name, tensor in base.items())
    adapter = load_weights(stage_1 / "adapter-final.safetensors")
    prefix = "modality.world_encoder.adapter."
    assert {n for n in full if n not in base} == {prefix + n for n in adapter}


@pytest.mark.parametrize("style", ["first", "later"])
def test_published_files_of_both_styles_give_the_same_answers(
    style: str, stage_1: Path, tmp_path: Path
) -> None:
    full = load_weights(stage_1 / "rwkv-final.pth")
    if style == "later":
        prefix = "modality.world_encoder.adapter."
        full = {
            f"proj.{n.removeprefix(prefix).replace('proj.', 'mlp.')}"
            if n.startswith(prefix)
            else f"llm.{n}": tensor
            for n, tensor in full.items()
        }
    save_weights(tmp_path / "rwkv-0.pth", full)
    names = {"encoder_path": settings(tmp_path)["encoder_path"], "tokenizer": "bytes"}
    theirs = load_vision(tmp_path / "rwkv-0.pth", **names).model.state_dict()
    ours = load_vision(stage_1, load_model=str(vision_files() / MODEL)).model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_wrong_shapes_warn_with_the_right_ones_or_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, n_layer=24, n_embd=1024, dim_att=96, epoch_steps=1) == 0
    said = capsys.readouterr().out
    assert "n_layer 24 (the file's is 2), n_embd 1024 (the file's is 64), dim_att 96 (" in said
    assert train(tmp_path / "right", n_layer=2, dim_att=64, epoch_steps=1) == 0
    assert "wrong shapes" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"n_layer 24 \(the file's is 2\)"):
        train(tmp_path / "strict", n_layer=24, strict_shape=True)


def plan_of(total_steps: int) -> Plan:
    return Plan(1, 256, 1, 750, total_steps, total_steps, total_steps)


def test_the_published_schedule_has_the_published_values() -> None:
    """wsd with 100 more warmup steps over 10,000: numbers from the published program."""
    config = VisionConfig(lr_schedule="wsd", lr_init=1e-3, warmup_steps=100)
    lr = make_schedule(config, plan_of(10_000)).lr_at
    assert lr(0) == 0 and lr(100) == 1e-3
    published = {10: 1.09e-5, 50: 2.53e-4, 99: 9.80e-4, 1000: 9.80e-4, 5000: 5.08e-4}
    for step, value in published.items():
        assert lr(step) == pytest.approx(value, rel=5e-3)
    assert lr(9999) == pytest.approx(0, abs=1e-9)


def test_the_other_schedules_are_what_their_names_say() -> None:
    def lr(kind: Any, **more: Any) -> Any:
        config = VisionConfig(lr_schedule=kind, lr_init=1.0, warmup_steps=-1, **more)
        return make_schedule(config, plan_of(1000)).lr_at

    cos = lr("cos", lr_final=0.1)
    assert cos(0) == 1 and cos(250) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    stable = lr("wsd_stable", lr_final=0.0)
    assert stable(0) == stable(799) == 1
    assert stable(900) == pytest.approx(1 - math.sqrt(0.5))
    assert lr("constant")(999) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train_step": "adapter nothing"}, "names nothing"),
        ({"train_step": ""}, "names nothing"),
        ({"adapter_conv": "3"}, "KERNEL,STRIDE"),
        ({"quant": "fp8"}, "quant='fp8' must be one of"),
        ({"peft": "lora"}, "would train nothing"),
        ({"peft_config": "{"}, "needs --peft lora"),
        ({"train_step": "rwkv", "peft": "lora", "peft_config": "{"}, "is no JSON object"),
        ({"train_step": "rwkv", "peft": "pissa", "quant": "nf4"}, "pissa takes its first"),
        (
            {"train_step": "rwkv", "peft": "lora", "peft_config": '{"init_lora_weights": "eva"}'},
            "changes the base's weights",
        ),
        (
            {"train_step": "rwkv", "peft": "lora", "peft_config": '{"rank": 4}'},
            "peft_config has rank, which peft's LoraConfig does not know",
        ),
        ({"load_model": ""}, "load_model is missing"),
        ({"encoder_type": "clip"}, "is a siglip_vision_model checkpoint"),
        ({"encoder_type": "whisper"}, "encodes speech"),
        ({"encoder_type": "eyes"}, "is unknown"),
        ({"encoder_path": "no/such/folder"}, "there is no such folder"),
        ({"data_file": "no/such"}, "there is no such folder"),
        ({"form": "placeholder"}, "use form=prefix"),
        ({"ctx_len": 9}, "a picture takes 9 tokens"),
        ({"global_bsz": 6}, "no multiple of micro_bsz 4"),
        ({"epoch_steps": 3, "accumulate_grad_batches": 4}, "one optimizer step takes 4"),
        ({"adapter_shuffle": 2}, "pixel shuffle"),
        ({"adapter_conv": "12,2"}, "needs at least 12 tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        train(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_adapters_with_fewer_tokens_train_and_are_loaded_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "conv": {"adapter_conv": "3,2"},
        "shuffle": {"adapter_shuffle": 3, "adapter_form": "linear"},
    }
    for name, options in kinds.items():
        assert train(tmp_path / name, **options, epoch_steps=2) == 0
        tokens = {"conv": 4, "shuffle": 1}[name]
        assert f"{tokens} tokens of width 64 per picture" in capsys.readouterr().out
        assert load_vision(tmp_path / name).assembly.image_tokens == tokens


def test_validation_measures_the_mean_loss_per_label(tmp_path: Path) -> None:
    data = str(vision_files() / DATA)
    assert train(tmp_path, val_data_file=data, epoch_steps=1, lr_init=0.0) == 0
    job, batch = first_batch(tmp_path / "other")
    whole = job.data.batch(list(range(len(job.data))))
    model = vision._build_model(from_flat(settings(tmp_path)), job)[0]
    with torch.no_grad():
        mean = float(vision._loss_sum(model, whole)) / whole.target_tokens
    assert float(metrics(tmp_path)[-1]["val_loss"]) == pytest.approx(mean, rel=1e-5)


def test_cached_features_train_the_same_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(tmp_path / "cache")
    assert train(tmp_path / "without") == 0
    assert train(tmp_path / "with", feature_cache=cache) == 0
    assert "48 pictures, 48 of them new" in capsys.readouterr().out
    # Batches of another size may round the encoder's products otherwise.
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)
    assert train(tmp_path / "again", feature_cache=cache) == 0
    assert "48 pictures, 0 of them new" in capsys.readouterr().out
    assert losses(tmp_path / "again") == losses(tmp_path / "with")
    with pytest.raises(UserError, match=r"was made otherwise: dtype fp32, now bf16"):
        train(tmp_path / "other", feature_cache=cache, precision="bf16")
    with pytest.raises(UserError, match="more than cache_limit_gb=1e-06"):
        train(tmp_path / "small", feature_cache=str(tmp_path / "c"), cache_limit_gb=1e-6)


def test_batches_without_any_picture_train_with_cached_features_too(tmp_path: Path) -> None:
    shutil.copytree(vision_files() / DATA, tmp_path / "data")
    chat = tmp_path / "data" / "chat.json"
    records = json.loads(chat.read_text())[:2]
    talk = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    chat.write_text(json.dumps([*records, {"conversations": talk}, {"conversations": talk}]))
    options = {"data_file": str(tmp_path / "data"), "micro_bsz": 1, "epoch_steps": 4}
    assert train(tmp_path / "without", **options) == 0
    assert train(tmp_path / "with", **options, feature_cache=str(tmp_path / "cache")) == 0
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


def test_generate_points_from_a_vision_run_to_the_command_that_asks_it(
    stage_1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(stage_1 / "adapter-final.safetensors", tmp_path)
    assert guarded("generate", [str(tmp_path), "--prompt", "x"]) == 2
    assert f"rwkvtune vision generate {tmp_path}" in capsys.readouterr().err
