"""LLaVA's data manifests: which samples there are, and which of them take part.

A sample is {"id"?, "image": path or list of paths, or "video": folder or list of frames,
"conversations": [{"from": "human" or "gpt", "value": text}, ...]}, with one <image> in the text for
each picture, or one for a video; a text sample has neither.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from rwkvtune.data.llava import RecordFile, picture_names
from rwkvtune.data.llava_images import PICTURE_SUFFIXES
from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import inside

IMAGE_TOKEN = "<image>"
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant"), "assistant"),
    "system": "system",
}
Record = dict[str, Any]


class Manifest(Sequence[Record]):
    """The samples of one or several files, each read from the disk when it is asked for."""

    def __init__(self) -> None:
        self._files: list[RecordFile] = []
        self._folders: list[Path] = []
        self._places: list[tuple[int, int]] = []
        """(file, number in it) of each sample."""

    def add(self, path: Path, chosen: Sequence[int], file: RecordFile) -> None:
        self._places += [(len(self._files), number) for number in chosen]
        self._files.append(file)
        self._folders.append(path.parent)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, number = self._places[index]
        return self._files[file][number]

    def folder(self, index: int) -> Path:
        """That of the manifest that a sample comes from."""
        return self._folders[self._places[index][0]]


def read_manifest(data_path: str, *, seed: int = 0) -> Manifest:
    """Read a .json (list), .jsonl, .yaml or a brace list PREFIX{a,b}.json.

    yaml: `datasets:` with a list of {json_path, sampling_strategy}; a strategy is all, or
    first, end, random, then `:` and a number or `P%`. random draws with `seed`, so that all
    processes and runs get the same subset. UserError that names the file and what was expected.
    """
    manifest = Manifest()
    for path, strategy in _sources(data_path):
        file = RecordFile(path)
        manifest.add(path, _sampled(len(file), strategy, seed=seed, where=path), file)
    return manifest


def _sources(data_path: str) -> Iterator[tuple[Path, str]]:
    path = Path(data_path)
    braces = re.fullmatch(r"(.*)\{(.*)\}(\.jsonl?)", data_path)
    if braces:
        for name in braces[2].split(","):
            yield Path(f"{braces[1]}{name.strip()}{braces[3]}"), "all"
        return
    if path.suffix not in (".yaml", ".yml"):
        yield path, "all"
        return
    try:
        content = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{path}: expected `datasets:` with a list of {{json_path, sampling_strategy}}"
        )
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
            raise UserError(f"{path}: entry {number} of `datasets` has no json_path")
        source = Path(entry["json_path"])
        if not source.exists() and (path.parent / source).exists():
            source = path.parent / source
        yield source, str(entry.get("sampling_strategy", "all"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MissingFileError(f"there is no manifest {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _sampled(total: int, strategy: str, *, seed: int, where: Path) -> list[int]:
    everything = list(range(total))
    if strategy == "all":
        return everything
    found = re.fullmatch(r"(first|end|random):(\d+)(%?)", strategy)
    if not found:
        raise UserError(
            f"{where}: sampling_strategy {strategy!r} is unknown: all, or first, end, random with "
            ":COUNT or :P%, such as random:10%"
        )
    count = int(found[2])
    if found[3]:
        count = math.ceil(count * total / 100)
    if found[1] == "first":
        return everything[:count]
    if found[1] == "end":
        return everything[-count:] if count else []
    random.Random(seed).shuffle(everything)
    return everything[:count]


def turns_of(record: Record) -> list[tuple[str, str]]:
    """(role, text) of each turn; ValueError that says what is wrong with the sample."""
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise ValueError("it has no `conversations`")
    turns = []
    for turn in conversations:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn is {turn!r}: expected an object with `from` and `value`")
        who, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if who not in ROLES or not isinstance(text, str):
            raise ValueError(
                f"a turn is from {who!r} with {type(text).__name__}: expected human or gpt and text"
            )
        turns.append((ROLES[who], text.replace("<video>", IMAGE_TOKEN)))
    return turns


def from_the_user_on(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Turns without a first one that is not the user's, which LLaVA leaves out."""
    return turns if turns[0][0] == "user" else turns[1:]


def pictures_of(record: Record, folder: Path) -> list[Path]:
    """Files of a sample's images, in order."""
    return [inside(folder, name) for name in picture_names(record)]


def frames_of(record: Record, folder: Path) -> list[Path]:
    """Files of the frames of a sample's video: a list, or the pictures of a folder by name.

    UserError for a video file.
    """
    video = record.get("video")
    if video is None:
        return []
    if isinstance(video, list):
        return [inside(folder, name) for name in video]
    path = inside(folder, video)
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
    if path.exists():
        raise UserError(
            f"{path} is a video file, which is not decoded here: give a folder of its frames, or a "
            "list of them"
        )
    raise MissingFileError(f"there is no folder of frames {path}")


def check_records(manifest: Manifest, folder_of: Callable[[int, Record], Path]) -> None:
    """UserError that counts the samples that cannot be trained on and names the first three.

    folder_of: where the paths of a sample begin.
    """
    found: list[str] = []
    count = 0
    for index, record in enumerate(manifest):
        wrong = _problem(record, folder_of(index, record))
        if wrong:
            count += 1
            if len(found) < 3:
                name = f" (id {record['id']})" if "id" in record else ""
                found.append(f"sample {index + 1}{name}: {wrong}")
    if count:
        of = f"{count} of {len(manifest)} samples cannot be used"
        raise UserError(f"{of}: {'; '.join(found)}" + (" ..." if count > len(found) else ""))


def _problem(record: Record, folder: Path) -> str | None:
    try:
        turns = from_the_user_on(turns_of(record))
        "".join(text for _, text in turns).encode()  # half a surrogate pair cannot be
        pictures = pictures_of(record, folder)
        frames = frames_of(record, folder)
    except (ValueError, TypeError) as error:
        return str(error)
    if "image" in record and "video" in record:
        return "it has both `image` and `video`"
    if "video" in record and not frames:
        return f"there are no pictures in {folder / str(record['video'])}"
    places = sum(text.count(IMAGE_TOKEN) for _, text in turns)
    wanted = 1 if frames else len(pictures)
    if places != wanted:
        kind = "videos" if frames else "images"
        return f"{wanted} {kind} for {places} {IMAGE_TOKEN} in its text"
    if not any(role == "assistant" for role, _ in turns):
        return "no turn of the assistant (gpt) follows the user's, so there is nothing to learn"
    for path in [*pictures, *frames]:
        if not os.path.isfile(path):  # unlike Path's, never raises
            return f"there is no picture {path}"
    return None


def num_words(record: Record) -> int:
    """In its conversation."""
    return sum(len(text.split()) for _, text in turns_of(record))
