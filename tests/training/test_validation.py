"""Validation: every photo once on any number of processes, and with the averaged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from roadwork.data.loader import EvalLoader
from roadwork.errors import UserError
from roadwork.training import loop
from roadwork.training.parts import build_data, build_model
from roadwork.training.validation import Scores, validate
from tests.training.small_trainer import Make, make_trainer, options, sheets  # noqa: F401 - fixtures


class Turn:
    """One of several processes that take turns: what each gathers stays in `left`, so that the last one has it all."""

    device = torch.device("cpu")

    def __init__(self, left: list[list[Any]]) -> None:
        self.left, self.calls = left, 0

    def all_reduce(self, value: Tensor, op: Any = None) -> Tensor:
        return value

    def gather_object(self, items: list[Any]) -> list[Any]:
        if self.calls == len(self.left):
            self.left.append([])
        self.left[self.calls] += items
        self.calls += 1
        return list(self.left[self.calls - 1])


def test_an_odd_number_of_photos_is_judged_once_each_and_alike_on_one_two_and_three_processes(
    shards: Path, tmp_path: Path
) -> None:
    config = options(tmp_path, shards)
    index = build_data(config).train
    model = build_model(config, index.view_size).model
    found: list[Scores] = []
    for world in (1, 2, 3):
        left: list[list[Any]] = []
        shares = []
        for rank in range(world):
            loader = EvalLoader(index, batch=4, rank=rank, world_size=world, workers=0)
            before = len(left[0]) if left else 0
            scores = validate(Turn(left), model, index, loader)  # type: ignore[arg-type]
            assert scores is not None
            shares.append(len(left[0]) - before)
        assert sorted(row for row, _ in left[0]) == list(range(21)) and max(shares) - min(shares) <= 1
        found.append(scores)
    one = found[0]
    assert one.sample.tolist() == np.flatnonzero(np.asarray(index.label) >= 0).tolist() and len(set(one.label)) == 2
    for other in found[1:]:
        assert other.sample.tolist() == one.sample.tolist() and other.label.tolist() == one.label.tolist()
        np.testing.assert_allclose(other.probability, one.probability, atol=1e-6)
        assert other.mcc == one.mcc and other.interval == one.interval and other.loss == pytest.approx(one.loss)


@pytest.mark.parametrize("decay", [0.999, 0.0])
def test_the_averaged_weights_are_judged_and_training_goes_on_with_its_own(
    trainer: Make, monkeypatch: pytest.MonkeyPatch, decay: float
) -> None:
    """ZeRO's is compared on two real processes in tests/distributed/test_pretrain.py."""
    made = trainer("--training.max_steps=2", f"--training.ema_decay={decay}")
    seen: list[dict[str, Tensor]] = []

    def watched(engine: Any, model: torch.nn.Module, *given: Any, **named: Any) -> Scores | None:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return validate(engine, model, *given, **named)

    monkeypatch.setattr(loop, "validate", watched)
    batches = iter(made.data.train_loader(made.engine, made.config, 0))
    for step in range(2):
        made.optimizer_step(step, batches)
        made.counters.step = step + 1
    trained = {name: p.detach().clone() for name, p in made.masters.parameters.items()}
    assert made._validate()
    expected = made.average.whole() if made.average is not None else trained
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(p, trained[name]) for name, p in made.masters.parameters.items())
    apart = any(not torch.equal(tensor, trained[name]) for name, tensor in expected.items())
    assert apart == bool(decay)


@pytest.mark.parametrize(
    ("given", "steps"),
    [(["steps=7", "epochs=2"], 7), (["steps=0"], 6), (["steps=0", "epochs=2"], 11), (["steps=0", "epochs=0.01"], 1)],
)
def test_it_comes_every_so_many_steps_or_epochs(given: list[str], steps: int, shards: Path, tmp_path: Path) -> None:
    config = options(tmp_path, shards, *(f"--training.validate_every_{word}" for word in given))
    assert build_data(config).validate_every == steps, "21 photos, 4 in a step"


def test_it_cannot_come_every_zeroth_epoch(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training.validate_every_epochs is 0"):
        options(tmp_path, shards, "--training.validate_every_epochs=0")
