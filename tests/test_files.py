from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from rwkvtune.errors import MissingFileError, UserError
from rwkvtune.files import (
    RunFolderLock,
    atomic_directory,
    atomic_write,
    atomic_write_together,
    check_writable,
    remove_directory,
    remove_leftovers,
)

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs file locks and signals")


def start(code: str, *args: object) -> subprocess.Popen[str]:
    """A process of its own that runs `code`; it says "ready" (a line) before we go on."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_written_file_has_its_content_and_leaves_no_other_name(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folders" / "file.bin"
    atomic_write(target, lambda file: file.write(b"first"))
    atomic_write(target, lambda file: file.write(b"second"))
    assert target.read_bytes() == b"second"
    assert os.listdir(target.parent) == ["file.bin"]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half of the n")
        raise KeyError("the writer's own mistake")

    with pytest.raises(KeyError, match="own mistake"):
        atomic_write(target, write)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_files_that_belong_together_appear_only_when_all_are_written(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"old a")
    b.write_bytes(b"old b")

    def fail(file: BinaryIO) -> None:
        assert (a.read_bytes(), b.read_bytes()) == (b"old a", b"old b")
        raise KeyError("the second writer's own mistake")

    with pytest.raises(KeyError, match="second writer"):
        atomic_write_together({a: lambda file: file.write(b"a"), b: fail})
    assert (a.read_bytes(), b.read_bytes()) == (b"old a", b"old b")
    atomic_write_together(
        {a: lambda f: f.write(b"a"), b: lambda f: f.write(b"b"), c: lambda f: f.write(b"c")}
    )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"a", "b": b"b", "c": b"c"}


@posix_only
@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_between_two_names_never_leaves_an_old_file_beside_a_new_one(
    tmp_path: Path, renames: int
) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from rwkvtune.files import atomic_write_together
a, b = map(Path, sys.argv[1:3])
left, replace = [int(sys.argv[3])], os.replace
def replace_or_die(*names):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    replace(*names)
os.replace = replace_or_die
print("ready", flush=True)
atomic_write_together({a: lambda f: f.write(b"new"), b: lambda f: f.write(b"new")})
"""
    paths = [tmp_path / "x.bin", tmp_path / "x.idx"]
    for path in paths:
        path.write_bytes(b"old")
    start(code, *paths, renames).wait(timeout=600)
    assert [path.read_bytes() for path in paths if path.exists()] == [b"new"] * renames


def test_a_stop_between_two_names_loses_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"old")
    b.write_bytes(b"old")
    real_replace = os.replace

    def stopped(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", real_replace)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_together({a: lambda f: f.write(b"new"), b: lambda f: f.write(b"new")})
    assert (a.read_bytes(), b.read_bytes()) == (b"new", b"new")
    assert sorted(tmp_path.iterdir()) == [a, b]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_we_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_replace, real_rename = os.fsync, os.replace, os.rename

    def fsync(fd: int) -> None:
        is_folder = os.path.isdir(os.readlink(f"/proc/self/fd/{fd}"))
        events.append("fsync folder" if is_folder else "fsync file")
        real_fsync(fd)

    def replace(source: Path, target: Path) -> None:
        events.append("rename")
        real_replace(source, target)

    def rename(source: Path, target: Path) -> None:
        events.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "rename", rename)

    atomic_write(tmp_path / "file", lambda file: file.write(b"x"))
    assert events == ["fsync file", "rename", "fsync folder"]

    events.clear()
    with atomic_directory(tmp_path / "folder") as temporary:
        (temporary / "a").write_bytes(b"a")
    assert events == ["fsync file", "fsync folder", "rename", "fsync folder"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained_with_path_and_free_bytes(tmp_path: Path, number: int) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"some")
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise RuntimeError("a library's own words") from error

    for target in (tmp_path / "file.bin", tmp_path / "folder"):
        with pytest.raises(UserError, match=r"[\d,]+ bytes are free") as caught:
            if target.suffix:
                atomic_write(target, write)
            else:
                with atomic_directory(target) as temporary, open(temporary / "part", "wb") as file:
                    write(file)
        assert str(target) in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_an_error_while_an_older_full_disk_is_handled_is_not_mistaken_for_it(
    tmp_path: Path,
) -> None:
    def write(file: BinaryIO) -> None:
        raise KeyError("something else")

    with pytest.raises(KeyError):
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError:
            atomic_write(tmp_path / "file", write)


def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    places = [tmp_path / "file" / "below.bin", tmp_path]
    if sys.platform == "linux":
        places.append(Path("/proc/rwkvtune.bin"))  # refuses root too
    for place in places:
        with pytest.raises(UserError, match=re.escape(str(place))):
            atomic_write(place, lambda file: file.write(b"x"))
        with pytest.raises(UserError, match=re.escape(str(place))):
            check_writable(place)
    (tmp_path / "old").write_text("old")
    check_writable(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "old"]
    for place in [tmp_path / "file" / "below", tmp_path / "file"]:
        with (
            pytest.raises(UserError, match=re.escape(str(place))),
            atomic_directory(place),
        ):
            raise AssertionError("must be refused before any work")
    with pytest.raises(UserError):
        RunFolderLock(tmp_path / "file").acquire()
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="Permission denied"):
        atomic_write(tmp_path / "file", lambda file: file.write(b"x"))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "state"
    with pytest.raises(KeyError), atomic_directory(target) as temporary:
        (temporary / "half").write_text("x")
        raise KeyError
    assert os.listdir(tmp_path) == []
    for content in ("first", "second"):
        with atomic_directory(target) as temporary:
            (temporary / "file").write_text(content)
            assert not target.exists() or (target / "file").read_text() == "first"
    assert (target / "file").read_text() == "second"
    with pytest.raises(KeyError), atomic_directory(target) as temporary:
        raise KeyError
    assert (target / "file").read_text() == "second"
    assert os.listdir(tmp_path) == ["state"]
    remove_directory(target)
    assert os.listdir(tmp_path) == []


CRASH_AFTER_RENAME = """
import os, signal, sys
from rwkvtune.files import atomic_directory
target, crash_after = sys.argv[1], int(sys.argv[2])
real, count = os.rename, 0
def rename(source, target):
    global count
    real(source, target)
    count += 1
    if count == crash_after:
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename
print("ready", flush=True)
with atomic_directory(target) as temporary:
    (temporary / "file").write_text("new")
"""


@posix_only
@pytest.mark.parametrize(("crash_after", "expected"), [(1, "old"), (2, "new")])
def test_a_crash_while_a_folder_is_replaced_leaves_one_good_copy(
    tmp_path: Path, crash_after: int, expected: str
) -> None:
    target = tmp_path / "state"
    target.mkdir()
    (target / "file").write_text("old")
    process = start(CRASH_AFTER_RENAME, target, crash_after)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    copies = sorted(path.read_text() for path in tmp_path.glob("*/file"))
    assert copies == ["new", "old"]
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["state"]
    assert (target / "file").read_text() == expected


HOLD_TEMPORARIES = """
import sys, time
from rwkvtune.files import atomic_directory, atomic_write
def write(file):
    file.write(b"x" * 100_000)
    print("ready", flush=True)
    time.sleep(60)
with atomic_directory(sys.argv[1] + "/folder") as temporary:
    (temporary / "part").write_text("part")
    atomic_write(sys.argv[1] + "/file", write)
"""


@posix_only
def test_leftovers_of_a_killed_writer_are_removed_and_those_of_a_living_one_are_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "kept.txt").write_text("somebody's file")
    process = start(HOLD_TEMPORARIES, tmp_path)
    during = sorted(os.listdir(tmp_path))
    assert during == [f".tmp-{process.pid}-file", f".tmp-{process.pid}-folder", "kept.txt"]
    assert remove_leftovers(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == during
    kill(process)
    assert remove_leftovers(tmp_path) == during[:2]
    assert os.listdir(tmp_path) == ["kept.txt"]
    assert remove_leftovers(tmp_path / "absent") == []


HOLD_LOCK = """
import os, sys, time
from rwkvtune.files import RunFolderLock
with RunFolderLock(sys.argv[1]):
    if sys.argv[2] == "fork" and os.fork() == 0:
        print("ready", flush=True)
        sys.stdin.read()
        os._exit(0)
    if sys.argv[2] == "alone":
        print("ready", flush=True)
    time.sleep(60)
"""


@posix_only
def test_a_second_run_in_one_folder_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(HOLD_LOCK, folder, "alone")
    with pytest.raises(UserError, match=f"pid {process.pid} .*{re.escape(str(folder))}"):
        RunFolderLock(folder).acquire()
    kill(process)
    with RunFolderLock(folder), pytest.raises(UserError, match=f"pid {os.getpid()} "):
        RunFolderLock(folder).acquire()
    lock = RunFolderLock(folder)
    lock.acquire()
    lock.release()
    lock.release()


@posix_only
def test_a_data_worker_that_outlives_its_run_does_not_keep_the_folder_locked(
    tmp_path: Path,
) -> None:
    process = start(HOLD_LOCK, tmp_path, "fork")
    process.kill()
    process.wait()
    assert process.stdin is not None
    try:
        process.stdin.write("the worker still lives and reads\n")
        process.stdin.flush()
        with RunFolderLock(tmp_path):
            pass
    finally:
        process.communicate()  # closes its input, which ends the worker


def test_a_missing_file_can_be_caught_as_user_error_and_as_file_not_found() -> None:
    for kind in (UserError, ValueError, FileNotFoundError):
        with pytest.raises(kind, match="there is no"):
            raise MissingFileError("there is no such file")
