"""What the package promises before any work: light imports, honest metadata, working commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import rwkvtune

ROOT = Path(__file__).resolve().parent.parent

HEAVY = ("torch", "numpy", "lightning_fabric", "matplotlib", "transformers")


def run_python(code: str) -> str:
    """Output of a fresh interpreter, in the repository root."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_rwkvtune_loads_nothing_heavy() -> None:
    loaded = run_python("import sys, rwkvtune; print(*{m.split('.')[0] for m in sys.modules})")
    assert not set(HEAVY) & set(loaded.split())
    assert "rwkvtune" in loaded.split()


def test_every_package_imports_without_torch() -> None:
    packages = sorted(
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "rwkvtune").rglob("__init__.py")
    )
    code = "import sys, importlib\nsys.modules['torch'] = None  # makes `import torch` fail\n"
    code += f"for name in {[p for p in packages if '.kernels' not in p]!r}:\n"
    code += "    importlib.import_module(name); print(name)"
    assert run_python(code).split()[0] == "rwkvtune"


def test_metadata_states_version_python_and_torch() -> None:
    info = metadata.metadata("rwkvtune")
    assert info["Version"] == rwkvtune.__version__
    assert info["Requires-Python"] == "<3.14,>=3.10"
    assert info["License-Expression"] == "Apache-2.0"
    assert "torch>=2.6" in (metadata.requires("rwkvtune") or [])


def test_the_installed_command_points_to_the_command_line() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="rwkvtune")
    assert script.value == "rwkvtune.cli.main:main"


def test_an_installed_wheel_has_all_files_and_answers_help(tmp_path: Path) -> None:
    # Copied, because a build leaves folders in its source. setuptools came with torch.
    source, site = tmp_path / "source", tmp_path / "site"
    packages = ("rwkvtune", "rwkv_trainer")
    for package in packages:
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-index", "--no-deps"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", str(source), "-w", str(tmp_path)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", str(site), str(wheel)], check=True)

    files = [path for package in packages for path in (source / package).rglob("*")]
    there = {path.relative_to(source) for path in files if path.is_file()}
    assert Path("rwkvtune/demo/recipe.yaml") in there
    assert {p for p in there if not (site / p).is_file()} == set()

    def installed(*arguments: str) -> str:
        run = [sys.executable, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, check=True)
        return done.stdout.decode()

    assert str(site) in installed("-c", "import rwkvtune; print(rwkvtune.__file__)")
    assert "train a small RWKV-7" in installed("-m", "rwkvtune", "--help")
    assert "--exit_tokens" in installed("-m", "rwkvtune", "train", "--help")
    assert "--my_pile_stage" in installed(str(site / "bin" / "rwkv-train"), "--help")
    assert installed("-c", "import rwkv_trainer as t; print(t.ModelConfig().n_layer)") == "3\n"


def test_constraints_pin_every_direct_dependency_for_each_python() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints-dev.txt").read_text().splitlines()
    assert lines[0] == "torch==2.13.0"
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for version in ("3.10", "3.11", "3.12", "3.13"):
        environment = {"python_version": version, "python_full_version": f"{version}.0"}
        pinned: dict[str, list[str]] = {}
        for pin in pins:
            assert re.fullmatch(r"==[\d.]+", str(pin.specifier)), f"{pin} is no exact version"
            if pin.marker is None or pin.marker.evaluate(environment):
                pinned.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier)[2:])
        for text in metadata.requires("rwkvtune") or []:
            wanted = Requirement(text)
            is_dev = wanted.marker is not None and wanted.marker.evaluate({"extra": "dev"})
            # triton: a GPU build of torch asks for one exact version of its own.
            if wanted.name in ("rwkvtune", "triton") or (wanted.marker is not None and not is_dev):
                continue
            found = pinned.get(canonicalize_name(wanted.name), [])
            assert len(found) == 1, f"{wanted.name} is pinned {len(found)} times for {version}"
            assert wanted.specifier.contains(found[0]), f"{wanted} does not admit {found[0]}"
