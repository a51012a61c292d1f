"""Photos and shards that cannot be read, judged over all ranks: no rank leaves alone while its peers wait for it."""

from __future__ import annotations

from roadwork.config import Config
from roadwork.data.loader import BUDGET_BASE
from roadwork.engine import Engine
from roadwork.errors import UserError
from roadwork.training.counters import Counters


def stop_on_faults(engine: Engine, faults: list[str]) -> None:
    """UserError on every rank where any rank's loader could not read a shard. Collective.

    The step at hand is not counted: a relaunch makes it again from the newest checkpoint, with all of its photos.
    """
    told = sorted(set(engine.gather_object(faults)))
    if told:
        others = f" ({len(told) - 1} more like this)" if len(told) > 1 else ""
        raise UserError(f"{told[0]}{others}; then launch again: the run goes on from its newest checkpoint")


def judge_budget(config: Config, counters: Counters, photos: int, fresh: dict[str, str]) -> None:
    """UserError where more of the drawn photos than data.bad_sample_budget allows are unreadable.

    Args:
        photos: in the splits that the run reads.
        fresh: id -> reason of the ones that were found just now.
    """
    budget = config.data.bad_sample_budget
    drawn = max((counters.step + 1) * config.training.global_batch, BUDGET_BASE)
    if len(counters.skipped) > max(budget * min(drawn, photos), 1.0 if budget else 0.0):
        named = "; ".join(f"{name}: {reason}" for name, reason in list(fresh.items())[:3])
        raise UserError(
            f"{len(counters.skipped)} photos of {config.data.shards} cannot be read, more than "
            f"data.bad_sample_budget {budget:g} allows ({named}); "
            f"run `python -m shards.verify {config.data.shards}` and build again"
        )
