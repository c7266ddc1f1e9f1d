"""`rwkvtune generate` as a user runs it: against the rwkv package, the models' own logits, and the
rules for pipes and terminals."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import rwkvtune
from rwkvtune.checkpoint import save_weights
from rwkvtune.cli.generate import UNSAFE_ON_A_TERMINAL
from rwkvtune.cli.main import main
from rwkvtune.data.tokenizers import ByteTokenizer, find_tokenizer, save_tokenizer
from rwkvtune.models import RWKV7Config, build_model

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 300  # beyond the 257 ids of the byte tokenizer
PROMPT = "To be, or not"


def save_model(path: Path, vocab_size: int, favoured: int | None = None) -> None:
    """A model that writes varied nonsense; `favoured` is an id that it would rather write."""
    model = build_model(RWKV7Config(vocab_size, 2, 64), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
        if favoured is not None:
            model.ln_out.bias[0] = 50.0
            model.head.weight[favoured, 0] = 10.0
    save_weights(path, model.state_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with rwkv-final.pth and tokenizer.json; do not change it."""
    folder = tmp_path_factory.mktemp("weights")
    save_model(folder / "rwkv-final.pth", VOCAB)
    save_tokenizer(ByteTokenizer(), folder)
    return folder


@dataclass
class Output:
    code: int
    out: bytes
    err: str


Run = Callable[..., Output]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Run:
    """run(flags..., stdin=b"") -> what the command wrote, on pipes."""

    def run_once(*args: object, stdin: bytes = b"") -> Output:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(["generate", *map(str, args)])
        captured = capsysbinary.readouterr()
        return Output(code, captured.out, captured.err.decode())

    return run_once


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "rwkvtune", "generate", *map(str, args)]


def environment() -> Mapping[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def greedy(path: Path, prompt: list[int], count: int, allowed: int) -> list[int]:
    """The likeliest of the first `allowed` ids, the whole text read again for each."""
    model, ids = rwkvtune.load(path), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1, :allowed].argmax()))
    return ids[len(prompt) :]


RWKV_PACKAGE = """
import sys
from rwkv.model import RWKV
path, allowed, count, *prompt = sys.argv[1:]
model = RWKV(model=path.removesuffix(".pth"), strategy="cpu fp32")
logits, state = model.forward([int(id) for id in prompt], None)
ids = []
for _ in range(int(count)):
    ids.append(int(logits[:int(allowed)].argmax()))
    logits, state = model.forward([ids[-1]], state)
print("ids", *ids)
"""


def test_greedy_text_is_that_of_the_rwkv_package(run: Run, folder: Path) -> None:
    pytest.importorskip("rwkv", reason="the rwkv package comes with the dev extra")
    ids, path = ByteTokenizer().encode(PROMPT), folder / "rwkv-final.pth"
    settings = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RWKV_PACKAGE, str(path), "257", "40", *map(str, ids)],
        env=os.environ | settings, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = [int(id) for id in done.stdout.rpartition("ids")[2].split()]
    assert len(set(theirs)) > 10 and 0 not in theirs
    ours = run(folder, "--prompt", PROMPT, "--temperature", 0, "--max_tokens", 40)
    assert ours.code == 0 and ours.out == ByteTokenizer().decode_bytes(theirs)


def test_stdout_has_the_text_alone_and_stderr_the_rest(run: Run, folder: Path) -> None:
    found = run(folder, "--prompt", PROMPT, "--temperature", 0, "--max_tokens", 30)
    ids = greedy(folder / "rwkv-final.pth", ByteTokenizer().encode(PROMPT), 30, allowed=257)
    assert found.out == ByteTokenizer().decode_bytes(ids)
    assert f"weights: {folder}/rwkv-final.pth\n" in found.err
    assert "30 tokens, ended by max_tokens; " in found.err and "prompt of 13 in" in found.err
    echoed = run(folder, "--prompt", PROMPT, "--temperature", 0, "--max_tokens", 30, "--echo")
    assert echoed.out == PROMPT.encode() + found.out


def test_a_prompt_on_stdin_is_read_to_the_byte(run: Run, folder: Path) -> None:
    prompt = "\té\r\n\0 end \n"
    given = run(folder, "--temperature", 0, "--max_tokens", 20, "--echo", stdin=prompt.encode())
    ids = greedy(folder / "rwkv-final.pth", ByteTokenizer().encode(prompt), 20, allowed=257)
    assert given.out == prompt.encode() + ByteTokenizer().decode_bytes(ids)
    # With --prompt, stdin is left alone.
    argument = run(folder, "--temperature", 0, "--max_tokens", 20, "--prompt", "x", stdin=b"\xff")
    assert argument.code == 0
    bad = run(folder, stdin=b"abc\xffd")
    assert (bad.code, bad.out) == (2, b"")
    assert "error: the prompt on stdin is not UTF-8: byte 3 is 0xff" in bad.err
    bad = run(folder, "--prompt", b"abc\xff".decode(errors="surrogateescape"))
    assert bad.code == 2 and "--prompt is not UTF-8: byte 3 is 0xff" in bad.err


def test_no_prompt_starts_a_document(run: Run, folder: Path) -> None:
    ids = greedy(folder / "rwkv-final.pth", [0], 20, allowed=257)
    wanted = ByteTokenizer().decode_bytes(ids)
    settings = ["--temperature", 0, "--max_tokens", 20]
    assert run(folder, *settings).out == run(folder, "--prompt", "", *settings).out == wanted


def test_a_seed_writes_the_same_text_again(run: Run, folder: Path) -> None:
    settings = ["--top_p", 0.9, "--top_k", 50, "--presence_penalty", 0.2, "--max_tokens", 60]
    first, again, other = (run(folder, *settings, "--seed", n).out for n in (5, 5, 6))
    assert first == again != other and len(first) > 20


def test_the_end_of_a_document_ends_the_text_unless_it_is_ignored(run: Run, folder: Path) -> None:
    from rwkvtune.inference.generate import generate

    model = rwkvtune.load(folder / "rwkv-final.pth")
    banned = range(257, VOCAB)
    for seed in range(20):
        ids = list(generate(model, [0], max_tokens=200, seed=seed, banned_ids=banned))
        if 0 in ids[:-1]:
            break
    settings = ["--max_tokens", 200, "--seed", seed]
    ended, ignored = run(folder, *settings), run(folder, *settings, "--ignore_end")
    assert ended.out == ByteTokenizer().decode_bytes(ids[: ids.index(0)])
    assert f"{ids.index(0)} tokens, ended by the end of the document" in ended.err
    assert ignored.out == ByteTokenizer().decode_bytes(ids)
    assert len(ignored.out) > len(ended.out)


def test_a_stop_text_ends_the_text_and_is_left_out(run: Run, folder: Path) -> None:
    settings = ["--prompt", PROMPT, "--temperature", 0, "--max_tokens", 40]
    whole = run(folder, *settings).out.decode(errors="replace")
    ascii_pairs = (whole[i : i + 2] for i in range(10, 38) if whole[i : i + 2].isascii())
    stop = next(pair for pair in ascii_pairs if pair.isprintable())
    found = run(folder, *settings, "--stop", "never", "--stop", stop)
    assert found.out.decode(errors="replace") == whole[: whole.index(stop)]
    assert "ended by a stop text" in found.err


def test_ids_without_text_are_never_written(run: Run, tmp_path: Path) -> None:
    save_model(tmp_path / "w.pth", VOCAB, favoured=290)
    found = run(tmp_path / "w.pth", "--tokenizer", "bytes", "--max_tokens", 50, "--ignore_end")
    assert found.code == 0 and "50 tokens" in found.err


def test_world_is_assumed_for_weights_of_its_size_and_its_unused_ids_are_never_written(
    run: Run,
    tmp_path: Path,
) -> None:
    # 65530 to 65535 stand for no text; this model would write 65531 always.
    save_model(tmp_path / "w.pth", 65536, favoured=65531)
    found = run(tmp_path / "w.pth", "--max_tokens", 8, "--seed", 1)
    assert found.code == 0 and "world is assumed for 65536 ids" in found.err
    assert found.out and "\ufffd" not in found.out.decode()


def test_a_trained_run_is_found_with_its_tokenizer(
    run: Run, run_folder: Path, tmp_path: Path
) -> None:
    tokenizer = find_tokenizer(run_folder)
    assert tokenizer is not None and tokenizer.name == "chars"
    for name in ("rwkv-init.pth", "rwkv-final.pth"):
        found = run(run_folder / name, "--prompt", "First", "--max_tokens", 5, "--seed", 1)
        assert found.code == 0 and "tokenizer" not in found.err, found.err
        assert set(found.out.decode()) <= set(tokenizer.decode(range(tokenizer.vocab_size)))
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    (copy / "rwkv-final.pth").unlink()
    assert f"weights: {copy}/rwkv-init.pth\n" in run(copy, "--max_tokens", 1).err
    shutil.copy(run_folder / "rwkv-final.pth", copy / "rwkv-10.pth")
    shutil.copy(run_folder / "rwkv-final.pth", copy / "rwkv-9.pth")
    assert f"weights: {copy}/rwkv-10.pth\n" in run(copy, "--max_tokens", 1).err
    shutil.copy(run_folder / "rwkv-final.pth", copy)
    os.utime(copy / "rwkv-final.pth", (0, 0))
    assert "rwkv-final.pth (rwkv-10.pth was written after it)" in run(copy, "--max_tokens", 1).err


REFUSALS: dict[str, tuple[list[Any], str]] = {
    # Settings come before the file: it is not even looked for.
    "temperature": (["nothing", "--temperature", "-1"], "temperature is -1.0: give 0"),
    "not a number": (["nothing", "--temperature", "nan"], "temperature is nan"),
    "top_p": (["nothing", "--top_p", "0"], "top_p is 0.0: give a probability above 0"),
    "top_k": (["nothing", "--top_k", "-1"], "top_k is -1"),
    "penalty": (["nothing", "--presence_penalty", "inf"], "presence_penalty is inf"),
    "max_tokens": (["nothing", "--max_tokens", "-1"], "max_tokens is -1: give 0 or more"),
    "seed": (["nothing", "--seed", str(2**64)], "fits into 64 bits"),
    "stop": (["nothing", "--stop", ""], "--stop is empty"),
    "threads": (["nothing", "--threads", "-1"], "--threads is -1: give 1 or more"),
    "half a number": (["nothing", "--top_k", "2.5"], "--top_k: invalid int value: '2.5'"),
    "near flag": (["nothing", "--temprature", "1"], "--temprature (did you mean --temperature?)"),
    "abbreviated": (["nothing", "--temp", "1"], "unknown flag --temp"),
    "no file": ([], "the following arguments are required: FILE"),
    "prompt like a flag": (["nothing", "--prompt", "-x"], "written --prompt=-..."),
    "missing": (["nothing.pth"], "there is no file nothing.pth"),
    "empty folder": (["empty"], "empty is no run folder"),
    "text": (["text.txt"], "text.txt is not a weights file"),
    "no RWKV": (["other.pth"], "other.pth: these weights are no RWKV"),
    "older": (["x060a.pth"], "x060a.pth: these weights are RWKV-6 x060a"),
    "resume state": (
        ["run/resume/step-00000001/state.safetensors"], "is a resume state, not a weights file: "
        "give its run folder, run",
    ),
    "no tokenizer": (["bare.pth"], "bare.pth has no tokenizer beside it, and 100 ids tell of none"),
    "large tokenizer": (
        ["bare.pth", "--tokenizer", "bytes"], "bytes has ids up to 256, bare.pth knows 0 to 99",
    ),
    "unknown tokenizer": (["bare.pth", "--tokenizer", "gpt"], "unknown tokenizer 'gpt'"),
    "no GPU": (["run", "--device", "cuda"], "torch sees no GPU here; use --device cpu"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = tmp_path_factory.mktemp("files")
    (files / "empty").mkdir()
    (files / "text.txt").write_text("hello")
    save_weights(files / "other.pth", {"layer.weight": torch.zeros(2, 2)})
    names = ["time_maa_x", "time_faaaa", "gate_w1"]
    save_weights(files / "x060a.pth", {f"blocks.0.att.{n}": torch.zeros(1) for n in names})
    save_model(files / "bare.pth", 100)
    shutil.copytree(folder, files / "run")
    state = files / "run" / "resume" / "step-00000001"
    state.mkdir(parents=True)
    save_weights(state / "state.safetensors", {"model.blocks.0.att.r_k": torch.zeros(1)})
    return files


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_one_line(
    case: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "stdin", None)
    args, told = REFUSALS[case]
    assert main(["generate", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and told in captured.err
    (line,) = (line for line in captured.err.splitlines() if not line.startswith("weights: "))
    assert line.startswith("error: ")


def test_half_precision_writes_text_too(run: Run, folder: Path) -> None:
    found = run(folder, "--dtype", "bf16", "--max_tokens", 20, "--seed", 1)
    assert found.code == 0 and len(found.out) > 10


def start(*args: object, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(*args), stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT,
        env=environment(),
    )  # fmt: skip


def test_text_comes_while_it_is_written_and_ctrl_c_ends_it_with_130(folder: Path) -> None:
    process = start(folder, "--max_tokens", 10**9, "--ignore_end")
    assert process.stdout and process.stderr
    assert process.stdout.read(20)  # a text of 10^9 tokens would never be complete
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert b"ended by Ctrl-C" in err and b"Traceback" not in err and b"error" not in err


def test_a_reader_that_leaves_ends_the_text_without_a_word(folder: Path) -> None:
    process = start(folder, "--max_tokens", 10**9, "--ignore_end")
    assert process.stdout and process.stderr
    process.stdout.read(20)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=600) == 141
    assert all(
        line.startswith(("weights: ", "prompt: ", "kernel ")) for line in err.decode().splitlines()
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        process = start(folder, "--max_tokens", 5, stdout=full.fileno())
        _, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert err.decode().splitlines()[-1] == (
        "error: cannot write the output: No space left on device"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_no_control_characters(run: Run, folder: Path) -> None:
    import pty

    master, slave = pty.openpty()
    process = start(folder, "--max_tokens", 1500, "--seed", 3, "--ignore_end", stdout=slave)
    os.close(slave)
    shown = b""
    while chunk := read_terminal(master):
        shown += chunk
    assert process.wait(timeout=600) == 0
    text = shown.decode()
    assert all(c.isprintable() or c in "\r\n\t" for c in text), text
    # What a pipe gets from the same seed does hold some.
    exact = run(folder, "--max_tokens", 1500, "--seed", 3, "--ignore_end").out
    assert b"\x1b" in exact and "\\x1b" in text and text.endswith("\r\n")


def read_terminal(master: int) -> bytes:
    try:
        return os.read(master, 4096)
    except OSError:  # Linux: the other end is closed
        return b""


def test_only_newline_tab_and_printable_characters_reach_a_terminal_unchanged() -> None:
    for code in [*range(0x2000), *range(0x2000, 0x2100), 0x1F600, *range(0xDC80, 0xDD00)]:
        shown = chr(code).translate(UNSAFE_ON_A_TERMINAL)
        if code < 32 or 127 <= code < 160:
            assert shown == (chr(code) if chr(code) in "\n\t" else f"\\x{code:02x}")
        elif 0xDC80 <= code < 0xDD00:
            assert shown == "\ufffd"
        elif shown != chr(code):
            assert shown == f"\\u{code:04x}" and not chr(code).isprintable()
