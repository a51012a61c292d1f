"""python -m shards.describe DIR [--json]: counts, prior, coverage, weights and audits of a folder of shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from roadwork.cli import Parser, exit_on_user_error
from roadwork.data.describe import describe
from roadwork.data.index import read_manifest


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Print the manifest in words, or as one JSON object."""
    p = Parser(prog="python -m shards.describe", description=__doc__)
    p.add_argument("dir", metavar="DIR", help="folder of shards")
    p.add_argument("--json", action="store_true", help="one JSON object on one line")
    args = p.parse_args(argv)
    manifest = read_manifest(args.dir)
    print(json.dumps(manifest, allow_nan=False) if args.json else describe(manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
