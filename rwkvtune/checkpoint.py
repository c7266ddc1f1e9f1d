"""Weights and resume states on disk: what other RWKV programs read, and what a killed run comes
back from.

Weights are one flat dictionary, name -> tensor, with upstream's names: a `.pth` in torch's zip
format, or `.safetensors`. Loading never runs code from a file, and notices a file that was cut
short; a `.pth` is compared with its checksums too.

A resume state is a folder `<run_dir>/resume/step-<8 digits>` with
    state.safetensors   weights, optimizer moments, generator states (uint8): what must be exact
    state.json          {"format": 1, "meta": {...}, "crc32": of the rest of this json,
                         "files": {"state.safetensors": {"bytes": size, "crc32": checksum}}}
It gets its name only when it is complete and on the disk, and is believed only while sizes and
checksums agree.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import (
    atomic_directory,
    atomic_write,
    name_before_moved_aside,
    remove_directory,
)
from rwkvtune.weights_header import WRAPPED_UNDER, weights_format, without_wrappers

_BLOCK_BYTES = 4 << 20
_TENSORS_FILE = "state.safetensors"
_JSON_FILE = "state.json"
_STATE_FORMAT = 1
_STEP_NAME = re.compile(r"step-(\d{8,})")

_SAVE_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}

# Names of the safetensors format, https://github.com/huggingface/safetensors (section Format).
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# The class that torch.save names for each.
_STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
_FP16_END = 65520  # from here on a value is rounded to infinity
_PTH_ALIGNMENT = 64  # bytes, as torch.save aligns the data of a tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one piece, gathered when it is sharded. Every rank must call this for every
    tensor."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    gathered: Tensor = tensor.full_tensor()
    return gathered


def load_weights(path: str | os.PathLike[str], *, verify: bool = True) -> dict[str, Tensor]:
    """Read a weights file: name -> CPU tensor, in the file's dtypes and shapes.

    The format is told from the content: `.pth` (zip or legacy) or safetensors. Wrapper prefixes
    (`_forward_module.`, `module.`, `_orig_mod.`) are taken off, and a dictionary under
    "state_dict", "model" or "module" is unwrapped. The tensors are memory-mapped copy-on-write:
    cheap to open, safe to change; the file itself must not be rewritten in place while they live.
    verify: also compare a `.pth` with the checksums inside it (about 3 GB/s, reads the file).
    Raises MissingFileError, or UserError for anything that is not a whole file of tensors.
    """
    path = Path(path)
    kind = weights_format(path)
    if kind == "zip":
        _check_zip(path, verify=verify)
        content = _torch_load(path, mmap=True)
    elif kind == "pickle":
        content = _torch_load(path, mmap=False)
    else:
        content = _load_safetensors(path)
    return _flat_weights(content, path)


def save_weights(
    path: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | str | None = None,
    write: bool = True,
) -> None:
    """Write name -> tensor as `.pth` (torch's zip format) or `.safetensors`, whole or not at all.

    dtype: what floating tensors are stored in ("fp32", "bf16", "fp16" or a torch.dtype); None keeps
    each as it is. Each tensor is stored alone: a view takes only its own elements along, and tied
    tensors become two copies. They are converted one by one as they are written, so memory-mapped
    weights of any size take the memory of their largest tensor; so do sharded ones, which are
    gathered one by one too: every rank calls this, and those with write=False only help. Raises
    UserError for an unknown suffix or dtype, values beyond fp16, a full disk or a folder that is
    not writable.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise UserError(f"cannot tell the format of {path}: end the name in .pth or .safetensors.")
    target = save_dtype(dtype)
    tensors = {name: _plain(name, tensor) for name, tensor in weights.items()}
    is_pth = path.suffix == ".pth"
    if not write:
        for name in tensors if is_pth else _in_file_order(tensors, target):
            whole(tensors[name])
        return
    write_format = write_pth if is_pth else write_safetensors
    atomic_write(path, lambda file: write_format(file, tensors, target))


def _check_zip(path: Path, *, verify: bool) -> None:
    """Refuse a `.pth` that is cut short or damaged, which torch would load without a word."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise UserError(
                        f"{path}: {record.filename} is compressed, which torch.save never does. "
                        "Load it with the program that wrote it, and save it with torch.save."
                    )
                # torch writes 0 for "no checksum" when a program switched them off
                if verify and record.CRC != 0:
                    with archive.open(record) as stream:
                        while stream.read(_BLOCK_BYTES):
                            pass
    except UserError:
        raise
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError, struct.error) as error:
        raise _damaged(path, error) from error


def _torch_load(path: Path, *, mmap: bool) -> object:
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what torch raises on damaged bytes has no common type
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(
                f"{path} holds more than tensors: rebuilding it would have to call {refused[1]}, "
                "and loading never runs code from a file. If you trust it, extract its tensors "
                "with the program that wrote it and save them as a plain dictionary."
            ) from error
        raise _damaged(path, error) from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return UserError(
        f"{path} ({path.stat().st_size:,} bytes) is cut short or damaged: {reason}. "
        "Copy or download it again, or use an older checkpoint."
    )


def _flat_weights(content: object, path: Path) -> dict[str, Tensor]:
    """Check that the content of a file is name -> tensor, and give the names upstream's form."""
    if isinstance(content, Mapping):
        for key in WRAPPED_UNDER:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            f"{path} holds {_described(content)}, expected a dictionary of name -> tensor."
        )
    weights: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not _is_ordinary(value):
            raise UserError(
                f"{path}: entry {name!r} is {_described(value)}, expected only names with tensors. "
                "Save the weights alone, as a flat dictionary."
            )
        plain_name = without_wrappers(name)
        if plain_name in weights:
            raise UserError(f"{path} has {plain_name} twice, with and without a wrapper's prefix.")
        weights[plain_name] = value.detach()
    return weights


def _is_ordinary(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _described(value: object) -> str:
    if isinstance(value, Mapping):
        return "an empty dictionary" if not value else "a dictionary"
    if isinstance(value, Tensor):
        return f"a tensor of kind {value.layout} on {value.device}"
    return f"a value of type {type(value).__name__}"


def save_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The type that a name of `save_weights` stands for; UserError for another name."""
    if isinstance(dtype, str):
        if dtype not in _SAVE_DTYPES:
            raise UserError(f"cannot save weights as {dtype!r}: choose fp32, bf16 or fp16.")
        return _SAVE_DTYPES[dtype]
    if dtype is not None and dtype not in _SAVE_DTYPES.values():
        raise UserError(f"cannot save weights as {dtype}: choose fp32, bf16 or fp16.")
    return dtype


def stored_as(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The whole tensor in the type that it is stored in, if it is floating-point; UserError where
    fp16 does not reach."""
    tensor = whole(tensor)
    if dtype is None or not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    if dtype != torch.float16 or not tensor.numel():
        return stored
    low, high = tensor.aminmax()  # looks at the values without copies of them
    # Not so for NaN and infinities, which stay what they are; then each value is looked at.
    is_within = bool(low > -_FP16_END) and bool(high < _FP16_END)
    if not is_within and bool((stored.isinf() & tensor.isfinite()).any()):
        raise UserError(
            f"{name} has values up to {float(tensor.abs().max()):.6g}, beyond fp16 (65504): "
            "save as bf16 or fp32."
        )
    return stored


def _plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor without its gradient history; TypeError for what our formats cannot hold."""
    tensor = tensor.detach()
    is_sharded = hasattr(tensor, "full_tensor")
    if not (type(tensor) is Tensor or is_sharded) or tensor.dtype not in _SAFETENSORS_DTYPES:
        raise TypeError(f"{name}: cannot store a {type(tensor).__name__} of {tensor.dtype}")
    return tensor


def write_pth(
    file: BinaryIO, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write what torch.save would write for the dictionary, each tensor converted to `dtype` when
    its turn comes.

    Our own writer because torch.save needs all tensors at once, in their final type and contiguous.
    """
    entries, records = {}, []
    for number, (name, tensor) in enumerate(tensors.items()):
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        storage = _StorageEntry(_STORAGES[kind], str(number), tensor.numel())
        entries[name] = _TensorEntry(storage, tuple(tensor.shape))
        records.append((name, tensor, kind.itemsize * tensor.numel()))
    content = io.BytesIO()
    _EntryPickler(content, protocol=2).dump(entries)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        # A ZipInfo has no time of the day: equal weights give equal files.
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), content.getvalue())
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), sys.byteorder)
        for number, (name, tensor, size) in enumerate(records):
            record = zipfile.ZipInfo(f"archive/data/{number}")
            record.file_size = size
            # What precedes the data in the file: 30 bytes, the name, 20 bytes for sizes beyond
            # 4 GB, and a field of padding with 4 bytes of its own.
            begin = file.tell() + 30 + len(record.filename) + 20 + 4
            padding = -begin % _PTH_ALIGNMENT
            record.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            with archive.open(record, "w", force_zip64=True) as stream:
                for block in _blocks_of(stored_as(name, tensor, dtype)):
                    stream.write(block)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


class _StorageEntry(NamedTuple):
    kind: Any
    key: str
    numel: int


class _TensorEntry:
    """Pickles as a contiguous tensor with a storage of its own."""

    def __init__(self, storage: _StorageEntry, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self.shape, device="meta").stride()
        # As torch.save of any version since 1.6: offset, shape, stride, no gradient, hooks.
        hooks: OrderedDict[str, Any] = OrderedDict()
        arguments = (self.storage, 0, self.shape, stride, False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


class _EntryPickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> Any:
        if isinstance(obj, _StorageEntry):
            return ("storage", obj.kind, obj.key, "cpu", obj.numel)
        return None


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> int:
    """Write the safetensors format, each tensor converted to `dtype` when its turn comes, and
    return the crc32 of all bytes written.

    Our own writer because it needs no second copy of the tensors (each goes to the CPU when its
    turn comes), computes the checksum while the disk is busy, and reports a full disk as the
    OSError that it is.
    """
    crc = 0
    with ThreadPoolExecutor(max_workers=1) as other_thread:
        for block in _safetensors_blocks(tensors, dtype):
            checksum = other_thread.submit(zlib.crc32, block, crc)
            file.write(block)
            crc = checksum.result()
    return crc


def _in_file_order(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> list[str]:
    """Names in the order of a safetensors file: the widest elements first, which keeps every tensor
    aligned to its element size."""

    def place(name: str) -> tuple[int, str]:
        kind = dtype if dtype and tensors[name].is_floating_point() else tensors[name].dtype
        return -kind.itemsize, name

    return sorted(tensors, key=place)


def _safetensors_blocks(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Iterator[bytes | memoryview]:
    kinds = {
        name: dtype if dtype and tensor.is_floating_point() else tensor.dtype
        for name, tensor in tensors.items()
    }
    names = _in_file_order(tensors, dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + tensors[name].numel() * kinds[name].itemsize
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[kinds[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield from _blocks_of(stored_as(name, tensors[name], dtype))


def _blocks_of(tensor: Tensor) -> Iterator[memoryview]:
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), _BLOCK_BYTES):
        yield data[start : start + _BLOCK_BYTES]


def resume_folder(run_dir: str | os.PathLike[str], step: int) -> Path:
    """Where the resume state of an optimizer step lies: `<run_dir>/resume/step-<8 digits>`."""
    return Path(run_dir) / "resume" / f"step-{step:08d}"


def save_resume_state(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    write: bool = True,
) -> None:
    """Write a resume state into `folder` (see `resume_folder`), whole or not at all; replaces an
    older one there.

    tensors: any plain dtype and device, flat names; sharded ones are gathered one by one: every
    rank calls this, and those with write=False only help. meta: what JSON can hold; it comes back
    as JSON gives it (tuples as lists, keys as strings, floats to the last bit). Raises UserError
    when the disk is full or not writable, TypeError for what cannot be stored, before writing.
    """
    plain = {name: _plain(name, tensor) for name, tensor in tensors.items()}
    meta = json.loads(json.dumps(dict(meta)))
    if not write:
        for name in _in_file_order(plain, None):
            whole(plain[name])
        return
    with atomic_directory(folder) as temporary:
        tensors_path = temporary / _TENSORS_FILE
        with open(tensors_path, "wb") as file:
            crc = write_safetensors(file, plain)
        body = {
            "format": _STATE_FORMAT,
            "meta": meta,
            "files": {_TENSORS_FILE: {"bytes": tensors_path.stat().st_size, "crc32": f"{crc:08x}"}},
        }
        text = json.dumps({**body, "crc32": _json_crc(body)}, indent=1)
        (temporary / _JSON_FILE).write_text(text, encoding="utf-8")


def load_resume_state(
    folder: str | os.PathLike[str], *, verify: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a resume state: (tensors, meta). The tensors are memory-mapped as in `load_weights`.

    verify: compare the tensors with their checksum; not needed straight after
    `newest_resume_state`. Raises MissingFileError, or UserError naming what is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"there is no resume state {folder}.")
    damage = _damage_of(folder, verify=verify)
    if damage:
        raise UserError(f"the resume state {folder} is damaged: {damage}. Use an older one.")
    return _load_safetensors(folder / _TENSORS_FILE), load_resume_meta(folder)


def load_resume_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Only the meta of a resume state that `newest_resume_state` has found to be whole."""
    state = json.loads((Path(folder) / _JSON_FILE).read_text(encoding="utf-8"))
    meta: dict[str, Any] = state["meta"]
    return meta


def newest_resume_state(
    run_dir: str | os.PathLike[str], *, report: Callable[[str], None] = print
) -> Path | None:
    """The newest resume state that is whole, read through once; None when the folder has none at
    all.

    Each damaged one that is passed over is reported in one line. When all are damaged this is a
    UserError: starting from the beginning without a word would overwrite what may still be saved.
    """
    damaged = []
    for folder in _states_newest_first(run_dir):
        damage = _damage_of(folder, verify=True)
        if not damage:
            return folder
        damaged.append(folder)
        report(f"resume: {folder} is damaged ({damage}); trying the one before it")
    if damaged:
        raise UserError(
            f"all {len(damaged)} resume states in {damaged[0].parent} are damaged. To train on "
            "from saved weights, load one of the rwkv-N.pth files; to start again, choose another "
            "folder or remove this one."
        )
    return None


def prune_resume_states(
    run_dir: str | os.PathLike[str], keep: int, *, just_written: Path | None = None
) -> list[Path]:
    """Remove all resume states older than the newest `keep` good ones; returns what was removed.

    Damaged states do not count, so the newest good one always stays: it is read through to be sure,
    unless it is `just_written`, a state that this process has saved a moment ago.
    """
    if keep < 1:
        raise UserError(f"cannot keep {keep} resume states: keep at least 1.")
    removed = []
    good = 0
    for folder in _states_newest_first(run_dir):
        if good >= keep:
            remove_directory(folder)
            removed.append(folder)
        elif folder == just_written or not _damage_of(folder, verify=good == 0):
            good += 1
    return removed


def _states_newest_first(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Folders named like a resume state, also one that a killed replacement left moved aside."""
    found = []
    parent = Path(run_dir) / "resume"
    for entry in parent.iterdir() if parent.is_dir() else []:
        original = name_before_moved_aside(entry.name)
        step = _STEP_NAME.fullmatch(original or entry.name)
        if step and entry.is_dir():
            found.append((int(step[1]), original is None, entry))
    return [entry for _, _, entry in sorted(found, reverse=True)]


def _damage_of(folder: Path, *, verify: bool) -> str | None:
    """What is wrong with a resume state, in a few words; None when nothing is."""
    try:
        state = json.loads((folder / _JSON_FILE).read_text(encoding="utf-8"))
        stored_crc = state.pop("crc32")
        if stored_crc != _json_crc(state):
            return f"{_JSON_FILE} does not agree with its checksum"
        if state["format"] != _STATE_FORMAT:
            return f"{_JSON_FILE} has format {state['format']}, this version reads {_STATE_FORMAT}"
        expected = state["files"][_TENSORS_FILE]
        size = (folder / _TENSORS_FILE).stat().st_size
        if size != expected["bytes"]:
            return f"{_TENSORS_FILE} has {size:,} bytes of {expected['bytes']:,}"
        if verify and _file_crc(folder / _TENSORS_FILE) != expected["crc32"]:
            return f"{_TENSORS_FILE} does not agree with its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return f"{_JSON_FILE} is not what was written"
    return None


def _json_crc(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"


def _file_crc(path: Path) -> str:
    crc = 0
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
    return f"{crc:08x}"
