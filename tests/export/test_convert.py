"""Exports read by the programs that they are for, or by the libraries of their formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

import rwkvtune.files
from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.data.chat import load_template
from rwkvtune.data.tokenizers import ByteTokenizer, Tokenizer, find_tokenizer, load_tokenizer
from rwkvtune.data.tokenizers.integers import IntegerTokenizer
from rwkvtune.errors import UserError
from rwkvtune.export.convert import export_weights
from rwkvtune.export.source import open_source
from rwkvtune.models import ModelConfig, RWKV5Config, RWKV6Config, RWKV7Config, build_model
from rwkvtune.models.rwkv7.config import UNUSED

gguf = pytest.importorskip("gguf", reason="the gguf package comes with the dev extra")

SIZES: dict[str, ModelConfig] = {
    "x052": RWKV5Config(300, 2, 64),
    "x060": RWKV6Config(300, 2, 64, mix_rank=8),
}
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "fla-rwkv7.json").read_text())
X070 = RWKV7Config(**GOLDEN["sizes"])


def some_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Values that differ everywhere, in fp16's range and precision."""
    generator = torch.Generator().manual_seed(2)
    model = build_model(config, seed=1)
    return {
        name: (w + 0.05 * torch.randn(w.shape, generator=generator)).half().float()
        for name, w in model.state_dict().items()
    }


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(to, config, dtype) -> the export of a model that lies at tmp_path/model.pth."""

    def make_one(
        to: str,
        config: ModelConfig = X070,
        *,
        stored: str | None = None,
        tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> Path:
        path = tmp_path / "model.pth"
        save_weights(path, some_weights(config), dtype=stored)
        out = tmp_path / {"hf": "folder"}.get(to, f"model.{to}")
        export_weights(open_source(path), out, to, tokenizer=tokenizer, **options)
        return out

    return make_one


def compare(path: Path, original: Path) -> None:
    """Every value that a model reads is the same to the last bit."""
    theirs, ours = load_weights(path), load_weights(original)
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype and theirs[name].shape == tensor.shape, name
        assert torch.equal(theirs[name], tensor) or name in UNUSED, name


# Round trips


@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("to", ["safetensors", "hf", "gguf"])
def test_an_x070_model_comes_back_to_the_last_bit(
    make: Make, tmp_path: Path, to: str, stored: str
) -> None:
    out = make(to, stored=stored)
    back = tmp_path / "back.pth"
    # GGUF keeps vectors in fp32, which any other float fits into.
    export_weights(open_source(out), back, "pth", dtype=stored)
    compare(back, tmp_path / "model.pth")
    assert open_source(back).config == X070


@pytest.mark.parametrize(
    ("to", "version"), [("st", "x052"), ("st", "x060"), ("gguf", "x060"), ("safetensors", "x052")]
)
def test_older_versions_come_back_to_the_last_bit(
    make: Make, tmp_path: Path, to: str, version: str
) -> None:
    out = make(to, SIZES[version], stored="fp16")
    back = tmp_path / "back.pth"
    export_weights(open_source(out), back, "pth", dtype="fp16")
    compare(back, tmp_path / "model.pth")


def test_an_x070_model_comes_back_from_st(make: Make, tmp_path: Path) -> None:
    back = tmp_path / "back.pth"
    export_weights(open_source(make("st", stored="fp16")), back, "pth")
    compare(back, tmp_path / "model.pth")


READER = """
import sys
import torch
from rwkv.model import RWKV

model = RWKV(model=sys.argv[1].removesuffix(".pth"), strategy="cpu fp32")
logits, _ = model.forward([3, 17, 0, 255, 5], None, full_output=True)
torch.save(logits, sys.argv[1] + ".out")
"""


def test_the_rwkv_package_answers_the_same_after_a_way_through_all_formats(
    make: Make, tmp_path: Path
) -> None:
    pytest.importorskip("rwkv", reason="the rwkv package comes with the dev extra")
    path = make("hf")
    for name in ("a.gguf", "b.st", "c.safetensors", "d.pth"):
        out = tmp_path / name
        dtype = None if out.suffix == ".st" else "fp32"  # the values fit fp16 exactly
        export_weights(open_source(path), out, out.suffix[1:], dtype=dtype)
        path = out
    settings = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    model = build_model(X070)
    model.load_state_dict(some_weights(X070))
    with torch.no_grad():
        ours, _ = model(torch.tensor([[3, 17, 0, 255, 5]]))
    # The package rounds exp(-0.5) to 0.606531 and sums in another order.
    assert (torch.load(f"{path}.out") - ours[0]).abs().max() < 2e-5


# Hugging Face


def test_names_and_shapes_are_those_of_flash_linear_attentions_module(make: Make) -> None:
    tensors = safetensors.torch.load_file(make("hf") / "model.safetensors")
    assert {name: list(t.shape) for name, t in tensors.items()} == GOLDEN["tensors"]


def test_the_configuration_leaves_no_rank_and_no_id_to_a_default(make: Make) -> None:
    folder = make("hf", stored="bf16")
    content = json.loads((folder / "config.json").read_text())
    ranks = {"decay": 32, "a": 40, "v": 48, "gate": 56}
    assert {name: content[f"{name}_low_rank_dim"] for name in ranks} == ranks
    for file in ("config.json", "generation_config.json"):
        ids = json.loads((folder / file).read_text())
        assert [ids[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [0, 0, 0]
    assert (content["vocab_size"], content["hidden_size"], content["num_hidden_layers"]) == (
        300,
        128,
        3,
    )
    assert content["torch_dtype"] == "bfloat16" and content["value_dim"] == [128] * 3


def test_a_large_model_is_cut_as_huggingface_hub_cuts_it(make: Make, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="comes with transformers")
    folder = make("hf", shard_bytes=300_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    whole = {
        name: torch.empty(shape, dtype=torch.float32) for name, shape in GOLDEN["tensors"].items()
    }
    order = {name: whole[name] for name in index["weight_map"]}
    split = hub.split_torch_state_dict_into_shards(order, max_shard_size=300_000)
    assert index["weight_map"] == split.tensor_to_filename
    assert index["metadata"]["total_size"] == split.metadata["total_size"]
    assert sorted(p.name for p in folder.glob("*.safetensors")) == sorted(split.filename_to_tensors)
    back = tmp_path / "back.pth"
    export_weights(open_source(folder), back, "pth")
    compare(back, tmp_path / "model.pth")


def test_transformers_cuts_text_as_the_world_tokenizer_does(make: Make) -> None:
    transformers = pytest.importorskip("transformers")
    world = load_tokenizer("world")
    folder = make("hf", RWKV7Config(65536, 1, 64), tokenizer=world)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == 0
    random = np.random.default_rng(1)
    kinds = [(32, 127), (0x80, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (9, 14)]
    mixed = "".join(chr(random.integers(*kinds[random.integers(5)])) for _ in range(5000))
    prose = (Path(rwkvtune.files.__file__).parent / "demo" / "tinyshakespeare.txt").read_text()
    for text in (mixed, prose[:50_000], " " * 300 + "\n" * 70 + "a" * 70, "", "é"):
        assert theirs(text)["input_ids"] == world.encode(text)
        assert theirs.decode(world.encode(text)) == text
    assert (folder / "rwkv_vocab_v20230424.txt").read_bytes().count(b"\n") == 65529
    assert open_source(folder).tokenizer.name == "world"  # type: ignore[union-attr]


def test_another_tokenizer_goes_along_and_comes_back(make: Make, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = make("hf", tokenizer=ByteTokenizer())
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert theirs.encode("a\nπ").ids == [b + 1 for b in "a\nπ".encode()]
    out = tmp_path / "back.pth"
    source = open_source(folder)
    export_weights(source, out, "pth", tokenizer=source.tokenizer)
    assert isinstance(find_tokenizer(out), ByteTokenizer)


# GGUF


def llama_cpp_shapes(c: RWKV7Config) -> dict[str, tuple[int, ...]]:
    """What llama.cpp's loader of rwkv7 asks for, fastest axis first (src/models, load_tensors)."""
    C, F = c.n_embd, c.dim_ffn
    ranks = {"w": c.decay_rank, "a": c.a_rank, "v": c.v_rank, "g": c.g_rank}
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (C, c.vocab_size),
        "output.weight": (C, c.vocab_size),
        **{
            f"{n}.{p}": (C,) for n in ("token_embd_norm", "output_norm") for p in ("weight", "bias")
        },
    }
    for i in range(c.n_layer):
        ranks["v"] = c.v_rank if i else c.a_rank
        block: dict[str, tuple[int, ...]] = {
            f"{n}.{p}": (C,)
            for n in ("attn_norm", "attn_norm_2", "time_mix_ln")
            for p in ("weight", "bias")
        }
        block |= {f"time_mix_{letter}1.weight": (C, rank) for letter, rank in ranks.items()}
        block |= {f"time_mix_{letter}2.weight": (rank, C) for letter, rank in ranks.items()}
        block |= {f"time_mix_{n}.weight": (C,) for n in ("w0", "a0", "v0", "k_k", "k_a", "r_k")}
        block |= {f"time_mix_{n}.weight": (C, C) for n in ("key", "value", "receptance", "output")}
        block["time_mix_lerp_fused.weight"] = (C, 1, 1, 6)
        block["channel_mix_lerp_k.weight"] = (C,)
        block["channel_mix_key.weight"] = (C, F)
        block["channel_mix_value.weight"] = (F, C)
        found |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    return found


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_gguf_has_the_tensors_that_llama_cpp_loads(make: Make) -> None:
    tensors = tensors_of(make("gguf"))
    shapes = {name: tuple(int(n) for n in t.shape) for name, t in tensors.items()}
    assert shapes == llama_cpp_shapes(X070)
    weights = some_weights(X070)
    for letter, rows in zip(
        "rwkvag", tensors["blk.1.time_mix_lerp_fused.weight"].data, strict=True
    ):
        assert np.array_equal(rows.ravel(), weights[f"blocks.1.att.x_{letter}"].numpy().ravel())
    for ours, theirs in (("att.w2", "time_mix_w2"), ("att.v1", "time_mix_v1")):
        data = tensors[f"blk.2.{theirs}.weight"].data
        assert np.array_equal(data, weights[f"blocks.2.{ours}"].numpy().T)
    for number in range(3):  # nothing reads those of the first block; llama.cpp wants the shapes
        a, v = (tensors[f"blk.0.time_mix_{letter}{number}.weight"].data for letter in "av")
        assert np.array_equal(a, v)


def test_gguf_names_are_what_the_gguf_package_makes_of_hugging_faces(make: Make) -> None:
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.RWKV7, X070.n_layer)
    # As llama.cpp's converter renames before it asks.
    renamed = {
        "attn_norm": "attention_norm",
        "ffn_norm": "ln2",
        "g_norm": "ln_x",
        "attn": "attention",
    }
    found = set()
    for name in GOLDEN["tensors"]:
        if ".x_" in name and "ffn" not in name:  # fused
            continue
        for theirs, other in renamed.items():
            name = name.replace(theirs, other) if other not in name else name
        name = name.replace("ffn", "feed_forward")
        for part, number in (("0.weight", "1"), ("2.weight", "2"), ("2.bias", "0")):
            name = name.replace(f"_lora.lora.{part}", f"{number}.weight")
        new = known.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new, name
        found.add(new if new.endswith((".weight", ".bias")) else f"{new}.weight")
    ours = set(tensors_of(make("gguf")))
    assert {n for n in ours - found if "fused" not in n} == {
        f"blk.0.time_mix_v{number}.weight" for number in range(3)
    }
    assert not found - ours


def test_gguf_tells_what_llama_cpp_asks(make: Make) -> None:
    reader = gguf.GGUFReader(make("gguf", stored="bf16"))

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    assert value("general.architecture") == "rwkv7"
    assert value("general.file_type") == gguf.LlamaFileType.MOSTLY_BF16
    expected = {
        "context_length": 1048576,
        "embedding_length": 128,
        "block_count": 3,
        "feed_forward_length": 512,
        "attention.head_count": 0,
        "wkv.head_size": 64,
        "attention.decay_lora_rank": 32,
        "attention.iclr_lora_rank": 40,
        "attention.value_residual_mix_lora_rank": 48,
        "attention.gate_lora_rank": 56,
    }
    assert {key: value(f"rwkv7.{key}") for key in expected} == expected
    assert value("rwkv7.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    assert value("tokenizer.ggml.model") == "no_vocab"
    assert value("rwkv7.vocab_size") == 300


def test_gguf_holds_the_world_vocabulary(make: Make) -> None:
    world = load_tokenizer("world")
    path = make("gguf", RWKV7Config(65536, 1, 64), tokenizer=world, dtype="fp16")
    reader = gguf.GGUFReader(path)
    keys = ("model", "tokens", "token_type", "bos_token_id", "eos_token_id", "eot_token_id")
    model, tokens, types, *ids = (
        reader.get_field(f"tokenizer.ggml.{key}").contents() for key in keys
    )
    assert model == "rwkv" and ids == [0, 0, 261] and len(tokens) == len(types) == 65536
    assert tokens[0] == "<s>" and types[0] == gguf.TokenType.CONTROL
    assert types[65529:] == [gguf.TokenType.NORMAL] + [gguf.TokenType.UNUSED] * 6
    for id in range(1, 65530):
        escaped = tokens[id].encode("latin-1").decode("unicode_escape")
        assert escaped.encode("latin-1") == world.decode_bytes([id]), id
    template = reader.get_field("tokenizer.chat_template").contents()
    assert rendered(template) == "User: Hi\n\nAssistant: Hm\nHo\n\nUser: So?\n\nAssistant:"
    assert "rwkv-world" in template  # what llama.cpp looks for when told to use no Jinja


def rendered(template: str) -> str:
    """A conversation as the Jinja engine of llama.cpp or transformers writes it."""
    chats = pytest.importorskip("transformers.utils.chat_template_utils")
    said = (("user", "Hi"), ("assistant", "Hm\n\nHo"), ("user", "So?"))
    messages = [{"role": role, "content": content} for role, content in said]
    (text,), _ = chats.render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, eos_token="<s>"
    )
    return str(text)


def test_llama_cpp_is_told_of_the_template_that_was_kept(tmp_path: Path) -> None:
    own = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    (tmp_path / "own.jinja").write_text(own)
    save_weights(tmp_path / "model.pth", some_weights(RWKV7Config(300, 1, 64)))
    source, out = open_source(tmp_path / "model.pth"), tmp_path / "model.gguf"

    def field(spec: str | Path) -> str:
        kept = source._replace(template=load_template(spec))
        export_weights(kept, out, "gguf", tokenizer=ByteTokenizer(), overwrite=True)
        found: str = gguf.GGUFReader(out).get_field("tokenizer.chat_template").contents()
        return found

    assert field(tmp_path / "own.jinja") == own
    assert rendered(field("g1")) == "User: Hi\n\nAssistant: Hm\n\nHo\n\nUser: So?\n\nAssistant:"
    save_weights(tmp_path / "model.pth", some_weights(RWKV7Config(65536, 1, 64)))
    kept = open_source(tmp_path / "model.pth")._replace(template=load_template("g1"))
    export_weights(kept, out, "gguf", tokenizer=load_tokenizer("world"), overwrite=True)
    # A blank line, 261, ends an answer only where answers have none.
    assert b"ggml.eos_token_id" in out.read_bytes() and b"ggml.eot_token" not in out.read_bytes()


def test_a_vocabulary_comes_back_from_gguf(make: Make) -> None:
    text = 'it\'s "both" \\ and\n\tπ\x00'
    tokenizer = open_source(make("gguf", tokenizer=ByteTokenizer())).tokenizer
    assert tokenizer is not None and tokenizer.vocab_size == 300
    assert tokenizer.encode(text) == ByteTokenizer().encode(text)


def test_whole_numbers_come_back_from_gguf(make: Make) -> None:
    there = IntegerTokenizer(5, padded_vocab_size=300)
    tokenizer = open_source(make("gguf", tokenizer=there)).tokenizer
    assert tokenizer is not None and tokenizer.to_json() == there.to_json()
    assert tokenizer.encode("5 0 3") == [6, 1, 4]  # also without a blank at the end


@pytest.mark.parametrize("tokenizer", [IntegerTokenizer(5), ByteTokenizer()])
def test_a_tokenizer_that_llama_cpp_would_hang_on_is_told_of(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    save_weights(tmp_path / "model.pth", some_weights(RWKV7Config(257, 1, 64)))
    source, out = open_source(tmp_path / "model.pth"), tmp_path / "x.gguf"
    notes = export_weights(source, out, "gguf", tokenizer=tokenizer).notes
    # It takes the longest token that fits, and does not move on where none does.
    covers_all = {bytes([byte]) for byte in range(256)} <= {
        tokenizer.decode_bytes([id]) for id in range(tokenizer.vocab_size)
    }
    assert [("a blank after each number" in note) for note in notes] == [True] * (not covers_all)


def test_a_model_of_one_layer_is_written_with_a_word_about_its_reader(tmp_path: Path) -> None:
    save_weights(tmp_path / "model.pth", some_weights(RWKV7Config(31, 1, 64)))
    done = export_weights(open_source(tmp_path / "model.pth"), tmp_path / "folder", "hf")
    assert any("cannot load a model of one layer" in note for note in done.notes)
    assert open_source(tmp_path / "folder").config.n_layer == 1


def test_q8_0_keeps_the_small_tensors_and_is_as_near_as_its_format_allows(make: Make) -> None:
    tensors, exact = tensors_of(make("gguf", dtype="q8_0")), some_weights(X070)
    kinds = {name: t.tensor_type for name, t in tensors.items()}
    quantized = {name for name, kind in kinds.items() if kind != gguf.GGMLQuantizationType.F32}
    matrices = [f"time_mix_{name}" for name in ("key", "value", "receptance", "output")]
    matrices += ["channel_mix_key", "channel_mix_value"]
    expected = {f"blk.{i}.{name}.weight" for i in range(3) for name in matrices}
    assert quantized == expected | {"token_embd.weight", "output.weight"}
    tensor = tensors["blk.1.channel_mix_key.weight"]
    found = gguf.dequantize(tensor.data, tensor.tensor_type)
    blocks = exact["blocks.1.ffn.key.weight"].numpy().reshape(-1, 32)
    # 8 bits over the largest of each 32 values: half a step, and its scale is rounded to fp16.
    allowed = np.abs(blocks).max(axis=1, keepdims=True) * (0.5 / 127 + 2**-11)
    assert (np.abs(found.reshape(-1, 32) - blocks) <= allowed).all()
    path = Path(tensors["output.weight"].data.filename)
    with pytest.raises(UserError, match=r"quantized \(Q8_0\)"):
        open_source(path)


def test_gguf_of_x060_has_the_layouts_that_llama_cpp_loads(make: Make) -> None:
    config, weights = SIZES["x060"], some_weights(SIZES["x060"])
    reader = gguf.GGUFReader(make("gguf", config))
    assert reader.get_field("general.architecture").contents() == "rwkv6"
    for key, number in (("time_mix_extra_dim", 8), ("time_decay_extra_dim", 64)):
        assert reader.get_field(f"rwkv6.{key}").contents() == number
    tensors = {t.name.removeprefix("blk.1."): t for t in reader.tensors}
    shapes = {  # fastest axis first
        "time_mix_w1": (64, 40), "time_mix_w2": (8, 64, 5), "time_mix_lerp_x": (64,),
        "time_mix_lerp_fused": (64, 1, 1, 5), "time_mix_first": (64, 1), "time_mix_decay": (64,),
        "time_mix_decay_w1": (64, 64), "time_mix_decay_w2": (64, 64), "time_mix_gate": (64, 64),
        "channel_mix_lerp_k": (64,), "channel_mix_lerp_r": (64,),
        "channel_mix_receptance": (64, 64), "channel_mix_key": (64, 224),
    }  # fmt: skip
    for name, shape in shapes.items():
        assert tuple(tensors[f"{name}.weight"].shape) == shape, name
    mixes = tensors["time_mix_lerp_fused.weight"].data
    for letter, rows in zip("wkvrg", mixes, strict=True):
        assert np.array_equal(rows.ravel(), weights[f"blocks.1.att.time_maa_{letter}"].ravel())
    w2 = weights["blocks.1.att.time_maa_w2"].numpy()
    assert np.array_equal(tensors["time_mix_w2.weight"].data, w2.transpose(0, 2, 1))


# web-rwkv


def test_st_is_fp16_with_transposed_low_rank_matrices(make: Make) -> None:
    path, weights = make("st"), some_weights(X070)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert tensors.keys() == weights.keys()
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    # Where web-rwkv reads the ranks: first axes, of v in the second block.
    ranks = [tensors[f"blocks.{i}.att.{n}1"].shape[0] for i, n in ((0, "w"), (0, "a"), (1, "v"))]
    assert ranks == [32, 40, 48]
    for name, tensor in tensors.items():
        is_low_rank = name[-2:] in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")
        exact = weights[name].T if is_low_rank else weights[name]
        assert torch.equal(tensor.float(), exact), name


def test_st_of_x060_is_recognised_by_web_rwkvs_rule(make: Make) -> None:
    tensors = safetensors.torch.load_file(make("st", SIZES["x060"]))
    asked = [f"att.time_mix_{n}" for n in ("x", "w", "k", "v", "r", "g", "w1", "w2")]
    asked += ["att.time_decay_w1", "att.time_decay_w2", "ffn.time_mix_k", "ffn.time_mix_r"]
    assert {f"blocks.0.{name}" for name in asked} <= tensors.keys()
    assert tensors["blocks.0.att.time_first"].shape[0] == 1  # heads
    assert tensors["blocks.0.att.time_mix_w1"].shape[0] // 5 == 8
    assert tensors["blocks.0.att.time_decay_w1"].shape[0] == 64


# Refusals


def test_a_value_beyond_fp16_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    weights = some_weights(X070)
    weights["blocks.2.ffn.key.weight"][7, 3] = -70000
    save_weights(tmp_path / "model.pth", weights)
    (tmp_path / "old.st").write_bytes(b"old")
    source = open_source(tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"blocks\.2\.ffn\.key\.weight has values up to 70000"):
        export_weights(source, tmp_path / "old.st", "st", overwrite=True)
    with pytest.raises(UserError, match="70000"):
        export_weights(source, tmp_path / "folder", "hf", dtype="fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pth", "old.st"]
    assert (tmp_path / "old.st").read_bytes() == b"old"


def test_what_a_format_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    def refused(config: ModelConfig, to: str, expected: str, **extra: Tensor) -> None:
        save_weights(tmp_path / "model.pth", some_weights(config) | extra)
        source = open_source(tmp_path / "model.pth")
        out = tmp_path / ("x" if to == "hf" else f"x.{to}")
        with pytest.raises(UserError, match=expected):
            export_weights(source, out, to)
        assert not out.exists()

    refused(SIZES["x052"], "gguf", "is x052; gguf holds x060 and x070 only")
    refused(SIZES["x060"], "hf", "is x060; hf holds x070 only")
    refused(RWKV7Config(31, 1, 64), "st", "cannot load a model of one layer")
    refused(RWKV7Config(31, 2, 64, head_size=32), "hf", "here 32")
    state = {"blocks.0.att.time_state": torch.zeros(2, 64, 64)}
    for to in ("hf", "gguf", "st"):
        refused(X070, to, "holds a tuned initial state", **state)


def test_a_tuned_state_goes_along_where_it_has_a_place(tmp_path: Path) -> None:
    state = {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(3)}
    save_weights(tmp_path / "model.pth", some_weights(X070) | state)
    export_weights(open_source(tmp_path / "model.pth"), tmp_path / "x.safetensors", "safetensors")
    compare(tmp_path / "x.safetensors", tmp_path / "model.pth")


def test_a_disk_without_room_is_told_before_writing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rwkvtune.files, "_free_bytes", lambda path: 1000)
    for to in ("pth", "hf", "gguf", "st"):
        with pytest.raises(UserError, match=r"needs [\d,]+ bytes, 1,000 are free"):
            name = "other.pth" if to == "pth" else f"x.{to}".removesuffix(".hf")
            save_weights(tmp_path / "model.pth", some_weights(X070))
            export_weights(open_source(tmp_path / "model.pth"), tmp_path / name, to)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def test_a_source_that_is_no_whole_model_is_refused(make: Make, tmp_path: Path) -> None:
    folder = make("hf")
    config = folder / "config.json"
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["model.layers.1.ffn.x_k"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: blocks\.1\.ffn\.x_k"):
        open_source(folder)
    tensors["model.layers.1.ffn.x_q"] = torch.zeros(3)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"the tensor 'ffn\.x_q'"):
        open_source(folder)
    config.write_text(config.read_text().replace('"rwkv7"', '"llama"'))
    with pytest.raises(UserError, match="a model of the type 'llama'"):
        open_source(folder)
    path = tmp_path / "cut.gguf"
    path.write_bytes(make("gguf", overwrite=True).read_bytes()[:5000])
    with pytest.raises(UserError, match="cut short"):
        open_source(path)
