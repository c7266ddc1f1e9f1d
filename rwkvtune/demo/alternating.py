"""Base, alternating and alternating_cross trained from one tiny backbone on the synthetic
correspondence task with the same budget, and compared, whatever comes out.

Nothing here is more than `rwkvtune alternating sweep` does. Run again, it goes on where it was
stopped, or shows the table again.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

TRAIN, TEST = 6000, 400
STEPS, BATCH = 400, 48

DECODER: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    # 1/sqrt(64): Qwen2's 0.02 is for layers a hundred times as wide, and would hardly learn here.
    "initializer_range": 0.125,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TRAINING: dict[str, Any] = {
    "label_mode": "assistant_only",
    "mm_tunable_parts": "mm_mlp_adapter,mm_vision_tower,mm_language_model",
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 30,
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "logging_steps": 50,
    "save_steps": 100,
    "save_total_limit": 1,
    "throughput_log_steps": 100,
}


def run_alternating_demo(folder: Path) -> int:
    """Make the backbone and the task in `folder`, train the three, print the table; the exit
    code."""
    from rwkvtune.demo.correspondence import write_task
    from rwkvtune.evaluation.alternating import read_questions
    from rwkvtune.training.alternating_config import AlternatingSettings
    from rwkvtune.training.alternating_sweep import cells_of, run_cell, table

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # not used, but imported
    began = time.perf_counter()
    train_path, test_path = write_task(folder / "task", train=TRAIN, test=TEST)
    backbone = _backbone(folder / "backbone")
    print(f"{TRAIN} samples to train on, {TEST} questions to answer, chance is 25 %")
    settings = AlternatingSettings.from_flat(
        {"model_name_or_path": str(backbone), "data_path": str(train_path), **TRAINING}
    )
    questions = read_questions(test_path)
    results = []
    for cell in cells_of(("base", "alternating", "alternating_cross"), ()):
        print(f"== {cell.variant}", flush=True)
        result = run_cell(cell, settings, questions, folder / cell.name, say=print)
        if isinstance(result, int):
            return result
        print(f"accuracy {result.accuracy}")
        results.append(result)
    print(f"\nThe same weights to begin with, {STEPS} steps of {BATCH} samples each:\n")
    print(table(results))
    print(f"\n{time.perf_counter() - began:.0f} s; everything is in {folder}")
    return 0


def _backbone(folder: Path) -> Path:
    """A fresh tiny LLaVA-OneVision, made once."""
    import torch

    from rwkvtune.inference.alternating import export
    from rwkvtune.models.alternating.build import config_of, empty_model
    from rwkvtune.models.alternating.tokenizer import byte_tokenizer

    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    config = config_of(
        {**DECODER, "mm_vision_tower": "tiny", "image_aspect_ratio": "pad"},
        "base",
        tower=TOWER,
        tower_name="tiny",
        llava={},
        mask_settings={},
    )
    model = empty_model(config, attention=None, dtype=torch.float32, initial_values=True)
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save_pretrained(folder)
    export(model, folder, "llava")
    return folder
