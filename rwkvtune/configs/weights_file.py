"""Where the weights of a preset are on this machine, and how they get there."""

from __future__ import annotations

import os
from pathlib import Path

from rwkvtune.errors import MissingFileError, UserError

FOLDERS_VARIABLE = "RWKVTUNE_MODELS"
"""Environment variable with folders of weights and of presets, separated as in PATH."""

HUB_REPOSITORY = "BlinkDL/rwkv7-g1"
"""Where the released RWKV-7 G0 and G1 weights are, on the Hugging Face hub."""


def model_folders() -> list[Path]:
    """The user's own folders, in their order; also those that do not exist, whose disk may not be
    there today. UserError for a file."""
    given = os.environ.get(FOLDERS_VARIABLE, "")
    folders = [Path(folder).expanduser() for folder in given.split(os.pathsep) if folder]
    for folder in folders:
        if folder.is_file():
            raise UserError(
                f"{FOLDERS_VARIABLE} names the file {folder}, and takes folders: name the one that "
                f"it lies in, {folder.absolute().parent}"
            )
    return folders


def look_for(model_file: str, *, beside: Path | None) -> tuple[Path | None, list[str]]:
    """(the file or None, the places that were looked at, in words).

    model_file: as the preset has it; a name, or a path relative to any of the places.
    beside: the folder of the preset's JSON; None = it came from no file.
    The Hugging Face cache is searched, by its own library, for a file of that name from any
    repository; nothing is fetched.
    """
    wanted = Path(model_file).expanduser()
    if wanted.is_absolute():
        return (wanted if wanted.is_file() else None), [str(wanted)]
    folders = [] if beside is None else [(beside, f"beside the preset ({beside})")]
    folders.append((Path.cwd(), f"the current folder ({Path.cwd()})"))
    for folder in model_folders():
        absent = "" if folder.is_dir() else ", which does not exist"
        folders.append((folder, f"{FOLDERS_VARIABLE} ({folder}{absent})"))
    for folder, _ in folders:
        if (folder / wanted).is_file():
            return folder / wanted, []
    looked_at = [words for _, words in folders]
    if not model_folders():
        looked_at.append(f"{FOLDERS_VARIABLE} (not set)")
    cached, words = _in_hub_cache(wanted.name)
    return cached, [*looked_at, words]


def find_weights_file(model_file: str, *, beside: Path | None, preset: str) -> Path:
    """The weights of a preset; MissingFileError says where they were looked for and how to get
    them.

    preset: what `rwkvtune configs show` is to be given for it.
    """
    found, looked_at = look_for(model_file, beside=beside)
    if found is None:
        raise MissingFileError(
            f"the weights of this preset, {model_file}, are in none of these places: "
            f"{'; '.join(looked_at)}. Give their path (--load_model FILE), name their folder in "
            f"{FOLDERS_VARIABLE}, or fetch them from {HUB_REPOSITORY} on the Hugging Face hub: "
            f"rwkvtune configs show {preset} --download"
        )
    return found


def download(model_file: str, *, repository: str = HUB_REPOSITORY) -> Path:
    """Fetch a file from the Hugging Face hub into its cache, or find it there; UserError says why
    it did not come."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(_LIBRARY_MISSING) from error
    name = Path(model_file).name
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # types of the HTTP library that its release uses, and its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name} cannot be fetched from {repository} on the Hugging Face hub: {reason[:300]}"
        ) from error


_LIBRARY_MISSING = (
    "fetching from the Hugging Face hub needs the package huggingface_hub: pip install "
    "huggingface_hub"
)


def _in_hub_cache(name: str) -> tuple[Path | None, str]:
    """The newest file of that name in the cache, and the place in words."""
    try:
        from huggingface_hub import CacheNotFound, constants, scan_cache_dir
    except ImportError:
        return None, "the Hugging Face cache (not read: there is no package huggingface_hub)"
    place = f"the Hugging Face cache ({constants.HF_HUB_CACHE})"
    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return None, place
    files = {
        file
        for repository in cache.repos
        for revision in repository.revisions
        for file in revision.files
        if file.file_name == name
    }
    newest = max(files, key=lambda file: file.blob_last_modified, default=None)
    return (None if newest is None else newest.file_path), place
