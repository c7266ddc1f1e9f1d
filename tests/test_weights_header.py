"""Headers against what torch and safetensors themselves read, and files that are not whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkvtune.checkpoint import load_weights
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.weights_header import (
    TensorInfo,
    WeightsHeader,
    newest_weights,
    numbered_weights,
    read_header,
    weights_format,
)

ROOT = Path(__file__).parent.parent
DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8,
    "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
FEW_TENSORS = st.dictionaries(
    st.text("abc.é", min_size=1, max_size=8), st.tuples(SHAPES, st.sampled_from(sorted(DTYPES)))
).filter(bool)


def read(path: Path) -> WeightsHeader:
    header = read_header(path)
    assert header is not None
    return header


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(FEW_TENSORS)
def test_names_shapes_and_types_are_those_that_the_libraries_read(
    tmp_path: Path, tensors: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    weights = {name: torch.zeros(shape, dtype=DTYPES[d]) for name, (shape, d) in tensors.items()}
    torch.save(weights, tmp_path / "w.pth")
    theirs = torch.load(tmp_path / "w.pth", weights_only=True)
    header = read(tmp_path / "w.pth")
    assert list(header.tensors) == list(theirs)
    for name, info in header.tensors.items():
        assert (info.shape, DTYPES[info.dtype]) == (tuple(theirs[name].shape), theirs[name].dtype)
        assert info.numel == theirs[name].numel()

    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    assert read(tmp_path / "w.safetensors").tensors == header.tensors


def test_a_safetensors_header_of_any_length_is_recognised(tmp_path: Path) -> None:
    """One of 32 begins with the byte 0x80, as a pickle does."""
    path = tmp_path / "w.safetensors"
    first_bytes = set()
    for letters in range(1, 250, 8):
        safetensors.torch.save_file({"w" * letters: torch.ones(2)}, path)
        first_bytes.add(path.read_bytes()[0])
        assert weights_format(path) == "safetensors"
    assert len(first_bytes) == 32


def a_view() -> dict[str, Tensor]:
    whole = torch.zeros(4, 6)
    return {"part": whole[1:3, ::2], "turned": whole.T, "tied": whole}


FORMS: dict[str, tuple[Callable[[], Any], tuple[str, ...], dict[str, tuple[int, ...]]]] = {
    "views": (a_view, (), {"part": (2, 3), "turned": (6, 4), "tied": (4, 6)}),
    "state dict": (
        lambda: torch.nn.Linear(2, 3).state_dict(),
        (),
        {"weight": (3, 2), "bias": (3,)},
    ),
    "parameters": (
        lambda: OrderedDict(torch.nn.Linear(2, 3).named_parameters()),
        (),
        {"weight": (3, 2), "bias": (3,)},
    ),
    "deepspeed": (
        lambda: {"_forward_module.a.b": torch.ones(2)},
        ("_forward_module",),
        {"a.b": (2,)},
    ),
    "compiled ddp": (
        lambda: {"_orig_mod.module.a": torch.ones(2)},
        ("_orig_mod", "module"),
        {"a": (2,)},
    ),
    "checkpoint": (
        lambda: {"epoch": 3, "state_dict": {"a": torch.ones(2)}, "note": [1.5, None]},
        ("state_dict",),
        {"a": (2,)},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_other_programs_write_is_flattened_as_for_loading(tmp_path: Path, form: str) -> None:
    content, wrappers, shapes = FORMS[form]
    torch.save(content(), tmp_path / "w.pth")
    header = read(tmp_path / "w.pth")
    assert header.wrappers == wrappers
    assert {name: info.shape for name, info in header.tensors.items()} == shapes
    assert {n: tuple(w.shape) for n, w in load_weights(tmp_path / "w.pth").items()} == shapes


class MakesAFolder:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


NOT_PLAIN: dict[str, Callable[[Path], object]] = {
    "code": lambda folder: {"w": torch.ones(2), "x": MakesAFolder(folder / "executed")},
    "sparse": lambda _: {"w": torch.ones(2).to_sparse()},
    "no data": lambda _: {"w": torch.ones(2, device="meta")},
    "a list": lambda _: [torch.ones(2)],
    "nothing": lambda _: {},
    "a number": lambda _: {"w": torch.ones(2), "step": 7},
    "a type of late": lambda _: {"w": torch.ones(2, dtype=torch.uint16)},
    "twice": lambda _: {"w": torch.ones(2), "module.w": torch.ones(2)},
}


@pytest.mark.parametrize("content", NOT_PLAIN)
def test_all_but_plain_tensors_is_left_to_the_loader_and_nothing_is_run(
    tmp_path: Path, content: str
) -> None:
    torch.save(NOT_PLAIN[content](tmp_path), tmp_path / "w.pth")
    assert read_header(tmp_path / "w.pth") is None
    assert not (tmp_path / "executed").exists()


def test_the_legacy_format_is_left_to_the_loader(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert read_header(tmp_path / "w.pth") is None


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_a_file_cut_short_anywhere_or_too_long_is_left_to_the_loader(
    tmp_path: Path, form: str
) -> None:
    path = tmp_path / "w.pth"
    weights = {"a.weight": torch.ones(300, 7), "b": torch.ones(5, dtype=torch.bfloat16)}
    if form == "zip":
        torch.save(weights, path)
    else:
        safetensors.torch.save_file(weights, path)
    whole = path.read_bytes()
    for cut in sorted({9, len(whole) - 1, *(len(whole) * i // 40 for i in range(1, 40))}):
        path.write_bytes(whole[:cut])
        assert read_header(path) is None, cut
    if form == "safetensors":
        path.write_bytes(whole + b"\0")
        assert read_header(path) is None


def test_a_record_that_is_smaller_than_its_tensor_is_left_to_the_loader(tmp_path: Path) -> None:
    import zipfile

    torch.save({"a": torch.ones(300)}, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as source,
        zipfile.ZipFile(tmp_path / "short.pth", "w") as target,
    ):
        for record in source.infolist():
            data = source.read(record)
            is_data = record.filename.endswith("data/0")
            target.writestr(record.filename, data[:-4] if is_data else data)
    assert read_header(tmp_path / "short.pth") is None


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_huge_file_is_told_from_its_header_without_torch(tmp_path: Path, suffix: str) -> None:
    """4 TB that are not there: a reader that touched the values would never end."""
    path = tmp_path / f"huge{suffix}"
    rows, columns = 1 << 30, 1 << 10
    if suffix == ".pth":
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({"emb.weight": torch.empty(rows, columns)}, path)
    else:
        entry = f'"F32","shape":[{rows},{columns}],"data_offsets":[0,{4 * rows * columns}]'
        text = ('{"emb.weight":{"dtype":' + entry + "}}").encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + 4 * rows * columns)
    assert path.stat().st_size > 4 << 40 and path.stat().st_blocks < 1 << 12
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from rwkvtune.weights_header import read_header\n"
        f"print(read_header({str(path)!r}).tensors)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{ {'emb.weight': TensorInfo((rows, columns), 'fp32')} }\n", done.stderr


def test_a_token_file_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "text.bin").write_bytes(bytes(range(40)))
    (tmp_path / "text.idx").write_bytes(b"MMIDIDX\0\0" + bytes(40))
    for name in ("text.bin", "text.idx"):
        with pytest.raises(UserError, match=r"token file: see `rwkvtune data inspect .*text`"):
            read_header(tmp_path / name)


def test_the_weights_of_a_run_folder_are_the_last_ones(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(MissingFileError, match=r"is no run folder.*has no \.pth"):
        newest_weights(tmp_path)
    for name in ("init", "2", "10", "9", "best", "final"):
        (tmp_path / f"rwkv-{name}.pth").touch()
        expected = {"2": "2", "10": "10", "9": "10", "best": "10"}.get(name, name)
        assert newest_weights(tmp_path).name == f"rwkv-{expected}.pth"
    assert [n for n, _ in numbered_weights(tmp_path)] == [2, 9, 10]
