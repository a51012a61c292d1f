"""Choices on held-out groups: what helps is used, what does not is not, and forcing is obeyed."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import logit

from roadwork.config import Config
from roadwork.inference.calibration import group_cross_fit
from roadwork.inference.collect import Answers
from roadwork.inference.ensemble import HeldOut, assess, choose_weights, member_weights
from roadwork.inference.members import Members
from roadwork.inference.plan import make_plan, system_log_odds


def truth(n: int = 400, prior: float = 0.8) -> HeldOut:
    rng = np.random.default_rng(0)
    groups = (np.arange(n) // 4).astype(str)
    labels = np.repeat((rng.random(-(-n // 4)) < prior).astype(int), 4)[:n]
    return HeldOut(labels, groups, 0.5, prior, 200, 0)


def noisy(held_out: HeldOut, spread: float, seed: int) -> np.ndarray:
    """Log-odds right under the training prior, but for noise."""
    noise = np.random.default_rng(seed).normal(0, spread, len(held_out.labels))
    return np.where(held_out.labels == 1, 2.0, -2.0) + noise + logit(held_out.source_prior)


def answers(held_out: HeldOut, log_odds: np.ndarray, distances: np.ndarray | None) -> Answers:
    n = len(held_out.labels)
    ids = [str(i) for i in range(n)]
    readable = np.ones(n, bool)
    alone = log_odds[:, 0]
    return Answers(ids, held_out.labels, held_out.groups, log_odds, alone, alone, distances, readable)


def members(*names: str) -> Members:
    return Members(None, list(names), [{} for _ in names], [False] * len(names), {})  # type: ignore[arg-type]


def config(**options) -> Config:
    made = Config()
    for name, value in options.items():
        setattr(made.predict, name, value)
    return made


@pytest.mark.parametrize(("mode", "reason"), [("auto", "there are no folds"), ("off", "not asked for")])
def test_what_is_not_there_is_said_under_the_mode_that_was_asked_for(mode, reason):
    held_out = truth(40)
    alone = answers(held_out, noisy(held_out, 1.0, 1)[:, None, None], None)
    details = make_plan(members("pretrained"), alone, held_out, config(ensemble=mode)).details
    assert details["ensemble"] == {"used": False, "mode": mode, "reason": reason}
    assert details["tta"] == {"used": False, "mode": "auto", "reason": "there is one augmentation"}


def test_the_single_view_is_judged_under_the_calibration_of_all_views():
    held_out = truth()
    odds = noisy(held_out, 1.0, 1)[:, None, None]
    found = answers(held_out, odds, None)
    found.single_view = found.image_only - 8.0  # a calibration of its own would take this back
    plan = make_plan(members("pretrained"), found, held_out, config())
    assert plan.network_system.figures["after"]["mcc"] > 0.9
    assert abs(plan.network_single_view["mcc"]) < 0.1
    assert plan.details["network"]["single_view_224"] == plan.network_single_view


def test_an_ensemble_that_helps_is_used_and_one_that_does_not_is_not():
    held_out = truth()
    weak = noisy(held_out, 4.0, 1)
    strong = np.stack([weak] + [noisy(held_out, 1.0, seed) for seed in (2, 3, 4)] + [weak], axis=1)[:, None]
    names = members("pretrained", "fold-0", "fold-1", "fold-2", "soup")
    good = make_plan(names, answers(held_out, strong, None), held_out, config())
    assert good.chosen == "ensemble"
    assert good.details["ensemble"]["low"] > 0
    assert good.member_weights[-1] == 0.0, "the soup is a network of its own, not a member"
    assert good.member_weights.sum() == pytest.approx(1.0)
    same = np.repeat(noisy(held_out, 1.0, 2)[:, None, None], 5, axis=2)
    idle = make_plan(names, answers(held_out, same, None), held_out, config())
    assert idle.chosen == "pretrained"
    forced = make_plan(names, answers(held_out, same, None), held_out, config(ensemble="on"))
    assert forced.chosen == "ensemble"
    refused = make_plan(names, answers(held_out, strong, None), held_out, config(ensemble="off"))
    assert refused.chosen == "pretrained"


def test_tta_is_used_only_where_the_whole_interval_says_so():
    held_out = truth()
    n = len(held_out.labels)
    log_odds = np.stack([noisy(held_out, 4.0, seed) for seed in range(6)], axis=1)[..., None]
    near = np.full((n, 6, 4), 0.5)
    helpful = make_plan(members("pretrained"), answers(held_out, log_odds, near), held_out, config())
    assert helpful.chosen == "pretrained_tta"
    assert (
        helpful.systems["pretrained_tta"].figures["after"]["mcc"]
        > helpful.systems["pretrained"].figures["after"]["mcc"]
    )
    far = near.copy()
    far[:, 1:] = 3.0
    filtered = make_plan(members("pretrained"), answers(held_out, log_odds, far), held_out, config())
    assert filtered.chosen == "pretrained"
    assert np.array_equal(filtered.systems["pretrained_tta"].probability, filtered.systems["pretrained"].probability)


def test_calibration_mends_a_shifted_prior_at_threshold_one_half():
    held_out = truth()
    figures = assess("pretrained", 2.0 * noisy(held_out, 1.6, 5), held_out).figures
    assert figures["after"]["mcc"] > figures["before"]["mcc"]
    assert figures["after"]["ece"] < figures["before"]["ece"]
    assert figures["after"]["log_loss"] < figures["before"]["log_loss"]
    low, high = figures["after"]["mcc_interval"]
    assert low < figures["after"]["mcc"] < high


def test_member_weights_prefer_the_better_member_and_stay_plain_without_evidence():
    held_out = truth()
    two = np.stack([noisy(held_out, 1.0, 1), noisy(held_out, 8.0, 2)], axis=1)
    fitted = member_weights(two, held_out)
    assert fitted[0] > 0.8
    share, details = choose_weights(two, held_out)
    assert details["used"]
    assert share == pytest.approx(fitted)
    equal, details = choose_weights(np.repeat(two[:, :1], 3, axis=1), held_out)
    assert not details["used"]
    assert equal == pytest.approx([1 / 3] * 3)


FOLDS = ("pretrained", "fold-0", "fold-1", "fold-2")


def test_a_photo_is_judged_by_nothing_that_its_own_group_chose():
    """Weights, temperature and calibration are fitted without it: turning its group's labels round changes nothing."""
    held_out = truth(120, 0.5)
    rng = np.random.default_rng(3)
    log_odds = np.stack([noisy(held_out, spread, i) for i, spread in enumerate((3.0, 0.5, 6.0, 6.0))], axis=1)[:, None]
    log_odds = log_odds + rng.normal(0, 4, (120, 5, 4)) * (np.arange(5) > 0)[None, :, None]
    val = answers(held_out, log_odds, rng.uniform(0, 0.9, (120, 5, 4)))
    judged: list[np.ndarray] = []
    group_cross_fit(lambda inside: lambda outside: judged.append(outside) or outside, held_out.groups)
    before = make_plan(members(*FOLDS), val, held_out, config())
    assert before.details["weighting"]["used"] and len(before.systems) == 4
    turned = held_out.labels.copy()
    turned[judged[0]] = 1 - turned[judged[0]]
    after = make_plan(members(*FOLDS), val, replace(held_out, labels=turned), config())
    assert not np.allclose(after.member_weights, before.member_weights), "what is deployed is fitted on all photos"
    for name, system in before.systems.items():
        assert np.array_equal(after.systems[name].probability[judged[0]], system.probability[judged[0]]), name


def test_members_and_augmentations_that_only_add_noise_are_hardly_ever_used():
    used = {"tta": 0, "ensemble": 0}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        labels = np.repeat(rng.permutation(24) % 2, 2)
        held_out = HeldOut(labels, (np.arange(48) // 2).astype(str), 0.5, 0.5, 100, seed)
        base = (2 * labels - 1) * 0.7 + rng.normal(0, 2, 48)
        log_odds = base[:, None, None] + rng.normal(0, 2, (48, 4, 4))
        log_odds[:, 0, 0] = base
        val = answers(held_out, log_odds, rng.uniform(0, 0.9, (48, 4, 4)))
        plan = make_plan(members(*FOLDS), val, held_out, config())
        used = {name: count + plan.details[name]["used"] for name, count in used.items()}
    assert max(used.values()) <= 1, used


@pytest.mark.parametrize("label", [None, 1])
def test_without_labels_or_with_one_class_the_defaults_are_stated(label):
    n = 0 if label is None else 12
    held_out = HeldOut(np.ones(n, int), np.arange(n).astype(str), 0.5, 0.8, 50, 0)
    log_odds = np.random.default_rng(0).normal(size=(n, 2, 3))
    val = None if label is None else answers(held_out, log_odds, np.full((n, 2, 4), 0.5))
    plan = make_plan(members("pretrained", "fold-0", "soup"), val, held_out, config())
    assert plan.chosen == "pretrained"
    assert plan.network == "pretrained"
    figures = plan.systems["pretrained"].figures
    assert not figures["fitted"]
    assert figures["bias"] == figures["analytic_bias"] == pytest.approx(-np.log(4))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("options", "chosen", "tta"),
    [
        ({}, "pretrained", True),
        ({"tta": "on"}, "pretrained_tta", True),
        ({"tta": "on", "ensemble": "on"}, "ensemble_tta", True),
        ({"tta": "off"}, "pretrained", False),
        ({"num_augmentations": 1}, "pretrained", False),
    ],
)
def test_without_held_out_photos_every_system_that_is_computed_is_there(options, chosen, tta):
    nobody = HeldOut(np.zeros(0, np.int64), np.zeros(0, str), 0.5, 0.8, 50, 0)
    plan = make_plan(members("pretrained", "fold-0", "soup"), None, nobody, config(**options))
    assert plan.chosen == chosen
    assert set(plan.systems) == {"pretrained", "ensemble"} | ({"pretrained_tta", "ensemble_tta"} if tta else set())
    assert plan.details["tta"]["used"] == chosen.endswith("_tta")
    assert ("reason" in plan.details["tta"]) != tta


def test_systems_are_what_their_names_say():
    log_odds = np.random.default_rng(0).normal(size=(5, 1, 3))
    found = system_log_odds(log_odds, None, np.array([0.5, 0.5, 0.0]), float("inf"))
    assert set(found) == {"pretrained", "ensemble"}
    assert np.array_equal(found["pretrained"], log_odds[:, 0, 0])
    assert found["ensemble"] == pytest.approx(log_odds[:, 0, :2].mean(1))
