"""Where an optimizer step reads tensors on the host: on a GPU it would wait there, so the log's reading is the only one."""

from __future__ import annotations

import pytest

from roadwork.data.batch import Batch
from tests.training.reads import ON_THE_HOST, Reads
from tests.training.small_trainer import Make, make_trainer, sheets  # noqa: F401 - fixtures


def test_a_step_waits_for_the_device_once_to_log_and_to_show_the_experts_load(trainer: Make) -> None:
    made = trainer()
    shown = []
    made.journal.experts = lambda step, load, kept: shown.append((step, load.shape, kept))
    batches = iter(made.data.train_loader(made.engine, made.config, 0))
    for step in range(2):  # the load is shown after the first
        with Reads() as reads:
            made.optimizer_step(step, batches)
        # The engine without ZeRO asks besides whether the norm is finite, before it steps.
        assert set(reads.places) - ON_THE_HOST == {"totals.py total", "loop.py _apply"}
        assert not any(reads.kinds[f"loop.py _record {kind}"] for kind in ("cpu", "item", "tolist"))
        assert reads.kinds["totals.py total cpu"] == reads.places["loop.py _apply"] == 1
    ((step, shape, kept),) = shown
    assert (step, shape) == (1, (1, made.config.model.num_experts)) and kept >= 1


def test_a_batch_is_copied_beside_the_loop(trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """From pinned memory a GPU copies while the host goes on, if it is told so."""
    made, asked, copy = trainer(), [], Batch.to
    monkeypatch.setattr(Batch, "to", lambda batch, *where, **how: asked.append(how) or copy(batch, *where, **how))
    made.optimizer_step(0, iter(made.data.train_loader(made.engine, made.config, 0)))
    assert asked == [{"non_blocking": True}] * made.micro_steps


def test_reducing_gradients_is_a_phase_behind_the_last_backward_pass(
    trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host returns from a collective at once, so phases alone tell who hangs in front of it."""
    made, phases = trainer(), []
    monkeypatch.setattr(made.heart, "beat", lambda step, phase: phases.append(phase))
    made.optimizer_step(0, iter(made.data.train_loader(made.engine, made.config, 0)))
    at = phases.index("reducing gradients")
    assert (
        phases.count("backward") == made.micro_steps == phases[:at].count("backward") and phases[at - 1] == "backward"
    )
