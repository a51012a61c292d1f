"""The ablation's runs are real options, its claims are read off real runs, and an interrupted night goes on."""

import json

import numpy as np
import pytest
import yaml

from benchmarks import ablation
from benchmarks.ablation_variants import BASE, CLAIMS, ENSEMBLE, FOLDS, NETWORK, TTA, VARIANTS
from benchmarks.results import newest
from roadwork.command_line import parse
from roadwork.config import to_dict

SIZE = ablation.Size(photos=40, view_size=64, epochs=1, max_steps=2, folds=2, augmentations=2)


def test_each_variant_switches_one_option_and_no_more():
    plain = to_dict(parse("pretrain", ["--config", "launch/configs/demo.yaml"]).config)
    words = [word for name in VARIANTS for word in VARIANTS[name]]
    assert [len(VARIANTS[name]) for name in VARIANTS] == [0] + [1] * (len(VARIANTS) - 1)
    together = to_dict(parse("pretrain", ["--config", "launch/configs/demo.yaml", *words]).config)
    differing = [
        f"{s}.{k}" for s in plain if isinstance(plain[s], dict) for k in plain[s] if plain[s][k] != together[s][k]
    ]
    assert sorted(differing) == sorted(word.removeprefix("--").partition("=")[0] for word in words)


def test_every_run_is_read_by_a_claim_and_every_contract_name_is_there():
    assert {side.variant for c in CLAIMS for side in (c.with_it, c.without)} == set(VARIANTS)
    assert {c.name for c in CLAIMS} >= {"gps_weights", "augmentation", "ema", "dora", "tta", "ensemble", "pruning"}
    assert all(BASE in (c.with_it.variant, c.without.variant) for c in CLAIMS)


def answers(folder, variant, seed, size=SIZE):
    """A stored answer file with more noise where a component is missing."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, 120)

    def answer(noise):
        return (1 / (1 + np.exp(-(2 * label - 1 + noise * rng.normal(size=len(label)))))).tolist()

    systems = {NETWORK: [answer(0.8 if variant == BASE else 2.5)]}
    if variant == BASE:
        systems |= {FOLDS: [answer(0.8), answer(0.8)], ENSEMBLE: [answer(0.6)], TTA: [answer(0.8)]}
    made = {
        "variant": variant, "seed": seed, **ablation.made_with(variant, size),
        "id": [f"{seed}-{k}" for k in range(len(label))], "label": label.tolist(),
        "group": [f"{seed}-{k // 3}" for k in range(len(label))], "systems": systems,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{variant}-seed-{seed}.json").write_text(json.dumps(made))


def test_finished_runs_are_kept_and_compared(tmp_path, capsys, monkeypatch):
    """With every answer there nothing is launched; the last line holds a row with an interval for every claim."""
    for variant in VARIANTS:
        for seed in (ablation.FIRST_SEED, ablation.FIRST_SEED + 1):
            answers(tmp_path / "answers", variant, seed)
    monkeypatch.setattr(ablation, "QUICK", SIZE)
    words = ["--quick", "--seeds", "2", "--out", str(tmp_path), "--resamples", "200", "--json"]
    assert ablation.main(words) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [row["name"] for row in result["rows"]] == [claim.name for claim in CLAIMS]
    assert all(row["low"] <= row["value"] <= row["high"] and row["seeds"] == 2 for row in result["rows"])
    assert result["rows"][0]["verdict"] == "helps" and result["test_photos"] == 240 and result["test_groups"] == 80


def test_answers_of_another_size_are_refused(tmp_path):
    answers(tmp_path / "answers", "no_ema", 0, ablation.FULL)
    with pytest.raises(SystemExit, match="another size.*--out"):
        ablation.Ablation(tmp_path, SIZE).answers("no_ema", 0)


def test_answers_of_another_demo_or_another_variant_are_refused(tmp_path, monkeypatch):
    answers(tmp_path / "answers", "no_ema", 0)
    monkeypatch.setattr(ablation, "demo_options", lambda: {"model": {"keep_ratio": 0.5}})
    with pytest.raises(SystemExit, match="another demo.*--out"):
        ablation.Ablation(tmp_path, SIZE).answers("no_ema", 0)
    monkeypatch.undo()
    monkeypatch.setitem(VARIANTS, "no_ema", ("--training.ema_decay=0.5",))
    with pytest.raises(SystemExit, match="another options.*--out"):
        ablation.Ablation(tmp_path, SIZE).answers("no_ema", 0)


def test_the_committed_result_is_of_the_present_demo_and_variants():
    """A default that follows the evidence of other networks follows nothing."""
    figures = newest()["ablation"]["figures"]
    assert figures["demo"] == json.loads(json.dumps(ablation.demo_options())), "run the ablation again"
    assert {row["name"] for row in figures["rows"]} == {claim.name for claim in CLAIMS}


def test_nothing_is_chosen_on_the_photos_that_the_demo_is_judged_by():
    demo = yaml.safe_load(ablation.DEMO.read_text())
    assert demo["seed"] not in range(ablation.FIRST_SEED, ablation.FIRST_SEED + 100)


def test_runs_over_other_photos_are_never_compared(tmp_path):
    answers(tmp_path / "answers", BASE, 0)
    answers(tmp_path / "answers", "no_ema", 1)
    one, other = (json.loads(path.read_text()) for path in sorted((tmp_path / "answers").iterdir()))
    with pytest.raises(SystemExit, match="different test photos"):
        ablation.row(CLAIMS[2], {BASE: [one], "no_ema": [other]}, 10)
