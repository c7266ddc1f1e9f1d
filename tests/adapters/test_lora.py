"""LoRA and its family against their formulas and against plain peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rwkvtune.adapters.adapter import Adapter, attach, load, merge
from rwkvtune.adapters.quant import dequantize, quantize
from rwkvtune.adapters.settings import AdapterSettings
from rwkvtune.checkpoint import load_weights, save_weights
from rwkvtune.errors import UserError
from rwkvtune.models.frame import LanguageModel
from tests.adapters.bases import IDS, make_base, shake

pytest.importorskip("peft", reason="peft comes with the dev extra")

KINDS = ("lora", "rslora", "dora", "pissa", "miss")


def tensors_of(model: LanguageModel, adapter: Adapter) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: state[name].clone() for name in adapter.tensors}


def trained(
    settings: AdapterSettings, version: str = "x070"
) -> tuple[LanguageModel, Adapter, dict[str, Tensor]]:
    """A base with an adapter that has moved, and the adapter's tensors."""
    torch.manual_seed(3)
    model = make_base(version)
    adapter = attach(model, settings, "base.pth")
    shake(model.train(), 4, 0.05)
    return model.eval(), adapter, tensors_of(model, adapter)


def updated(kind: str, w: Tensor, own: dict[str, Tensor], r: int, alpha: float) -> Tensor:
    """The matrix that an adapted projection multiplies by, from the formula of its paper."""
    if kind == "miss":  # arXiv:2409.15371: the block is repeated along the input
        tiles = -(-w.shape[1] // r)
        return w + own["miss_block.default"].T.repeat(1, tiles)[:, : w.shape[1]]
    a, b = own["lora_A.default.weight"], own["lora_B.default.weight"]
    if kind == "pissa":  # arXiv:2404.02948
        return w - own["initial_B"] @ own["initial_A"] + b @ a
    scale = alpha / (r**0.5 if kind == "rslora" else r)  # arXiv:2106.09685, arXiv:2312.03732
    moved: Tensor = w + scale * b @ a
    if kind == "dora":  # arXiv:2402.09353
        size = own["lora_magnitude_vector.default.weight"]
        moved = size[:, None] * moved / moved.norm(dim=1, keepdim=True)
    return moved


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_is_the_base_with_the_matrices_of_the_formula(kind: str) -> None:
    r, alpha = 6, 9.0
    settings = AdapterSettings(kind, r=r, alpha=None if kind in ("miss", "pissa") else alpha)
    model, _, own = trained(settings)
    plain = make_base()
    changed = 0
    for name, module in plain.named_modules():
        mine = {n.removeprefix(f"{name}."): t for n, t in own.items() if n.startswith(f"{name}.")}
        if isinstance(module, nn.Linear) and mine:
            w = module.weight.detach()
            module.weight.data = updated(kind, w, mine, r, alpha)
            changed += 1
    assert changed == 12  # four projections of time mix and two of channel mix, twice
    # Sums of 64 products in fp32, through two layers.
    assert (model(IDS)[0] - plain(IDS)[0]).abs().max() < 1e-4
    assert (model(IDS)[0] - make_base()(IDS)[0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_at_its_start_an_adapter_changes_nothing(kind: str) -> None:
    model = make_base()
    before = model(IDS)[0]
    attach(model, AdapterSettings(kind, r=4), "base.pth")
    assert (model(IDS)[0] - before).abs().max() < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_merges_and_loads_in_plain_peft_to_the_logits_of_what_was_trained(
    tmp_path: Path, kind: str
) -> None:
    from peft import PeftModel

    model, adapter, own = trained(AdapterSettings(kind, r=4, train_modules="ln1,ln_x,head"))
    assert "blocks.1.att.ln_x.modules_to_save.default.bias" in own
    adapter.save(model, own, tmp_path / "adapter")
    expected = model(IDS)[0]
    plain = merge(make_base(), "base.pth", tmp_path / "adapter")
    untouched = {n: t for n, t in make_base().state_dict().items() if n in plain.unused}
    assert plain.state_dict().keys() == make_base().state_dict().keys()
    assert untouched
    assert all(torch.equal(plain.state_dict()[n], t) for n, t in untouched.items())
    assert (plain(IDS)[0] - expected).abs().max() < 1e-5
    # Its prefix matters: with another one peft would load nothing and only warn.
    assert torch.equal(load(make_base(), "base.pth", tmp_path / "adapter")(IDS)[0], expected) or (
        kind == "pissa"  # whose folder holds a LoRA of twice its rank
    )
    by_peft = PeftModel.from_pretrained(make_base(), tmp_path / "adapter")
    assert (by_peft(IDS)[0] - expected).abs().max() < 1e-5
    # What peft's wrapper is given reaches the model.
    first, state = by_peft(inputs_embeds=make_base().emb(IDS[:, :4]))
    second, _ = by_peft(IDS[:, 4:], state)
    assert (torch.cat([first, second], dim=1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("version", ["x052", "x060"])
def test_older_versions_are_adapted_and_merged_too(tmp_path: Path, version: str) -> None:
    model, adapter, own = trained(AdapterSettings("lora", r=4), version)
    assert sum(n.endswith("lora_A.default.weight") for n in own) == 16  # gate; ffn.receptance
    adapter.save(model, own, tmp_path / "adapter")
    plain = merge(make_base(version), "base.pth", tmp_path / "adapter")
    assert (plain(IDS)[0] - model(IDS)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["lora", "dora", "miss"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_on_a_quantized_base_merging_gives_the_rounded_base_with_the_update(
    tmp_path: Path, kind: str, quant: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes comes with the dev extra")
    r, alpha = 4, 8.0
    settings = AdapterSettings(kind, r=r, alpha=None if kind == "miss" else alpha, quant=quant)
    model, adapter, own = trained(settings)
    adapter.save(model, own, tmp_path / "adapter")
    expected = model(IDS)[0]
    assert (merge(make_base(), "base.pth", tmp_path / "adapter")(IDS)[0] - expected).abs().max() < (
        1e-5
    )
    rounded = make_base()
    quantize(rounded, quant)
    dequantize(rounded)
    for name, module in rounded.named_modules():
        mine = {n.removeprefix(f"{name}."): t for n, t in own.items() if n.startswith(f"{name}.")}
        if isinstance(module, nn.Linear) and mine:
            module.weight.data = updated(kind, module.weight.detach(), mine, r, alpha)
    assert (rounded(IDS)[0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_bring_back_the_same_bits(kind: str) -> None:
    settings = AdapterSettings(kind, r=4, train_modules="ln2")
    model, _, own = trained(settings)
    torch.manual_seed(99)
    again = make_base()
    attach(again, settings, "base.pth", saved=own)
    assert torch.equal(again(IDS)[0], model(IDS)[0])
    del own["blocks.0.ln2.modules_to_save.default.bias"]
    with pytest.raises(UserError, match=r"blocks\.0\.ln2\.modules_to_save.*only in one"):
        attach(make_base(), settings, "base.pth", saved=own)


def test_only_what_the_adapter_names_has_gradients() -> None:
    model = make_base().train()
    adapter = attach(model, AdapterSettings("lora", r=4, train_modules="ln_x"), "base.pth")
    model(IDS)[0].square().sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(adapter.tensors)


def test_frozen_projections_in_bf16_give_the_bits_that_rounding_them_in_each_step_gives() -> None:
    settings = AdapterSettings("lora", r=4)
    _, _, own = trained(settings)
    models = [make_base(), make_base()]
    for model, dtype in zip(models, (torch.float32, torch.bfloat16), strict=True):
        attach(model, settings, "base.pth", saved=own, compute_dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        kept, rounded = (model(IDS)[0] for model in models)
    assert torch.equal(kept, rounded)
    assert models[1].head.weight.dtype == torch.bfloat16


def test_another_base_is_refused(tmp_path: Path) -> None:
    model, adapter, own = trained(AdapterSettings("lora", r=4))
    adapter.save(model, own, tmp_path / "adapter")
    other = make_base()
    with torch.no_grad():
        other.emb.weight[7, 5] += 1e-3
    with pytest.raises(UserError, match="same shapes but other values than the base"):
        merge(other, "other.pth", tmp_path / "adapter")
    with pytest.raises(UserError, match="other tensors than the base"):
        merge(make_base("x060"), "other.pth", tmp_path / "adapter")


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    model, adapter, own = trained(AdapterSettings("lora", r=4, train_modules="ln1"))
    adapter.save(model, own, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_weights(file)
    name = "base_model.model.blocks.1.ln1.weight"
    save_weights(file, {n: t.clone() for n, t in weights.items() if n != name})
    with pytest.raises(UserError, match=r"blocks\.1\.ln1\.weight is missing"):
        merge(make_base(), "base.pth", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("file", "field", "value", "message"),
    [
        ("rwkvtune.json", "format", 9, "has format 9"),
        ("rwkvtune.json", "adapter", {"kind": "lora", "rank": 4}, "rwkvtune.json is damaged"),
        ("rwkvtune.json", "base", {}, "rwkvtune.json is damaged"),
        ("adapter_config.json", "r", 8, r"lora_A.* has shape \[4, 64\], needs \[8, 64\]"),
        ("adapter_config.json", "peft_type", "LORE", "does not fit this base"),
        ("adapter_config.json", None, None, "has no adapter_config.json"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(
    tmp_path: Path, file: str, field: str | None, value: object, message: str
) -> None:
    model, adapter, own = trained(AdapterSettings("lora", r=4))
    adapter.save(model, own, tmp_path)
    path = tmp_path / file
    content = json.loads(path.read_text())
    if field is None:
        path.unlink()
    else:
        path.write_text(json.dumps(content | {field: value}))
    with pytest.raises(UserError, match=message):
        merge(make_base(), "base.pth", tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AdapterSettings("lora", targets="quey"), "its projections: head, key, output"),
        (AdapterSettings("lora", targets="(key"), "is no regular expression"),
        (AdapterSettings("lora", targets="key,head"), "takes in the head"),
        (AdapterSettings("lora", train_modules="ln9"), "ln9 is not in this model"),
        (AdapterSettings("lora", train_modules="x_r"), "x_r is a single tensor"),
        (AdapterSettings("lora", train_modules="att"), "att holds the projections"),
        (AdapterSettings("lora", peft_config={"bias": "all"}), "name its module in train_modules"),
        (AdapterSettings("lora", peft_config={"rank": 4}), "rank, which peft's LoraConfig"),
        (AdapterSettings("pissa", r=65), "lora_r=65: the smallest matrix .* has 64"),
    ],
)
def test_settings_that_fit_nothing_are_refused(settings: AdapterSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach(make_base(), settings, "base.pth")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AdapterSettings("lora", alpha=0.0), "lora_alpha=0.0 must be"),
        (AdapterSettings("lora", peft_config={"lora_alpha": "8"}), "lora_alpha='8' must be"),
        (AdapterSettings("lora", peft_config={"lora_bias": True}), "cannot be merged"),
        (AdapterSettings("lora", peft_config={"alora_invocation_tokens": [1]}), "cannot be merged"),
    ],
)
def test_settings_that_no_model_could_use_are_problems(
    settings: AdapterSettings, message: str
) -> None:
    (problem,) = settings.problems()
    assert message in problem


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_a_loaded_adapter_drops_nothing_out(tmp_path: Path, quant: str) -> None:
    if quant != "none":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes comes with the dev extra")
    settings = AdapterSettings("lora", r=4, quant=quant, peft_config={"lora_dropout": 0.5})
    model, adapter, own = trained(settings)
    adapter.save(model, own, tmp_path / "adapter")
    expected = merge(make_base(), "base.pth", tmp_path / "adapter")(IDS)[0]
    loaded = load(make_base(), "base.pth", tmp_path / "adapter")
    assert (loaded(IDS)[0] - expected).abs().max() < 1e-5
    again = make_base()
    attach(again, settings, "base.pth", saved=own)
    assert (again(IDS)[0] - expected).abs().max() < 1e-5


def test_patterns_and_ranks_beyond_the_matrices_merge_and_load_in_plain_peft(
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    patterns = {"rank_pattern": {r".*att\.key": 99}, "alpha_pattern": {"ffn.value": 3}}
    model, adapter, own = trained(AdapterSettings("lora", r=4, peft_config=patterns))
    assert own["blocks.1.att.key.lora_A.default.weight"].shape == (99, 64)
    adapter.save(model, own, tmp_path / "adapter")
    expected = model(IDS)[0]
    by_peft = PeftModel.from_pretrained(make_base(), tmp_path / "adapter").eval()
    plain = merge(make_base(), "base.pth", tmp_path / "adapter")
    assert max((m(IDS)[0] - expected).abs().max() for m in (by_peft, plain)) < 1e-5


def test_targets_are_names_or_one_regular_expression() -> None:
    for targets in ("att.key, ffn.value", r"blocks\.\d+\.(att\.key|ffn\.value)"):
        model = make_base()
        adapter = attach(model, AdapterSettings("lora", targets=targets), "base.pth")
        layers = {n.partition(".lora_")[0] for n in adapter.tensors}
        assert layers == {f"blocks.{i}.{part}" for i in (0, 1) for part in ("att.key", "ffn.value")}
