"""The photographs of `benchmarks.photographs`: `python -m benchmarks.photograph_set DIR` writes DIR/photos.csv.

DIR holds clones of the public repositories in `SOURCES` (`git clone https://github.com/OWNER/NAME` there). A photo is
positive where the repository's own annotation marks a traffic cone, or where the repository is of work zones only. Left out
are files that do not decode, shots before a white background, which are no street photos, and what `LEFT_OUT` names, by
looking at every photo. The photos are their owners'.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from roadwork.data.images import decode_photo
from roadwork.data.record import Rejected

IMAGES = {".jpg", ".jpeg", ".png"}
WHITE, BORDER = 225, 0.6
"""A shot before a white background: more than this part of the outermost twentieth is brighter than that in each channel."""


class Source(NamedTuple):
    """One repository.

    Attributes:
        name: OWNER/NAME.
        images: folders of photos.
        annotations: what in a photo's path gives way to what in its annotation's (text, a line per box); None: there is none.
        positive: classes that make a photo positive; None: every photo is.
        refused: classes whose photos are left out: a barricade may be roadwork or not.
        every: one photo is taken of so many, in the order of their paths.
    """

    name: str
    images: tuple[str, ...]
    annotations: tuple[str, str] | None
    positive: frozenset[str] | None
    refused: frozenset[str] = frozenset()
    every: int = 1


CONES = frozenset({"0"})
SOURCES = (
    Source("ikatsamenis/Cone-Detection", ("TraCon_dataset/images",), ("/images/", "/labels/"), CONES),
    Source("99succubus/road_cone-detection-improved", ("data/images",), ("/images/", "/labels/"), CONES),
    Source("VTTI/Segmentation-and-detection-of-work-zone-scenes", ("data/test",), None, None),
    Source(
        "vsh9705/indian-road-obstacle-detection-dataset", ("images/test", "images/val"), ("/images/", "/annotations/"),
        frozenset(), refused=frozenset({"3"}), every=2,
    ),
)  # fmt: skip
LEFT_OUT = {
    "TraCon_dataset/images/train/imh_116_00000000.jpg": "rollers at work, no cone",
    "TraCon_dataset/images/train/imh_215_00000000.jpg": "a roller at work, no cone",
    "data/images/road_cone_085.jpg": "cones that are not annotated",
    "images/test/img_041.jpg": "cones that are not annotated",
}
"""Photos whose annotation does not say whether there is roadwork: path in the repository -> why."""


def photos(source: Source, clone: Path) -> Iterator[tuple[Path, int]]:
    """(path, label) of a repository's photos, sorted by path."""
    found = sorted(p for folder in source.images for p in (clone / folder).rglob("*") if p.suffix.lower() in IMAGES)
    for path in found[:: source.every]:
        classes = annotated(source, path)
        if classes is None or classes & source.refused or path.relative_to(clone).as_posix() in LEFT_OUT:
            continue
        if is_street(path):
            yield path, int(source.positive is None or bool(classes & source.positive))


def annotated(source: Source, path: Path) -> set[str] | None:
    """Classes of a photo's boxes; None: it has no annotation."""
    if source.annotations is None:
        return set()
    before, behind = path.as_posix().rsplit(source.annotations[0], 1)
    note = Path(f"{before}{source.annotations[1]}{behind}").with_suffix(".txt")
    return {line.split()[0] for line in note.read_text().splitlines() if line.strip()} if note.is_file() else None


def is_street(path: Path) -> bool:
    """Whether a file is a photo and has no white border."""
    try:
        rgb, _ = decode_photo(path.read_bytes())
    except Rejected:
        return False
    height, width = (max(1, side // 20) for side in rgb.shape[:2])
    sides = (rgb[:height], rgb[-height:], rgb[:, :width], rgb[:, -width:])
    border = np.concatenate([side.reshape(-1, 3) for side in sides])
    return bool((border.min(1) > WHITE).mean() <= BORDER)


def main(argv: list[str] | None = None) -> int:
    """Write the list and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path, help="folder with a clone of each repository")
    folder = parser.parse_args(argv).clones
    for source in SOURCES:
        if not (folder / source.name.split("/")[1]).is_dir():
            parser.error(f"{folder} has no clone of {source.name}; git clone https://github.com/{source.name} there")
    rows = []
    for source in SOURCES:
        clone = folder / source.name.split("/")[1]
        mine = [(path.relative_to(folder).as_posix(), label) for path, label in photos(source, clone)]
        commit = subprocess.run(
            ["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        positives = sum(label for _, label in mine)
        print(f"{source.name} at {commit or '?'}: {positives} with roadwork, {len(mine) - positives} without")
        rows += mine
    with (folder / "photos.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
