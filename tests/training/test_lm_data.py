"""Training on mixtures, and validation told apart by source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rwkvtune.data.binidx import BinIdxWriter
from rwkvtune.errors import UserError
from rwkvtune.evaluation.perplexity import Evaluation, together
from rwkvtune.training.config import TrainConfig
from rwkvtune.training.lm_data import open_data
from tests.token_files import write_token_files
from tests.training.runs import Blow, flags, metrics, outcome, run

SMALL = {
    "n_layer": 1, "n_embd": 64, "ctx_len": 32, "micro_bsz": 2, "precision": "fp32", "threads": 1,
    "log_every": 1, "accelerator": "cpu", "warmup_steps": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two token files in different languages, so to speak: letters, and digits."""
    folder = tmp_path_factory.mktemp("mixture")
    rng = np.random.default_rng(0)
    for name, letters in (("letters", "abcdef"), ("digits", "01234567")):
        documents = ["".join(rng.choice(list(letters), 300)) for _ in range(10)]
        write_token_files(documents, folder / name, "bytes")
    return str(folder / "letters"), str(folder / "digits")


def test_a_killed_mixture_goes_on_to_the_same_bits_and_validates_each_source(
    prefixes: tuple[str, str], tmp_path: Path
) -> None:
    a, b = prefixes
    settings = SMALL | {
        "data_file": f"{a}:0.7,{b}:0.3", "val_data_file": f"{a},{b}", "order": "shuffled",
        "exit_tokens": 64 * 12, "val_every": 4, "save_every": 3, "val_windows": 3,
    }  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = ["train", *flags(settings)]
    ended = run([*argv, "--proj_dir", str(whole)], tmp_path / "out")
    assert ended.code == 0, ended.output
    assert f"70 % {a}: 3,010 tokens; 30 % {b}: 3,010 tokens" in ended.output
    blow = Blow(1, "step-00000006")
    assert run([*argv, "--proj_dir", str(killed)], tmp_path / "out", blow).code == -9
    assert run([*argv, "--proj_dir", str(killed)], tmp_path / "out").code == 0
    assert outcome(killed) == outcome(whole)
    other_shares = ["--data_file", f"{a}:0.6,{b}:0.4", "--proj_dir", str(killed)]
    assert "data: '0.7 of 3010" in run([*argv, *other_shares], tmp_path / "out").output

    row = metrics(whole)[-1]
    letters, digits = float(row["val_loss/letters"]), float(row["val_loss/digits"])
    assert letters != digits
    assert float(row["val_loss"]) == pytest.approx((letters + digits) / 2)  # equal token counts
    assert "letters " in ended.output and "digits " in ended.output


def test_a_mean_over_sources_counts_tokens_or_the_weights_that_are_given() -> None:
    parts = [Evaluation(2.0, 100, 400), Evaluation(4.0, 300, 600)]
    whole = together(parts)
    assert (whole.loss, whole.tokens, whole.num_bytes) == (3.5, 400, 1000)
    weighted = together(parts, [0.5, 0.5])
    assert weighted.loss == 3.0
    # Half of the tokens with 4 bytes each, half with 2: 3 bytes per token.
    assert weighted.bits_per_byte == pytest.approx(3.0 / np.log(2) / 3)
    assert together([parts[0], Evaluation(4.0, 300, 0)]).bits_per_byte is None


def test_what_cannot_be_mixed_is_refused(prefixes: tuple[str, str], tmp_path: Path) -> None:
    a, b = prefixes
    write_token_files(["abc"] * 200, tmp_path / "other", "chars")

    def refused(**settings: object) -> str:
        with pytest.raises(UserError) as caught:
            open_data(TrainConfig.from_flat({"ctx_len": 32, **settings}), [])
        return str(caught.value)

    assert f"such as {a}:0.5,{b}:0.5" in refused(data_file=f"{a},{b}")
    assert "magic_prime=29 has no meaning for a mixture" in refused(
        data_file=f"{a}:1,{b}:1", magic_prime=29
    )
    told = refused(data_file=f"{a}:1,{tmp_path / 'other'}:1")
    assert "tokenizer bytes" in told and "(chars)" in told
    assert "nothing.idx" in refused(data_file=f"{a}:1,nothing:1")


def test_sources_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    names = []
    for folder in ("x", "y"):
        names.append(str(tmp_path / folder / "val"))
        with BinIdxWriter(names[-1], 10) as writer:
            writer.add_document(range(1, 10))
    settings = {"data_file": names[0], "val_data_file": ",".join(names), "ctx_len": 2}
    assert open_data(TrainConfig.from_flat(settings), []).validation_columns == [
        f"val_loss/{name}" for name in names
    ]
