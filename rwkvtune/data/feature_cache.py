"""What a frozen encoder makes of each picture, kept on the disk.

    cache.json         {"format": 1, "fingerprint": ..., "dtype": ..., "tokens": n, "width": E}
    index.jsonl        [name, bytes of the picture's file], a line per picture, in the shards' order
    features-00000.bin fixed-length entries, one after the other; at most SHARD_BYTES per file

An entry is [n, E] in fp32 or bf16, or int8 [n, E] with fp32 scales [n] behind it. Entries are
written before their lines, so what a killed writer leaves is a whole cache of fewer pictures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rwkvtune.data.images import PictureError, PictureStore
from rwkvtune.errors import UserError
from rwkvtune.files import RunFolderLock, atomic_write

Dtype = Literal["fp32", "bf16", "int8"]
FORMAT = 1
SHARD_BYTES = 1 << 30
VALUE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


class FeatureCache:
    """Features by the name of their picture.

    fingerprint: of encoder and preparation of pictures; UserError when the folder has another, or
    other sizes.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        pictures: PictureStore,
        *,
        fingerprint: str,
        tokens: int,
        width: int,
        dtype: Dtype,
    ) -> None:
        self.folder, self.pictures = Path(folder), pictures
        self.shape, self.dtype = (tokens, width), dtype
        self.entry_bytes = tokens * (width * VALUE_BYTES[dtype] + 4 * (dtype == "int8"))
        self.per_shard = max(1, SHARD_BYTES // self.entry_bytes)
        self._is_as = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "dtype": dtype,
            "tokens": tokens,
            "width": width,
        }
        self._check_folder()
        self._number: dict[str, int] = {}
        self._maps: dict[int, np.ndarray] = {}
        self._read_index()

    def __len__(self) -> int:
        return len(self._number)

    def bytes_for(self, count: int) -> int:
        return count * self.entry_bytes

    def read(self, name: str) -> Tensor:
        """[n, E] of a picture; PictureError when it could not be encoded."""
        number = self._number.get(name)
        if number is None:
            self.pictures.open(name)  # says what is wrong with it
            raise PictureError(f"{name}: is not in the feature cache {self.folder}")
        shard, place = divmod(number, self.per_shard)
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._shard(shard), np.uint8, "r")
        begin = place * self.entry_bytes
        return self._unpacked(self._maps[shard][begin : begin + self.entry_bytes])

    def fill(
        self,
        names: Sequence[str],
        encode: Callable[[Sequence[str]], Iterator[tuple[str, Tensor]]],
        *,
        at_once: int = 64,
    ) -> int:
        """Add the pictures that are not there yet; returns how many. encode: gives the features of
        those among some names whose picture can be read."""
        missing = [name for name in names if name not in self._number]
        if not missing:
            return 0
        before = len(self)
        with RunFolderLock(self.folder):
            if not (self.folder / "cache.json").exists():
                content = json.dumps(self._is_as, indent=1).encode()
                atomic_write(self.folder / "cache.json", lambda file: file.write(content))
            self._trim()
            for first in range(0, len(missing), at_once):
                self._append(list(encode(missing[first : first + at_once])))
        self._maps.clear()
        return len(self) - before

    def reload(self) -> None:
        """Take in what another process has added."""
        self._number.clear()
        self._maps.clear()
        self._read_index()

    def _append(self, found: list[tuple[str, Tensor]]) -> None:
        lines = []
        try:
            for name, features in found:
                shard = len(self._number) // self.per_shard
                with open(self._shard(shard), "ab") as file:
                    file.write(self._packed(features))
                    file.flush()
                    os.fsync(file.fileno())
                self._number[name] = len(self._number)
                lines.append(json.dumps([name, self.pictures.size(name)]) + "\n")
            with open(self.folder / "index.jsonl", "a", encoding="utf-8") as index:
                index.write("".join(lines))
        except OSError as error:
            raise UserError(
                f"feature_cache {self.folder}: cannot be written ({error.strerror}); make room and "
                "run the same command again, it goes on from there"
            ) from error

    def _packed(self, features: Tensor) -> bytes:
        x = features.detach().cpu()
        assert tuple(x.shape) == self.shape, (x.shape, self.shape)
        if self.dtype == "int8":
            scales = x.float().abs().amax(dim=1).clamp_min(1e-12) / 127
            codes = (x.float() / scales[:, None]).round().to(torch.int8)
            return codes.numpy().tobytes() + scales.numpy().tobytes()
        kind = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        return x.to(kind).contiguous().view(torch.uint8).numpy().tobytes()

    def _unpacked(self, entry: np.ndarray) -> Tensor:
        raw = torch.from_numpy(np.array(entry))
        tokens, width = self.shape
        if self.dtype == "int8":
            codes = raw[: tokens * width].view(torch.int8).view(tokens, width)
            scales = raw[tokens * width :].clone().view(torch.float32)
            return codes.float() * scales[:, None]
        kind = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        return raw.view(kind).view(tokens, width)

    def _check_folder(self) -> None:
        path = self.folder / "cache.json"
        if not path.exists():
            if (self.folder / "index.jsonl").exists():
                raise UserError(f"{self.folder} has an index and no cache.json: remove the folder")
            return
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in self._is_as if found.get(name) != self._is_as[name]]
        if differing:
            raise UserError(
                f"feature_cache {self.folder} was made otherwise: "
                + ", ".join(f"{n} {found.get(n)}, now {self._is_as[n]}" for n in differing)
                + "; give another folder, or the encoder and the settings of then"
            )

    def _read_index(self) -> None:
        path = self.folder / "index.jsonl"
        if not path.exists():
            return
        lines = path.read_bytes().split(b"\n")[:-1]
        for line in lines[: self._whole_entries()]:
            name, size = json.loads(line)
            if self.pictures.find(name) is not None and self.pictures.size(name) != size:
                raise UserError(
                    f"feature_cache {self.folder}: {name} was {size} bytes long when it was "
                    f"encoded, it has {self.pictures.size(name)} now; give another folder"
                )
            self._number[name] = len(self._number)

    def _whole_entries(self) -> int:
        return sum(
            path.stat().st_size // self.entry_bytes for path in self.folder.glob("features-*.bin")
        )

    def _trim(self) -> None:
        """Drop what a killed writer has left behind the last whole picture."""
        count = len(self)
        for path in sorted(self.folder.glob("features-*.bin")):
            kept = min(count, self.per_shard)
            os.truncate(path, kept * self.entry_bytes)
            count -= kept
        path = self.folder / "index.jsonl"
        if path.exists():
            lines = path.read_bytes().split(b"\n")[: len(self)]
            content = b"".join(line + b"\n" for line in lines)
            atomic_write(path, lambda file: file.write(content))

    def _shard(self, number: int) -> Path:
        return self.folder / f"features-{number:05}.bin"
