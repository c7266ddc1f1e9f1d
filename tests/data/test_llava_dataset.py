"""Witness: token counts of the original, transformers' image processor and chat template, and
hand-written samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionImageProcessor, Qwen2Tokenizer

from rwkvtune.data.llava import make_supervised_data_module
from rwkvtune.data.llava_dataset import DataArguments, LlavaDataset, Template
from rwkvtune.data.llava_images import ImageProcessor, best_canvas, sampled_frames
from rwkvtune.data.llava_manifest import read_manifest
from rwkvtune.data.llava_sampler import GroupedSampler, by_length_throughout, by_modality
from rwkvtune.errors import UserError
from rwkvtune.models.alternating.packing import PackingRule, frame_features, image_features
from rwkvtune.models.alternating.tokenizer import byte_tokenizer

SIX = "(1x1),...,(6x6)"


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> str:
    pixels = np.random.default_rng(size[0]).integers(0, 255, (size[1], size[0], 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path.name


def turns(question: str, answer: str = "yes") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def written(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


# ---- images


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((384, 384), 1485),
        ((640, 480), 2929),
        ((1024, 899), 6551),
        ((1920, 1080), 7269),
        ((100, 1000), 1539),
    ],
)
def test_anyres_counts_are_the_originals(size: tuple[int, int], tokens: int) -> None:
    processor = ImageProcessor(image_aspect_ratio="anyres_max_9", image_grid_pinpoints=SIX)
    assert processor.image_tokens(size) == tokens
    assert processor.image_tokens(size, alone=False) == 730
    assert ImageProcessor(image_aspect_ratio="pad").image_tokens(size) == 730


@pytest.mark.parametrize(
    ("newline", "per_frame", "extra"),
    [("grid", 210, 0), ("frame", 197, 0), ("one_token", 196, 1), ("no_token", 196, 0)],
)
def test_video_counts_are_the_originals(newline: str, per_frame: int, extra: int) -> None:
    assert ImageProcessor(mm_newline_position=newline).video_tokens(5) == 5 * per_frame + extra
    pooled = ImageProcessor(mm_newline_position="no_token", mm_spatial_pool_mode="average")
    assert pooled.video_tokens(2) == 2 * 13 * 13


@pytest.mark.parametrize(
    "merge", ["spatial_unpad", "spatial", "flat", "spatial_maxpool2x2", "spatial_unpad_nobase"]
)
def test_counts_are_the_lengths_of_what_the_model_packs(merge: str) -> None:
    generator = np.random.default_rng(3)
    for aspect in ("anyres_max_2", "anyres"):
        processor = ImageProcessor(56, 14, aspect, "(1x1),...,(3x4)", merge)
        rule = PackingRule(
            [(h, w) for w, h in processor.canvases],
            view_size=56,
            max_tiles=2 if "max" in aspect else None,
            merge=merge,
        )
        for _ in range(40):
            size = (int(generator.integers(5, 400)), int(generator.integers(5, 400)))
            width, height = best_canvas(size, processor.canvases)
            views = torch.zeros(1 + width // 56 * (height // 56), 16, 2)
            packed = image_features(views, size, torch.zeros(2), rule)
            assert len(packed) == processor.image_tokens(size), size
    rule = PackingRule([], 56, None, newline="grid")
    assert len(frame_features(torch.zeros(3, 16, 2), torch.zeros(2), rule)) == 3 * 2 * 3


@pytest.mark.parametrize(
    ("merge", "position", "tokens"),
    [  # of the original program, run on 3 frames of 4 x 4 features
        *(("flat", position, 12) for position in ("grid", "frame", "one_token", "no_token")),
        ("spatial", "one_token", 12),
        ("spatial", "grid", 18),
        ("spatial_unpad", "one_token", 13),
    ],
)
def test_a_video_has_newlines_only_where_the_merge_has_them(
    merge: str, position: str, tokens: int
) -> None:
    config: Any = LlavaOnevisionConfig()
    config.mm_patch_merge_type, config.mm_newline_position = merge, position
    rule = PackingRule.of(config)
    assert len(frame_features(torch.zeros(3, 16, 2), torch.zeros(2), rule)) == tokens
    processor = ImageProcessor(56, 14, mm_newline_position=rule.newline)
    assert processor.video_tokens(3) == tokens


@pytest.mark.parametrize("size", [(200, 90), (90, 200), (60, 60)])
def test_views_are_those_of_transformers_processor(size: tuple[int, int], tmp_path: Path) -> None:
    image = PIL.Image.open(tmp_path / picture(tmp_path / "p.png", size))
    ours = ImageProcessor(56, 14, "anyres_max_9", "(1x1),...,(3x3)")
    theirs = LlavaOnevisionImageProcessor(
        size={"height": 56, "width": 56},
        image_grid_pinpoints=[[h, w] for w, h in ours.canvases],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    views = ours.views(image)
    assert views.shape == expected.shape
    # one of 255 steps where their resize rounds otherwise
    torch.testing.assert_close(views, expected, atol=2.1 / 255, rtol=0.0)


def test_pad_centres_on_the_mean_colour(tmp_path: Path) -> None:
    image = PIL.Image.new("RGB", (56, 28), (255, 0, 0))
    views = ImageProcessor(56, 14, "pad").views(image)
    red = views[0, 0]
    assert views.shape == (1, 3, 56, 56)
    # resampling spreads the edge over two pixels
    assert torch.allclose(red[16:40], torch.tensor(1.0), atol=0.1)
    assert torch.allclose(red[:12], torch.tensor(127 / 255 * 2 - 1), atol=0.01)
    assert ImageProcessor(56, 14, "square").views(image)[0, 0].min() == 1.0


def test_pinpoints_come_in_both_spellings_and_unknown_aspects_are_refused() -> None:
    assert ImageProcessor(image_grid_pinpoints=[[384, 768]]).canvases == [(384, 768)]
    assert ImageProcessor(image_grid_pinpoints="[[384, 768]]").canvases == [(384, 768)]
    assert len(ImageProcessor(image_grid_pinpoints=SIX).canvases) == 36
    for wrong in ({"image_aspect_ratio": "highres"}, {"image_grid_pinpoints": "six"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ImageProcessor(**wrong)  # type: ignore[arg-type]


def test_frames_are_chosen_at_equal_distances() -> None:
    paths = [Path(str(i)) for i in range(10)]
    assert sampled_frames(paths, 4) == [0, 3, 6, 9]
    assert sampled_frames(paths, 0) == sampled_frames(paths, 20) == list(range(10))


# ---- manifests


def test_every_kind_of_manifest_is_read(tmp_path: Path) -> None:
    records = [{"id": i, "conversations": turns(str(i))} for i in range(10)]
    written(tmp_path / "a.json", records)
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")

    def ids(path: str, **options: Any) -> list[int]:
        return [r["id"] for r in read_manifest(path, **options)]

    assert ids(str(tmp_path / "a.json")) == ids(str(tmp_path / "b.jsonl")) == list(range(10))
    written(tmp_path / "a2.json", records[:2])
    assert ids(f"{tmp_path}/a{{,2}}.json") == [*range(10), 0, 1]
    lines = ["datasets:"]
    for strategy in ("first:2", "end:10%", "random:25%", "all"):
        lines += ["  - json_path: b.jsonl", f"    sampling_strategy: {strategy}"]
    (tmp_path / "all.yaml").write_text("\n".join(lines[:-1]))
    drawn = ids(str(tmp_path / "all.yaml"), seed=3)
    assert drawn[:3] == [0, 1, 9] and len(set(drawn[3:6])) == 3 and drawn[6:] == list(range(10))
    assert drawn == ids(str(tmp_path / "all.yaml"), seed=3)
    assert drawn != ids(str(tmp_path / "all.yaml"), seed=4)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("x.json", "{", "x.json is damaged"),
        ("x.json", "{}", "without a list"),
        ("x.json", "[3]", "no JSON object"),
        ("x.jsonl", '{"id": 1}\n{', "x.jsonl: line 2 is no JSON"),
        ("x.yaml", "datasets: 3", "expected `datasets:`"),
        ("x.yaml", "datasets: [{}]", "entry 1 of `datasets` has no json_path"),
        ("x.yaml", "datasets: [{json_path: gone.json}]", "gone.json: there is no such file"),
        ("x.yaml", "datasets: [{json_path: x.json, sampling_strategy: some}]", "'some' is unknown"),
    ],
)
def test_a_bad_manifest_is_named(tmp_path: Path, name: str, text: str, reason: str) -> None:
    written(tmp_path / "x.json", [])
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=reason):
        read_manifest(str(tmp_path / name))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": turns("<image>")}, "0 images for 1 <image>"),
        ({"image": "p.png", "conversations": turns("what?")}, "1 images for 0 <image>"),
        ({"image": ["p.png"] * 2, "conversations": turns("<image> a")}, "2 images for 1 <image>"),
        ({"image": "gone.png", "conversations": turns("<image>")}, "no picture .*gone.png"),
        ({"video": "gone", "conversations": turns("<video>")}, "no folder of frames"),
        ({"video": "p.png", "conversations": turns("<video>")}, "video file, which is not decoded"),
        ({"conversations": []}, "no `conversations`"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "from 'bot'"),
        ({"conversations": turns("a")[:1]}, "nothing to learn"),
        ({"conversations": turns("a")[1:]}, "no turn of the assistant"),
        (  # the first turn is left out, and its picture's place with it
            {"image": "p.png", "conversations": [*turns("", "<image>")[1:], *turns("a")]},
            "1 images for 0 <image>",
        ),
        ({"image": "n" * 300, "conversations": turns("<image>")}, "there is no picture"),
        ({"image": ".", "conversations": turns("<image>")}, "there is no picture"),
        ({"conversations": turns("\ud800")}, "surrogates not allowed"),
    ],
)
def test_samples_that_cannot_be_trained_on_are_counted_and_named(
    tmp_path: Path, record: dict[str, Any], reason: str
) -> None:
    picture(tmp_path / "p.png")
    good = {"image": "p.png", "conversations": turns("<image>\nwhat?")}
    path = written(tmp_path / "m.json", [good, {"id": "x7", **record}])
    dataset = LlavaDataset(byte_tokenizer(), DataArguments(data_path=str(path)))
    with pytest.raises(UserError, match=f"1 of 2 samples .*sample 2 .id x7.: .*{reason}"):
        dataset.check()


# ---- conversations


def test_ids_are_those_of_qwens_chat_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
        "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = [("user", "<image>\nwas? <image>"), ("assistant", "zwei\nBlumen"), ("user", "ja")]
    messages = [{"role": role, "content": text} for role, text in talk]
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    image = tokenizer.convert_tokens_to_ids("<image>")
    template = Template(byte_tokenizer(), "qwen_2")
    ids, _ = template.encode(talk)
    assert [image if i == -200 else i for i in ids] == expected
    asked = tokenizer.apply_chat_template(
        messages[:1], return_dict=False, add_generation_prompt=True
    )
    assert [image if i == -200 else i for i in template.prompt(talk[0][1])] == asked


def test_newlines_that_begin_a_text_are_one_token_with_the_roles_as_in_the_original() -> None:
    letters = {t: i for t, i in byte_tokenizer().get_vocab().items() if i < 256}
    special = ["<|im_start|>", "<|im_end|>"]
    merges: Any = [("Ċ", "Ċ")]
    tokenizer = Qwen2Tokenizer(
        vocab={**letters, "ĊĊ": 256}, merges=merges, additional_special_tokens=special
    )
    talk = [("user", "\nA"), ("assistant", "\nB\n\nC")]
    spoken = [("system", "You are a helpful assistant."), *talk]
    whole = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in spoken)
    ids_of: Any = tokenizer.convert_tokens_to_ids
    start, end = ids_of(special)
    for mode, learned in (
        # the original also learns every marker and every newline that is a token of its own
        ("llava", [start, 10, end, 10, start, end, 10, start, *b"assistant", 256, 66, 256, 67]),
        ("assistant_only", [256, 66, 256, 67]),
    ):
        ids, labels = Template(tokenizer, "qwen_2", mode).encode(talk)  # type: ignore[arg-type]
        assert ids == tokenizer.encode(whole, add_special_tokens=False)
        closing = [end, 10] if mode == "llava" else [end]
        assert [label for label in labels if label != -100] == [*learned, *closing]


def test_labels_of_both_modes_are_as_described() -> None:
    tokenizer = byte_tokenizer()
    talk = [("assistant", "dropped"), ("user", "<image>\nA"), ("assistant", "B\nC")]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    newline = 10

    ids, labels = Template(tokenizer, "qwen_1_5", "llava").encode(talk)
    assistant = [start, *b"assistant\n", *b"B\nC", end, newline]
    assert ids[-len(assistant) :] == labels[-len(assistant) :] == assistant
    before = zip(ids[: -len(assistant)], labels[: -len(assistant)], strict=True)
    for token, label in before:
        assert label == (token if token in (start, end, newline) else -100)

    ids, labels = Template(tokenizer, "qwen_1_5", "assistant_only").encode(talk)
    learned = [label for label in labels if label != -100]
    assert learned == [*b"B\nC", end] and labels[-2] == end


def test_plain_learns_the_caption_and_qwen_2_5_has_its_own_system_line() -> None:
    tokenizer = byte_tokenizer()
    talk = [("user", "<image>\nDescribe."), ("assistant", "A dog")]
    assert Template(tokenizer, "plain").encode(talk) == (
        [-200, *b"A dog\n"],
        [-100, *b"A dog\n"],
    )
    tagged = [("user", "<image>"), ("assistant", "A<image> dog")]
    assert Template(tokenizer, "plain").encode(tagged)[0] == [-200, -200, *b"A dog\n"]
    ids, _ = Template(tokenizer, "qwen_2_5").encode(talk)
    assert b"created by Alibaba Cloud" in bytes(i for i in ids if 0 <= i < 256)


def test_a_template_that_is_not_known_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = str(written(tmp_path / "m.json", [{"conversations": turns("a")}]))
    with pytest.raises(UserError, match="version=v1 is no conversation template"):
        LlavaDataset(byte_tokenizer(), DataArguments(data_path=path, version="v1"))
    other = byte_tokenizer()
    other.convert_tokens_to_ids = lambda names: [None for _ in names]
    with pytest.raises(UserError, match="im_start"):
        LlavaDataset(other, DataArguments(data_path=path))


# ---- the data module


def test_the_module_keeps_its_documented_contract(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "f1.png", "f2.png", "f3.png"):
        picture(tmp_path / name)
    records = [
        {"id": "one", "image": "a.png", "conversations": turns("what <image> is it?")},
        {"id": "two", "image": ["a.png", "b.png"], "conversations": turns("<image> or <image>?")},
        {"id": "text", "conversations": turns("hello there")},
        {"id": "film", "video": ["f1.png", "f2.png", "f3.png"], "conversations": turns("<video>?")},
    ]
    path = written(tmp_path / "m.json", records)
    tokenizer = byte_tokenizer()
    processor = ImageProcessor(28, 14, "anyres", "(1x1),...,(2x2)")
    arguments = DataArguments(data_path=str(path), image_processor=processor, frames_upbound=2)
    module = make_supervised_data_module(tokenizer, arguments)
    assert set(module) == {"train_dataset", "eval_dataset", "data_collator"}
    assert module["eval_dataset"] is None
    dataset = module["train_dataset"]
    dataset.check()
    assert list(dataset.list_data_dict) == records
    assert dataset.lengths == [5 + 128, 4 + 128, 3, 2 + 128]
    assert dataset.modality_lengths == [5, 4, -3, 2]
    first = bytes(i for i in dataset[0]["input_ids"].tolist() if 0 <= i < 256).decode()
    assert "user\n\nwhat  is it?" in first  # the image in front, then the newline

    batch = module["data_collator"]([dataset[i] for i in range(4)])
    assert batch["modalities"] == ["image", "image", "image", "text", "video"]
    assert [len(views) for views in batch["images"]] == [5, 1, 1, 1, 2]
    assert batch["image_sizes"][0] == (40, 30)
    assert ((batch["input_ids"] == -200).sum(1)).tolist() == [1, 2, 0, 1]
    lengths = [len(dataset[i]["input_ids"]) for i in range(4)]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["labels"][2, lengths[2] :].eq(-100).all()
    # 40 x 30 on a canvas of 56 x 56: 4 patches, and 4 - 0 rows of 4 + newline
    widths = module["data_collator"].widths(batch)
    assert widths[batch["input_ids"] == -200].tolist() == [4 + 4 * 5, 5, 5, 2 + 1]
    assert widths.sum(1).tolist() == [lengths[0] + 23, lengths[1] + 8, lengths[2], lengths[3] + 2]
    texts = module["data_collator"]([dataset[2]])
    assert "images" not in texts
    tokenizer.model_max_length = 60  # ends in the middle of the question with two images
    cut = module["data_collator"]([dataset[1]])
    places = int((cut["input_ids"] == -200).sum())
    assert cut["input_ids"].shape[1] == 60 and len(cut["images"]) == max(places, 1)
    widths = module["data_collator"].widths(cut)
    assert widths.sum() == 60 and (widths[0, 60 - 4 * places :] == 0).all()


def test_the_time_of_frames_is_told_when_asked_for(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    path = written(tmp_path / "m.json", [{"video": ".", "conversations": turns("<video>\nWhy?")}])
    arguments = DataArguments(str(path), video_fps=2.0, frames_upbound=2, add_time_instruction=True)
    item = LlavaDataset(byte_tokenizer(), arguments)[0]
    text = bytes(i for i in item["input_ids"].tolist() if 0 <= i < 256).decode()
    assert "2.00s long" in text and "0.00s, 1.50s" in text and text.count("Why?") == 1


# ---- orders


def test_grouped_orders_are_permutations_that_keep_modalities_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [(i % 7 + 1) * (1 if i % 3 else -1) for i in range(50)]
    order = by_modality(lengths, 8, 2, generator)
    assert sorted(order) == list(range(50))
    kinds = [lengths[i] > 0 for i in order]
    mixed = [n for n in range(0, 50, 8) if len(set(kinds[n : n + 8])) == 2]
    # 34 images and 16 texts: the last group of each, 2 and 8, comes at the end
    assert all(n >= 40 for n in mixed)
    for batch in (order[n : n + 8] for n in range(0, 40, 8)):
        hands = [sum(abs(lengths[i]) for i in batch[:4]), sum(abs(lengths[i]) for i in batch[4:])]
        assert abs(hands[0] - hands[1]) <= max(abs(lengths[i]) for i in batch)
    by_length = by_length_throughout([abs(n) for n in lengths], 5, generator)
    assert sorted(by_length) == list(range(50))
    for n in range(0, 50, 5):
        batch = [abs(lengths[i]) for i in by_length[n : n + 5]]
        assert max(batch) - min(batch) <= 1


def test_an_order_is_a_function_of_seed_and_epoch() -> None:
    def order(epoch: int, seed: int = 1) -> list[int]:
        sampler = GroupedSampler(
            [1, -2, 3, 4, -5] * 8, "modality_length_auto", batch_size=2, world_size=2, seed=seed
        )
        sampler.set_epoch(epoch)
        assert len(sampler) == 40
        return list(sampler)

    assert order(0) == order(0) != order(1)
    assert order(0) != order(0, seed=2)
    assert sorted(order(3)) == list(range(40))
