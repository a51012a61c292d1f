"""What is chosen on held-out groups: weights, temperatures, calibrations, and which system answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from roadwork.config import Config
from roadwork.data.index import ShardIndex
from roadwork.evaluation.metrics import finite_or_none
from roadwork.inference import foods
from roadwork.inference.collect import Answers
from roadwork.inference.ensemble import HeldOut, System, assess, choose, choose_weights, compare, scores
from roadwork.inference.members import PRETRAINED, SOUP, Members


@dataclass
class Plan:
    """How members and augmentations become one log-odds; everything in it was chosen on held-out groups.

    network_single_view: held-out scores of the one network on a single centred 224 px view, as it is calibrated for all views.
    """

    member_weights: np.ndarray
    temperature: float
    systems: dict[str, System]
    chosen: str
    network: str
    network_system: System
    network_single_view: dict[str, Any]
    details: dict[str, Any]


def held_out(val: Answers | None, train: ShardIndex, config: Config) -> HeldOut:
    """Labelled, readable val photos, and the priors: of the training draws (weights move it) and of use."""
    keep = np.zeros(0, bool) if val is None else usable(val)
    labels = np.zeros(0, np.int64) if val is None else val.labels[keep]
    groups = np.zeros(0, str) if val is None else val.groups[keep]
    return HeldOut(
        labels, groups, config.predict.prior, prior_of_draws(train, config), config.predict.bootstrap, config.seed
    )


def usable(answers: Answers) -> np.ndarray:
    """bool [N]: photos with a label and pixels."""
    known: np.ndarray = (answers.labels >= 0) & answers.readable
    return known


def prior_of_draws(train: ShardIndex, config: Config) -> float:
    """Share of positives among labelled training DRAWS: GPS weights move it away from the share among photos."""
    labels = np.asarray(train.label)
    weights = np.asarray(train.gps_weight, np.float64) if config.data.gps_weighted else np.ones(len(labels))
    known = labels >= 0
    total = float(weights[known].sum())
    return float(weights[known & (labels == 1)].sum() / total) if total > 0 else 0.5


def make_plan(members: Members, val: Answers | None, truth: HeldOut, config: Config) -> Plan:
    """Fit and choose everything on held-out groups; without any, defaults that are stated as such."""
    if val is None:
        number = len(members.names)
        many = 1 if config.predict.tta == "off" else config.predict.num_augmentations
        log_odds, image_only = np.zeros((0, many, number)), np.zeros((0, number))
        single_view = image_only
        selection = foods.Selection(np.ones((0, many), bool), np.zeros((0, many))) if many > 1 else None
    else:
        kept = val.rows(usable(val))
        assert kept.single_view is not None, "held-out answers come with those on a single view"
        log_odds, image_only, single_view = kept.log_odds, kept.image_only, kept.single_view
        selection = select(kept, config)
    details: dict[str, Any] = {"held_out": describe_held_out(truth), "members": members.names}
    member_weights, temperature, choices = fit_mixture(log_odds, selection, members.folds, truth)
    details |= choices
    systems = assess_systems(log_odds, selection, members.folds, truth, member_weights, temperature)
    chosen = decide(systems, truth, config, details)
    network, network_system = choose_network(members, image_only, truth, chosen, details)
    column = members.names.index(network)
    alone = scores(truth.cross_fitted(image_only[:, column], applied=single_view[:, column]), truth)
    details["network"]["single_view_224"] = alone
    details["systems"] = {name: system.figures for name, system in systems.items()}
    details["chosen"] = chosen
    return Plan(member_weights, temperature, systems, chosen, network, network_system, alone, details)


def fit_mixture(
    log_odds: np.ndarray, selection: foods.Selection | None, folds: list[int], truth: HeldOut
) -> tuple[np.ndarray, float, dict[str, Any]]:
    """Weights [M] of all members (0 but for `folds`) and the votes' temperature, chosen on all of `truth`'s photos."""
    share, weighting = choose_weights(log_odds[:, 0, folds], truth)
    member_weights = np.zeros(log_odds.shape[-1])
    member_weights[folds] = share
    temperature = float("inf")
    table: list[tuple[float, float]] = []
    if selection is not None and len(truth.labels):
        temperature, table = foods.fit_temperature(selection, log_odds[:, :, 0], truth.loss)
    losses = [[finite_or_none(t), finite_or_none(loss)] for t, loss in table]
    choices = {"weighting": weighting, "tta_temperature": {"used": finite_or_none(temperature), "log_loss": losses}}
    return member_weights, temperature, choices


def assess_systems(
    log_odds: np.ndarray, selection: foods.Selection | None, folds: list[int], truth: HeldOut,
    member_weights: np.ndarray, temperature: float,
) -> dict[str, System]:  # fmt: skip
    """Every system as it is deployed (weights and temperature from all photos), judged by what is fitted without the
    photo's group: weights, temperature and calibration alike. Otherwise a mixture that fits noise would seem to help.

    log_odds [N,A,M] of N held-out photos, A augmentations and M members; member_weights [M]; temperature of the votes.
    """
    refitted: dict[bytes, dict[str, np.ndarray]] = {}  # once per part of the groups, for all systems

    def refit(name: str, rows: np.ndarray) -> np.ndarray:
        key = rows.tobytes()
        if key not in refitted:
            some = None if selection is None else selection.rows(rows)
            weights, votes, _ = fit_mixture(log_odds[rows], some, folds, truth.part(rows))
            refitted[key] = system_log_odds(log_odds, selection, weights, votes)
        return refitted[key][name]

    odds = system_log_odds(log_odds, selection, member_weights, temperature)
    return {
        name: assess(name, value, truth, None if name == PRETRAINED else partial(refit, name))
        for name, value in odds.items()
    }


def select(answers: Answers, config: Config) -> foods.Selection | None:
    """What FOODS keeps of each photo; None with one augmentation."""
    options = config.predict
    if answers.distances is None:
        return None
    return foods.select(answers.distances, options.filter, options.keep, options.keep_ratio)


def system_log_odds(
    log_odds: np.ndarray, selection: foods.Selection | None, member_weights: np.ndarray, temperature: float
) -> dict[str, np.ndarray]:
    """Uncalibrated log-odds [N] of every system that there is: pretrained and ensemble, plain and with TTA."""
    plain = log_odds[:, 0]
    found = {PRETRAINED: plain[:, 0]}
    several = np.count_nonzero(member_weights) > 1
    if several:
        found["ensemble"] = plain @ member_weights
    if selection is not None:
        voted = foods.combine(log_odds, foods.weights(selection, temperature))
        found["pretrained_tta"] = voted[:, 0]
        if several:
            found["ensemble_tta"] = voted @ member_weights
    return found


def decide(systems: dict[str, System], truth: HeldOut, config: Config, details: dict[str, Any]) -> str:
    """Name of the system to answer with: TTA first, then the ensemble on top of what that gave."""
    chosen = PRETRAINED
    for name, mode, missing in (
        ("tta", config.predict.tta, "there is one augmentation"),
        ("ensemble", config.predict.ensemble, "there are no folds"),
    ):
        reason = "not asked for" if mode == "off" else missing
        details[name] = {"used": False, "mode": mode, "reason": reason}
    if "pretrained_tta" in systems:
        details["tta"] = choose(systems[chosen], systems["pretrained_tta"], config.predict.tta, truth)
        chosen = "pretrained_tta" if details["tta"]["used"] else chosen
    better = chosen.replace(PRETRAINED, "ensemble")
    if better in systems:
        details["ensemble"] = choose(systems[chosen], systems[better], config.predict.ensemble, truth)
        chosen = better if details["ensemble"]["used"] else chosen
    return chosen


def choose_network(
    members: Members, image_only: np.ndarray, truth: HeldOut, chosen: str, details: dict[str, Any]
) -> tuple[str, System]:
    """The ONE network of model/, judged as it will be used: pixels alone, no TTA.

    The folds' average takes the pre-trained network's place only where the ensemble was chosen and the average is not
    worse on held-out groups. image_only: log-odds [N,M].
    """
    pretrained = assess(PRETRAINED, image_only[:, 0], truth)
    details["network"] = {PRETRAINED: pretrained.figures}
    name, system = PRETRAINED, pretrained
    if SOUP in members.names:
        soup = assess(SOUP, image_only[:, members.names.index(SOUP)], truth)
        paired = compare(pretrained, soup, truth)
        details["network"] |= {SOUP: soup.figures, "difference": [finite_or_none(value) for value in paired]}
        if chosen.startswith("ensemble") and not paired.difference < 0:
            name, system = SOUP, soup
    details["network"]["chosen"] = name
    return name, system


def describe_held_out(truth: HeldOut) -> dict[str, Any]:
    """What the held-out figures were measured on."""
    return {
        "split": "val",
        "photos": len(truth.labels),
        "positives": int(np.sum(truth.labels == 1)),
        "groups": len(np.unique(truth.groups)),
        "prior_of_use": truth.prior,
        "prior_of_draws": truth.source_prior,
        "resamples": truth.resamples,
    }
