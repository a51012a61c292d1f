"""Trains like launch/pretrain.py; rank argv[2] sends itself SIGKILL in the middle of optimizer step argv[1]."""

import os
import signal
import sys

import roadwork.training.pretrain as stage
from roadwork.command_line import parse
from roadwork.training.loop import Trainer

fatal_step, fatal_rank = int(sys.argv[1]), int(sys.argv[2])


class Doomed(Trainer):
    """Dies between two micro-batches."""

    def _micro_step(self, step, micro, batch, counts):  # type: ignore[no-untyped-def]
        if step == fatal_step and micro == 1 and self.engine.rank == fatal_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._micro_step(step, micro, batch, counts)


stage.Trainer = Doomed  # type: ignore[misc]
stage.pretrain(parse("pretrain", sys.argv[3:]).config)
