from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rwkvtune.checkpoint import (
    load_resume_state,
    load_weights,
    newest_resume_state,
    prune_resume_states,
    resume_folder,
    save_resume_state,
    save_weights,
)
from rwkvtune.errors import MissingFileError, UserError

ROOT = Path(__file__).parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def some_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "emb.weight": torch.randn(11, 8, generator=generator),
        "blocks.0.att.x_r": torch.randn(1, 1, 8, generator=generator),
        "blocks.0.att.r_k": torch.randn(2, 4, generator=generator),
        "head.weight": torch.randn(11, 8, generator=generator),
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


# Weights: what is written, read by other programs and by ourselves


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16", "fp16", torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_programs_and_we_read_back_what_was_saved(
    tmp_path: Path, suffix: str, dtype: str | torch.dtype | None
) -> None:
    path = tmp_path / f"rwkv-3{suffix}"
    weights = some_weights()
    stored_dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype or torch.float32
    expected = {name: tensor.to(stored_dtype) for name, tensor in weights.items()}
    save_weights(path, weights, dtype=dtype)
    if suffix == ".pth":  # exactly how the rwkv package opens it
        theirs = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        assert type(theirs) is dict and list(theirs) == list(weights)
    else:
        theirs = safetensors.torch.load_file(path)
    assert same(theirs, expected)
    assert same(load_weights(path), expected)
    assert os.listdir(tmp_path) == [path.name]


def test_every_storable_dtype_and_shape_is_read_back_by_the_safetensors_library(
    tmp_path: Path,
) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]
    dtypes += [torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {}
    for dtype in dtypes:
        for shape in [(), (0,), (3,), (2, 0, 3), (5, 7)]:
            tensors[f"{dtype} {shape} ü"] = torch.arange(torch.Size(shape).numel()).to(dtype)
            tensors[f"{dtype} {shape} ü"] = tensors[f"{dtype} {shape} ü"].reshape(shape)
    path = tmp_path / "all.safetensors"
    save_weights(path, tensors)
    assert same(safetensors.torch.load_file(path), tensors)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_a_finite_value_that_fp16_makes_infinite_is_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "x.safetensors"
    kept = torch.tensor([65519.0, -65519.0, math.inf, -math.inf, math.nan, 1e-9], dtype=dtype)
    save_weights(path, {"kept": kept, "none": torch.empty(0, dtype=dtype)}, dtype="fp16")
    found = load_weights(path)["kept"]
    assert torch.equal(found[:4].float(), torch.tensor([65504.0, -65504, math.inf, -math.inf]))
    assert found[4].isnan() and found[5] == 0
    for value in (65520.0, -65520.0):
        with pytest.raises(UserError, match="beyond fp16"):
            save_weights(path, {"x": torch.tensor([1.0, value], dtype=dtype)}, dtype="fp16")


def test_a_pth_holds_what_torch_itself_would_have_saved(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.pth", tmp_path / "theirs.pth"
    kinds = [torch.float64, torch.float16, torch.int64, torch.int16, torch.uint8, torch.bool]
    weights = {f"of {kind}": torch.arange(5).to(kind) for kind in kinds}
    weights |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "one": torch.ones(1, 1, 7)}
    save_weights(ours, weights)
    torch.save(weights, theirs)
    for mmap in (False, True):
        mine, torchs = (torch.load(p, weights_only=True, mmap=mmap) for p in (ours, theirs))
        assert same(mine, torchs) and list(mine) == list(torchs)
        assert [t.stride() for t in mine.values()] == [t.stride() for t in torchs.values()]
    # torch.save puts the data of each tensor where any processor reads it fast.
    assert all(t.data_ptr() % 64 == 0 for t in mine.values() if t.numel())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_views_parameters_and_tied_tensors_are_saved_alone(tmp_path: Path, suffix: str) -> None:
    big = torch.randn(1000, 1000)
    parameter = torch.nn.Parameter(torch.randn(4, 4))
    weights = {
        "row": big[7],
        "transposed": big[:3, :5].t(),
        "parameter": parameter,
        "tied": parameter,
    }
    path = tmp_path / f"w{suffix}"
    save_weights(path, weights)
    assert path.stat().st_size < 10_000  # the storage behind the views has 4,000,000 bytes
    loaded = load_weights(path)
    assert same(loaded, {name: tensor.detach() for name, tensor in weights.items()})
    assert not any(tensor.requires_grad for tensor in loaded.values())
    loaded["tied"].zero_()
    assert torch.equal(loaded["parameter"], parameter.detach())
    assert torch.equal(load_weights(path)["tied"], parameter.detach())


def test_what_cannot_be_saved_is_refused_before_the_old_file_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "rwkv-1.pth"
    save_weights(path, some_weights())
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"wide.*70000.*fp16"):
        save_weights(path, {"wide": torch.tensor([1.0, -70000.0])}, dtype="fp16")
    with pytest.raises(UserError, match=r"'int4'.*fp32, bf16 or fp16"):
        save_weights(path, some_weights(), dtype="int4")
    with pytest.raises(UserError, match=r"torch.int8.*fp32, bf16 or fp16"):
        save_weights(path, some_weights(), dtype=torch.int8)
    with pytest.raises(UserError, match=r"\.pth or \.safetensors"):
        save_weights(tmp_path / "rwkv-1.ckpt", some_weights())
    with pytest.raises(TypeError, match="complex64"):
        save_weights(path, {"c": torch.zeros(2, dtype=torch.complex64)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    infinite = {"inf": torch.tensor([float("inf"), 1.0])}
    save_weights(path, infinite, dtype="fp16")  # infinite already: nothing is lost
    assert same(load_weights(path), {"inf": infinite["inf"].half()})


# Weights: the forms that other programs write


@pytest.mark.parametrize(
    "form", ["flat", "ordered", "legacy", "deepspeed", "ddp", "compiled", "fsdp", "wrapped"]
)
def test_the_forms_that_other_programs_write_give_the_same_flat_weights(
    tmp_path: Path, form: str
) -> None:
    import collections

    weights = some_weights()
    content: Any = weights
    if form == "ordered":
        content = collections.OrderedDict(
            (name, torch.nn.Parameter(tensor)) for name, tensor in weights.items()
        )
    if form in ("deepspeed", "ddp", "compiled"):
        prefix = {"deepspeed": "_forward_module.", "ddp": "module."}.get(form, "_orig_mod.module.")
        content = {prefix + name: tensor for name, tensor in weights.items()}
    if form == "fsdp":
        inner = "_checkpoint_wrapped_module."
        content = {
            "_fsdp_wrapped_module." + name.replace("att.", "att." + inner): tensor
            for name, tensor in weights.items()
        }
    if form == "wrapped":
        content = {"epoch": 3, "state_dict": weights}
    path = tmp_path / "theirs.pth"
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    assert same(load_weights(path), weights)


def test_a_file_without_checksums_inside_loads(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(some_weights(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load_weights(path), some_weights())


def test_the_suffix_does_not_matter_for_loading(tmp_path: Path) -> None:
    safetensors.torch.save_file(some_weights(), tmp_path / "renamed.pth")
    assert same(load_weights(tmp_path / "renamed.pth"), some_weights())


# Weights: files that are not what they should be


class MakesAFolder:
    """Pickles as a call of os.mkdir, which a loader that runs code from a file would make."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_inside_a_file_is_refused_and_never_run(tmp_path: Path, form: str) -> None:
    path, proof = tmp_path / "bad.pth", tmp_path / "executed"
    content = {"emb.weight": torch.zeros(2), "evil": MakesAFolder(proof)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(MakesAFolder(proof)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        load_weights(path)
    assert not proof.exists()
    if form != "pickle":
        assert "mkdir" in str(caught.value) and "never runs code" in str(caught.value)
    pickle.loads(pickle.dumps(MakesAFolder(proof)))  # the proof would have worked
    assert proof.exists()


def bytes_of(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"hello", "not a weights file"),
        (b"PK\x03\x04", "cut short or damaged"),
        (b"\x80\x02", "cut short or damaged"),
        (b"\x80\x02}q\x00.", "cut short or damaged"),
        (b"\x10\0\0\0\0\0\0\0{}", "cut short or damaged"),
        (struct.pack("<Q", 1 << 62) + b"{}", "cut short or damaged"),
        (bytes_of({}), "an empty dictionary"),
        (bytes_of([torch.zeros(2)]), "type list"),
        (bytes_of({"w": torch.zeros(2), "step": 7}), "'step' is a value of type int"),
        (bytes_of({"w": {"deeper": torch.zeros(2)}}), "'w' is a dictionary"),
        (bytes_of({3: torch.zeros(2)}), "entry 3"),
        (bytes_of({"w": torch.zeros(2).to_sparse()}), "sparse"),
        (bytes_of({"w": torch.zeros(2, device="meta")}), "on meta"),
        (bytes_of({"w": torch.zeros(2), "module.w": torch.zeros(2)}), "w twice"),
    ],
)
def test_a_file_that_is_not_whole_weights_gives_one_clear_error(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_reported_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no \.pth or \.safetensors"):
        load_weights(tmp_path / "rwkv-9.pth")
    for n in range(12):
        save_weights(tmp_path / f"rwkv-{n:02d}.pth", {"w": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match=r"rwkv-00\.pth, .*rwkv-09\.pth and 2 more"):
        load_weights(tmp_path / "rwkv-99.pth")
    with pytest.raises(UserError, match=r"is a folder.*rwkv-00\.pth"):
        load_weights(tmp_path)
    with pytest.raises(MissingFileError, match="does not exist either"):
        load_weights(tmp_path / "typo" / "rwkv-1.pth")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(UserError, match="compressed"):
        load_weights(path)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, form: str) -> None:
    path = tmp_path / "w.pth"
    if form == "safetensors":
        safetensors.torch.save_file(some_weights(), path)
    else:
        torch.save(some_weights(), path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    cuts = {1, 7, 8, 9, len(whole) - 1, *(len(whole) * i // 30 for i in range(1, 30))}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError):
            load_weights(path)


def test_a_flipped_byte_in_a_pth_is_noticed_wherever_it_would_change_the_weights(
    tmp_path: Path,
) -> None:
    path = tmp_path / "w.pth"
    save_weights(path, some_weights())
    whole = path.read_bytes()
    noticed = 0
    offsets = random.Random(5).sample(range(len(whole)), 200)
    for offset in offsets:
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x41]) + whole[offset + 1 :])
        try:
            assert same(load_weights(path), some_weights()), f"offset {offset}"
        except UserError:
            noticed += 1
    assert noticed > 50  # the rest hits padding and file dates


# Resume states


def state_of(step: int) -> dict[str, Tensor]:
    return {
        "model.w": torch.full((300, 100), float(step)),
        "optimizer.m": torch.full((17,), step, dtype=torch.bfloat16),
        "rng": torch.get_rng_state(),
        "count": torch.tensor(step),
    }


def run_with_states(run_dir: Path, *steps: int) -> None:
    for step in steps:
        save_resume_state(resume_folder(run_dir, step), state_of(step), {"step": step})


def test_a_resume_state_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    folder = resume_folder(tmp_path, 1234)
    meta: dict[Any, Any] = {
        "step": 1234,
        "tokens": 2**70,
        "loss": 0.1 + 0.2,
        "tiny": 5e-324,
        "worst": float("-inf"),
        "text": "ü ☃ \ud800",
        "nested": {"10": [1, None, True], "9": []},
        10: "a number as key",
    }
    save_resume_state(folder, state_of(1234), meta)
    assert folder == tmp_path / "resume" / "step-00001234"
    assert sorted(os.listdir(folder)) == ["state.json", "state.safetensors"]
    assert newest_resume_state(tmp_path) == folder
    tensors, loaded = load_resume_state(folder)
    assert same(tensors, state_of(1234))
    meta["10"] = meta.pop(10)
    assert loaded == meta
    assert same(safetensors.torch.load_file(folder / "state.safetensors"), state_of(1234))


def test_meta_or_tensors_that_cannot_be_stored_are_refused_before_writing(tmp_path: Path) -> None:
    folder = resume_folder(tmp_path, 1)
    with pytest.raises(TypeError, match="set is not JSON"):
        save_resume_state(folder, state_of(1), {"a": {1, 2}})
    with pytest.raises(TypeError, match="z: cannot store"):
        save_resume_state(folder, {"z": torch.zeros(1, dtype=torch.complex64)}, {})
    assert os.listdir(tmp_path) == []


def test_the_newest_state_is_taken_by_number_and_nothing_else_is_mistaken_for_one(
    tmp_path: Path,
) -> None:
    assert newest_resume_state(tmp_path) is None
    run_with_states(tmp_path, 99_999_999, 5, 100_000_000)
    (tmp_path / "resume" / ".tmp-1-step-200000000").mkdir()
    (tmp_path / "resume" / "step-300000000.bak").mkdir()
    (tmp_path / "resume" / "step-400000000").write_text("a file")
    assert newest_resume_state(tmp_path) == resume_folder(tmp_path, 100_000_000)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def make_folder(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    path.mkdir()


T, J = "state.safetensors", "state.json"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped in the data": (lambda f: flip(f / T, -50), "checksum"),
    "flipped in the tensor header": (lambda f: flip(f / T, 20), "checksum"),
    "flipped in the length": (lambda f: flip(f / T, 0), "checksum"),
    "tensors cut at the end": (lambda f: cut(f / T, (f / T).stat().st_size - 1), "bytes of"),
    "tensors cut in the middle": (lambda f: cut(f / T, 60_000), "60,000 bytes of"),
    "tensors empty": (lambda f: cut(f / T, 0), "0 bytes of"),
    "tensors longer": (lambda f: cut(f / T, 999_999), "999,999 bytes of"),
    "tensors missing": (lambda f: (f / T).unlink(), "state.safetensors is missing"),
    "json missing": (lambda f: (f / J).unlink(), "state.json is missing"),
    "json empty": (lambda f: cut(f / J, 0), "not what was written"),
    "json cut": (lambda f: cut(f / J, 40), "not what was written"),
    "json of another kind": (lambda f: (f / J).write_text("[1]"), "not what was written"),
    "json nested too deep": (lambda f: (f / J).write_text("[" * 99_999), "not what was written"),
    "json not text": (lambda f: (f / J).write_bytes(b"\xff\xfe"), "not what was written"),
    "json is a folder": (lambda f: make_folder(f / J), "cannot be read"),
    "step changed by hand": (
        lambda f: (f / J).write_text((f / J).read_text().replace('"step": 30', '"step": 31')),
        "state.json does not agree",
    ),
    "folder empty": (lambda f: make_folder(f), "state.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_passed_over_with_one_line(tmp_path: Path, damage: str) -> None:
    run_with_states(tmp_path, 10, 20, 30)
    newest = resume_folder(tmp_path, 30)
    do_damage, reason = DAMAGES[damage]
    do_damage(newest)
    lines: list[str] = []
    assert newest_resume_state(tmp_path, report=lines.append) == resume_folder(tmp_path, 20)
    assert len(lines) == 1 and str(newest) in lines[0] and reason in lines[0]
    with pytest.raises(UserError, match=reason):
        load_resume_state(newest)


def test_any_flipped_bit_in_the_json_is_noticed(tmp_path: Path) -> None:
    run_with_states(tmp_path, 1, 2)
    path = resume_folder(tmp_path, 2) / J
    whole = path.read_bytes()
    for offset in range(len(whole)):
        flip(path, offset)
        if newest_resume_state(tmp_path, report=lambda line: None) != path.parent.with_name(
            "step-00000001"
        ):
            # Only a byte that means nothing to JSON, such as one space for another, may pass.
            assert json.loads(path.read_bytes()) == json.loads(whole)
        path.write_bytes(whole)


def test_a_later_format_is_named_and_not_misread(tmp_path: Path) -> None:
    from rwkvtune.checkpoint import _json_crc

    run_with_states(tmp_path, 1)
    path = resume_folder(tmp_path, 1) / J
    state = json.loads(path.read_text())
    state["format"] = 2
    del state["crc32"]
    path.write_text(json.dumps({**state, "crc32": _json_crc(state)}))
    with pytest.raises(UserError, match="has format 2, this version reads 1"):
        load_resume_state(path.parent)


def test_when_all_states_are_damaged_the_run_does_not_begin_anew_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with_states(tmp_path, 1, 2)
    for step in (1, 2):
        flip(resume_folder(tmp_path, step) / T, -1)
    with pytest.raises(UserError, match="all 2 resume states"):
        newest_resume_state(tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(MissingFileError, match="no resume state"):
        load_resume_state(resume_folder(tmp_path, 3))


def test_a_state_that_a_killed_replacement_had_moved_aside_is_found(tmp_path: Path) -> None:
    run_with_states(tmp_path, 1, 2)
    folder = resume_folder(tmp_path, 2)
    aside = folder.with_name(f".old-99-{folder.name}")
    folder.rename(aside)
    assert newest_resume_state(tmp_path) == aside
    assert load_resume_state(aside)[1] == {"step": 2}
    run_with_states(tmp_path, 2)
    assert newest_resume_state(tmp_path) == folder


def test_pruning_keeps_the_newest_good_states(tmp_path: Path) -> None:
    def steps() -> list[str]:
        return sorted(os.listdir(tmp_path / "resume"))

    run_with_states(tmp_path, *range(1, 8))
    assert len(prune_resume_states(tmp_path, 5)) == 2
    assert steps() == [f"step-{step:08d}" for step in (3, 4, 5, 6, 7)]
    flip(resume_folder(tmp_path, 7) / T, -1)
    (resume_folder(tmp_path, 6) / J).unlink()
    prune_resume_states(tmp_path, 1)
    assert steps() == [f"step-{step:08d}" for step in (5, 6, 7)]
    run_with_states(tmp_path, 7)
    prune_resume_states(tmp_path, 1, just_written=resume_folder(tmp_path, 7))
    assert steps() == ["step-00000007"]
    assert prune_resume_states(tmp_path, 1) == []
    with pytest.raises(UserError, match="at least 1"):
        prune_resume_states(tmp_path, 0)


# Crashes and full disks, in processes of their own

SAVE_FOREVER = """
import os, sys, torch
from rwkvtune.checkpoint import newest_resume_state, prune_resume_states, resume_folder
from rwkvtune.checkpoint import load_resume_state, save_resume_state, save_weights
run_dir = sys.argv[1]
def save(step):
    tensors = {f"t{i}": torch.full((100_000,), float(step)) for i in range(8)}
    save_resume_state(resume_folder(run_dir, step), tensors, {"step": step})
    save_weights(f"{run_dir}/rwkv-1.pth", tensors)
    prune_resume_states(run_dir, 1, just_written=resume_folder(run_dir, step))
for line in sys.stdin:  # importing torch once for all the processes to be killed
    child = os.fork()
    if child == 0:
        newest = newest_resume_state(run_dir)
        step = load_resume_state(newest)[1]["step"] if newest else 0
        while True:
            save(step)  # the same step again first: replaces a folder
            print("saved", step, flush=True)
            step += 1
    print("child", child, flush=True)
    print("status", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and kill -9")
def test_kill_9_at_random_moments_while_saving_always_leaves_a_good_newest_state(
    tmp_path: Path,
) -> None:
    moments = random.Random(20)
    server = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert server.stdin is not None and server.stdout is not None
    last_saved, seconds_per_save = -1, 0.05
    try:
        for round_number in range(12):
            server.stdin.write("go\n")
            server.stdin.flush()
            child, saves, begin = None, 0, time.monotonic()
            while child is None or saves < round_number % 3:  # so many saves, then a part of one
                kind, number = server.stdout.readline().split()
                if kind == "child":
                    child = int(number)
                else:
                    saves, last_saved = saves + 1, int(number)
            if saves:
                seconds_per_save = (time.monotonic() - begin) / saves
            time.sleep(moments.uniform(0.0, 1.2) * seconds_per_save)
            os.kill(child, signal.SIGKILL)
            while True:
                kind, number = server.stdout.readline().split()
                if kind == "status":
                    break
                last_saved = int(number)
            assert int(number) == signal.SIGKILL
            newest = newest_resume_state(tmp_path)
            if newest is None:
                assert last_saved == -1
                continue
            tensors, meta = load_resume_state(newest)
            assert last_saved <= meta["step"] <= last_saved + 1
            assert all(torch.all(t == meta["step"]) for t in tensors.values())
            if (tmp_path / "rwkv-1.pth").exists():
                weights = load_weights(tmp_path / "rwkv-1.pth")
                assert len({float(t.mean()) for t in weights.values()}) == 1
    finally:
        server.stdin.close()
        server.wait(timeout=600)
        server.stdout.close()
    assert last_saved >= 4


FULL_DISK = """
import resource, sys, torch
from rwkvtune.checkpoint import resume_folder, save_resume_state, save_weights
from rwkvtune.errors import UserError
run_dir = sys.argv[1]
def save(value):
    weights = {f"w{i}": torch.full((100_000,), value) for i in range(4)}
    yield lambda: save_weights(f"{run_dir}/rwkv-1.pth", weights)
    yield lambda: save_weights(f"{run_dir}/rwkv-1.safetensors", weights)
    yield lambda: save_resume_state(resume_folder(run_dir, 1), weights, {"value": value})
for write in save(1.0):
    write()
for limit in (0, 1000, 1_000_000):  # bytes after which the system refuses to write on
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for write in save(2.0):
        try:
            write()
        except UserError as error:
            print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on the size of files")
def test_a_system_that_stops_taking_bytes_leaves_what_was_there(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 9
    for line in lines:
        assert str(tmp_path) in line and "bytes are free" in line
    assert sorted(os.listdir(tmp_path)) == ["resume", "rwkv-1.pth", "rwkv-1.safetensors"]
    assert os.listdir(tmp_path / "resume") == ["step-00000001"]
    for tensors in (
        load_weights(tmp_path / "rwkv-1.pth"),
        load_weights(tmp_path / "rwkv-1.safetensors"),
        load_resume_state(resume_folder(tmp_path, 1))[0],
    ):
        assert all(torch.all(tensor == 1.0) for tensor in tensors.values())
