"""`python -m shards.masks DIR --masks MASKS`: new masks for built shards, in place and atomically."""

from __future__ import annotations

from roadwork.cli import Parser, exit_on_user_error
from roadwork.labelling.update import Keep, update_masks


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parse, update, say what changed."""
    parser = Parser(prog="python -m shards.masks", description=__doc__)
    parser.add_argument("shards", metavar="DIR", help="folder of shards")
    parser.add_argument("--masks", required=True, metavar="MASKS", help="folder that launch/pseudo_masks.py wrote")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--missing-only", action="store_true", help="leave photos alone that have masks already")
    kept.add_argument(
        "--keep-real", action="store_true", help="leave masks alone that people drew, unless the new ones are drawn too"
    )
    options = parser.parse_args(argv)
    keep: Keep = "all" if options.missing_only else "real" if options.keep_real else "none"
    done = update_masks(options.shards, options.masks, keep)
    print(
        f"{options.shards}: {done.changed} of {done.samples} photos got new masks, {done.kept} keep theirs, "
        f"{done.without} have none, {done.shards} shards were written again"
    )


if __name__ == "__main__":
    raise SystemExit(main())
