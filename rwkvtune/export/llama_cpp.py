"""GGUF files of llama.cpp, by the `gguf` package: architectures rwkv7 and rwkv6.

Names are those of gguf 0.19 (MODEL_TENSORS); layouts those that llama.cpp's loader asks for and its
own converter from Hugging Face folders makes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from rwkvtune.checkpoint import stored_as
from rwkvtune.data.chat import TEMPLATES, RWKVTemplate, Template
from rwkvtune.data.tokenizers import END_OF_DOCUMENT, Tokenizer
from rwkvtune.errors import UserError
from rwkvtune.export.chat_template import as_jinja
from rwkvtune.models import ModelConfig, RWKV6Config, RWKV7Config

ARCHITECTURES = {"x060": "rwkv6", "x070": "rwkv7"}

_OUTER = {
    "emb.weight": "token_embd.weight",
    "blocks.0.ln0.weight": "token_embd_norm.weight",
    "blocks.0.ln0.bias": "token_embd_norm.bias",
    "ln_out.weight": "output_norm.weight",
    "ln_out.bias": "output_norm.bias",
    "head.weight": "output.weight",
}
_NORMS = {
    f"{ours}.{part}": f"{theirs}.{part}"
    for ours, theirs in (
        ("ln1", "attn_norm"),
        ("ln2", "attn_norm_2"),
        ("att.ln_x", "time_mix_ln"),
    )
    for part in ("weight", "bias")
}
_SHARED = _NORMS | {
    "att.receptance.weight": "time_mix_receptance.weight",
    "att.key.weight": "time_mix_key.weight",
    "att.value.weight": "time_mix_value.weight",
    "att.output.weight": "time_mix_output.weight",
    "ffn.key.weight": "channel_mix_key.weight",
    "ffn.value.weight": "channel_mix_value.weight",
}
_OF_X070 = ("w0", "w1", "w2", "a0", "a1", "a2", "v0", "v1", "v2", "g1", "g2", "k_k", "k_a", "r_k")
# Name within a block -> name within a block of the GGUF file.
_IN_BLOCK = {
    "x070": _SHARED
    | {f"att.{name}": f"time_mix_{name}.weight" for name in _OF_X070}
    | {"ffn.x_k": "channel_mix_lerp_k.weight"},
    "x060": _SHARED
    | {
        "att.time_maa_x": "time_mix_lerp_x.weight",
        "att.time_maa_w1": "time_mix_w1.weight",
        "att.time_maa_w2": "time_mix_w2.weight",
        "att.time_decay": "time_mix_decay.weight",
        "att.time_decay_w1": "time_mix_decay_w1.weight",
        "att.time_decay_w2": "time_mix_decay_w2.weight",
        "att.time_faaaa": "time_mix_first.weight",
        "att.gate.weight": "time_mix_gate.weight",
        "ffn.time_maa_k": "channel_mix_lerp_k.weight",
        "ffn.time_maa_r": "channel_mix_lerp_r.weight",
        "ffn.receptance.weight": "channel_mix_receptance.weight",
    },
}
_FUSED = "time_mix_lerp_fused.weight"
# What it holds, in this order.
_FUSED_FROM = {
    "x070": [f"att.x_{letter}" for letter in "rwkvag"],
    "x060": [f"att.time_maa_{letter}" for letter in "wkvrg"],
}
_LOW_RANK = re.compile(r"att\.([wavg][12]|time_(maa|decay)_w[12])")
# Always fp32, as llama.cpp's converter stores them and its operators read them.
_FP32 = re.compile(r"_norm(_2)?\.|lerp|time_mix_(first|w[12]|decay_w[12])\.")
_NOT_QUANTIZED = re.compile(r"time_mix_[avg][12]\.")

CONTEXT_LENGTH = 1 << 20
"""What the format wants to be told of a model whose context has no limit."""
LAYER_NORM_EPS = 1e-5
# Before a template of RWKV: without its Jinja engine (--no-jinja), llama.cpp takes its own template
# of this name where it finds the name. Alone, its Jinja engine would write the name itself.
_TEMPLATE_NAME = "{#- rwkv-world -#}\n"


def to_gguf(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a model by llama.cpp's names and in its layouts, views where that is possible.

    The first block's v0, v1, v2, which nothing reads, are its a0, a1, a2 again: llama.cpp wants
    tensors of these shapes there.
    """
    version = config.version
    found = {theirs: weights[ours] for ours, theirs in _OUTER.items()}
    for i in range(config.n_layer):
        block = {ours: weights.get(f"blocks.{i}.{ours}") for ours in _IN_BLOCK[version]}
        if i == 0 and version == "x070":
            block |= {f"att.v{n}": block[f"att.a{n}"] for n in range(3)}
        for ours, tensor in block.items():
            assert tensor is not None, ours
            found[f"blk.{i}.{_IN_BLOCK[version][ours]}"] = _their_layout(ours, tensor)
        mixes = [weights[f"blocks.{i}.{ours}"].reshape(1, 1, -1) for ours in _FUSED_FROM[version]]
        found[f"blk.{i}.{_FUSED}"] = torch.stack(mixes)  # [6 or 5, 1, 1, C]
    return found


def from_gguf(tensors: Mapping[str, Tensor], version: str, head_size: int) -> dict[str, Tensor]:
    """The same by upstream's names; vectors are [C]. Raises KeyError for an unknown name."""
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    in_block = {theirs: ours for ours, theirs in _IN_BLOCK[version].items()}
    found = {}
    for theirs, tensor in tensors.items():
        if theirs in outer:
            found[outer[theirs]] = tensor
            continue
        _, layer, part = theirs.split(".", 2)
        if part == _FUSED:
            mixes = zip(_FUSED_FROM[version], tensor.unbind(0), strict=True)
            found |= {f"blocks.{layer}.{ours}": mix for ours, mix in mixes}
        elif not (layer == "0" and part.startswith("time_mix_v") and part[10].isdigit()):
            ours = in_block[part]
            found[f"blocks.{layer}.{ours}"] = tensor.mT if _LOW_RANK.match(ours) else tensor
    for name, tensor in found.items():
        if name.endswith(".r_k"):
            found[name] = tensor.reshape(-1, head_size)
    return found


def _their_layout(ours: str, tensor: Tensor) -> Tensor:
    if _LOW_RANK.match(ours):
        return tensor.mT
    if ours == "att.time_faaaa" or tensor.squeeze().dim() > 1 and ours != "att.r_k":
        return tensor
    return tensor.reshape(-1)


def write(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    name: str,
    dtype: str | None,
    tokenizer: Tokenizer | None,
    template: Template | None = None,
) -> None:
    """Write a GGUF file, tensor by tensor.

    file: open for writing; it is written by its name, which the gguf package asks for.
    tensors: as to_gguf gives them.  dtype: fp32, bf16, fp16 or q8_0 for the matrices, None = as
    they are; vectors and the smallest matrices are fp32 in any case, and with q8_0 all low-rank
    matrices are.
    template: of chats; None = World's, beside World's tokenizer.
    """
    gguf = gguf_package()
    kinds = {name: _kind_of(gguf, name, tensor, dtype, config) for name, tensor in tensors.items()}
    writer = gguf.GGUFWriter(file.name, ARCHITECTURES[config.version])
    _add_facts(gguf, writer, config, name, kinds["blk.0.channel_mix_key.weight"])
    _add_tokenizer(gguf, writer, config, tokenizer, template)
    for theirs, tensor in tensors.items():
        kind = kinds[theirs]
        shape: tuple[int, ...] = tuple(tensor.shape)
        if kind == gguf.GGMLQuantizationType.Q8_0:
            shape = gguf.quant_shape_to_byte_shape(shape, kind)
        values_per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        num_bytes = tensor.numel() // values_per_block * block_bytes
        like = np.dtype(np.uint8 if kind == gguf.GGMLQuantizationType.Q8_0 else np.float32)
        writer.add_tensor_info(theirs, shape, like, num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for theirs, tensor in tensors.items():
        writer.write_tensor_data(_values(gguf, theirs, tensor, kinds[theirs]))
    writer.close()


def stored_bytes(tensors: Mapping[str, Tensor], config: ModelConfig, dtype: str | None) -> int:
    """Bytes that the tensors take in the file."""
    gguf = gguf_package()
    total = 0
    for name, tensor in tensors.items():
        values, size = gguf.GGML_QUANT_SIZES[_kind_of(gguf, name, tensor, dtype, config)]
        total += tensor.numel() // values * size
    return total


def read(path: Path) -> tuple[dict[str, Tensor], dict[int, bytes]]:
    """The tensors of a GGUF file as upstream names them (vectors [C]), and its tokens by id, none
    where it has no RWKV vocabulary. The file is memory-mapped.

    UserError for what is no RWKV that we know, and for quantized or scaled tensors.
    """
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path, "c")  # copy on write
        architecture = reader.get_field("general.architecture").contents()
        head_size = reader.get_field(gguf.Keys.WKV.HEAD_SIZE.format(arch=architecture)).contents()
        vocabulary = _vocabulary(gguf, reader)
    except (
        ValueError,
        IndexError,
        KeyError,
        AttributeError,
        OverflowError,
        OSError,
        SyntaxError,
    ) as error:
        raise UserError(
            f"{path} is cut short or no GGUF file that the gguf package can read: {error}. Copy or "
            "download it again."
        ) from error
    versions = {theirs: version for version, theirs in ARCHITECTURES.items()}
    if architecture not in versions:
        raise UserError(
            f"{path} holds a model of the architecture {architecture}; expected "
            f"{' or '.join(versions)}"
        )
    scaled = reader.get_field(gguf.Keys.LLM.RESCALE_EVERY_N_LAYERS.format(arch=architecture))
    if scaled and scaled.contents():
        raise UserError(
            f"{path}: its matrices are halved every {scaled.contents()} layers, which is not "
            "undone here: give the file that it was made of"
        )
    kinds = gguf.GGMLQuantizationType
    tensors = {}
    for tensor in reader.tensors:
        if tensor.tensor_type not in (kinds.F32, kinds.F16, kinds.BF16):
            raise UserError(
                f"{path}: {tensor.name} is quantized ({tensor.tensor_type.name}), and its original "
                "values are gone: give a GGUF file in F32, F16 or BF16, or the file it was made of"
            )
        data = torch.from_numpy(tensor.data)
        if tensor.tensor_type == kinds.BF16:
            data = data.view(torch.bfloat16)
        tensors[tensor.name] = data
    try:
        weights = from_gguf(tensors, versions[architecture], head_size)
        return weights, vocabulary
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} has the tensor {error}, which no {architecture} that we know has"
        ) from None


def gguf_package() -> Any:
    """The gguf package; UserError that says how to get it."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the gguf package: pip install 'rwkvtune[gguf]'") from None
    return gguf


def _kind_of(gguf: Any, name: str, tensor: Tensor, dtype: str | None, config: ModelConfig) -> Any:
    kinds = gguf.GGMLQuantizationType
    if tensor.dim() < 2 or _FP32.search(name):
        return kinds.F32
    if dtype == "q8_0":
        block = gguf.GGML_QUANT_SIZES[kinds.Q8_0][0]
        return kinds.F32 if _NOT_QUANTIZED.search(name) or tensor.shape[-1] % block else kinds.Q8_0
    own = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    named = {"fp32": kinds.F32, "bf16": kinds.BF16, "fp16": kinds.F16}
    return named[dtype or own.get(tensor.dtype, "fp32")]


def _values(gguf: Any, name: str, tensor: Tensor, kind: Any) -> np.ndarray:
    """The tensor's values as the file holds them."""
    kinds = gguf.GGMLQuantizationType
    if kind == kinds.Q8_0:
        quantized: np.ndarray = gguf.quantize(tensor.float().contiguous().numpy(), kind)
        return quantized
    dtypes = {kinds.F32: torch.float32, kinds.F16: torch.float16, kinds.BF16: torch.bfloat16}
    stored = stored_as(name, tensor, dtypes[kind]).contiguous()
    if kind == kinds.BF16:  # a type that numpy lacks
        stored = stored.view(torch.int16)
    return stored.numpy()


def _add_facts(gguf: Any, writer: Any, config: ModelConfig, name: str, matrix_kind: Any) -> None:
    writer.add_name(name)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.dim_ffn)
    writer.add_layer_norm_eps(LAYER_NORM_EPS)
    writer.add_wkv_head_size(config.head_size)
    writer.add_head_count(0)  # asked for, and unused
    if isinstance(config, RWKV7Config):
        writer.add_decay_lora_rank(config.decay_rank)
        writer.add_iclr_lora_rank(config.a_rank)
        writer.add_value_residual_mix_lora_rank(config.v_rank)
        writer.add_gate_lora_rank(config.g_rank)
    elif isinstance(config, RWKV6Config):
        writer.add_time_mix_extra_dim(config.mix_rank)
        writer.add_time_decay_extra_dim(config.decay_rank)
        writer.add_rescale_every_n_layers(0)  # the matrices are not scaled down
    kinds, files = gguf.GGMLQuantizationType, gguf.LlamaFileType
    file_types = {
        kinds.F32: files.ALL_F32,
        kinds.F16: files.MOSTLY_F16,
        kinds.BF16: files.MOSTLY_BF16,
        kinds.Q8_0: files.MOSTLY_Q8_0,
    }
    writer.add_file_type(file_types[matrix_kind])
    if matrix_kind == kinds.Q8_0:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(
    gguf: Any,
    writer: Any,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    template: Template | None,
) -> None:
    """The vocabulary, with a token for each row of the embedding; token 0 begins and ends a
    document. Without a tokenizer llama.cpp works on ids alone."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config.vocab_size)
        return
    unused, kinds = set(tokenizer.unused_ids), gguf.TokenType
    tokens, types = [b"<s>"], [kinds.CONTROL]
    for id in range(1, config.vocab_size):
        is_token = id < tokenizer.vocab_size and id not in unused
        content = repr(tokenizer.decode_bytes([id]))[2:-1] if is_token else f"[PAD{id}]"
        tokens.append(content.encode())
        types.append(kinds.NORMAL if is_token else kinds.UNUSED)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(END_OF_DOCUMENT)
    writer.add_eos_token_id(END_OF_DOCUMENT)
    is_world = tokenizer.name == "world"
    template = template or (TEMPLATES["world"] if is_world else None)
    if template is None:
        return
    if is_world and "\n\n" in template.stops:
        (blank_line,) = tokenizer.encode("\n\n")
        writer.add_eot_token_id(blank_line)  # ends a turn of a chat
    source = as_jinja(template)
    if source is not None:
        is_own = isinstance(template, RWKVTemplate)
        writer.add_chat_template(_TEMPLATE_NAME + source if is_own else source)


def _vocabulary(gguf: Any, reader: Any) -> dict[int, bytes]:
    model = reader.get_field(gguf.Keys.Tokenizer.MODEL)
    if model is None or model.contents() != "rwkv":
        return {}
    texts = reader.get_field(gguf.Keys.Tokenizer.LIST).contents()
    types = reader.get_field(gguf.Keys.Tokenizer.TOKEN_TYPE).contents()
    return {
        id: _unescaped(text)
        for id, (text, type) in enumerate(zip(texts, types, strict=True))
        if type == gguf.TokenType.NORMAL
    }


def _unescaped(text: str) -> bytes:
    quote = '"' if "'" in text and '"' not in text else "'"  # as repr chose it
    value: bytes = ast.literal_eval(f"b{quote}{text}{quote}")
    return value
