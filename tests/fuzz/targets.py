"""What reads files that somebody else may have made, each with files to start from.

A target gets a folder with a changed file in it and reads that as a run would. It may return, or
raise UserError; everything else is a mistake of ours.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import rwkvtune.configs
from rwkvtune.checkpoint import (
    load_resume_state,
    load_weights,
    newest_resume_state,
    save_resume_state,
    save_weights,
)
from rwkvtune.cli.train import check_config_files, make_parser, parse_settings
from rwkvtune.configs import load_model_config
from rwkvtune.data.binidx import BinIdx, BinIdxWriter
from rwkvtune.data.chat import load_template
from rwkvtune.data.chat_samples import read_samples
from rwkvtune.data.images import ARCHIVE, PictureStore
from rwkvtune.data.llava_manifest import check_records, read_manifest
from rwkvtune.data.text import find_files, read_batches
from rwkvtune.data.tokenizers import load_tokenizer
from rwkvtune.errors import UserError
from rwkvtune.models import RWKV7Config, build_model, config_from_state_dict
from rwkvtune.training.config import TrainConfig
from rwkvtune.weights_header import read_header


@dataclass(frozen=True)
class Target:
    file: str
    """Name of the file that is changed, in the folder."""
    seeds: tuple[bytes, ...]
    """Its content in whole files."""
    read: Callable[[Path], object]
    """(folder) -> what becomes of it."""
    beside: tuple[tuple[str, bytes], ...] = ()
    """Other files of the folder, as they should be."""
    share: float = 1.0
    """Of the cases that others get: less for what takes long."""


WEIGHTS = {
    "emb.weight": torch.arange(12.0).view(4, 3),
    "blocks.0.att.key.weight": torch.ones(3, 3, dtype=torch.bfloat16),
    "head.weight": torch.zeros(4, 3),
}


def all_targets(scratch: Path) -> dict[str, Target]:
    """Every target by name; scratch: a folder to make the whole files in."""
    with BinIdxWriter(str(scratch / "t"), vocab_size=300) as writer:
        for length in (5, 1, 9):
            writer.add_document(np.arange(length) + 1)
    token_files = {kind: (scratch / f"t.{kind}").read_bytes() for kind in ("bin", "idx")}
    for name in ("w.pth", "w.safetensors"):
        save_weights(scratch / name, WEIGHTS)
    torch.save(WEIGHTS, scratch / "legacy.pth", _use_new_zipfile_serialization=False)
    model = build_model(RWKV7Config(4, n_layer=1, n_embd=32, head_size=32, dim_ffn=32))
    save_weights(scratch / "model.pth", model.state_dict(), dtype="bf16")
    state = scratch / "resume" / "step-00000003"
    meta = {"progress": {"step": 3}, "settings": {}, "recipe": {}, "loss_scale": {}}
    save_resume_state(state, {"model.w": torch.ones(4), "rng.cpu": torch.zeros(8)}, meta)
    parts = {name: (state / name).read_bytes() for name in ("state.safetensors", "state.json")}
    in_state = {f"resume/step-00000003/{name}": content for name, content in parts.items()}
    names = ("w.pth", "legacy.pth", "w.safetensors", "model.pth")
    return {
        "token index": Target(
            "t.idx", (token_files["idx"],), _tokens, (("t.bin", token_files["bin"]),)
        ),
        "tokens": Target("t.bin", (token_files["bin"],), _tokens, (("t.idx", token_files["idx"]),)),
        "weights": Target("w.pth", tuple((scratch / n).read_bytes() for n in names), _weights),
        **{
            name: Target(name, (content,), _resume_state, _others(in_state, name))
            for name, content in in_state.items()
        },
        "vocabulary": Target("v.txt", _VOCABULARIES, _tokenizer("v.txt")),
        "tokenizer.json": Target("v.json", _TOKENIZERS, _tokenizer("v.json")),
        "conversations": Target("c.jsonl", _CONVERSATIONS, _conversations),
        "documents": Target("d.jsonl", _DOCUMENTS, _documents),
        "chat template": Target("t.jinja", _TEMPLATES, _template),
        "preset": Target("p.json", (_PRESET,), _preset),
        "settings": Target("s.yaml", _SETTINGS, _settings, share=0.03),
        "llava manifest": Target(
            "m.json", _MANIFESTS, _manifest("m.json"), (("a.png", b"only its name is looked at"),)
        ),
        "llava mixture": Target(
            "m.yaml", _MIXTURES, _manifest("m.yaml"), (("m.json", _MANIFESTS[0]), ("a.png", b""))
        ),
        "pictures in a zip": Target(ARCHIVE, _archives(), _pictures),
    }


def _others(files: dict[str, bytes], name: str) -> tuple[tuple[str, bytes], ...]:
    return tuple((n, content) for n, content in files.items() if n != name)


def _tokens(folder: Path) -> None:
    file = BinIdx(str(folder / "t"))
    file.check_ids(300)
    np.asarray(file.tokens).sum()


def _weights(folder: Path) -> None:
    read_header(folder / "w.pth")
    weights = load_weights(folder / "w.pth")
    for tensor in weights.values():
        float(tensor.double().sum())
    config_from_state_dict(weights)


def _resume_state(folder: Path) -> None:
    state = newest_resume_state(folder, report=lambda line: None)
    if state is not None:
        load_resume_state(state, verify=False)


def _tokenizer(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        tokenizer = load_tokenizer(folder / name)
        if tokenizer.vocab_size < 10**6:
            tokenizer.decode([0, 1, tokenizer.vocab_size - 1])

    return read


def _conversations(folder: Path) -> None:
    read_samples(
        str(folder / "c.jsonl"), load_tokenizer("bytes"), load_template("g1"),
        ctx_len=256, on_bad_sample="skip",
    )  # fmt: skip


def _documents(folder: Path) -> None:
    files, _ = find_files([folder / "d.jsonl"])
    for batch in read_batches(files, key="text", last_cut=len):
        batch.documents()


def _template(folder: Path) -> None:
    template = load_template(folder / "t.jinja")
    template.pieces(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
    )


def _preset(folder: Path) -> None:
    load_model_config(str(folder / "p.json"))


def _settings(folder: Path) -> None:
    argv = ["--config", str(folder / "s.yaml")]
    check_config_files(argv)
    TrainConfig.from_flat(parse_settings(make_parser(), argv)).problems()


def _manifest(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        manifest = read_manifest(str(folder / name))
        check_records(manifest, lambda index, record: folder)

    return read


def _pictures(folder: Path) -> None:
    store = PictureStore(folder)
    for name in ("a.png", "images/b.png"):
        store.open(name)


def _archives() -> tuple[bytes, ...]:
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(picture, "PNG")
    found = []
    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", packing) as archive:
            for name in ("a.png", "images/b.png"):
                archive.writestr(name, picture.getvalue())
        found.append(content.getvalue())
    return tuple(found)


_PRESET = (Path(rwkvtune.configs.__file__).parent / "models" / "rwkv7-0.1b.json").read_bytes()
_VOCABULARIES = (
    b"1 '\\x00' 1\n2 b'\\xff' 1\n3 'ab' 2\n4 '\"' 1\n",
    b"1 'a' 1\n2 \"'\" 1\n300 '\\u4e2d' 3\n",
)
_TOKENIZERS = (
    b'{"kind": "chars", "characters": "ab\\n"}',
    b'{"kind": "vocab", "lines": ["1 \'a\' 1", "2 \'b\' 1"], "vocab_size": 8}',
    b'{"kind": "integers", "max_value": 9, "vocab_size": 16}',
)
_CONVERSATIONS = (
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n',
    b'{"instruction": "a", "input": "", "output": "b"}\n{"text": "c"}\n',
    b'{"messages": [{"role": "assistant", "content": "b", "weight": 1, "tool_calls": []}]}\n',
)
_DOCUMENTS = (b'{"text": "a"}\n{"text": "b\\u00e9"}\n', b'{"text": ""}\n\n{"text": "x", "n": 1}\n')
_TEMPLATES = (
    b"{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
    b"{% for m in messages %}{% generation %}{{ m['content'] | trim }}{% endgeneration %}"
    b"{% endfor %}",
)
_SETTINGS = (
    b"data_file: data/x\nn_layer: 6\nlr_init: 1e-3\ngrad_cp: true\norder: shuffled\n",
    b"micro_bsz: 4\nstrategy: fsdp\ndevices: auto\n",
)
_MANIFESTS = (
    b'[{"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>q"}, '
    b'{"from": "gpt", "value": "a"}]}]',
    b'[{"image": ["../a.png", "/etc/b"], "conversations": []}, {"video": "v"}]',
)
_MIXTURES = (
    b"datasets:\n  - json_path: m.json\n    sampling_strategy: random:50%\n",
    b"datasets:\n  - {json_path: m.json, sampling_strategy: 'first:1'}\n",
)


def read_changed(target: Target, content: bytes, folder: Path) -> bool:
    """Let a target read the content in place of its file; False when it was refused."""
    for name, whole in ((target.file, content), *target.beside):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole)
    try:
        target.read(folder)
    except UserError:
        return False
    return True
