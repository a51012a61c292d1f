"""The service's live challenge, replicated: its distribution of pictures and its scoring, seeded.

Written from the public behaviour of the StreetVision subnet (natixnetwork/streetvision-subnet): one 224 x 224 JPEG and
nothing else, labels drawn half and half, one of four levels of degradation, answers rounded at 0.5, reward from the
last 100 and the last 10 answers. Its synthetic half needs generated pictures; where none are given every result says
'real half only'.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from roadwork.errors import UserError
from roadwork.evaluation import metrics

Picture = npt.NDArray[np.uint8]

SIZE = 224
LEVELS = 4
ROTATION_DEGREES = 20.0
CROP_AREA = (0.2, 1.0)
SATURATION = (1.0, 0.4, 0.3)
DIMMING = (1.0, 0.85, 0.725)
RESAMPLING = (1, 2, 3)
NOISE_VARIANCE = (0.0, 0.001, 0.002)
BLUR_KERNEL = (0, 7, 9)
JPEG_QUALITY = 75
"""Pillow's default, with which the picture is sent."""

HALVES = {False: "real half only", True: "real and synthetic halves"}
"""What a figure was measured on, by whether a synthetic half was given."""

LONG_WINDOW, SHORT_WINDOW, POWER, SMOOTHING = 100, 10, 3.0, 0.05
NO_ANSWER = -1.0


# --- pictures -------------------------------------------------------------------------------------------------------


def centre_square(photo: Picture, size: int = SIZE) -> Picture:
    """Level 0: the largest centred square, resized. uint8 [H, W, 3] -> uint8 [size, size, 3]."""
    height, width = photo.shape[:2]
    side = min(height, width)
    top, left = round((height - side) / 2.0), round((width - side) / 2.0)
    return _resized(photo[top : top + side, left : left + side], size)


def _resized(photo: Picture, size: int) -> Picture:
    return np.asarray(Image.fromarray(np.ascontiguousarray(photo)).resize((size, size), Image.Resampling.BILINEAR))


def rotated(photo: Picture, degrees: float) -> Picture:
    """uint8 [H, W, 3] turned counter-clockwise about the centre, same frame, nearest neighbour, black corners."""
    height, width = photo.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    turned = cv2.warpAffine(photo, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=(0, 0, 0))
    return np.asarray(turned, dtype=np.uint8)


def square_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """(top, left, side) of a square of CROP_AREA of the photo: ten tries, else the centred largest square."""
    for _ in range(10):
        side = round(math.sqrt(rng.uniform(*CROP_AREA) * height * width))
        if 0 < side <= min(height, width):
            return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), side
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side


def desaturated(photo: Picture, factor: float) -> Picture:
    """uint8 [H, W, 3] with its chroma times `factor` around the luma (BT.601)."""
    pixels = photo.astype(np.float32)
    luma = (pixels @ np.asarray([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
    return np.asarray(np.clip(luma + factor * (pixels - luma), 0, 255), dtype=np.uint8)


def dimmed(photo: Picture, factor: float) -> Picture:
    """uint8 [H, W, 3] with every value times `factor`, at most 1: what the service calls contrast."""
    return np.asarray(photo.astype(np.float32) * factor, dtype=np.uint8)


def resampled(photo: Picture, factor: int) -> Picture:
    """uint8 [H, W, 3] down by `factor` without smoothing and up again, bilinear: what the service calls JPEG."""
    height, width = photo.shape[:2]
    small = cv2.resize(photo, (width // factor, height // factor))
    return np.asarray(cv2.resize(small, (width, height)), dtype=np.uint8)


def noisy(photo: Picture, variance: float, rng: np.random.Generator) -> Picture:
    """uint8 [H, W, 3] with Gaussian noise of that variance (of 1) on luma and chroma in studio range, so 255/219 and
    255/224 larger in full.
    """
    noise = rng.standard_normal((*photo.shape[:2], 3)) * math.sqrt(variance) * 255.0
    luma, red, blue = noise[..., 0] * 255 / 219, noise[..., 1] * 255 / 224, noise[..., 2] * 255 / 224
    added = np.stack([luma + 1.403 * red, luma - 0.714 * red - 0.344 * blue, luma + 1.773 * blue], axis=-1)
    return np.asarray(np.clip(photo + added, 0, 255), dtype=np.uint8)


def blurred(photo: Picture, kernel: int) -> Picture:
    """uint8 [H, W, 3] under a Gaussian of that odd kernel size in pixels, with sigma kernel / 6."""
    return np.asarray(cv2.GaussianBlur(photo, (kernel, kernel), kernel / 6.0), dtype=np.uint8)


def jpeg(photo: Picture, quality: int = JPEG_QUALITY) -> bytes:
    """The bytes of uint8 [H, W, 3] that are sent."""
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def degrade(photo: Picture, level: int, rng: np.random.Generator, size: int = SIZE) -> Picture:
    """A photo as the service sends it, before JPEG. uint8 [H, W, 3] of any size -> uint8 [size, size, 3].

    Level 0: centred square. 1: rotation up to 20 degrees, square crop of 0.2 to 1 of the area. 2: also saturation,
    dimming and resampling, each at severity 0 or 1. 3: the same at severity 0 to 2, then noise and blur at 0 to 2.
    There are no flips: the service's own code never performs them. ValueError for another level, shape or type.
    """
    if not 0 <= level < LEVELS:
        raise ValueError(f"level must be 0 to {LEVELS - 1}, got {level}")
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        raise ValueError(f"expected uint8 [H, W, 3], got {photo.dtype} {photo.shape}")
    if level == 0:
        return centre_square(photo, size)
    turned = rotated(photo, float(rng.uniform(-ROTATION_DEGREES, ROTATION_DEGREES)))
    top, left, side = square_crop(photo.shape[0], photo.shape[1], rng)
    result = _resized(turned[top : top + side, left : left + side], size)
    if level == 1:
        return result
    colour, contrast, grain = (int(s) for s in rng.integers(level, size=3))  # severity 0..1 at level 2, 0..2 at level 3
    result = desaturated(result, SATURATION[colour]) if colour else result
    result = dimmed(result, DIMMING[contrast]) if contrast else result
    result = resampled(result, RESAMPLING[grain]) if grain else result
    if level == 3:
        speckle, blur = (int(s) for s in rng.integers(3, size=2))
        result = noisy(result, NOISE_VARIANCE[speckle], rng) if speckle else result
        result = blurred(result, BLUR_KERNEL[blur]) if blur else result
    return result


# --- scoring --------------------------------------------------------------------------------------------------------


def window_mcc(predictions: Any, labels: Any) -> float:
    """max(0, MCC) of the rounded answers; unanswered ones (-1) are left out; 0 where one class, or nothing, is left."""
    answers, truth = _answered(predictions, labels)
    if len(np.unique(truth)) < 2:
        return 0.0
    if np.isin(answers, (0, 1)).all():
        return max(0.0, metrics.mcc(metrics.confusion(truth, answers)))
    from sklearn.metrics import matthews_corrcoef  # answers such as 2 are a class of their own there

    return max(0.0, float(matthews_corrcoef(truth, answers.astype(np.int64))))


def window_accuracy(predictions: Any, labels: Any) -> float:
    """Share of right rounded answers among those that were given; 0 where none was."""
    answers, truth = _answered(predictions, labels)
    return float((answers == truth).mean()) if len(truth) else 0.0


def _answered(predictions: Any, labels: Any) -> tuple[Any, Any]:
    values, truth = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    given = values != NO_ANSWER
    return np.round(values[given]), truth[given]


def reward(predictions: Any, labels: Any) -> float:
    """Reward after the LAST of these answers: (0.5 MCC of the last 100 + 0.5 accuracy of the last 10) cubed.

    predictions, labels [N] in order of time. 0 where the last prediction is -1 (no answer) or outside [0, 1]; answers
    of that kind also take a place in the windows.
    """
    if len(predictions) == 0 or not 0.0 <= float(predictions[-1]) <= 1.0:
        return 0.0
    mcc = window_mcc(predictions[-LONG_WINDOW:], labels[-LONG_WINDOW:])
    accuracy = window_accuracy(predictions[-SHORT_WINDOW:], labels[-SHORT_WINDOW:])
    cubed: float = (0.5 * mcc + 0.5 * accuracy) ** POWER
    return cubed


def rewards(predictions: Any, labels: Any) -> Any:
    """Reward after each answer, [N] float64."""
    return np.asarray([reward(predictions[: i + 1], labels[: i + 1]) for i in range(len(predictions))])


def moving_score(values: Any, smoothing: float = SMOOTHING, start: float = 0.0) -> float:
    """The exponentially smoothed score that emissions follow: s <- smoothing * reward + (1 - smoothing) * s."""
    score = start
    for value in values:
        score = smoothing * float(value) + (1 - smoothing) * score
    return score


# --- a simulated standing -------------------------------------------------------------------------------------------


class Challenge(NamedTuple):
    """One question: which picture of which source, its label, and the level of degradation."""

    source: int
    photo: int
    label: int
    level: int


def draw_challenges(labels: Sequence[Any], rounds: int, seed: int) -> list[Challenge]:
    """`rounds` questions: label half and half, source half and half where there are two, picture and level uniform.

    labels: one array of 0/1 per source (real first, then synthetic). A label without pictures in a source is asked from
    the other one; a label without pictures anywhere is never asked. UserError without any label.
    """
    pools = [[np.flatnonzero(np.asarray(source) == label) for label in (0, 1)] for source in labels]
    known = [label for label in (0, 1) if any(len(pool[label]) for pool in pools)]
    if not known:
        raise UserError("the challenge needs labelled pictures, and none of those given has a label of 0 or 1")
    rng = np.random.default_rng([seed, 0xC4A11])
    questions = []
    for _ in range(rounds):
        label = known[int(rng.integers(len(known)))]
        sources = [s for s, pool in enumerate(pools) if len(pool[label])]
        source = sources[int(rng.integers(len(sources)))]
        photo = int(rng.choice(pools[source][label]))
        questions.append(Challenge(source, photo, label, int(rng.integers(LEVELS))))
    return questions


def read_synthetic(place: str | Path) -> tuple[list[Path], npt.NDArray[np.int64]]:
    """Generated pictures -> N paths and their labels int64 [N].

    place: a folder with 0/* (no roadwork) and 1/* (roadwork), or a CSV with the header path,label, paths relative to it.
    Raises UserError where there is no picture, a label is neither 0 nor 1, or a picture is missing.
    """
    place = Path(place)
    if place.suffix.lower() == ".csv" and place.is_file():
        return _listed(place)
    found = [
        (path, label)
        for label in (0, 1)
        for path in sorted((place / str(label)).glob("*"))
        if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    ]
    if not found:
        raise UserError(f"no synthetic pictures in {place}; expected {place}/0/*.jpg and {place}/1/*.jpg, or a CSV")
    return [path for path, _ in found], np.asarray([label for _, label in found], dtype=np.int64)


def _listed(file: Path) -> tuple[list[Path], npt.NDArray[np.int64]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not a CSV in UTF-8 ({error})") from error
    if not rows or not {"path", "label"} <= set(rows[0]):
        raise UserError(f"{file} holds no synthetic pictures; expected the header path,label and a line per picture")
    paths = [file.parent / (row["path"] or "") for row in rows]
    for row, path in zip(rows, paths, strict=True):
        if row["label"] not in ("0", "1"):
            raise UserError(f"{file}: label {row['label']!r} of {row['path']}; give 0 (no roadwork) or 1 (roadwork)")
        if not path.is_file():
            raise UserError(f"{file}: {path} is not a file; paths are relative to the CSV")
    return paths, np.asarray([int(row["label"]) for row in rows], dtype=np.int64)


def open_picture(picture: Any) -> Picture:
    """uint8 [H, W, 3] of an array, a PIL image, bytes, a path, or uint8 [3, H, W]; UserError for an unreadable file."""
    if isinstance(picture, np.ndarray):
        if picture.ndim == 3 and picture.shape[0] == 3 and picture.shape[2] != 3:
            picture = picture.transpose(1, 2, 0)
        return np.ascontiguousarray(picture)
    if isinstance(picture, str | Path):
        try:
            return open_picture(Image.open(picture))
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"picture {picture} cannot be read: {error}; remove or replace it") from error
    if isinstance(picture, bytes):
        picture = Image.open(io.BytesIO(picture))
    return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


Predict = Callable[[list[Picture]], Any]


def ask(
    predict_fn: Predict, questions: Sequence[tuple[int, Challenge]], sources: Sequence[Any], seed: int, batch: int = 32
) -> npt.NDArray[np.float64]:
    """Answers [N] to numbered questions: pictures degraded, sent through JPEG, predicted in batches; nan and None are
    -1.

    predict_fn: list of uint8 [224, 224, 3] -> probabilities, one each. The degradation depends on (seed, number)
    alone, so processes may share the questions out in any way. ValueError for another number of answers.
    """
    answers: list[float] = []
    for chunk in _chunks(list(questions), batch):
        pictures = []
        for number, question in chunk:
            photo = open_picture(sources[question.source][question.photo])
            sent = jpeg(degrade(photo, question.level, np.random.default_rng([seed, number])))
            pictures.append(open_picture(sent))
        given = list(np.asarray(predict_fn(pictures), dtype=object).reshape(-1))
        if len(given) != len(pictures):
            raise ValueError(f"predict_fn gave {len(given)} answers to {len(pictures)} pictures")
        answers += [NO_ANSWER if p is None or not math.isfinite(float(p)) else float(p) for p in given]
    return np.asarray(answers)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def simulated_rewards(predictions: Any, labels: Any, groups: Any, n: int, seed: int) -> Any:
    """Rewards [n] of moments at which the windows are full, each from 100 answers drawn from resampled groups."""
    rng = np.random.default_rng(seed)
    codes = metrics.group_codes(groups, len(labels))
    members = [np.flatnonzero(codes == g) for g in range(int(codes.max()) + 1)]
    values = np.empty(n)
    for k in range(n):
        pool = np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])
        rows = rng.choice(pool, size=LONG_WINDOW)
        values[k] = reward(predictions[rows], labels[rows])
    return values


def score_challenge(
    predict_fn: Predict,
    images: Sequence[Any],
    labels: Any,
    seed: int = 0,
    rounds: int = 1000,
    groups: Any = None,
    synthetic: tuple[Sequence[Any], Any] | None = None,
    batch: int = 32,
    bootstrap: int = 1000,
) -> dict[str, Any]:
    """A simulated standing, JSON-able: MCC with interval over groups, accuracy, by level, reward with its spread.

    images: photos (anything that `open_picture` takes), labels [N] in {0, 1}, groups [N] names (videos). synthetic: the
    generated half as (pictures, labels). Keys: see `standing`.
    """
    questions = draw_challenges([labels, *([synthetic[1]] if synthetic else [])], rounds, seed)
    sources = [images, *([synthetic[0]] if synthetic else [])]
    answers = ask(predict_fn, list(enumerate(questions)), sources, seed, batch)
    return standing(answers, questions, groups, len(images), len(sources) > 1, bootstrap, seed)


def standing(
    answers: Any, questions: Sequence[Challenge], groups: Any, photos: int, synthetic: bool, bootstrap: int, seed: int
) -> dict[str, Any]:
    """What a sequence of answers is worth. groups [photos]: of the real photos.

    `reward` is the mean over simulated moments with full windows and `reward_interval` the range of a single moment;
    `score` is the smoothed one at the end of this very sequence. ValueError where answers are not [questions].
    """
    answers = np.asarray(answers, dtype=np.float64)
    if answers.shape != (len(questions),):
        raise ValueError(f"expected {len(questions)} answers, one per question, got shape {answers.shape}")
    truth = np.asarray([q.label for q in questions])
    real = metrics.group_codes(groups, photos)
    names = np.asarray(
        [f"real {real[q.photo]}" if q.source == 0 else f"synthetic {q.photo}" for q in questions], object
    )
    valid = (answers >= 0) & (answers <= 1)
    low, high = metrics.group_bootstrap(truth[valid], answers[valid], names[valid], "mcc", bootstrap, seed)
    moments = simulated_rewards(answers, truth, names, bootstrap, seed)
    levels = np.asarray([q.level for q in questions])
    return {
        "what": HALVES[synthetic],
        "rounds": len(questions),
        "seed": seed,
        "photos": photos,
        "groups": len(np.unique(names)),
        "labels": sorted(int(label) for label in np.unique(truth)),
        "no_answer": int((answers == NO_ANSWER).sum()),
        "out_of_range": int((~valid & (answers != NO_ANSWER)).sum()),
        "mcc": metrics.mcc(metrics.confusion(truth[valid], answers[valid])),
        "mcc_interval": None if math.isnan(low) else [low, high],
        "accuracy": window_accuracy(answers, truth),
        "reward": float(moments.mean()),
        "reward_interval": [float(q) for q in np.quantile(moments, [0.025, 0.975])],
        "score": moving_score(rewards(answers, truth)),
        "levels": [_level(answers, truth, levels == level, level) for level in range(LEVELS)],
    }


def _level(answers: Any, truth: Any, rows: Any, level: int) -> dict[str, Any]:
    inside = rows & (answers >= 0) & (answers <= 1)
    return {
        "level": level,
        "n": int(rows.sum()),
        "mcc": metrics.mcc(metrics.confusion(truth[inside], answers[inside])),
        "accuracy": window_accuracy(answers[rows], truth[rows]),
    }
