"""From records to batches: templates and labels by hand, bad data, and the order of samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rwkvtune.data.images import PictureStore, Preprocessing
from rwkvtune.data.tokenizers import load_tokenizer
from rwkvtune.data.visual import (
    Assembly,
    BucketedOrder,
    Sample,
    VisualDataset,
    collate,
    without_image_tags,
)
from rwkvtune.errors import UserError

X = -100
SMALL = Preprocessing((4, 4), None, 2, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def turn(who: str, text: Any) -> dict[str, Any]:
    return {"from": who, "value": text}


def record(*turns: dict[str, str], image: Any = "a.png", **more: Any) -> dict[str, Any]:
    return {"image": image, "conversations": list(turns), **more}


tokenizer = cache(load_tokenizer)


def world(**options: Any) -> Assembly:
    return Assembly(tokenizer("world"), **{"image_tokens": 2, **options})


# Ids of the World vocabulary file: 23 = \x16, 24 = \x17, 24281 = User, 59 = :, 5585 and 41693
# = Assistant, 30031 = " What", 4600 = " is", 4601 = " it", 64 = ?, 332 = " a", 21417 = " cat",
# 47 = ".".
USER = [23, 24281, 59, 30031, 4600, 4601, 64, 24]
ANSWER = [23, 5585, 41693, 59, 332, 21417, 47, 24]


def test_the_published_template_and_its_labels() -> None:
    sample = world().sample(record(turn("human", "<image>\nWhat is it?"), turn("gpt", "a cat.")))
    assert sample.ids.tolist() == [0, 0, *USER, *ANSWER]
    assert sample.labels.tolist() == [X] * 10 + ANSWER
    assert sample.is_image.tolist() == [True] * 2 + [False] * 16
    assert sample.pictures == ("a.png",)


def test_turns_pictures_and_roles_of_every_spelling() -> None:
    two = record(
        turn("USER", "What is it?\n<image>"), turn("Assistant", "a cat."),
        turn("Human", "What is it?"), turn("GPT", "a cat."), image=["a.png", "b.png"],
    )  # fmt: skip
    sample = world().sample(two)
    assert sample.ids.tolist() == [0] * 4 + (USER + ANSWER) * 2
    assert sample.labels.tolist() == [X] * 4 + ([X] * 8 + ANSWER) * 2
    text = world().sample({"conversations": two["conversations"][2:]})
    assert text.ids.tolist() == USER + ANSWER and not text.is_image.any()


def test_the_image_tag_goes_with_one_newline_unless_it_is_kept() -> None:
    assert without_image_tags("<image>\nWhat?") == without_image_tags("What?\n<image>") == "What?"
    assert without_image_tags("<image>What?") == "What?"
    kept = world(keep_image_tag=True)
    dialogue = [turn("human", "<image>\nWhat is it?"), turn("gpt", "a cat.")]
    text = tokenizer("world").decode(kept.sample(record(*dialogue)).ids.tolist())
    assert text == "\x16User: <image>\nWhat is it?\x17\x16Assistant: a cat.\x17"


def test_the_later_versions_put_placeholders_where_the_tags_stand() -> None:
    assembly = world(form="placeholder")
    sample = assembly.sample(
        record(turn("human", "<image>cat<image>"), turn("gpt", "a"), image=["a.png", "b.png"])
    )
    start, pad, end, cat = 65530, 65532, 65531, 7211
    user = [23, 24281, 59, start, pad, pad, end, cat, start, pad, pad, end, 24]
    answer = [23, 5585, 41693, 59, 98, 24]
    assert tokenizer("world").decode([cat, 98]) == "cata"
    assert sample.ids.tolist() == user + answer
    assert sample.labels.tolist() == [X] * 13 + answer
    assert (sample.ids == pad).tolist() == sample.is_image.tolist()
    untagged = assembly.sample(record(turn("human", "cat"), turn("gpt", "a")))
    assert untagged.ids[3:8].tolist() == [start, pad, pad, end, cat]  # nothing between, as there
    with pytest.raises(UserError, match="2 tags <image> for 1 pictures"):
        assembly.sample(record(turn("human", "<image><image>"), turn("gpt", "a")))


def sample_of(image_tokens: int, labels: Sequence[int]) -> Sample:
    """Text tokens 1, 2, 3, ... behind a picture, of which those with a label are learned."""
    n = len(labels)
    return Sample(
        np.array([0] * image_tokens + list(range(1, n + 1))),
        np.array([X] * image_tokens + list(labels)),
        np.array([True] * image_tokens + [False] * n),
        ("a.png",) * (image_tokens > 0),
    )


def test_padding_and_shift_of_the_golden_case() -> None:
    # facts of WorldRWKV's own collation: 9 picture tokens and 7 of text give 16, learned at 11..14
    batch = collate([sample_of(9, [X, X, X, 4, 5, 6, 7])], 2048)
    assert batch.input_ids.tolist() == [[0] * 9 + [1, 2, 3, 4, 5, 6, 7]]
    assert batch.targets.tolist() == [[X] * 11 + [4, 5, 6, 7] + [X]]
    assert batch.target_tokens == 4 and batch.num_tokens == 16 and batch.image_rows is None


def test_a_batch_is_padded_to_16_and_cut_on_the_right_at_ctx_len() -> None:
    samples = [sample_of(9, [X, 2, 3]), sample_of(0, list(range(1, 20)))]
    batch = collate(samples, 2048)
    assert batch.input_ids.shape == (2, 32)
    assert batch.input_ids[0].tolist() == [0] * 9 + [1, 2, 3] + [0] * 20
    assert batch.targets[0].tolist() == [X] * 9 + [2, 3] + [X] * 21
    assert batch.targets[1].tolist() == [*range(2, 20), *[X] * 14]
    cut = collate(samples, 16)
    assert cut.input_ids[1].tolist() == list(range(1, 17))
    assert cut.targets[1].tolist() == list(range(2, 18)), "the token behind the cut is a target too"
    pictures = collate([sample_of(9, [1]), sample_of(9, [1])], 8)
    assert pictures.image_rows is not None
    assert pictures.image_rows.tolist() == [*range(8), *range(9, 17)], "row 8 was cut away"


def test_what_comes_before_an_answer_is_what_training_has_before_it() -> None:
    for form in ("prefix", "placeholder"):
        assembly = world(form=form)
        whole = assembly.sample(record(turn("human", "What is it?"), turn("gpt", "a cat.")))
        asked = assembly.question("What is it?", pictures=1)
        answer = assembly.answer("a cat.")
        assert [*asked.ids.tolist(), *answer] == whole.ids.tolist()
        assert asked.is_image.tolist() == whole.is_image[: len(asked.ids)].tolist()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(), "no conversation"),
        ({"image": "a.png"}, "no conversation"),
        (record(turn("system", "x"), turn("gpt", "y")), "unknown role 'system'"),
        (record({"value": "x"}), "unknown role None"),
        (record(turn("human", "x")), "no turn of the assistant"),
        (record(turn("gpt", 3)), "has no text"),
        (record(turn("gpt", "x"), image=3), "expected a file name"),
    ],
)
def test_a_record_that_teaches_nothing_says_why(bad: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        world().sample(bad)


@pytest.fixture
def pictures(tmp_path: Path) -> PictureStore:
    for i, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (5, 5), (10 * i + 10, 0, 0)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return PictureStore(tmp_path)


def dataset(records: list[dict[str, Any]], pictures: PictureStore, **options: Any) -> VisualDataset:
    return VisualDataset(records, pictures, world(), SMALL, **{"ctx_len": 64, **options})


GOOD = [turn("human", "What is it?"), turn("gpt", "a cat.")]


def test_bad_records_and_pictures_are_counted_named_and_left_out(pictures: PictureStore) -> None:
    records = [
        record(*GOOD), record(id="empty"), record(*GOOD, image="b.png"),
        record(*GOOD, image="gone.png", id="g"), record(turn("system", "x"), *GOOD),
        record(*GOOD, image="broken.png"), {"conversations": GOOD},
    ]  # fmt: skip
    data = dataset(records, pictures)
    assert len(data) == 4
    assert data.problems.counts == {
        "unusable records": 2, "records whose picture is missing": 1,
    }  # fmt: skip
    news = data.problems.take_news()
    assert "record 2 (id empty): no conversation" in news[0]
    assert any("record 4 (id g): gone.png is not in" in line for line in news)
    batch = data.batch([0, 1, 2, 3])
    assert batch.input_ids.shape[0] == 3, "the broken picture's sample is left out"
    assert batch.pixels is not None and batch.pixels.shape == (2, 3, 4, 4)
    assert batch.pixels[:, 0, 0, 0].tolist() == [10, 20]
    assert batch.image_positions.sum().item() == 4
    data.batch([2])
    assert data.problems.counts["samples with an unreadable picture"] == 1, "counted once"
    assert "record 6: broken.png: no readable picture" in data.problems.take_news()[0]


def test_a_batch_of_which_nothing_can_be_read_has_no_targets(pictures: PictureStore) -> None:
    broken = record(*GOOD, image="broken.png")
    batch = dataset([broken, record(*GOOD)], pictures).batch([0, 0])
    assert batch.target_tokens == 0 and batch.input_ids.shape == (1, 16)
    assert batch.pixels is not None and batch.pixels.shape == (0, 3, 4, 4)


def test_bad_data_are_refused_where_that_was_asked_for(pictures: PictureStore) -> None:
    with pytest.raises(UserError, match="record 2: no conversation"):
        dataset([record(*GOOD), record()], pictures, on_bad="refuse")
    broken = dataset([record(*GOOD, image="broken.png")], pictures, on_bad="refuse")
    with pytest.raises(UserError, match=r"record 1: broken\.png: no readable picture"):
        broken.batch([0])
    with pytest.raises(UserError, match="none of the records can be used: 1 unusable records"):
        dataset([record()], pictures)


def test_an_answer_behind_the_cut_is_told_and_left_out(pictures: PictureStore) -> None:
    records = [record(*GOOD, id="long"), record(turn("human", ""), turn("gpt", "a cat."))]
    data = dataset(records, pictures, ctx_len=9)  # 2 + 8 tokens come before the long one's answer
    assert len(data) == 1 and data.batch([0]).target_tokens == 3
    assert data.problems.counts == {"samples cut off before their answer": 1}
    assert "record 1 (id long): its answer lies beyond" in data.problems.take_news()[0]
    with pytest.raises(UserError, match="none of the records can be used: 1 samples cut off"):
        dataset(records[:1], pictures, ctx_len=9)


def test_a_data_set_without_one_readable_picture_stops_the_run(pictures: PictureStore) -> None:
    data = dataset([record(*GOOD, image="broken.png")] * 3, pictures)
    assert data.batch([0, 1]).target_tokens == 0
    with pytest.raises(UserError, match=r"no sample has a picture that can be read.*broken\.png"):
        data.batch([1, 2])


def test_pixels_of_the_workers_are_those_of_one_picture_after_the_other(
    pictures: PictureStore,
) -> None:
    records = [record(*GOOD, image=["b.png", "a.png"]), record(*GOOD)]
    batch = dataset(records, pictures, num_workers=3).batch([0, 1])
    expected = [SMALL.pixels(pictures.open(name)) for name in ("b.png", "a.png", "a.png")]
    assert batch.pixels is not None
    assert torch.equal(batch.pixels, torch.from_numpy(np.stack(expected)))


def order_of(lengths: list[int], **options: Any) -> BucketedOrder:
    settings = {"global_bsz": 4, "window_steps": 3, "seed": 5, "shuffle": True} | options
    return BucketedOrder(np.array(lengths), **settings)


def test_each_pass_has_every_sample_once_and_another_order() -> None:
    lengths = np.random.default_rng(0).integers(5, 50, 24).tolist()
    order = order_of(lengths)
    passes = [np.concatenate([order.step(6 * p + s) for s in range(6)]) for p in range(3)]
    for one in passes:
        assert sorted(one.tolist()) == list(range(24))
    assert passes[0].tolist() != passes[1].tolist() != passes[2].tolist()
    again = order_of(lengths)
    assert again.step(17).tolist() == order.step(17).tolist(), "a pure function of the step"


def test_a_pass_that_ends_inside_a_window_loses_and_repeats_nothing() -> None:
    order = order_of([7] * 10)
    seen = np.concatenate([order.step(s) for s in range(30)])  # 12 passes of 10
    assert np.bincount(seen).tolist() == [12] * 10


@pytest.mark.parametrize(("steps", "left"), [(3, 0), (25, 1), (33, 0), (50, 2)])
def test_windows_fill_a_pass_so_that_one_pass_repeats_next_to_nothing(
    steps: int, left: int
) -> None:
    lengths = np.random.default_rng(3).integers(5, 50, 4 * steps).tolist()
    order = order_of(lengths, window_steps=16)
    seen = np.concatenate([order.step(s) for s in range(steps)])
    assert len(set(seen.tolist())) >= 4 * (steps - left), "16 a window would miss more"


def test_samples_of_one_step_have_about_one_length() -> None:
    lengths = np.random.default_rng(1).permutation(120).tolist()
    order = order_of(lengths, window_steps=30)
    spans = [np.ptp(np.array(lengths)[order.step(s)]) for s in range(30)]
    assert max(spans) == 3, "30 steps of 4 neighbours"


def test_a_step_has_the_same_samples_however_it_is_divided() -> None:
    order = order_of(list(range(48)), global_bsz=8)
    whole = sorted(order.step(2).tolist())
    for micro_bsz, world_size in ((8, 1), (2, 1), (2, 2), (1, 4)):
        parts = [
            part
            for rank in range(world_size)
            for part in order.micro_batches(
                2, micro_bsz=micro_bsz, rank=rank, world_size=world_size
            )
        ]
        assert all(len(part) == micro_bsz for part in parts)
        assert sorted(np.concatenate(parts).tolist()) == whole


def test_without_shuffling_samples_come_as_in_the_file() -> None:
    order = order_of([9, 8, 7, 6, 5, 4, 3, 2], shuffle=False, window_steps=1)
    assert sorted(order.step(0).tolist()) == [0, 1, 2, 3]
    assert sorted(order.step(1).tolist()) == [4, 5, 6, 7]
    assert sorted(order.step(2).tolist()) == [0, 1, 2, 3]
