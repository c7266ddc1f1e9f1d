"""The short form of `make fuzz`: changed files of every kind are read or refused, nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from rwkvtune.checkpoint import load_weights
from rwkvtune.data.images import PictureStore
from rwkvtune.data.llava_manifest import pictures_of
from rwkvtune.errors import UserError
from rwkvtune.weights_header import read_header
from tests.fuzz.__main__ import fuzz
from tests.fuzz.guard import guarded
from tests.fuzz.targets import Target, all_targets, read_changed

NAMES = (
    "token index", "tokens", "weights", "resume/step-00000003/state.safetensors",
    "resume/step-00000003/state.json", "vocabulary", "tokenizer.json", "conversations",
    "documents", "chat template", "preset", "settings", "llava manifest", "llava mixture",
    "pictures in a zip",
)  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return all_targets(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_file_is_read_or_refused_by_our_own_error(
    name: str, targets: dict[str, Target], tmp_path: Path
) -> None:
    target = targets[name]
    assert any(read_changed(target, whole, tmp_path) for whole in target.seeds)
    taken, refused = fuzz(target, tmp_path, 60, first_seed=7)
    assert taken + refused >= 60 and refused > 0
    assert set(NAMES) == set(targets)


def test_the_guard_notices_a_reader_that_runs_a_program(tmp_path: Path) -> None:
    """The witness that the other tests would fail."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.system, (f"touch {tmp_path / 'ran'}",)

    content = pickle.dumps({"emb.weight": Evil()})
    with pytest.raises(AssertionError, match=r"os\.system"), guarded():
        pickle.loads(content)
    (tmp_path / "w.pth").write_bytes(content)
    with guarded(), pytest.raises(UserError):
        load_weights(tmp_path / "w.pth")
    with guarded():
        assert read_header(tmp_path / "w.pth") is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
def test_a_name_in_a_manifest_cannot_leave_the_folder_of_the_data(
    name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    with pytest.raises(UserError, match="outside"):
        PictureStore(folder).open(name)
    with pytest.raises(UserError, match="outside"):
        pictures_of({"image": name}, folder)
