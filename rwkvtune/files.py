"""Writing files so that a crash at any moment leaves either the old version or the new one, never
half of it.

The rule is the same everywhere: write under a temporary name in the same folder, fsync, rename,
fsync the folder. Temporary names begin with `.tmp-<pid>-`, versions moved aside by a replacement
with `.old-<pid>-`. Whoever works on such a name holds a flock on it, and the kernel drops that lock
when the process dies, however it dies: so an abandoned name can be told from one in use without
trusting process ids, which containers hand out again.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

from rwkvtune.errors import UserError

if sys.platform != "win32":  # renames are atomic there too; locks and fsync of folders are missing
    import fcntl

_TEMPORARY = re.compile(r"\.tmp-\d+-(.+)", re.DOTALL)
_MOVED_ASIDE = re.compile(r"\.old-\d+-(.+)", re.DOTALL)

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Create or replace the file `path` with what `write` puts into the binary file it is given.

    Returns once the bytes and the name are on the disk. Missing parent folders are made. When
    anything fails, `path` is as it was and the temporary file is gone. A full disk or a place that
    cannot be written is a UserError.
    """
    atomic_write_together({Path(path): write})


def atomic_write_together(writes: Mapping[Path, Callable[[BinaryIO], object]]) -> None:
    """The same for several files that belong together: written in the given order, and none gets
    its name before all are on the disk.

    The old files of these names stay until then. They go just before the new ones get their names,
    the last first, and the new ones come in the given order: a crash in that moment can leave a
    part of the files, but never old ones beside new ones.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        with ExitStack() as still_open:  # and so locked, as long as another is being written
            for path, write in writes.items():
                temporary, file = _open_temporary(path)
                staged.append((temporary, path))
                still_open.enter_context(_full_disk_explained(path))
                still_open.enter_context(file)
                with _full_disk_explained(path):
                    _try_lock(file.fileno())
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
        try:
            _give_names(staged)
        except (KeyboardInterrupt, SystemExit):  # the old files may be gone by now
            _give_names(staged)
            raise
    except BaseException:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
        raise


def _give_names(staged: list[tuple[Path, Path]]) -> None:
    """Rename what still has its temporary name, as atomic_write_together promises."""
    waiting = [(temporary, path) for temporary, path in staged if temporary.exists()]
    if len(staged) > 1:
        for _, path in reversed(waiting):
            path.unlink(missing_ok=True)
    for temporary, path in waiting:
        os.replace(temporary, path)
    for folder in {path.parent for _, path in staged}:
        _fsync_folder(folder)


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """The place of a file that a list or an index names, within its folder.

    UserError for an absolute path and for one that climbs out of the folder: such a list could
    otherwise make a run read any file of this machine.
    """
    relative = os.path.normpath(name)
    if os.path.isabs(name) or relative.split(os.sep)[0] == os.pardir or "\0" in name:
        raise UserError(
            f"{name!r} lies outside of {os.fspath(folder)}: names must be relative to that folder "
            "and stay in it"
        )
    return Path(folder) / name


def check_writable(path: str | os.PathLike[str]) -> None:
    """UserError now where `atomic_write` to `path` would be refused after long work. Missing parent
    folders are made."""
    temporary, file = _open_temporary(Path(path))
    file.close()
    temporary.unlink()


def check_space(path: str | os.PathLike[str], num_bytes: int) -> None:
    """UserError when the disk that `path` is to lie on has no room for so many bytes."""
    free = _free_bytes(Path(path).absolute())
    if num_bytes > free:
        raise UserError(
            f"{path} needs {num_bytes:,} bytes, {free:,} are free on its disk: make room or choose "
            "another folder"
        )


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder to fill; it becomes `path` when the block ends without an error.

    Everything in it is on the disk before it gets its name. A folder already at `path` is replaced:
    it is first moved aside to `.old-<pid>-<name>` and stays whole until the new one has its name. A
    crash just between these two renames leaves the old version under that name only; readers may
    use it there, and `remove_leftovers` puts it back. Failures are those of `atomic_write`.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    aside = path.with_name(f".old-{os.getpid()}-{path.name}")
    with _refusals_explained(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file has that name")
        _make_folder(path.parent)
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had our id
        temporary.mkdir()
    try:
        with _full_disk_explained(path), _folder_in_use(temporary):
            yield temporary
            _fsync_tree(temporary)
            if path.exists():
                shutil.rmtree(aside, ignore_errors=True)  # obsolete while `path` exists
                with _folder_in_use(path):
                    os.rename(path, aside)
                    os.rename(temporary, path)
            else:
                os.rename(temporary, path)
            _fsync_folder(path.parent)
    except BaseException:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def remove_directory(path: str | os.PathLike[str]) -> None:
    """Remove a folder and its content; a crash on the way leaves no half of it under its name."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had our id
    os.rename(path, temporary)
    shutil.rmtree(temporary)


def name_before_moved_aside(entry_name: str) -> str | None:
    """The original name of a version that a replacement moved aside; None for every other name."""
    moved = _MOVED_ASIDE.fullmatch(entry_name)
    return moved[1] if moved else None


def remove_leftovers(folder: str | os.PathLike[str]) -> list[str]:
    """Tidy up after killed writers in `folder` (not below it); returns the names that were removed
    or put back.

    Names that a living process still works on are left alone, and so is everything where there are
    no file locks. A version that was moved aside and whose replacement never got its name is put
    back under its own name.
    """
    folder = Path(folder)
    tidied = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        original = name_before_moved_aside(entry.name)
        if not (original or _TEMPORARY.fullmatch(entry.name)) or not _is_abandoned(entry):
            continue
        if original and not (folder / original).exists():
            os.rename(entry, folder / original)
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
        tidied.append(entry.name)
    if tidied:
        _fsync_folder(folder)
    return tidied


class RunFolderLock:
    """Keeps a second run out of a folder: `with RunFolderLock(folder): ...`, or acquire() and
    release().

    The lock is a flock on `<folder>/.lock`. It belongs to the open file, not to the name: it ends
    with its process, whatever ends that, and the file may stay. The file holds process id and host
    for the message that a second run gets. Forked children (data workers) give up their copy at
    once, so that an orphan cannot keep the folder locked. Where there are no file locks (Windows,
    some network file systems) one warning says so and nobody is kept out.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._fd: int | None = None
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._close)

    def acquire(self) -> None:
        """Take the lock, making the folder if need be; UserError when another run has it."""
        path = self.folder / ".lock"
        with _refusals_explained(path):
            _make_folder(self.folder)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        state = _try_lock(fd)
        if state == "held":
            holder = os.read(fd, 200).decode("utf-8", "replace").strip() or "pid not known"
            os.close(fd)
            raise UserError(
                f"another run ({holder}) is using this folder: {self.folder}. "
                "Wait for it, stop it, or choose another folder for this run."
            )
        self._fd = fd
        if state == "no locks":
            warnings.warn(
                f"{self.folder}: this file system has no file locks, so a second run started in "
                "the same folder would not be noticed",
                stacklevel=2,
            )
        with _full_disk_explained(path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()} on {platform.node()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> RunFolderLock:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def _open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new file, open, that can be renamed to `path`; UserError when there may be none."""
    with _refusals_explained(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has that name")
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        _make_folder(path.parent)
        return temporary, open(temporary, "wb")


def _try_lock(fd: int) -> Literal["taken", "held", "no locks"]:
    """Lock an open file or folder until it is closed, without waiting; "held": by somebody else."""
    if sys.platform == "win32":
        return "no locks"
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return "no locks"
    return "taken"


@contextmanager
def _folder_in_use(folder: Path) -> Iterator[None]:
    """Mark a folder, by a lock on it, as one that `remove_leftovers` has to leave alone."""
    if sys.platform == "win32":
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        _try_lock(fd)
        yield
    finally:
        os.close(fd)


def _is_abandoned(path: Path) -> bool:
    """True when nobody holds the lock of this temporary; False also when that cannot be known."""
    if sys.platform == "win32":
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # renamed by its owner since we listed it, or not ours to touch
        return False
    try:
        return _try_lock(fd) == "taken"
    finally:
        os.close(fd)


def _make_folder(folder: Path) -> None:
    """Make `folder` with its parents, each new name on the disk before we return."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):  # another process made it meanwhile
        folder.mkdir()
        _fsync_folder(folder.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file")


def _fsync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(parent, name), "rb+") as file:
                os.fsync(file.fileno())
        _fsync_folder(Path(parent))


@contextmanager
def _refusals_explained(path: Path) -> Iterator[None]:
    """Turn "the system does not let us begin writing here" into a UserError."""
    try:
        with _full_disk_explained(path):
            yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. Choose a folder in which this user may write."
        ) from error


@contextmanager
def _full_disk_explained(path: Path) -> Iterator[None]:
    """Turn "no space left" into a UserError, also when it comes wrapped in a library's error."""
    handled_before = sys.exc_info()[1]  # also at the end of the chain, but not our failure
    try:
        yield
    except UserError:  # explained by what was called inside
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and cause is not handled_before:
            if isinstance(cause, OSError) and cause.errno in _NO_SPACE:
                raise UserError(
                    f"cannot write {path}: {os.strerror(cause.errno)}; {_free_bytes(path):,} bytes "
                    "are free there. What was there before is unharmed: make room or choose "
                    "another folder, then run the same command again."
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _free_bytes(path: Path) -> int:
    while not path.is_dir():
        path = path.parent
    return shutil.disk_usage(path).free
