"""python -m shards.build: photos of any source to shards with views, masks, GPS weights and a manifest."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence

from roadwork.cli import Parser, exit_on_user_error
from roadwork.data.build import REJECTED, BuildReport, build
from roadwork.data.describe import describe
from roadwork.data.geo import DEFAULT, Brackets
from roadwork.data.plan import BuildOptions
from roadwork.errors import UserError
from roadwork.monitoring.progress import Progress


def brackets(text: str) -> Brackets:
    """`50:5,200:2.5,500:1,inf:0.3` (km, weight) to Brackets; ArgumentTypeError, which argparse prints, for anything else."""
    try:
        pairs = [(float(km), float(weight)) for km, _, weight in (part.partition(":") for part in text.split(","))]
    except ValueError:
        pairs = []
    if len(pairs) < 2 or pairs[-1][0] != math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; give km:weight,...,inf:weight")
    try:
        return Brackets(tuple(km for km, _ in pairs[:-1]), tuple(weight for _, weight in pairs))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def shard_range(text: str) -> tuple[int, int]:
    """`A:B` to a pair."""
    low, _, high = text.partition(":")
    return int(low), int(high)


def add_weight_options(parser: argparse.ArgumentParser) -> None:
    """Options that build and reweight share."""
    parser.add_argument("--clusters", type=int, default=5, help="clusters of the target region")
    parser.add_argument(
        "--brackets",
        type=brackets,
        default=None,
        metavar="KM:W,...",
        help="weights by distance; none: 50:5,200:2.5,500:1,inf:0.3",
    )
    parser.add_argument(
        "--class-balance",
        choices=("none", "keep", "equal"),
        default=None,
        help="keep: distance weights leave the class prior as it is; equal: draws half and half; none: as they are",
    )
    parser.add_argument("--weight-cap", type=float, default=None, help="largest weight of a photo; 0: none")


def parser() -> Parser:
    """The command line of `shards.build`."""
    p = Parser(prog="python -m shards.build", description=__doc__)
    p.add_argument(
        "--source",
        required=True,
        help="natix (the hub), street[:N] (embedded), csv:FILE, or a folder, glob or URL of parquet",
    )
    p.add_argument(
        "--out",
        required=True,
        help="folder of shards, or a URL that fsspec knows; a build that was killed continues here",
    )
    region = p.add_mutually_exclusive_group()
    region.add_argument(
        "--target-gps", default="", metavar="FILE", help="target region: CSV with the header latitude,longitude"
    )
    region.add_argument("--target-cities", default="", metavar="A,B", help="target region: cities of the records")
    add_weight_options(p)
    _add_sizes(p)
    p.add_argument("--processes", type=int, default=0, help="encoding processes; 0: one per core")
    p.add_argument("--seed", type=int, default=0, help="of the carved splits and of the embedded benchmark")
    p.add_argument("--val-fraction", type=float, default=0.15, help="share of train that becomes val, by group")
    p.add_argument(
        "--test-fraction", type=float, default=0.0, help="share that becomes test where the source has no test split"
    )
    p.add_argument(
        "--masks", default="", metavar="DIR", help="folder of masks <id>.png (and <id>.json) by launch/pseudo_masks.py"
    )
    p.add_argument(
        "--text-encoder",
        default="",
        metavar="NAME",
        help="sentence encoder of the descriptions, for model.metadata_fields with text: minilm, a folder or a hub name; "
        "descriptions tell the label in the public data",
    )
    p.add_argument("--quality", type=int, default=90, help="JPEG quality of the views")
    p.add_argument(
        "--group-near-duplicates",
        action="store_true",
        help="photos that look alike (perceptual hash) count as one group",
    )
    p.add_argument(
        "--shard-range",
        type=shard_range,
        default=None,
        metavar="A:B",
        help="build shards A to B-1 only: many nodes share the work",
    )
    return p


def _add_sizes(p: Parser) -> None:
    """Of views, shards and the data set."""
    p.add_argument("--view-size", type=int, default=512, help="side of a view in pixels, a multiple of 16")
    p.add_argument("--max-views", type=int, default=12, help="views per photo at most")
    p.add_argument(
        "--samples-per-shard", type=int, default=0, help="photos per shard; 0: by the number of photos, at most 256"
    )
    p.add_argument(
        "--max-photos",
        type=int,
        default=0,
        metavar="N",
        help="a sample of about N photos for a first look, each published split in its share, the test split, too; 0: all",
    )


def options_of(args: argparse.Namespace) -> BuildOptions:
    """Parsed arguments as BuildOptions."""
    values = vars(args) | {
        "target_cities": [city.strip() for city in args.target_cities.split(",") if city.strip()],
        "brackets": args.brackets or DEFAULT,
        "class_balance": args.class_balance or "none",
        "weight_cap": args.weight_cap or 0.0,
    }
    return BuildOptions(**values)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Build, show progress, and print what came out."""
    options = options_of(parser().parse_args(argv))
    started = time.monotonic()
    with Lines() as lines:
        report = build(options, lines.show)
    tell(report, options, time.monotonic() - started)
    return 0


class Lines:
    """One progress line with rate and time left per stage: drawing, encoding."""

    def __init__(self) -> None:
        self.lines: dict[str, Progress] = {}

    def show(self, stage: str, done: int, kept: int, total: int) -> None:
        """As roadwork.data.build.Progress."""
        if stage not in self.lines:
            self.lines[stage] = Progress(stage, total, start=done)  # its rate is that of what comes from now on
        line = self.lines[stage]
        line.update(done, done - line.step, {"kept": kept} if kept else {})

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        for line in self.lines.values():
            line.__exit__(*exc)


def tell(report: BuildReport, options: BuildOptions, seconds: float) -> None:
    """Print the outcome."""
    rate = f", encoding {report.encoded / report.encode_s:.1f} photos/s" if report.encoded else ""
    print(f"{report.encoded} photos encoded, {report.kept} kept from before, {seconds:.1f} s{rate}")
    if report.manifest is None:
        print("a range of shards was built; run without --shard-range to complete the folder")
        return
    if report.unchanged:
        print(f"{options.out} is complete and unchanged")
    print(describe(report.manifest))
    if report.manifest["records"]["rejected"]:
        print(f"rejected records, each with its reason: {options.out}/{REJECTED}")


if __name__ == "__main__":
    sys.exit(main())
