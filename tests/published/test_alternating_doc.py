"""The commands of the published page on alternating attention, as printed, on tiny checkpoints.

/path/to is the folder of examples/make_alternating_checkpoints.py; the program runs in it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rwkvtune.cli.main import guarded

ROOT = Path(__file__).resolve().parents[2]

INSPECTING = [
    (
        """--model_name_or_path lmms-lab/llava-onevision-qwen2-0.5b-ov
           --data_path /tmp/dummy.json --dry_run""",
        ["Detected model_type: llava_qwen\n"],
    ),
    (
        "--model_name_or_path lmms-lab/llava-onevision-qwen2-0.5b-ov --dry_run",
        ["Detected model_type: llava_qwen\n"],
    ),
    (
        """--model_name_or_path lmms-lab/llava-onevision-qwen2-0.5b-ov
           --data_path /path/to/laion_subset.json --inspect_data""",
        ["Dataset loaded. Number of samples: 12\n", "'conversations': [{'from': 'human'"],
    ),
    (
        """--backbone_model qwen2-base-or-local --data_path /path/to/laion_subset.json
           --variant alternating --init_from_backbone --inspect_weights""",
        [
            "Detected model_type: qwen2\n",
            "copied 74 params from backbone into alternating model\n",
            "missing (keep their initial values), 5:\n",
            "model.language_model.embed_tokens.weight",
        ],
    ),
]
TRAINING = {
    "alternating": """--model_name_or_path path_or_repo_with_alternating_attn
        --data_path /path/to/laion_subset_in_llava_format.json
        --output_dir outputs/alt_qwen2 --variant alternating""",
    "alternating_cross": """--model_name_or_path path_or_repo_with_alternating_cross_attn
        --data_path /path/to/laion_subset_in_llava_format.json
        --output_dir outputs/alt_qwen2_cross --variant alternating_cross""",
    "with_sizes": """--model_name_or_path path_or_repo_with_alternating_attn
        --data_path /path/to/laion_subset_in_llava_format.json --output_dir outputs/alt_qwen2
        --variant alternating --per_device_train_batch_size 8 --num_train_epochs 3""",
    "backbone": """--backbone_model path_or_repo_for_backbone
        --data_path /path/to/laion_subset_in_llava_format.json
        --init_from_backbone --variant alternating
        --output_dir outputs/alt_qwen2_from_backbone
        --per_device_train_batch_size 8 --num_train_epochs 3 --throughput_log_steps 50""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the example script, as a user would."""
    made = tmp_path_factory.mktemp("path") / "to"
    script = ROOT / "examples" / "make_alternating_checkpoints.py"
    done = subprocess.run([sys.executable, script, made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def run(command: str, folder: Path) -> int:
    return guarded("alternating_train", shlex.split(command.replace("/path/to", str(folder))))


@pytest.mark.parametrize(("command", "expected"), INSPECTING)
def test_inspecting_commands_print_what_is_documented(
    command: str, expected: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.rglob("*"))
    assert run(command, here) == 0
    out = capsys.readouterr().out
    for text in expected:
        assert text in out
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("name", TRAINING)
def test_training_commands_run_as_printed_and_leave_a_checkpoint(
    name: str, here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = shlex.split(TRAINING[name])
    output = Path(words[words.index("--output_dir") + 1])
    command = TRAINING[name].replace(str(output), str(tmp_path / output))
    assert run(f"{command} --logging_steps 1", here) == 0
    out = capsys.readouterr().out
    assert "Dataset loaded. Number of samples: 12\n" in out
    assert "step 6/6  loss" in out and "6 steps done" in out
    again = f"--model_name_or_path {tmp_path / output} --variant auto --dry_run"
    assert run(again, here) == 0
    variant = "cross_" if name == "alternating_cross" else ""
    expected = f"Detected model_type: llava_qwen_with_alternating_{variant}attn\n"
    assert expected in capsys.readouterr().out
    first = safetensors.torch.load_file(here / words[1] / "model.safetensors")
    last = safetensors.torch.load_file(tmp_path / output / "model.safetensors")
    assert set(first) <= set(last)
    learned = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[learned], last[learned])
    tower = "model.vision_tower.vision_tower.vision_model.post_layernorm.bias"
    assert torch.equal(first.get(tower, last[tower]), last[tower])


def json_of(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert run(f"{command} --json", folder) in (0, 3, 4)
    captured = capsys.readouterr()
    result: dict[str, Any] = json.loads(captured.out)
    return result


def test_a_variant_that_does_not_match_ends_with_3_unless_it_is_forced(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cross = "--model_name_or_path path_or_repo_with_alternating_cross_attn --dry_run_step"
    assert run(f"{cross} --variant alternating", here) == 3
    captured = capsys.readouterr()
    assert "requested --variant: alternating\n" in captured.err
    assert "detected model_type: llava_qwen_with_alternating_cross_attn" in captured.err
    assert json_of(f"{cross} --variant base", here, capsys)["exit_code"] == 3
    for variant in ("alternating_cross", "auto"):
        assert run(f"{cross} --variant {variant}", here) == 0
    forced = json_of(f"{cross} --variant base --force", here, capsys)
    assert forced["decoder_class"] == "LlavaQwenWithAlternatingCrossAttnModel"
    changed = json_of(f"{cross} --force_class alternating", here, capsys)
    assert changed["class"].endswith(".LlavaOnevisionWithAlternatingAttn")
    assert changed["decoder_class"] == "LlavaQwenWithAlternatingAttnModel"


def test_force_class_builds_the_class_from_every_naming(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "lmms-lab/llava-onevision-qwen2-0.5b-ov",
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "qwen2-base-or-local",
    ):
        result = json_of(
            f"--model_name_or_path {name} --dry_run_step --force_class alternating_cross "
            "--schedule last_k:2",
            here,
            capsys,
        )
        assert result["decoder_class"] == "LlavaQwenWithAlternatingCrossAttnModel"
        assert result["schedule"] == "last_k:2: layers 4, 5 of 6"
        assert result["missing"] == result["unexpected"] == []


def test_the_step_of_a_dry_run_is_real_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*")}
    command = "--model_name_or_path path_or_repo_with_alternating_attn --dry_run_step"
    made_up = json_of(command, here, capsys)
    real = json_of(f"{command} --data_path {here}/laion_subset.json", here, capsys)
    assert before == {p: p.stat().st_mtime_ns for p in here.rglob("*")}
    for result in (made_up, real):
        # a model that knows nothing yet: about ln(320) nats for each of 320 ids
        assert result["step"]["loss"] == pytest.approx(5.77, abs=0.3)
        assert result["step"]["grad_norm"] > 0 and result["exit_code"] == 0
    assert made_up["parameters"] == real["parameters"]


def test_a_step_that_is_not_finite_ends_with_4(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = here / "path_or_repo_with_alternating_attn"
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = safetensors.torch.load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    assert run(f"--model_name_or_path {tmp_path} --dry_run_step", here) == 4
    assert "no finite loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("--dry_run", "no model is given"),
        ("--model_name_or_path gone --dry_run", "there is no folder gone"),
        ("--model_name_or_path M --init_from_backbone", "needs --backbone_model"),
        ("--model_name_or_path M", "--data_path is missing"),
        ("--model_name_or_path M --data_path gone.json", "gone.json: there is no such file"),
        ("--model_name_or_path M --data_path D", "--output_dir is missing"),
        ("--model_name_or_path M --dry_rum", "unknown settings: dry_rum (did you mean dry_run?)"),
        ("--model_name_or_path M --variant cross", "variant=cross must be one of auto"),
        ("--model_name_or_path M --dry_run --bits 4", "bits=4"),
        ("--model_name_or_path M --dry_run_step --mm_patch_merge_type x", "merge_type=x is not"),
        ("--model_name_or_path M --dry_run_step --image_grid_pinpoints x", "pinpoints is 'x'"),
        ("--model_name_or_path M --attn_implementation flash_attention_2", "cannot follow"),
        ("--model_name_or_path M --dry_run --bf16 --fp16", "two precisions"),
        ("--model_name_or_path M --dry_run --mm_tunable_parts lm", "choose from mm_mlp_adapter"),
        ("--model_name_or_path M --dry_run_step --schedule odd", "no schedule 'odd'"),
        ("--backbone_model B --init_from_backbone --dry_run_step --vision_tower X", "no folder X"),
        ("--model_name_or_path B --data_path D --output_dir O", "has images, but this model"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_exit_code_2(
    command: str, reason: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "M": "path_or_repo_with_alternating_attn",
        "B": "qwen2-base-or-local",
        "D": "laion_subset.json",
        "O": "never",
    }
    words = [names.get(word, word) for word in shlex.split(command)]
    assert guarded("alternating_train", words) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ") and reason in error
    assert not (here / "never").exists()


def test_a_backbone_of_other_dimensions_or_another_family_says_what_differs(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    small: Any = Qwen2Config(**sizes)  # type: ignore[arg-type]
    Qwen2ForCausalLM(small).save_pretrained(tmp_path / "small")
    flags = f"--init_from_backbone --backbone_model {tmp_path}/small --variant alternating "
    flags += "--model_name_or_path path_or_repo_with_alternating_attn"
    assert run(f"{flags} --dry_run_step", here) == 2
    assert "hidden_size is 32 in the backbone and 48 here" in capsys.readouterr().err
    assert run(f"{flags} --inspect_weights", here) == 0
    assert "shape-mismatched (not copied), " in capsys.readouterr().out
    same = flags.replace(f"{tmp_path}/small", "qwen2-base-or-local")
    assert run(f"{same} --dry_run_step", here) == 0
    assert "copied 74 params from backbone into alternating model" in capsys.readouterr().out
    parts = json_of(f"{same} --inspect_weights", here, capsys)["tensors"]
    found = {part: (counts["matched"], counts["missing"]) for part, counts in parts.items()}
    assert found == {"lm": (74, 0), "newline": (1, 0), "projector": (4, 0), "vision": (37, 0)}

    llama: Any = LlamaConfig(**sizes)  # type: ignore[arg-type]
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    other = f"--init_from_backbone --backbone_model {tmp_path}/llama --dry_run_step"
    assert run(other, here) == 2
    assert "llama is a llama model" in capsys.readouterr().err.replace(f"{tmp_path}/", "")


def test_a_dry_run_reads_the_configuration_alone_and_imports_no_torch(folder: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from rwkvtune.cli.alternating_train import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    name = folder / "path_or_repo_with_alternating_cross_attn"
    words = [
        "--model_name_or_path",
        str(name),
        "--data_path",
        "/no/such.json",
        "--dry_run",
        "--json",
    ]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert json.loads(done.stdout) == {
        "model_type": "llava_qwen_with_alternating_cross_attn",
        "variant": "alternating_cross",
        "exit_code": 0,
    }


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        guarded("alternating_train", ["-h"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--variant", "--force_class", "--dry_run_step", "--throughput_log_steps"):
        assert flag in text
    assert "what is this checkpoint?" in text and "Exit codes" in text


def test_the_published_import_gives_the_documented_module(here: Path) -> None:
    from rwkvtune.data.llava import make_supervised_data_module
    from rwkvtune.models.alternating.tokenizer import byte_tokenizer

    class Arguments:
        data_path = str(here / "laion_subset.json")

    module = make_supervised_data_module(byte_tokenizer(), Arguments())
    assert len(module["train_dataset"].list_data_dict) == 12 and module["eval_dataset"] is None
