"""The simulated standing of a network in the live challenge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from roadwork.config import Config
from roadwork.data.index import ShardIndex
from roadwork.engine import Engine
from roadwork.evaluation import challenge
from roadwork.evaluation.photos import Photos
from roadwork.models import RoadworkDetector

ROUNDS = 1000
CHUNK = 32
"""Questions that a process asks between two chances to stop."""


def synthetic_half(config: Config) -> tuple[list[Path], npt.NDArray[np.int64]] | None:
    """Paths and labels of predict.challenge_synthetic, None without one. UserError where it cannot be used."""
    place = config.predict.challenge_synthetic
    return challenge.read_synthetic(place) if place else None


def challenge_standing(
    network: RoadworkDetector, config: Config, engine: Engine, index: ShardIndex, rounds: int = ROUNDS
) -> dict[str, Any] | None:
    """The network's standing on the split's labelled photos and the generated half, questions shared out. Collective.

    None without a labelled photo. Photos are stitched from the views, at most 1280 px wide. Pixels alone, and whatever
    is asked has 224 px: this IS the image-only figure. Without a generated half it says 'real half only'.
    """
    rows = np.flatnonzero(np.asarray(index.label) >= 0)
    if not len(rows):
        return None
    sources, labels = halves(config, index, rows)
    questions, answers = asked(network, engine, sources, labels, rounds, config.seed)
    groups, bootstrap = np.asarray(index.group)[rows], config.predict.bootstrap
    return challenge.standing(answers, questions, groups, len(rows), len(sources) > 1, bootstrap, config.seed)


def halves(
    config: Config, index: ShardIndex, rows: npt.NDArray[np.int64]
) -> tuple[list[Sequence[Any]], list[npt.NDArray[Any]]]:
    """Pictures and labels of the real half (labelled rows of the index) and, where there is one, the generated half."""
    generated = synthetic_half(config)
    sources: list[Sequence[Any]] = [Photos(index, rows)]
    labels: list[npt.NDArray[Any]] = [np.asarray(index.label)[rows]]
    if generated is not None:
        sources.append(generated[0])
        labels.append(generated[1])
    return sources, labels


def asked(
    network: RoadworkDetector,
    engine: Engine,
    sources: Sequence[Any],
    labels: Sequence[Any],
    rounds: int,
    seed: int,
    go_on: Callable[[], None] = lambda: None,
) -> tuple[list[challenge.Challenge], npt.NDArray[np.float64]]:
    """Questions drawn from the `halves`, and the network's answers [rounds]. Collective: the questions are shared out.

    Args:
        go_on: called before every CHUNK questions, as often on every rank; what it raises ends the asking.
    """
    questions = challenge.draw_challenges(labels, rounds, seed)
    mine = list(enumerate(questions))[engine.rank :: engine.world_size]
    answers: list[float] = []
    for first in range(0, math.ceil(rounds / engine.world_size), CHUNK):
        go_on()
        answers += challenge.ask(network.predict_batch, mine[first : first + CHUNK], sources, seed).tolist()
    pairs = [(number, p) for (number, _), p in zip(mine, answers, strict=True)]
    return questions, np.asarray([p for _, p in sorted(engine.gather_object(pairs))])


def standing_words(standing: dict[str, Any]) -> str:
    """One line for a terminal."""
    low, high = standing["reward_interval"]
    return (
        f"challenge ({standing['what']}): MCC {standing['mcc']:.3f}, accuracy {standing['accuracy']:.3f}, "
        f"reward {standing['reward']:.3f} ({low:.3f} to {high:.3f})"
    )
