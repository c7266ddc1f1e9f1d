"""LLaVA's data manifests: which samples there are, and which of them take part.

A sample is {"id"?, "image": path or list of paths, or "video": folder or list of frames,
"conversations": [{"from": "human" or "gpt", "value": text}, ...]}, with one <image> in the text for
each picture, or one for a video; a text sample has neither.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rwkvtune.data.llava_images import PICTURE_SUFFIXES
from rwkvtune.errors import MissingFileError, UserError

IMAGE_TOKEN = "<image>"
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant"), "assistant"),
    "system": "system",
}
Record = dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """Samples, and for each the folder that its paths are relative to."""

    records: list[Record]
    folders: list[Path]


def read_manifest(
    data_path: str, *, seed: int = 0, image_folder: str = "", video_folder: str = ""
) -> Manifest:
    """Read a .json (list), .jsonl, .yaml or a brace list PREFIX{a,b}.json.

    yaml: `datasets:` with a list of {json_path, sampling_strategy}; a strategy is all, or
    first, end, random, then `:` and a number or `P%`. random draws with `seed`, so that all
    processes and runs get the same subset. Paths are relative to image_folder (video_folder) or,
    where that is not given, to the manifest's own folder. UserError that names the file and
    what was expected.
    """
    records: list[Record] = []
    folders: list[Path] = []
    for path, strategy in _sources(data_path):
        found = _sampled(_read_file(path), strategy, seed=seed, where=path)
        records += found
        for record in found:
            given = video_folder if "video" in record else image_folder
            folders.append(Path(given) if given else path.parent)
    return Manifest(records, folders)


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


def _read_file(path: Path) -> list[Record]:
    text = _text(path)
    if path.suffix == ".jsonl":
        records = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                records.append(_parsed(line, f"{path}, line {number}"))
    else:
        records = _parsed(text, str(path))
        if not isinstance(records, list):
            raise UserError(
                f"{path} holds one {type(records).__name__}: expected a list of samples"
            )
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise UserError(f"{path}: sample {number} is {record!r}: expected an object")
    return records


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is no JSON: {error}") from error


def _sampled(records: list[Record], strategy: str, *, seed: int, where: Path) -> list[Record]:
    if strategy == "all":
        return records
    found = re.fullmatch(r"(first|end|random):(\d+)(%?)", strategy)
    if not found:
        raise UserError(
            f"{where}: sampling_strategy {strategy!r} is unknown: all, or first, end, random with "
            ":COUNT or :P%, such as random:10%"
        )
    count = int(found[2])
    if found[3]:
        count = math.ceil(count * len(records) / 100)
    if found[1] == "first":
        return records[:count]
    if found[1] == "end":
        return records[-count:] if count else []
    shuffled = list(records)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


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


def pictures_of(record: Record, folder: Path) -> list[Path]:
    """Files of a sample's images, in order."""
    images = record.get("image")
    if images is None:
        return []
    return [folder / name for name in ([images] if isinstance(images, str) else images)]


def frames_of(record: Record, folder: Path) -> list[Path]:
    """Files of the frames of a sample's video: a list, or the pictures of a folder by name.

    UserError for a video file.
    """
    video = record.get("video")
    if video is None:
        return []
    if isinstance(video, list):
        return [folder / name for name in video]
    path = folder / video
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
    if path.exists():
        raise UserError(
            f"{path} is a video file, which is not decoded here: give a folder of its frames, or a "
            "list of them"
        )
    raise MissingFileError(f"there is no folder of frames {path}")


def check_records(manifest: Manifest, *, needs_pictures: bool = True) -> None:
    """UserError that counts the samples that cannot be trained on and names the first three."""
    found: list[str] = []
    count = 0
    for number, (record, folder) in enumerate(
        zip(manifest.records, manifest.folders, strict=True), start=1
    ):
        wrong = _problem(record, folder, needs_pictures)
        if wrong:
            count += 1
            if len(found) < 3:
                name = f" (id {record['id']})" if "id" in record else ""
                found.append(f"sample {number}{name}: {wrong}")
    if count:
        of = f"{count} of {len(manifest.records)} samples cannot be used"
        raise UserError(f"{of}: {'; '.join(found)}" + (" ..." if count > len(found) else ""))


def _problem(record: Record, folder: Path, needs_pictures: bool) -> str | None:
    try:
        turns = turns_of(record)
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
        return "no turn is the assistant's (gpt), so there is nothing to learn"
    for path in [*pictures, *frames] if needs_pictures else []:
        if not path.exists():
            return f"there is no picture {path}"
    return None


def word_lengths(records: Sequence[Record]) -> list[int]:
    """Words in each sample's conversation."""
    return [sum(len(text.split()) for _, text in turns_of(record)) for record in records]
