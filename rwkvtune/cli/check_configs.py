"""Every preset's model built without memory, its tensors and their number checked: what
`python examples/test_model_configs.py` and `rwkvtune configs check` run."""

from __future__ import annotations

from rwkvtune.cli import output
from rwkvtune.cli.arguments import OneLineParser
from rwkvtune.configs import ModelConfig, list_available_models, load_model_config
from rwkvtune.configs.model_loader import full_names
from rwkvtune.errors import UserError
from rwkvtune.models.rwkv7.config import UNUSED, RWKV7Config, tensor_shapes

ABOUT = """Build the model of each preset on torch's meta device, which takes no memory, and check
the name and shape of every tensor and the number of parameters. One line for each preset, the
number that passed last; exit code 1 unless that is all of them."""

PARAMETERS = {
    "rwkv7-0.1b": 191_034_624,
    "rwkv7-0.4b": 450_767_872,
    "rwkv7-1.5b": 1_527_404_544,
    "rwkv7-2.9b": 2_947_735_040,
    "rwkv7-7.2b": 7_199_141_888,
    "rwkv7-13.3b": 13_269_245_952,
}
"""Of the released models, without the tensors of block 0 that nothing reads."""


def main(argv: list[str]) -> int:
    parser = OneLineParser("test_model_configs", ABOUT)
    parser.add_argument("folder", nargs="?", help="check the presets of a folder instead")
    folder = parser.parse_args(argv).folder
    presets = list_available_models(folder)
    names = full_names(presets)
    if folder is None:  # a released one that is gone fails too
        names += [name for name in PARAMETERS if name not in presets]
    if not names:
        raise UserError(f"{folder} has no presets: expected files such as rwkv7-1.5b.json")
    passed = 0
    for name in names:
        try:
            preset = load_model_config(presets.get(name, name))
            problems = problems_of(preset, expected_parameters=PARAMETERS.get(name))
        except UserError as error:
            problems = [str(error)]
        if problems:
            output.write(f"FAIL  {name:<12}  {'; '.join(problems[:5])}\n")
        else:
            passed += 1
            d = preset.dimensions
            output.write(
                f"pass  {name:<12}  {preset.model_name:<16}  {parameters_of(d):>14,} parameters in "
                f"{len(tensor_shapes(d).keys() - UNUSED)} tensors\n"
            )
    output.write(f"{passed}/{len(names)} passed\n")
    return 0 if passed == len(names) else 1


def parameters_of(d: RWKV7Config) -> int:
    """Parameters in closed form, without block 0's v0, v1 and v2, which nothing reads."""
    V, C, L = d.vocab_size, d.n_embd, d.n_layer
    matrices = 4 * C * C + 2 * C * d.dim_ffn
    ranks = d.decay_rank + d.a_rank + d.g_rank
    mixed_in = 2 * C * d.v_rank + C  # v1, v2 and v0, from the second block on
    return 2 * V * C + L * (matrices + 2 * C * ranks + 18 * C) + (L - 1) * mixed_in + 4 * C


def problems_of(preset: ModelConfig, *, expected_parameters: int | None) -> list[str]:
    """What is wrong with a preset's model: tensors that its table of shapes does not have, and
    numbers of parameters that are not those of the closed form and of the released weights."""
    import torch

    from rwkvtune.models import build_model

    dimensions = preset.dimensions
    with torch.device("meta"):
        model = build_model(dimensions, initial_values=False)
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    table = tensor_shapes(dimensions)
    problems = [
        f"{name} is {built.get(name)}, expected {table.get(name)}"
        for name in [*table, *(built.keys() - table.keys())]
        if built.get(name) != table.get(name)
    ]
    count = sum(t.numel() for name, t in model.state_dict().items() if name not in UNUSED)
    for wanted in (parameters_of(dimensions), expected_parameters):
        if wanted not in (None, count):
            problems.append(f"{count:,} parameters, expected {wanted:,}")
    return problems
