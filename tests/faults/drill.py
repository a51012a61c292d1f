"""Trains like launch/pretrain.py and lets planned accidents happen: argv[1] is a JSON list of them, the rest are options.

An accident has `step` (counted from 0), `rank`, `do`, and `micro` (default 0) or `where`: `validation`, `saving` (as the
checkpoint of that many steps begins) or `writing` (when its folder has its name, just before COMPLETE). What it does: a
signal's name (sent to itself; with `all` to every rank, itself last; with `launcher` to its parent), `sleep` (seconds),
`nan` (this rank's loss), `inf` (one of its gradients, while the loss is finite), `raise` (in the middle of its backward
pass), `fill` (the run folder's disk, up to `leave` bytes), `readonly` (that disk from now on), `free` (mends both, and
notes which checkpoints were complete meanwhile).
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import roadwork.training.checkpoint as checkpoint
import roadwork.training.pretrain as stage
from roadwork.cli import exit_on_user_error
from roadwork.command_line import parse
from roadwork.training.checkpoint import complete_checkpoints
from roadwork.training.loop import Trainer

plan = json.loads(sys.argv[1])
hooks: list = []


class Poisoned(torch.nn.Module):
    """The loss times NaN."""

    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *given):  # type: ignore[no-untyped-def]
        loss, terms = self.loss(*given)
        return loss * float("nan"), {**terms, "loss": terms["loss"] * float("nan")}


def _fail(gradient: torch.Tensor) -> None:
    raise RuntimeError("a planned failure")


class Accident(Trainer):
    """A trainer to whom things happen."""

    def _micro_step(self, step, micro, batch, counts):  # type: ignore[no-untyped-def]
        healthy = self.loss
        for event in plan:
            if event.get("where") is None and (event["step"], event.get("micro", 0)) == (step, micro):
                self._suffer(event)
        try:
            return super()._micro_step(step, micro, batch, counts)
        finally:
            self.loss = healthy
            for hook in hooks:
                hook.remove()
            hooks.clear()

    def _validate(self):  # type: ignore[no-untyped-def]
        for event in plan:
            if event.get("where") == "validation" and event["step"] == self.counters.step:
                self._suffer(event)
        return super()._validate()

    def _save(self) -> None:
        for event in plan:
            if event["step"] != self.counters.step:
                continue
            if event.get("where") == "saving":
                self._suffer(event)
            elif event.get("where") == "writing" and self.engine.is_main:
                checkpoint.write_atomic = lambda *_, event=event: self._signal(event)
        super()._save()

    def _suffer(self, event: dict) -> None:
        if event["rank"] != self.engine.rank:
            return
        action, filler = event["do"], self.folder / "filler"
        if action == "nan":
            self.loss = Poisoned(self.loss)
        elif action == "inf":
            weight = self.model.classifier[-1].weight
            hooks.append(weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf"))))
        elif action == "raise":
            hooks.append(self.model.classifier[-1].weight.register_hook(_fail))
        elif action == "sleep":
            (self.folder / "asleep").touch()
            time.sleep(event["seconds"])
        elif action == "fill":
            self.checkpoints.wait()
            with contextlib.suppress(OSError):  # full a little earlier: logs and heartbeats write meanwhile
                filler.write_bytes(bytes(shutil.disk_usage(self.folder).free - event["leave"]))
        elif action == "readonly":
            self.checkpoints.wait()
            subprocess.run(["mount", "--bind", self.folder.parent, self.folder.parent], check=True)
            for _ in range(100):  # busy while a heartbeat or a log has a file open for writing
                if not subprocess.run(["mount", "-o", "remount,ro,bind", self.folder.parent]).returncode:
                    break
                time.sleep(0.05)
        elif action == "free":
            self.checkpoints.wait()
            if filler.exists():
                filler.unlink()
            else:
                subprocess.run(["umount", "--lazy", self.folder.parent], check=True)
            names = [path.name for path in complete_checkpoints(self.checkpoints.folder)]
            Path(event["note"]).write_text(json.dumps(names))
        else:
            self._signal(event)

    def _signal(self, event: dict) -> None:
        ranks = [json.loads(path.read_text())["pid"] for path in self.folder.glob("ranks/rank-*.json")]
        peers = [pid for pid in ranks if pid != os.getpid()] if event.get("all") else []
        for pid in [*peers, os.getppid() if event.get("launcher") else os.getpid()]:
            os.kill(pid, getattr(signal, event["do"]))


stage.Trainer = Accident  # type: ignore[misc]
raise SystemExit(exit_on_user_error(lambda: stage.pretrain(parse("pretrain", sys.argv[2:]).config) and None)())
