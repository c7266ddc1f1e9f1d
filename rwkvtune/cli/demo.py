"""`rwkvtune demo`: a small RWKV-7 trained on a laptop CPU, in minutes."""

from __future__ import annotations

import argparse
from pathlib import Path

DEMOS = {
    "text": "a model of the bundled text",
    "sft": "one that is then fine-tuned to follow small instructions, and checked",
    "lora": "one that is fine-tuned by LoRA, on a packed base, by its state and in full",
    "alternating": "plain, alternating and alternating_cross attention on one visual task",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="rwkvtune demo", description=__doc__.partition(": ")[2], allow_abbrev=False
    )
    about = "; ".join(f"{name}: {what}" for name, what in DEMOS.items())
    parser.add_argument("which", nargs="?", choices=DEMOS, default="text", help=about)
    parser.add_argument(
        "--proj_dir",
        type=Path,
        help="the run folder (default: out/demo, out/demo-sft, ...)",
    )
    args = parser.parse_args(argv)
    if args.which == "sft":
        from rwkvtune.demo.sft import run_sft_demo

        return run_sft_demo(args.proj_dir or Path("out/demo-sft"))
    if args.which == "lora":
        from rwkvtune.demo.lora import run_lora_demo

        return run_lora_demo(args.proj_dir or Path("out/demo-lora"))
    if args.which == "alternating":
        from rwkvtune.demo.alternating import run_alternating_demo

        return run_alternating_demo(args.proj_dir or Path("out/demo-alternating"))
    from rwkvtune.demo.run import run_demo

    return run_demo(args.proj_dir or Path("out/demo"))
