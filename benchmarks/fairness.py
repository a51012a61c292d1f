"""Is the embedded street benchmark a fair small model of the problem? `python -m benchmarks.fairness [--json]`

Gates, all measured on the same held-out test groups:
(a) a logistic regression on a 512-bin colour histogram stays under MCC 0.35: colour alone does not tell;
(b) a plain timm net on one downscaled view of the whole photo stays at least 0.10 MCC below the same net, with the same
    frozen features, classifier and maximum over views, on the tiles: small objects need tiles;
(c) a classifier on the metadata that the model may see (GPS, weather, day time, scene) is reported: to be beaten.
Sizes of objects and numbers of look-alikes are stated. The last line is one JSON object. The exit status is 1 where a gate
does not hold, but for `--out`, which leaves the verdict to the report that shows the file.
"""

import argparse
import json
import multiprocessing
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchvision.transforms import v2

from roadwork.data.street import MASK_CLASSES, Photo, draw
from roadwork.models.weights import LITE0, create, load, plan

HISTOGRAM_LIMIT = 0.35
GAP_LIMIT = 0.10
SLIVER = 60
"""Pixels of roadwork from which a view counts as showing roadwork."""


@dataclass
class Drawn:
    """What the gates need of one photo."""

    label: int
    split: str
    group: str
    histogram: np.ndarray
    row: dict[str, Any]
    objects: tuple[tuple[str, int | None, float, int], ...]
    views: np.ndarray
    """uint8 [9, S, S, 3]: the whole photo, 2 x 4 tiles."""
    pixels: np.ndarray
    """[9] pixels of roadwork in each view."""


def view_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The whole photo, then 2 x 4 tiles of half its height: 9 of the trainer's 12 views (without the 3 squares)."""
    boxes, side = [(0, 0, width, height)], height // 2
    for y in (0, height - side):
        boxes += [(x, y, x + side, y + side) for x in np.linspace(0, width - side, 4).round().astype(int)]
    return boxes


def _prepare(job: tuple[int, int, int]) -> Drawn:
    index, seed, size = job
    cv2.setNumThreads(1)
    photo: Photo = draw(index, seed)
    _, jpeg = cv2.imencode(".jpg", photo.rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    rgb = np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR))[..., ::-1].copy()
    boxes = view_boxes(rgb.shape[1], rgb.shape[0])
    views = np.stack(
        [cv2.resize(rgb[y0:y1, x0:x1], (size, size), interpolation=cv2.INTER_AREA) for x0, y0, x1, y1 in boxes]
    )
    pixels = np.array([np.count_nonzero(photo.masks[y0:y1, x0:x1]) for x0, y0, x1, y1 in boxes])
    bins = (rgb // 32).astype(np.int64)
    code = bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]
    histogram = np.bincount(code.ravel(), minlength=512) / code.size
    row = photo.row
    return Drawn(row["label"], photo.split, row["video_info.vid_id"], histogram, row, photo.objects, views, pixels)


def draw_all(photos: int, seed: int, size: int, processes: int) -> list[Drawn]:
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return list(pool.imap(_prepare, [(i, seed, size) for i in range(photos)], chunksize=12))


def histogram_mcc(train: list[Drawn], test: list[Drawn]) -> float:
    """MCC of the best of several regularisations (chosen in the histogram's favour, on test): an upper bound."""
    x, y = np.sqrt([d.histogram for d in train]), np.array([d.label for d in train])
    x_test, y_test = np.sqrt([d.histogram for d in test]), np.array([d.label for d in test])
    scaler = StandardScaler().fit(x)
    best = 0.0
    for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        model = LogisticRegression(C=c, class_weight="balanced", max_iter=2000).fit(scaler.transform(x), y)
        best = max(best, float(matthews_corrcoef(y_test, model.predict(scaler.transform(x_test)))))
    return best


def _metadata(drawn: Drawn) -> list[float]:
    gps = json.loads(drawn.row["gps"]) if drawn.row["gps"] else [np.nan, np.nan]
    tags = [drawn.row[f"scene_level_tags.{name}"] for name in ("weather", "daytime", "scene_environment")]
    words = (
        "Sunny",
        "Partly Cloudy",
        "Cloudy",
        "Rain",
        "Snow",
        "Fog",
        "Light",
        "Twilight",
        "Dark",
        "Urban",
        "Suburban",
        "Highway",
        "Rural",
    )
    return [*gps, *(float(any(word in tag for tag in tags)) for word in words)]


def metadata_mcc(train: list[Drawn], test: list[Drawn]) -> float:
    x, y = np.array([_metadata(d) for d in train]), np.array([d.label for d in train])
    x_test, y_test = np.array([_metadata(d) for d in test]), np.array([d.label for d in test])
    best = 0.0
    for leaf in (2, 8, 24):
        model = RandomForestClassifier(300, min_samples_leaf=leaf, class_weight="balanced", random_state=0).fit(x, y)
        best = max(best, float(matthews_corrcoef(y_test, model.predict(x_test))))
    return best


def pretrained_lite0() -> nn.Module:
    """Pixels float32 [N, 3, S, S] in [0, 1] -> features [N, 1280]: the net that the trainer starts from.

    Weights, input scale and batch-norm epsilon are those of `roadwork.models.weights`, so that what is compared with the
    trainer has the very same start.
    """
    recipe = plan(LITE0, "auto")
    net = create(recipe, view_size=224)
    load(net, recipe, "auto")
    whole: nn.Module = nn.Sequential(v2.Normalize(recipe.mean, recipe.std), net)
    return whole.eval().to(memory_format=torch.channels_last)


def features(net: nn.Module, drawn: list[Drawn]) -> Tensor:
    """float32 [photos, views, 1280]."""
    out = []
    with torch.inference_mode():
        for start in range(0, len(drawn), 8):
            pixels = torch.from_numpy(np.stack([d.views for d in drawn[start : start + 8]]))
            x = (pixels.float() / 255).flatten(0, 1).permute(0, 3, 1, 2)
            out.append(net(x).reshape(*pixels.shape[:2], -1))
    return torch.cat(out)


def _balanced_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The score with the best MCC when both classes weigh the same (the test split's prior)."""
    weight = np.where(labels == 1, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    candidates = np.quantile(scores, np.linspace(0.02, 0.98, 97))
    values = [matthews_corrcoef(labels, scores >= c, sample_weight=weight) for c in candidates]
    best = np.flatnonzero(np.asarray(values) >= max(values) - 0.01)
    return float(candidates[best].mean())


def probe(x: Tensor, pixels: np.ndarray, y: np.ndarray, groups: np.ndarray, x_test: Tensor) -> np.ndarray:
    """Scores of the test photos, positive = roadwork: a logistic regression on frozen features judges each view, the
    photo gets the maximum over its views.

    `x` [n, views, width] with `pixels` [n, views] of roadwork in each view (from the masks: a view's own label);
    `x_test` [m, views, width]. The threshold comes from held-out folds of the training videos; nothing is chosen on
    test. With one view this is the plain classifier of that view.
    """
    scaler = StandardScaler().fit(x.flatten(0, 1).numpy())
    seen, unseen = (scaler.transform(part.flatten(0, 1).numpy()).reshape(part.shape) for part in (x, x_test))
    # a sliver of an object at a view's edge is neither roadwork nor its absence
    clear, target = (pixels == 0) | (pixels >= SLIVER), (pixels >= SLIVER).astype(int)

    def fitted(rows: np.ndarray) -> LogisticRegression:
        model = LogisticRegression(C=1e-3, class_weight="balanced", max_iter=200)
        return model.fit(seen[rows][clear[rows]], target[rows][clear[rows]])

    def judged(model: LogisticRegression, part: np.ndarray) -> np.ndarray:
        scores: np.ndarray = model.decision_function(part.reshape(-1, part.shape[-1])).reshape(part.shape[:2]).max(1)
        return scores

    held_out = np.zeros(len(y))
    for rows, rest in StratifiedGroupKFold(4, shuffle=True, random_state=0).split(y, y, groups):
        held_out[rest] = judged(fitted(rows), seen[rest])
    return judged(fitted(np.arange(len(y))), unseen) - _balanced_threshold(y, held_out)


def census(drawn: list[Drawn]) -> dict[str, Any]:
    """Heights of roadwork objects in px of the photo, and look-alikes per photo."""
    heights = np.array([o[2] for d in drawn for o in d.objects if o[1] is not None])
    per_class = {
        name: [round(float(q)) for q in np.quantile(found, (0.1, 0.5, 0.9))]
        for k, name in enumerate(MASK_CLASSES)
        if len(found := [o[2] for d in drawn for o in d.objects if o[1] == k])
    }
    like = [sum(o[1] is None and not o[0].startswith("car_") for o in d.objects) for d in drawn]
    labels = np.array([d.label for d in drawn])
    return {
        "object_height_px_quantiles_10_50_90": [round(float(q)) for q in np.quantile(heights, (0.1, 0.5, 0.9))],
        "object_height_px_by_class": per_class,
        "objects_per_positive": round(len(heights) / max(1, int(labels.sum())), 2),
        "lookalikes_per_positive": round(float(np.mean([n for n, y in zip(like, labels, strict=True) if y])), 2),
        "lookalikes_per_negative": round(float(np.mean([n for n, y in zip(like, labels, strict=True) if not y])), 2),
    }


def measure(photos: int, seed: int, size: int, net: nn.Module, processes: int, probes: bool) -> dict[str, Any]:
    start = time.perf_counter()
    drawn = draw_all(photos, seed, size, processes)
    drawing = time.perf_counter() - start
    train, test = ([d for d in drawn if d.split == s] for s in ("train", "test"))
    y, y_test = (np.array([d.label for d in part]) for part in (train, test))
    result: dict[str, Any] = {
        "seed": seed, "train": len(train), "test": len(test), "test_groups": len({d.group for d in test}),
        "prior_train": round(float(y.mean()), 3), "prior_test": round(float(y_test.mean()), 3),
        "drawing_s": round(drawing, 1),
        "histogram_mcc": round(histogram_mcc(train, test), 3), "metadata_mcc": round(metadata_mcc(train, test), 3),
    }  # fmt: skip
    if probes:
        start = time.perf_counter()
        seen, unseen = features(net, train), features(net, test)
        pixels, groups = np.stack([d.pixels for d in train]), np.array([d.group for d in train])
        result["features_s"] = round(time.perf_counter() - start, 1)
        for name, part in (("global", slice(0, 1)), ("tiles", slice(1, None))):
            scores = probe(seen[:, part], pixels[:, part], y, groups, unseen[:, part])
            result[f"{name}_auc"] = round(float(roc_auc_score(y_test, scores)), 3)
            result[f"{name}_mcc"] = round(float(matthews_corrcoef(y_test, scores >= 0)), 3)
    return {**result, **census(drawn)}


def contact_sheet(path: Path, seed: int = 0) -> None:
    """Twelve photos of one seed, one per video, as one JPEG under 300 KB."""
    chosen = [draw(i, seed).rgb for i in range(0, 120, 10)]
    small = [cv2.resize(rgb, (480, 270), interpolation=cv2.INTER_AREA) for rgb in chosen]
    sheet = np.vstack([np.hstack(small[i : i + 3]) for i in range(0, 12, 3)])
    path.parent.mkdir(parents=True, exist_ok=True)
    for quality in range(88, 20, -6):
        _, jpeg = cv2.imencode(".jpg", sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        if len(jpeg) < 300_000:
            break
    path.write_bytes(jpeg.tobytes())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--photos", type=int, default=640, help="photos per seed, both splits")
    parser.add_argument("--seeds", type=int, default=1, help="how many benchmarks are drawn and measured")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128, help="side of a view, px")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--threads", type=int, help="of the net; 1 on a busy machine (default: as --processes)")
    parser.add_argument("--no-probes", action="store_true", help="only histogram, metadata and census")
    parser.add_argument("--out", type=Path, help="write the JSON here too: the pipeline's RUN/fairness.json")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of twelve photos here and stop")
    options = parser.parse_args(argv)
    if options.sheet is not None:
        contact_sheet(options.sheet, options.first_seed)
        return 0
    torch.set_num_threads(options.threads or options.processes)
    net = pretrained_lite0()
    runs = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        runs.append(measure(options.photos, seed, options.size, net, options.processes, not options.no_probes))
        if not options.json:
            print(json.dumps(runs[-1]))
    keys = [k for k in ("histogram_mcc", "metadata_mcc", "tiles_mcc", "global_mcc") if k in runs[0]]
    summary: dict[str, Any] = {k: round(float(np.mean([r[k] for r in runs])), 3) for k in keys}
    summary["gate_histogram"] = summary["histogram_mcc"] < HISTOGRAM_LIMIT
    if {"tiles_mcc", "global_mcc"} <= summary.keys():
        summary["gap"] = round(summary["tiles_mcc"] - summary["global_mcc"], 3)
        summary["gate_tiles"] = summary["gap"] >= GAP_LIMIT
    gates = [v for k, v in summary.items() if k.startswith("gate_")]
    line = json.dumps(
        {"benchmark": "fairness", "size": options.size, "photos": options.photos, **summary, "runs": runs}
    )
    print(line)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(line + "\n")
        return 0
    return 0 if all(gates) else 1


if __name__ == "__main__":
    sys.exit(main())
