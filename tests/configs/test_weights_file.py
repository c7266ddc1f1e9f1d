"""Where the weights of a preset are looked for, in which order, and how they are fetched."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rwkvtune.cli.main import main as rwkvtune
from rwkvtune.configs import ModelConfig, load_model_config
from rwkvtune.configs.weights_file import HUB_REPOSITORY
from rwkvtune.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAME = "rwkv7-g1-0.1b-20250307-ctx4096.pth"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """An empty folder for each place; the Hugging Face cache is laid out as its library does."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--something" / "snapshots" / ("0" * 40)
    found = {name: tmp_path / name for name in ("beside", "here", "first", "second")}
    for folder in (*found.values(), snapshot, cache / "models--someone--something" / "refs"):
        folder.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("RWKVTUNE_MODELS", f"{found['first']}{os.pathsep}{found['second']}")
    monkeypatch.chdir(found["here"])
    return found | {"cache": snapshot}


def preset_in(folder: Path, model_file: str | None = NAME) -> ModelConfig:
    content = load_model_config("0.1b").config_dict | {"model_file": model_file}
    (folder / "rwkv7-mine.json").write_text(json.dumps(content))
    return load_model_config(str(folder / "rwkv7-mine.json"))


def test_the_first_place_that_has_the_file_wins(places: dict[str, Path], tmp_path: Path) -> None:
    preset = preset_in(places["beside"])
    assert preset.model_path == NAME  # nowhere yet
    for name in ("cache", "second", "first", "here", "beside"):
        (places[name] / NAME).write_bytes(b"weights")
        assert preset.model_path == str(preset.find_weights()) == str(places[name] / NAME)
    other = tmp_path / "other.pth"
    other.write_bytes(b"weights")
    assert preset.find_weights(other) == other
    with pytest.raises(FileNotFoundError, match=r"there is no file no\.pth"):
        preset.find_weights("no.pth")


def test_a_wrong_entry_among_the_users_folders_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = preset_in(tmp_path)
    monkeypatch.setenv("RWKVTUNE_MODELS", f"{tmp_path}{os.pathsep}{tmp_path / 'gone'}")
    with pytest.raises(FileNotFoundError, match=r"RWKVTUNE_MODELS \(\S*gone, which does not exist"):
        preset.find_weights()
    monkeypatch.setenv("RWKVTUNE_MODELS", f"{tmp_path}{os.pathsep}{__file__}")
    told = f"names the file {__file__}, .* it lies in, {Path(__file__).parent}"
    for use in (preset.find_weights, lambda: load_model_config("0.1b")):
        with pytest.raises(UserError, match=told):
            use()


def test_a_builtin_preset_is_resolved_in_the_same_way(places: dict[str, Path]) -> None:
    (places["second"] / NAME).write_bytes(b"weights")
    assert load_model_config("0.1b").model_path == str(places["second"] / NAME)


def test_weights_that_are_nowhere_are_an_error_with_all_places_and_the_way_out(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    preset = preset_in(places["beside"])
    with pytest.raises(FileNotFoundError) as raised:
        preset.find_weights()
    message = str(raised.value)
    assert isinstance(raised.value, UserError) and "\n" not in message
    order = [message.index(str(places[name])) for name in ("beside", "here", "first", "second")]
    assert order == sorted(order) and "Hugging Face cache" in message
    assert message.endswith(
        f"rwkvtune configs show {places['beside'] / 'rwkv7-mine.json'} --download"
    )
    with pytest.raises(FileNotFoundError, match="rwkvtune configs show rwkv7-0.1b --download"):
        load_model_config("0.1b").find_weights()
    assert rwkvtune(["configs", "show", "0.1b"]) == 0
    shown = capsys.readouterr().out
    assert f"{NAME}, which is in none of these places:" in shown and str(places["second"]) in shown


def test_paths_in_a_preset_are_relative_to_the_places_and_absolute_ones_are_alone(
    places: dict[str, Path], tmp_path: Path
) -> None:
    (places["first"] / "small").mkdir()
    (places["first"] / "small" / "w.pth").write_bytes(b"weights")
    preset = preset_in(places["beside"], "small/w.pth")
    assert preset.model_path == str(places["first"] / "small" / "w.pth")
    absolute = tmp_path / "w.pth"
    preset = preset_in(places["beside"], str(absolute))
    with pytest.raises(FileNotFoundError, match=f"are in none of these places: {absolute}. Give"):
        preset.find_weights()
    absolute.write_bytes(b"weights")
    assert preset.model_path == str(absolute)
    with pytest.raises(FileNotFoundError, match="names no model_file"):
        preset_in(places["beside"], None).find_weights()


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Address of a stand-in for the hub with one file, and what it was asked for."""
    content = b"weights of somebody"
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            asked.append(f"{self.command} {self.path}")
            found = self.path.endswith(f"/{HUB_REPOSITORY}/resolve/main/{NAME}")
            self.send_response(200 if found else 404)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "1" * 40)
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.end_headers()
            if with_body and found:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_is_fetched_without_the_flag_and_then_it_is_in_the_cache(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = hub

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        environment |= {"RWKVTUNE_MODELS": "", "HF_HUB_DISABLE_XET": "1"}
        environment["PYTHONPATH"] = str(ROOT)
        return subprocess.run(
            [sys.executable, "-m", "rwkvtune", "configs", "show", *args],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    assert "which is in none of these places" in run("0.1b").stdout and asked == []
    fetched = run("0.1b", "--download")
    assert fetched.returncode == 0, fetched.stderr
    assert any(line.startswith("GET") for line in asked)
    asked.clear()
    found = run("0.1b").stdout.splitlines()[-1].split(maxsplit=1)[1]
    assert Path(found).read_bytes() == b"weights of somebody" and asked == []
    missing = run("0.4b", "--download")
    assert missing.returncode == 2 and missing.stderr.startswith(
        f"error: rwkv7-g1-0.4b-20250722-ctx4096.pth cannot be fetched from {HUB_REPOSITORY}"
    )
    assert len(missing.stderr.splitlines()) == 1
