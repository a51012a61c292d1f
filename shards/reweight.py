"""python -m shards.reweight DIR --target-gps FILE: a new target region without re-encoding.

Only the index and the manifest change, in one rename; the JSON inside the tars keeps the weight of the build.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from roadwork.cli import Parser, exit_on_user_error
from roadwork.data.describe import describe
from roadwork.data.reweight import reweight
from shards.build import add_weight_options


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Reweight and print what changed."""
    p = Parser(prog="python -m shards.reweight", description=__doc__)
    p.add_argument("dir", metavar="DIR", help="folder of shards")
    p.add_argument("--target-gps", required=True, metavar="FILE", help="CSV with the header latitude,longitude")
    add_weight_options(p)
    args = p.parse_args(argv)
    print(
        describe(reweight(args.dir, args.target_gps, args.clusters, args.brackets, args.class_balance, args.weight_cap))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
