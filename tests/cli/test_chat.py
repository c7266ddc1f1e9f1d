"""`rwkvtune chat` and `rwkvtune sft --preview` as a user runs them."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rwkvtune.checkpoint import save_weights
from rwkvtune.cli.main import main
from rwkvtune.data.chat import load_template, save_template
from rwkvtune.data.tokenizers import ByteTokenizer, save_tokenizer
from rwkvtune.models import RWKV7Config, build_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose model answers "~" to everything; do not change it."""
    folder = tmp_path_factory.mktemp("run")
    model = build_model(RWKV7Config(257, 2, 64), seed=1)
    with torch.no_grad():
        model.ln_out.bias[0] = 50.0
        model.head.weight[ord("~") + 1, 0] = 10.0
    save_weights(folder / "rwkv-final.pth", model.state_dict())
    save_tokenizer(ByteTokenizer(), folder)
    save_template(load_template("world"), folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture
def chat(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Chat:
    def run(lines: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = main(["chat", str(folder), "--max_tokens", "3", "--temperature", "0", *flags])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def test_each_line_of_a_pipe_is_answered_on_stdout_alone(chat: Chat) -> None:
    code, out, err = chat("Hello\n\nand\n/history\n/exit\nnot read\n", "--system", "Be brief")
    assert (code, out) == (0, "~~~\n~~~\n")
    spoken = [line for line in err.splitlines() if line.startswith(("system:", "user:", "assis"))]
    assert spoken == [
        "system: Be brief", "user: Hello", "assistant: ~~~", "user: and", "assistant: ~~~",
    ]  # fmt: skip
    assert "template" not in err, "the run folder's own"


def test_a_conversation_is_saved_loaded_and_reset(chat: Chat, tmp_path: Path) -> None:
    state = tmp_path / "talk.safetensors"
    assert "saved" in chat(f"Hello\n/save {state}\n")[2]
    code, out, err = chat("/history\nmore\n/reset\n/history\n", "--load", str(state))
    assert (code, out) == (0, "~~~\n")
    assert err.count("user: Hello") == 1 and f"loaded {state}: 2 turns" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sav x", "unknown command /sav: there are /save FILE"),
        ("/load none.safetensors", "none.safetensors: there is no such file"),
        ("/save", "/save needs the name of a file"),
    ],
)
def test_a_wrong_command_in_a_pipe_ends_it_with_one_line(
    chat: Chat, line: str, message: str
) -> None:
    code, _, err = chat(f"{line}\nHello\n")
    errors = [text for text in err.splitlines() if text.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0]


def test_on_a_terminal_control_c_ends_an_answer_and_the_chat_goes_on(folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "rwkvtune", "chat", str(folder), "--max_tokens", "1000000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True
    )
    os.close(theirs)
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 600
        while text not in seen:
            assert time.monotonic() < deadline, seen[-500:]
            seen += os.read(ours, 4096)

    try:
        wait_for(b"> ")
        os.write(ours, b"Hello\n")
        wait_for(b"~~~~~~~~")
        process.send_signal(signal.SIGINT)
        wait_for(b"(ended by Ctrl-C)")
        seen = b""
        os.write(ours, b"/nothing\n")
        wait_for(b"error: unknown command")
        os.write(ours, b"/exit\n")
        assert process.wait(timeout=600) == 0
    finally:
        process.kill()
        os.close(ours)


def test_the_preview_marks_what_is_trained_and_needs_no_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    lines = [{"messages": turns * 2}, {"text": "Once"}, {"messages": turns}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["sft", "--preview", "2", "--data_file", str(path), "--tokenizer", "bytes"]) == 0
    assert capfd.readouterr().out == (
        f"--- {path}: line 1: 49 tokens, 9 trained\n"
        "User: Hi\n\nAssistant:[[ Ho\n\n]]User: Hi\n\nAssistant:[[ Ho<end>]]\n"
        f"--- {path}: line 2: 6 tokens, 5 trained\n"
        "<end>[[Once<end>]]\n"
        "in all: 3 samples, 79 tokens, 23% of them trained\n"
    )
    assert not (tmp_path / "out").exists()
