"""python -m shards.verify DIR: exit 0 where every byte and count agrees; else 1, each fault named on its own line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from roadwork.cli import Parser, exit_on_user_error
from roadwork.data.index import read_manifest, rebuild_index
from roadwork.data.verify import verify


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Verify, or make the index again from the tars."""
    p = Parser(prog="python -m shards.verify", description=__doc__)
    p.add_argument("dir", metavar="DIR", help="folder of shards, or a URL that fsspec knows")
    p.add_argument("--pixels", action="store_true", help="also decode every photo and mask")
    p.add_argument("--rebuild", action="store_true", help="first make index and manifest again from the tars alone")
    args = p.parse_args(argv)
    if args.rebuild:
        rebuild_index(args.dir)
    faults = verify(args.dir, args.pixels)
    for fault in faults:
        print(fault)
    if faults:
        print(f"{len(faults)} faults in {args.dir}")
        return 1
    manifest = read_manifest(args.dir)
    photos = sum(line["count"] for line in manifest["shards"])
    print(f"{args.dir}: {len(manifest['shards'])} shards, {photos} photos, no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
