"""`rwkvtune report`: one or several runs side by side, as a PNG and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from rwkvtune.cli.arguments import OneLineParser

DEFAULT_SHARE = "0.05"


def main(argv: list[str]) -> int:
    parser = OneLineParser(
        "rwkvtune report",
        "Draw runs side by side: losses, learning rate, gradient norm, speed, and gradient\n"
        "norms and decays of each layer.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or its metrics.csv")
    parser.add_argument(
        "--output",
        help="where to write OUTPUT.png and OUTPUT.html (default: report in the folder of a single "
        "run, in the working folder for several)",
    )
    parser.add_argument(
        "--smooth",
        type=float,
        default=float(DEFAULT_SHARE),
        metavar="SHARE",
        help="width of the smoothing window as a share of the run, 0 = as logged (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--x",
        choices=("step", "tokens", "seconds"),
        default="step",
        help="what the curves are drawn over (default: %(default)s)",
    )
    args = parser.parse_args(with_default_share(argv))
    from rwkvtune.training.report import write_report  # matplotlib: half a second

    png, html = write_report(args.runs, args.output, x=args.x, share=args.smooth)
    print(f"wrote {png} and {html}")
    return 0


def with_default_share(argv: Sequence[str]) -> list[str]:
    """A bare `--smooth` before a RUN, an option or nothing means the default width."""
    args: list[str] = []
    for i, arg in enumerate(argv):
        args.append(arg)
        if arg == "--smooth" and not _is_number("".join(argv[i + 1 : i + 2])):
            args.append(DEFAULT_SHARE)
    return args


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
