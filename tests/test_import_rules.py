"""Who may import whom, read from the syntax trees of every file.

A room is a folder (or a single file) of rwkvtune; ROOMS below is the whole rule. Adding an edge
here is a decision about the architecture: say why in the commit.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

EVERYONE_MAY_USE = {"errors", "files"}

# Packages that are not listed for a room are refused; None = any package, save those in ONLY_IN.
TORCH_NUMPY = {"torch", "numpy"}
DATA_PACKAGES = TORCH_NUMPY | {"PIL", "sympy", "zstandard", "pyarrow", "jinja2", "yaml"}
LIBRARY = {"kernels", "weights_header", "checkpoint", "data/tokenizers", "data", "models"}
LIBRARY |= {"adapters", "configs"}
ACTIVITIES = {"inference", "training", "evaluation", "export"}

# room -> (rooms it may import, packages it may import)
ROOMS: dict[str, tuple[set[str], set[str] | None]] = {
    "errors": (set(), set()),
    "files": ({"errors"}, set()),
    "kernels": (set(), {"torch", "triton"}),
    "weights_header": (set(), set()),
    "checkpoint": ({"weights_header"}, {"torch", "safetensors"}),
    "data/tokenizers": (set(), {"numpy", "pyrwkv_tokenizer", "numba"}),
    "data": ({"data/tokenizers"}, DATA_PACKAGES),
    "models": ({"kernels"}, {"torch", "transformers"}),
    "adapters": ({"models", "checkpoint"}, {"torch", "peft", "bitsandbytes"}),
    # Of models only */config.py, which holds no torch.
    "configs": ({"models"}, {"huggingface_hub"}),
    "inference": ({"models", "data", "data/tokenizers", "checkpoint"}, None),
    "evaluation": (LIBRARY - {"kernels", "configs"} | {"inference"}, None),
    "export": (LIBRARY - {"kernels", "configs"} | {"inference"}, None),
    "training": (LIBRARY | {"inference", "evaluation"}, None),
    "demo": (LIBRARY | ACTIVITIES, None),
    "cli": (LIBRARY | ACTIVITIES | {"demo"}, None),
    "pipeline": (LIBRARY | ACTIVITIES | {"cli"}, None),
    "__init__": ({"inference"}, set()),  # rwkvtune.load, on first use
    "__main__": ({"cli"}, set()),
}

# package -> the only files (regular expression on the path inside rwkvtune/) that may name it
ONLY_IN = {
    "triton": r".*/triton_gpu\.py",
    "lightning_fabric": r"training/fabric\.py",
    "lightning": r"training/fabric\.py",
    "pytorch_lightning": r"training/fabric\.py",
    "deepspeed": r"training/zero\.py",
    "transformers": r"(models/(vision|alternating)/.*|training/alternating)\.py",
    "peft": r"adapters/.*\.py",
    "bitsandbytes": r"adapters/.*\.py",
    "huggingface_hub": r"configs/weights_file\.py",
    "argparse": r"(cli/.*|pipeline/vicsek)\.py",
    "jsonargparse": r"(cli/.*|training/config)\.py",
}

PUBLISHED_SPELLINGS = ("my_testing", "head_size_a", "my_exit_tokens", "my_pile_stage")
# The presets' JSON files are published, and so are their keys.
MAY_SPELL_AS_PUBLISHED = (
    "cli/published_flags.py",
    "cli/world_train.py",
    "pipeline/",
    "configs/",
    "models/rwkv7/config.py",
)
# RWKVTUNE_MODELS is read wherever weights of a preset are looked for; launchers and DeepSpeed talk
# by variables.
MAY_READ_ENVIRONMENT = r"(kernels/dispatch|configs/weights_file|training/(fabric|zero)|cli/.*)\.py"

# `rwkvtune --help` runs these before anything else; torch alone would cost seconds.
NEEDED_BY_HELP = r"(errors|files|weights_header|training/config|cli/.*|configs/.*)\.py"
HEAVY = {"torch", "lightning_fabric", "transformers", "matplotlib", "sympy", "triton"}

DOORS = ("train.py", "world_train.py", "train_alternating.py", "convert_chat_json_to_jsonl.py")
DOOR_TARGETS = r"rwkvtune\.(cli(\..*)?|pipeline(\..*)?|demo)"


@dataclass(frozen=True)
class Import:
    """One import statement: the full module name, the names taken from it, where, and how early."""

    module: str
    names: tuple[str, ...]
    line: int
    at_import: bool
    """False inside a function and under `if TYPE_CHECKING:`, which cost nothing at start-up."""


def room_of(path: str) -> str | None:
    """Room of a file (path inside rwkvtune/) or of a module path; None if the table lacks it."""
    parts = path.removesuffix(".py").split("/")
    if parts[:2] == ["data", "tokenizers"]:
        return "data/tokenizers"
    return parts[0] if parts[0] in ROOMS else None


def imports_of(source: str, path: str) -> list[Import]:
    """All imports of a file of rwkvtune, relative ones resolved, import_module("...") included."""
    package = ["rwkvtune", *path.split("/")[:-1]]

    def absolute(level: int, module: str | None) -> str:
        base = package[: len(package) - level + 1] if level else []
        return ".".join([*base, *([module] if module else [])])

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node.level, node.module)
            yield Import(module, tuple(a.name for a in node.names), node.lineno, at_import)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            name = str(node.args[0].value)
            level = len(name) - len(name.lstrip("."))
            yield Import(absolute(level, name[level:]), (), node.lineno, at_import)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.body:
                yield from walk(statement, False)
            for statement in node.orelse:
                yield from walk(statement, at_import)
            return
        inside_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_import and not inside_function)

    return list(walk(ast.parse(source), True))


def our_targets(item: Import) -> list[str]:
    """Paths inside rwkvtune/ that an import reaches (`from rwkvtune import files` -> files)."""
    if item.module == "rwkvtune":
        return [name for name in item.names if not name.startswith("__")]
    if item.module.startswith("rwkvtune."):
        return [item.module.removeprefix("rwkvtune.").replace(".", "/")]
    return []


def import_violations(source: str, path: str) -> list[str]:
    """What is wrong with the imports of one file, each as `path:line: reason`."""
    room = room_of(path)
    if room is None:
        return [f"{path}: belongs to no room; add it to ROOMS in tests/test_import_rules.py"]
    rooms, packages = ROOMS[room]
    found = []
    for item in imports_of(source, path):
        where = f"{path}:{item.line}: "
        for target in our_targets(item):
            target_room = room_of(target)
            if target_room is None:
                found.append(where + f"imports rwkvtune/{target}, which belongs to no room")
            elif target_room != room and target_room not in rooms | EVERYONE_MAY_USE:
                found.append(where + f"room {room} may not import room {target_room}")
            elif room == "configs" and target_room == "models" and not target.endswith("/config"):
                found.append(where + "room configs may import only the config.py of a model")
        top = item.module.split(".")[0]
        if top == "rwkvtune":
            continue
        is_stdlib = top in sys.stdlib_module_names
        if top in ONLY_IN and not re.fullmatch(ONLY_IN[top], path):
            found.append(where + f"{top} may be named only in {ONLY_IN[top]}")
        elif not is_stdlib and packages is not None and top not in packages:
            found.append(where + f"room {room} may not import {top}")
        if item.at_import and top in HEAVY and re.fullmatch(NEEDED_BY_HELP, path):
            found.append(where + f"--help needs this file, so {top} must be imported in a function")
    return found


def word_violations(source: str, path: str) -> list[str]:
    """Published spellings and environment reads outside their places."""
    found = []
    if not path.startswith(MAY_SPELL_AS_PUBLISHED):
        for word in PUBLISHED_SPELLINGS:
            if re.search(rf"\b{word}\b", source):
                found.append(f"{path}: {word} belongs in {' or '.join(MAY_SPELL_AS_PUBLISHED)}")
    if not re.fullmatch(MAY_READ_ENVIRONMENT, path):
        found += [
            f"{path}:{line}: reads the environment outside {MAY_READ_ENVIRONMENT}"
            for line in environment_reads(source)
        ]
    return found


def environment_reads(source: str) -> list[int]:
    """Lines that read environment variables; `os.environ[...] = value` alone is no read."""
    tree = ast.parse(source)
    written = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
    }
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            if id(node) not in written:
                lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            lines += [node.lineno for a in node.names if a.name in ("environ", "getenv")]
    return lines


def door_violations(source: str, path: str) -> list[str]:
    """A door is a docstring, one import of the command line (or pipeline), and one call."""
    body = ast.parse(source).body
    if body and isinstance(body[-1], ast.If) and "__main__" in ast.unparse(body[-1].test):
        body = body[:-1] + body[-1].body
    imports, calls, others = [], [], []
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        elif isinstance(node, ast.Raise | ast.Expr):
            calls.append(node)
        else:
            others.append(node)
    found = []
    if others or len(imports) != 1 or len(calls) != 1:
        found.append(f"{path}: a door is one import and one call")
    for node in imports:
        module = getattr(node, "module", None) or ""
        if not re.fullmatch(DOOR_TARGETS, module):
            found.append(f"{path}: a door imports only {DOOR_TARGETS}")
    return found


def heavy_at_help(sources: dict[str, str]) -> list[str]:
    """Heavy packages that --help would load, also through other files of ours."""
    reached = [path for path in sources if re.fullmatch(NEEDED_BY_HELP, path)]
    came_from = dict.fromkeys(reached, "--help")
    found = []
    while reached:
        path = reached.pop()
        for item in imports_of(sources[path], path):
            if not item.at_import:
                continue
            if item.module.split(".")[0] in HEAVY:
                found.append(f"{path}:{item.line}: {item.module} (needed by {came_from[path]})")
            for target in files_of(item, sources):
                if target not in came_from:
                    came_from[target] = path
                    reached.append(target)
    return found


def files_of(item: Import, sources: dict[str, str]) -> list[str]:
    """Files of rwkvtune that Python runs for an import: the module, and each package above it."""
    if item.module.split(".")[0] != "rwkvtune":
        return []
    names = [item.module, *(f"{item.module}.{name}" for name in item.names)]
    paths = []
    for name in names:
        parts = name.split(".")[1:]
        paths += ["/".join([*parts[:i], "__init__.py"]) for i in range(len(parts) + 1)]
        paths.append("/".join(parts) + ".py")
    return [path for path in paths if path in sources]


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """Rooms that reach themselves."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(edges.get(start, ()))
        while waiting:
            room = waiting.pop()
            if room not in seen:
                seen.add(room)
                waiting += edges.get(room, ())
        return seen

    return sorted(room for room in edges if room in reach(room))


def package_sources() -> dict[str, str]:
    """Path inside rwkvtune/ -> source, for every Python file of the package."""
    package = ROOT / "rwkvtune"
    return {
        path.relative_to(package).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(package.rglob("*.py"))
    }


def test_every_file_imports_only_what_its_room_may() -> None:
    sources = package_sources()
    assert "__init__.py" in sources
    found = [v for path, source in sources.items() for v in import_violations(source, path)]
    assert not found, "\n".join(found)


def test_no_two_rooms_import_each_other() -> None:
    assert not cycles({room: rooms - {room} for room, (rooms, _) in ROOMS.items()})
    edges: dict[str, set[str]] = {}
    for path, source in package_sources().items():
        room = room_of(path) or path
        targets = {room_of(t) or t for item in imports_of(source, path) for t in our_targets(item)}
        edges.setdefault(room, set()).update(targets - {room})
    assert not cycles(edges)


def test_published_spellings_and_environment_reads_stay_in_their_files() -> None:
    found = [v for path, source in package_sources().items() for v in word_violations(source, path)]
    assert not found, "\n".join(found)


def test_help_loads_nothing_heavy() -> None:
    found = heavy_at_help(package_sources())
    assert not found, "\n".join(found)


def test_there_is_no_drawer() -> None:
    drawers = [path for path in package_sources() if path.endswith(("utils.py", "helpers.py"))]
    assert not drawers, "a helper lives beside its caller"


def test_doors_are_one_import_and_one_call() -> None:
    doors = [ROOT / name for name in DOORS] + sorted((ROOT / "examples").glob("*.py"))
    found = [
        v for path in doors if path.exists() for v in door_violations(path.read_text(), path.name)
    ]
    trainer = ROOT / "rwkv_trainer" / "__init__.py"
    if trainer.exists():
        for node in ast.walk(ast.parse(trainer.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                if module not in ("__future__", "rwkvtune.pipeline"):
                    found.append(f"rwkv_trainer/__init__.py:{node.lineno}: only rwkvtune.pipeline")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        (
            "models/rwkv7/model.py",
            "from rwkvtune.data.batch import Batch",
            "may not import room data",
        ),
        ("models/rwkv7/model.py", "from ...data import batch", "may not import room data"),
        ("kernels/wkv7/__init__.py", "from ...models import x", "may not import room models"),
        ("kernels/wkv7/chunked.py", "import numpy as np", "may not import numpy"),
        ("kernels/wkv7/chunked.py", "import triton.language as tl", "triton may be named only in"),
        ("data/tokenizers/world.py", "import torch", "may not import torch"),
        ("data/tokenizers/world.py", "from .. import binidx", "may not import room data"),
        (
            "data/binidx.py",
            "def f():\n    from ..training import loop",
            "may not import room train",
        ),
        ("inference/generate.py", "import rwkvtune.training.loop", "may not import room training"),
        ("training/loop.py", "from lightning_fabric import Fabric", "may be named only in"),
        ("training/lm.py", "from ..cli import main", "may not import room cli"),
        ("configs/model_loader.py", "from ..models.rwkv7.model import RWKV7", "only the config.py"),
        ("models/layers.py", "import argparse", "argparse may be named only in"),
        (
            "checkpoint.py",
            "import importlib\nimportlib.import_module('.models', 'rwkvtune')",
            "may not import room models",
        ),
        ("training/config.py", "try:\n    import torch\nexcept ImportError: pass", "--help needs"),
        ("helper_drawer/x.py", "", "belongs to no room"),
        ("data/x.py", "import rwkvtune.drawer", "belongs to no room"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str, reason: str) -> None:
    found = import_violations(source, path)
    assert len(found) == 1 and reason in found[0], found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/rwkv7/model.py", "import torch\nfrom ...kernels.wkv7 import wkv7\nimport math"),
        ("kernels/wkv7/triton_gpu.py", "import triton\nfrom ...errors import UserError"),
        ("training/fabric.py", "from lightning_fabric import Fabric"),
        ("training/config.py", "def f():\n    import torch"),
        (
            "data/binidx.py",
            "from .tokenizers import load_tokenizer\nfrom rwkvtune import __version__",
        ),
        ("configs/model_loader.py", "from rwkvtune.models.rwkv7.config import RWKV7Config"),
    ],
)
def test_an_allowed_import_is_not_reported(path: str, source: str) -> None:
    assert import_violations(source, path) == []


def test_a_heavy_import_behind_another_file_is_found() -> None:
    sources = {
        "cli/main.py": "from ..training.config import TrainConfig",
        "training/__init__.py": "from . import loop",
        "training/loop.py": "import torch",
        "training/config.py": "",
    }
    assert heavy_at_help(sources) == ["training/loop.py:1: torch (needed by training/__init__.py)"]
    sources["training/__init__.py"] = "def f():\n    from . import loop"
    assert heavy_at_help(sources) == []


def test_a_published_spelling_or_environment_read_is_found() -> None:
    assert word_violations("head_size_a = 64", "models/layers.py")
    assert not word_violations("head_size_a = 64", "cli/published_flags.py")
    assert not word_violations("head_size_all = 64", "models/layers.py")
    for read in ("os.environ['A']", "os.environ.get('A')", "os.getenv('A')", "dict(os.environ)"):
        assert word_violations(f"import os\nx = {read}", "training/loop.py"), read
        assert not word_violations(f"import os\nx = {read}", "kernels/dispatch.py")
    assert word_violations("from os import environ", "data/text.py")
    assert not word_violations("import os\nos.environ['A'] = '1'", "training/fabric.py")


def test_a_two_way_pair_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_a_door_with_logic_is_found() -> None:
    good = '"""Train."""\nfrom rwkvtune.cli.train import main\nraise SystemExit(main())\n'
    assert door_violations(good, "train.py") == []
    assert door_violations(good + "print('done')\n", "train.py")
    assert door_violations("import sys\n" + good, "train.py")
    assert door_violations("from rwkvtune.models import f\nf()\n", "train.py")
    assert door_violations(good.replace("raise", "if True:\n    raise"), "train.py")
