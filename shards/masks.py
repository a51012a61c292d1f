"""`python -m shards.masks DIR --masks MASKS`: new masks for built shards, in place and atomically."""

from __future__ import annotations

from roadwork.cli import Parser, exit_on_user_error
from roadwork.labelling.update import update_masks


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parse, update, say what changed."""
    parser = Parser(prog="python -m shards.masks", description=__doc__)
    parser.add_argument("shards", metavar="DIR", help="folder of shards")
    parser.add_argument("--masks", required=True, metavar="MASKS", help="folder that launch/pseudo_masks.py wrote")
    parser.add_argument("--missing-only", action="store_true", help="leave photos alone that have masks already")
    options = parser.parse_args(argv)
    done = update_masks(options.shards, options.masks, options.missing_only)
    print(
        f"{options.shards}: {done.changed} of {done.samples} photos got new masks, {done.without} have none, "
        f"{done.shards} shards were written again"
    )


if __name__ == "__main__":
    raise SystemExit(main())
