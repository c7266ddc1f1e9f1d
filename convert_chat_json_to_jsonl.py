"""The published converter from LLaVA's chat.json to chat.jsonl."""

from rwkvtune.cli.main import run_door

if __name__ == "__main__":
    raise SystemExit(run_door("convert_chat"))
