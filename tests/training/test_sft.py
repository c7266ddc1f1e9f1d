"""Fine-tuning: packed rows equal conversations trained apart; a step means the same however it is
divided; a run that was killed ends as one that was not."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.cli.main import main
from rwkvtune.data.batch import Batch
from rwkvtune.data.chat import find_template, load_template
from rwkvtune.data.chat_batches import batch_of
from rwkvtune.data.chat_samples import ChatSamples, read_samples
from rwkvtune.data.tokenizers import ByteTokenizer, find_tokenizer
from rwkvtune.models import CONFIG_CLASSES, build_model
from rwkvtune.training.config import OptimizerOptions
from rwkvtune.training.lm import next_token_loss
from tests.training.runs import Blow, flags, losses, metrics, outcome, run, start_ranks

SETTINGS = {
    "tokenizer": "bytes", "n_layer": 2, "n_embd": 64, "ctx_len": 96, "threads": 1,
    "precision": "fp32", "accelerator": "cpu", "log_every": 1, "micro_bsz": 4, "lr_init": 1e-3,
    "warmup_steps": 2, "sample_tokens": 5, "val_share": 0.1,
}  # fmt: skip
TOLERANCE = 1e-5


def write_chats(path: Path, count: int = 60) -> Path:
    dice = random.Random(5)
    with path.open("w") as file:
        for n in range(count):
            word = "".join(dice.choices("abcdef", k=dice.randint(1, 9)))
            turns = [{"role": "user", "content": word}, {"role": "assistant", "content": word}]
            file.write(json.dumps({"messages": turns * (1 + n % 2)}) + "\n")
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="module")
def samples(chats: Path) -> ChatSamples:
    found, _ = read_samples(
        str(chats), ByteTokenizer(), load_template("g1"), ctx_len=96, on_bad_sample="error"
    )
    return found


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Runs set torch's thread count; the tests after these find theirs again."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
def test_a_packed_row_has_the_loss_and_gradients_of_its_conversations_apart(
    version: str, samples: ChatSamples
) -> None:
    model = build_model(CONFIG_CLASSES[version](vocab_size=257, n_layer=2, n_embd=64), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # at their initial values, blocks add nothing
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)

    def trained(batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
        """Mean loss over all targets, and its gradients, conversation after conversation."""
        model.zero_grad(set_to_none=True)
        targets = sum(b.target_tokens for b in batches)
        total = 0.0
        for batch in batches:
            loss, *_ = next_token_loss(model, batch, None, OptimizerOptions())
            (loss / targets).backward()
            total += loss.item() / targets
        named = model.named_parameters()
        return total, {name: p.grad.clone() for name, p in named if p.grad is not None}

    row = [7, 2, 11, 4]
    apart = []
    for n in row:
        ids, next_ids, is_trained = (torch.tensor(part.tolist()) for part in samples.shifted(n))
        apart.append(Batch(ids[None], torch.where(is_trained, next_ids, -100)[None]))
    loss, gradients = trained([batch_of(samples, [row])])
    expected_loss, expected = trained(apart)
    assert loss == pytest.approx(expected_loss, abs=TOLERANCE)
    assert gradients.keys() == expected.keys() and len(expected) > 30
    for name in expected:
        scale = max(1.0, float(expected[name].abs().max()))
        assert (gradients[name] - expected[name]).abs().max() < TOLERANCE * scale, name
    batch = batch_of(samples, [row])
    without, _ = trained([Batch(batch.input_ids, batch.targets)])
    assert abs(without - expected_loss) > 1e-3, "the resets matter"


def sft(chats: Path, folder: Path, **changes: object) -> list[str]:
    paths = {"data_file": chats, "proj_dir": folder}
    return ["sft", *flags(SETTINGS | paths | changes)]


@pytest.fixture(scope="module")
def alone(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    ended = run(sft(chats, folder), folder.parent / "out")
    assert ended.code == 0, ended.output
    return folder


def test_losses_are_weighed_by_tokens_over_accumulation_and_ranks(
    alone: Path, chats: Path, tmp_path: Path
) -> None:
    parts = {"micro_bsz": 1, "accumulate_grad_batches": 4}
    assert run(sft(chats, tmp_path / "parts", **parts), tmp_path / "out").code == 0
    parts["accumulate_grad_batches"] = 2
    # torch 2.6 has FSDP2 for GPUs only.
    strategies = ("ddp", "fsdp") if hasattr(torch.cpu.Stream, "record_event") else ("ddp",)
    for strategy in strategies:
        args = sft(chats, tmp_path / strategy, strategy=strategy, **parts)
        ended = [rank.wait() for rank in start_ranks(args, tmp_path, 2)]
        assert [e.code for e in ended] == [0, 0], ended
    for name in ("parts", *strategies):
        assert losses(tmp_path / name) == pytest.approx(losses(alone), abs=TOLERANCE)
        last, expected = metrics(tmp_path / name)[-1], metrics(alone)[-1]
        for column in ("val_loss", "val_bits_per_byte", "grad_norm"):
            assert float(last[column]) == pytest.approx(float(expected[column]), rel=1e-4)


def test_killed_at_random_moments_a_run_ends_as_if_never_stopped(
    alone: Path, chats: Path, tmp_path: Path
) -> None:
    more = {"epoch_count": 2, "save_every": 3, "batching": "bucketed", "freeze": "emb.*"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = run(sft(chats, whole, **more), tmp_path / "out")
    assert ended.code == 0, ended.output
    dice = random.Random(6)
    for _ in range(6):
        blow = Blow(dice.randint(1, 110), str(killed))
        ended = run(sft(chats, killed, **more), tmp_path / "out", blow)
        assert ended.code in (-9, 0), ended.output
    ended = run(sft(chats, killed, **more), tmp_path / "out")
    assert ended.code == 0, ended.output
    result, expected = outcome(killed), outcome(whole)
    assert result.keys() == expected.keys()
    for part in expected:
        assert result[part] == expected[part]
    assert (killed / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()


def test_the_base_and_the_tuned_model_are_measured_on_what_was_held_out(
    alone: Path, chats: Path
) -> None:
    """Against cross entropy in fp64, one conversation at a time, over the bytes of the answers."""
    found, _ = read_samples(
        str(chats), ByteTokenizer(), load_template("g1"), ctx_len=96, on_bad_sample="error"
    )
    _, held_out = found.divided(0.1, seed=42)
    evaluation = json.loads((alone / "evaluation.json").read_text())
    for name, file in (("base", "rwkv-init.pth"), ("tuned", "rwkv-final.pth")):
        weights = load_weights(alone / file)
        model = build_model(CONFIG_CLASSES["x070"](257, 2, 64), initial_values=False)
        model.load_state_dict(weights)
        nats, count, num_bytes = 0.0, 0, 0
        for n in range(len(held_out)):
            ids, next_ids, trained = (torch.tensor(p.tolist()) for p in held_out.shifted(n))
            with torch.no_grad():
                logits = model(ids[None])[0][0].double()
            each = torch.nn.functional.cross_entropy(logits, next_ids, reduction="none")
            nats += float(each[trained].sum())
            count += int(trained.sum())
            num_bytes += int((next_ids[trained] > 0).sum())
        assert evaluation[name]["val_loss"] == pytest.approx(nats / count, abs=1e-5)
        bits = nats / math.log(2) / num_bytes
        assert evaluation[name]["val_bits_per_byte"] == pytest.approx(bits, abs=1e-5)
    assert evaluation["tuned"]["val_loss"] < evaluation["base"]["val_loss"] - 1
    first = metrics(alone)[0]
    assert first["step"] == "0"
    assert float(first["val_loss"]) == pytest.approx(evaluation["base"]["val_loss"])


def test_a_run_folder_keeps_tokenizer_and_template(alone: Path) -> None:
    tokenizer, template = find_tokenizer(alone), find_template(alone)
    assert tokenizer is not None and tokenizer.name == "bytes"
    assert template is not None and template.to_json() == {"kind": "g1"}


def test_frozen_parameters_keep_their_bits_and_others_move(
    alone: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = alone / "rwkv-final.pth"
    only = {"load_model": base, "train_only": "blocks.1.att.*", "freeze": "*.ln_x.*"}
    fresh = ("n_layer", "n_embd", "tokenizer")
    args = flags({k: v for k, v in SETTINGS.items() if k not in fresh} | only)
    paths = ["--data_file", str(chats), "--proj_dir", str(tmp_path / "run")]
    assert main(["sft", *args, *paths]) == 0
    assert "of them trained" in capsys.readouterr().out
    before, after = load_weights(base), load_weights(tmp_path / "run" / "rwkv-final.pth")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {n for n in before if n.startswith("blocks.1.att.") and ".ln_x." not in n}
    assert moved == wanted
    capsys.readouterr()
    for pattern, message in (("embedding.*", "fits no parameter"), ("*", "nothing to train")):
        folder = tmp_path / "refused"
        argv = ["--freeze", pattern, "--proj_dir", str(folder), "--data_file", str(chats)]
        assert main(["sft", "--load_model", str(base), *argv]) == 2
        assert message in capsys.readouterr().err and not folder.exists()


def test_what_cannot_be_trained_is_refused_before_a_folder_is_made(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*argv: object) -> str:
        folder = ["--proj_dir", str(tmp_path / "run")]
        assert main(["sft", *map(str, argv), *folder]) == 2
        assert not (tmp_path / "run").exists()
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    assert "give a .jsonl file of conversations" in refused()
    assert "load_model is missing" in refused("--data_file", chats)
    fresh = ["--n_layer", 1, "--n_embd", 64]
    assert "give --tokenizer" in refused("--data_file", chats, *fresh)
    cut = tmp_path / "cut.pth"
    save_weights(cut, {"emb.weight": torch.zeros(257, 64)})
    cut.write_bytes(cut.read_bytes()[:-2000])
    assert str(cut) in refused("--data_file", chats, "--load_model", cut)
    short = ["--data_file", chats, *fresh, "--tokenizer", "bytes", "--ctx_len", 20]
    assert "chats.jsonl: line " in refused(*short)
    assert "val_share=1.5 must be in" in refused(*short, "--val_share", 1.5)
    text = tmp_path / "chats.txt"
    text.write_text("x")
    assert "reads .jsonl files" in refused("--data_file", text, *fresh, "--tokenizer", "bytes")
    missing = tmp_path / "none.jsonl"
    assert "no such file" in refused("--data_file", missing, *fresh, "--tokenizer", "bytes")
