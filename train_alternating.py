"""Train LLaVA-OneVision or Qwen2 with alternating attention (`python train_alternating.py -h`)."""

from rwkvtune.cli.main import run_door

if __name__ == "__main__":
    raise SystemExit(run_door("alternating_train"))
