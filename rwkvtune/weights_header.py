"""What a weights file holds, told from its header: names, shapes and types, never the values.

A file of many gigabytes costs no more than its list of names, and torch is not needed.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rwkvtune.errors import MissingFileError, UserError

# What training wrappers put before or between the names: DeepSpeed, torch.compile, FSDP,
# checkpointing.
_WRAPPER_SEGMENTS = {
    "_forward_module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
WRAPPED_UNDER = ("state_dict", "model", "module")
"""Keys under which other programs keep the weights in a larger dictionary."""

# Our name, bytes per element, the class that torch.save names, and safetensors' name
# (https://github.com/huggingface/safetensors, section Format).
_DTYPES = (
    ("fp64", 8, "DoubleStorage", "F64"),
    ("fp32", 4, "FloatStorage", "F32"),
    ("fp16", 2, "HalfStorage", "F16"),
    ("bf16", 2, "BFloat16Storage", "BF16"),
    ("int64", 8, "LongStorage", "I64"),
    ("int32", 4, "IntStorage", "I32"),
    ("int16", 2, "ShortStorage", "I16"),
    ("int8", 1, "CharStorage", "I8"),
    ("uint8", 1, "ByteStorage", "U8"),
    ("bool", 1, "BoolStorage", "BOOL"),
)
_ITEM_BYTES = {name: size for name, size, _, _ in _DTYPES}
_OF_STORAGE = {storage: name for name, _, storage, _ in _DTYPES}
_OF_SAFETENSORS = {theirs: name for name, _, _, theirs in _DTYPES}

_LONGEST_SAFETENSORS_HEADER = 100_000_000  # the format's own limit, bytes


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    """fp64, fp32, fp16, bf16, int64 ... int8, uint8 or bool."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class WeightsHeader:
    format: str
    """`.pth` or `safetensors`."""
    tensors: dict[str, TensorInfo]
    """By upstream's name, in the file's order."""
    wrappers: tuple[str, ...] = ()
    """What was taken off: parts of names such as `_forward_module`, and the key of an outer
    dictionary."""


def weights_format(path: Path) -> Literal["zip", "pickle", "safetensors"]:
    """How a weights file is packed, told from its first bytes; "pickle" is torch's legacy format.

    MissingFileError, or UserError for what is no weights file.
    """
    head = first_bytes(path)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:9] == b"{":  # before the next: the length of a header may begin with any byte
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    raise UserError(
        f"{path} is not a weights file: it begins with {head[:16]!r}. Expected a .pth written "
        "by torch.save, or .safetensors." + _hint_about(path, head)
    )


def read_header(path: str | os.PathLike[str]) -> WeightsHeader | None:
    """Names, shapes and types of a weights file; None for a file that only
    `checkpoint.load_weights` can read, or say what is wrong with.

    That is all but a plain dictionary of whole tensors: torch's legacy format, other objects beside
    the tensors, a file that was cut short. MissingFileError and UserError as `weights_format`.
    """
    path = Path(path)
    kind = weights_format(path)
    try:
        if kind == "zip":
            return _flat_header(_read_zip(path), ".pth")
        if kind == "safetensors":
            return _flat_header(_read_safetensors(path), "safetensors")
    except Exception:  # what damaged bytes raise in pickle, zipfile and json has no common type
        return None
    return None


def without_wrappers(name: str) -> str:
    """A tensor's upstream name, without what training wrappers put around it."""
    segments = [s for s in name.split(".") if s not in _WRAPPER_SEGMENTS]
    while len(segments) > 1 and segments[0] == "module":  # DistributedDataParallel
        segments = segments[1:]
    return ".".join(segments)


def numbered_weights(folder: Path) -> list[tuple[int, Path]]:
    """N and path of each rwkv-N.pth in a run folder, ascending."""
    found = ((re.fullmatch(r"rwkv-(\d+)\.pth", p.name), p) for p in folder.glob("rwkv-*.pth"))
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_weights(folder: Path) -> Path:
    """The weights of a run folder: rwkv-final.pth, else the highest rwkv-N.pth, else rwkv-init.pth.

    MissingFileError when there are none.
    """
    numbered = [path for _, path in numbered_weights(folder)]
    candidates = [folder / "rwkv-init.pth", *numbered, folder / "rwkv-final.pth"]
    for path in reversed(candidates):
        if path.is_file():
            return path
    if (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is a Hugging Face folder; `rwkvtune export {folder} NAME.pth --to pth` may "
            "turn it into weights"
        )
    if any(folder.glob("adapter-*.safetensors")):
        raise MissingFileError(
            f"{folder} holds a vision adapter: ask it by `rwkvtune vision generate {folder} "
            "--image FILE --prompt TEXT`"
        )
    if any(folder.glob("adapter-*")):
        raise MissingFileError(
            f"{folder} holds an adapter, which needs its base: rwkvtune merge BASE {folder} "
            "OUT.pth writes weights that run by themselves (a tuned state: rwkvtune generate BASE "
            f"--state {folder})"
        )
    raise MissingFileError(
        f"{folder} is no run folder: it has no rwkv-final.pth, rwkv-N.pth or rwkv-init.pth. "
        f"{_weights_nearby(folder / '*')}"
    )


def first_bytes(path: Path) -> bytes:
    """The first 200 bytes of a file; MissingFileError, or UserError for what cannot be read, or is
    a folder or empty."""
    if not path.exists():
        raise MissingFileError(f"there is no file {path}. {_weights_nearby(path)}")
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, a weights file is needed. {_weights_nearby(path / '*')}"
        )
    try:
        with open(path, "rb") as file:
            head = file.read(200)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    if not head:
        raise UserError(f"{path} is empty (0 bytes): copy or download it again.")
    return head


def _weights_nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist either."
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".pth", ".safetensors"))
    if not names:
        return f"{folder} has no .pth or .safetensors file."
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{folder} has {', '.join(names[:10])}{more}."


def _hint_about(path: Path, head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return " This is a git-lfs pointer, not the weights: run `git lfs pull` where it came from."
    if head.lstrip().startswith(b"<"):
        return " This is a web page, probably the answer to a failed download: download it again."
    if head.startswith(b"GGUF"):
        return f" This is a GGUF file: `rwkvtune export {path} NAME.pth --to pth` may turn it back."
    prefix = path.with_suffix("")
    if head.startswith(b"MMIDIDX") or (path.suffix == ".bin" and path.with_suffix(".idx").exists()):
        return f" This is a token file: see `rwkvtune data inspect {prefix}`."
    return ""


def _flat_header(content: object, kind: str) -> WeightsHeader | None:
    """As `checkpoint.load_weights` flattens it; None where that has something to say."""
    wrappers: set[str] = set()
    if isinstance(content, Mapping):
        for key in WRAPPED_UNDER:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                wrappers.add(key)
                break
    if not isinstance(content, Mapping) or not content:
        return None
    tensors: dict[str, TensorInfo] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, TensorInfo):
            return None
        plain_name = without_wrappers(name)
        if plain_name in tensors:
            return None
        wrappers |= set(name.split(".")) - set(plain_name.split("."))
        tensors[plain_name] = value
    return WeightsHeader(kind, tensors, tuple(sorted(wrappers)))


def _read_zip(path: Path) -> object:
    """The content of a `.pth` with a TensorInfo in place of each tensor; ValueError, among others,
    when a tensor's data is not there in full."""
    with zipfile.ZipFile(path) as archive:
        (main,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name))
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{record.filename} is compressed")
        folder = main.removesuffix("data.pkl")
        with archive.open(main) as stream:
            reader = _ShapesOnly(stream)
            content = reader.load()
        for key, size in reader.storages.items():
            if archive.getinfo(f"{folder}data/{key}").file_size != size:
                raise ValueError(f"the data of storage {key} has another size")
    return content


class _Storage(NamedTuple):
    dtype: str
    numel: int


class _ShapesOnly(pickle.Unpickler):
    """Reads the pickle of torch.save without torch: nothing in it but dictionaries and tensors is
    known, and nothing that the file names is called."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.storages: dict[str, int] = {}
        """Bytes of each storage by its key."""

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown record {kind}")
        self.storages[key] = numel * _ITEM_BYTES[dtype]
        return _Storage(dtype, numel)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _OF_STORAGE:
            return _OF_STORAGE[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor_info,
            ("torch._utils", "_rebuild_parameter"): _parameter_info,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"unknown name {module}.{name}")
        return known[module, name]


def _tensor_info(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> TensorInfo:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if prod(size) and not 0 <= last < storage.numel:
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return TensorInfo(tuple(size), storage.dtype)


def _parameter_info(data: TensorInfo, *_: object) -> TensorInfo:
    return data


def _read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """Name -> TensorInfo; ValueError, among others, when the data is not there in full."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_SAFETENSORS_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 0
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        info = TensorInfo(tuple(entry["shape"]), _OF_SAFETENSORS[entry["dtype"]])
        begin, after = entry["data_offsets"]
        if begin != end or after - begin != info.numel * _ITEM_BYTES[info.dtype]:
            raise ValueError(f"the data of {name} has another size or place")
        tensors[name], end = info, after
    if 8 + length + end != path.stat().st_size:
        raise ValueError(f"the file has {path.stat().st_size} bytes, not {8 + length + end}")
    return {name: tensors[name] for name in header}
