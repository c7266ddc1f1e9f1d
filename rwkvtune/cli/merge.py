"""`rwkvtune merge`: the weights of a base with an adapter in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rwkvtune.cli.arguments import OneLineParser
from rwkvtune.cli.generate import adapter_folder, note
from rwkvtune.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from rwkvtune.models.frame import LanguageModel

ABOUT = """Write the weights of a base with an adapter in them, as any RWKV program reads them.

  rwkvtune merge rwkv7-g1-0.1b.pth out/lora merged.pth
  rwkvtune merge rwkv7-g1-0.1b.pth out/lora/adapter-1 merged.safetensors --dtype bf16

ADAPTER is an adapter folder, or a run folder, of which the newest adapter counts. The result
answers as the base and the adapter together; a base that was packed for training counts with its
rounded values. An adapter of another base is refused."""


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    base, out = args.base, args.out
    if out.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{out}: end the name in .pth or .safetensors")
    if out.exists():
        raise UserError(f"{out} exists already: give another name, or remove it first")
    folder = adapter_folder(args.adapter)
    from rwkvtune.adapters.adapter import merge, read_about
    from rwkvtune.checkpoint import load_weights, save_weights
    from rwkvtune.files import check_writable
    from rwkvtune.models import build_model, config_from_state_dict, fill_model

    check_writable(out)
    weights = load_weights(base)
    model = build_model(config_from_state_dict(weights), initial_values=False)
    fill_model(model, weights, str(base))
    about = read_about(folder)
    if about is None:
        note(f"{folder} does not say which base it belongs to: that {base} is its base is assumed")
    elif about["adapter"]["kind"] == "state" and model.config.version == "x070":
        raise UserError(
            f"{folder} holds a tuned state, and no RWKV-7 program reads one from the weights: keep "
            f"{folder / 'state.pth'} beside {base} (rwkvtune generate {base} --state {folder})"
        )
    elif about["adapter"]["kind"] == "state":
        note(
            f"{out} is for programs that look for a state in the weights, such as the rwkv package;"
            f" here: rwkvtune generate {base} --state {folder}"
        )
    # Values, not references: merging changes the model's own.
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = merge(model, str(base), folder)
    save_weights(out, plain.state_dict(), dtype=args.dtype)
    keep_beside(folder, base, out)
    note(f"{out}: {in_words(before, plain)}")
    return 0


def make_parser() -> OneLineParser:
    parser = OneLineParser("rwkvtune merge", ABOUT)
    add = parser.add_argument
    add("base", type=Path, metavar="BASE", help="weights that the adapter was trained on")
    add("adapter", type=Path, metavar="ADAPTER", help="adapter folder, or its run folder")
    add("out", type=Path, metavar="OUT", help="new file: .pth or .safetensors")
    add("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the written tensors; "
        "fp32 rounds nothing (fp32)")  # fmt: skip
    return parser


def keep_beside(folder: Path, base: Path, out: Path) -> None:
    """Take the tokenizer and the chat template along, where the new place has none."""
    from rwkvtune.data.chat import find_template, save_template
    from rwkvtune.data.tokenizers import find_tokenizer, save_tokenizer

    places = (folder.parent, base)
    if find_tokenizer(out.parent) is None:
        tokenizer = next(filter(None, map(find_tokenizer, places)), None)
        if tokenizer is not None:
            save_tokenizer(tokenizer, out.parent)
            note(f"tokenizer: kept in {out.parent}")
    if find_template(out.parent) is None:
        template = next(filter(None, map(find_template, places)), None)
        if template is not None:
            save_template(template, out.parent)


def in_words(before: dict[str, Tensor], model: LanguageModel) -> str:
    """How many tensors differ from the base's, and by how much at most."""
    after = model.state_dict()
    added = [name for name in after if name not in before]
    moved = {n: float((after[n] - t).abs().max()) for n, t in before.items()}
    changed = [name for name, by in moved.items() if by > 0]
    largest = max(moved.values())
    words = f"{len(changed)} of {len(before)} tensors changed, by at most {largest:.3g}"
    return words + (f"; {len(added)} added ({added[0]} ...)" if added else "")
