"""The training loop: order -> loader -> augmentation -> detector -> losses -> ZeRO-2 step -> average -> validation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roadwork import config as options
from roadwork.config import Config
from roadwork.data.augment import Augment
from roadwork.data.batch import Batch
from roadwork.engine import Engine
from roadwork.errors import UserError
from roadwork.losses import TERMS, Counts, Targets, TotalLoss
from roadwork.monitoring.own_time import OwnTime
from roadwork.monitoring.progress import Progress
from roadwork.training import best
from roadwork.training.atomic import mend_folder
from roadwork.training.checkpoint import Checkpointer, load_training_state
from roadwork.training.counters import Counters, check_finished_options
from roadwork.training.curvature import sampled_loss, update_curvature, update_hessian
from roadwork.training.ema import Average
from roadwork.training.gradients import Gradients
from roadwork.training.journal import Journal
from roadwork.training.liveness import Heartbeat, Stopped, StopRequest, lock_run
from roadwork.training.masters import Masters
from roadwork.training.optimizers import step_sophia_h
from roadwork.training.pace import GarbageCollection, Utilisation
from roadwork.training.parts import Data, Made
from roadwork.training.schedule import cosine_with_warmup
from roadwork.training.spikes import Spikes
from roadwork.training.totals import Share, total
from roadwork.training.unreadable import judge_budget, stop_on_faults
from roadwork.training.validation import challenge_mcc, validate

log = logging.getLogger(__name__)
_EXPERTS_EVERY = 10  # steps


class Trainer:
    """One run on one process; every rank runs the same steps.

    Args:
        config: the run's options.
        engine: the running engine, made with `trains=True`.
        data: splits and order.
        made: detector and optimizer, not yet prepared.
        subfolder: for a trial beside the run (the learning-rate finder): where its events go; nothing is resumed or saved.
    """

    def __init__(self, config: Config, engine: Engine, data: Data, made: Made, subfolder: str = "") -> None:
        self.config, self.engine, self.data = config, engine, data
        self.folder = Path(config.run.dir)
        self.stop = StopRequest().install()
        self.lock = lock_run(engine, self.folder)
        self.fixed_rate: float | None = None
        if engine.is_main and not subfolder:
            mend_folder(self.folder / "best")
        self.steps_total = data.steps
        self.micro_steps = options.accumulation(config, engine.world_size)
        if self.micro_steps > 1:
            self.stop.join(engine)
        self.compiled: set[str] = set()
        self.heart = Heartbeat(self.folder, engine.rank, engine.world_size, config.engine.timeout_s)
        self._build(made)
        self.counters = Counters() if subfolder else self._resume()
        if engine.is_main and not subfolder:  # not before: a launch that is refused must not change a run's options
            options.save(config, self.folder / "config.yaml")
        self.journal = Journal(config, self.folder, engine.is_main, self.counters.step, subfolder)

    def _build(self, made: Made) -> None:
        config, engine = self.config, self.engine
        self.model, optimizer, self.constants, whole = made
        self.model.max_views = self.data.train.max_views  # so that what is saved cuts photos as these were cut
        self.model.to(engine.device)
        if config.model.compile:
            self.model.compile_blocks()
        self.wrapped, self.optimizer = engine.prepare(self.model, optimizer)
        self.gradients = Gradients(engine, self.micro_steps, config.engine.hold_gradients)
        self.masters = Masters(engine, self.wrapped, self.optimizer)
        self.masters.load(whole)
        self.average = Average(self.masters, config.training.ema_decay) if config.training.ema_decay else None
        self.loss = TotalLoss(config.loss)
        self.augment = Augment(config.augment)
        self.counts = self.data.counts(self.micro_steps * engine.world_size)
        self.utilisation = Utilisation(config, engine, self.model, self.counts)
        self.own_time = OwnTime(engine.device)
        kept = config.checkpoint
        self.checkpoints = Checkpointer(engine, self.folder / "checkpoints", kept.keep_last, kept.keep_every)
        self.spikes = Spikes(config.training.spike_factor)
        self.experts = torch.zeros(0, dtype=torch.float64, device=engine.device)

    def _resume(self) -> Counters:
        if self.engine.is_main:
            self.checkpoints.clean()
        self.engine.barrier()
        config = self.config
        data = self.data
        fresh = Counters(
            global_batch=data.global_batch,
            seed=config.seed,
            samples=len(data.train),
            order=data.kind,
            photos=data.photos,
            select_on=config.training.select_on,
            optimizer=config.optimizer.name,
        )
        path = self.checkpoints.newest()
        if path is None:
            return fresh
        stored = load_training_state(path, self.masters, self.average)
        counters = Counters(**{k: v for k, v in stored.items() if k in Counters.__dataclass_fields__})
        counters.check_same_run(fresh, path)
        ended_early = bool(config.training.patience) and counters.stale_validations >= config.training.patience
        counters.finished = counters.finished and (ended_early or counters.step >= self.steps_total)
        if counters.finished:
            check_finished_options(config, self.folder)
        log.info("resumed from %s", path)
        return counters

    def run(self) -> Counters:
        """Train to the end, an early stop or a stop signal; returns the counters. Collective."""
        counters = self.counters
        progress = Progress(
            "pretrain", self.steps_total, counters.step, enabled=self.engine.is_main and self.config.monitoring.console
        )
        loader = None if counters.finished else self.data.train_loader(self.engine, self.config, counters.step)
        outcome = "failed"
        try:
            self._mend_best()
            if loader is not None:
                if not counters.step:
                    self.journal.draws(self.data.train)
                with GarbageCollection(self.config.training.gc_every_steps) as garbage:
                    stopped = self._steps(iter(loader), progress, garbage)
                if not stopped:
                    self._finish()
            outcome = "done" if counters.finished else "stopped"
        finally:
            if loader is not None:
                loader.close()
            progress.close(outcome)
            self.close()
        return counters

    def _steps(self, batches: Iterator[Batch], progress: Progress, garbage: GarbageCollection) -> bool:
        """The loop. True where a signal ended it; a checkpoint of the last step is then complete."""
        counters, training, self.finite = self.counters, self.config.training, replace(self.counters)
        if self._due(counters.step) and not self._validate():
            return self._leave()
        for step in range(counters.step, self.steps_total):
            if self._stale():
                log.info("no better MCC in %d validations: stopped early at step %d", training.patience, step)
                return False
            if not counters.nonfinite_steps:
                self.finite = replace(counters)
            try:
                record, stop = self.optimizer_step(step, batches)
            except Stopped:
                return self._leave()
            counters.step = step + 1
            self.journal.record(record)
            progress.update(step + 1, training.global_batch, {"loss": record["loss"], **counters.judged()})
            self._guard(record)
            garbage.after(step + 1)
            if stop or (self._due(step + 1) and not self._validate()):
                return self._leave()
            every = self.config.checkpoint.every_steps
            if every and (step + 1) % every == 0:
                self._save()
        return False

    def _due(self, step: int) -> bool:
        """Whether the weights of an optimizer step are to be validated and were not; those of the last one always are."""
        regular = 0 < step < self.steps_total and step % self.data.validate_every == 0
        return regular and self.counters.validated_step != step

    def _stale(self) -> bool:
        patience = self.config.training.patience
        return bool(patience) and self.counters.stale_validations >= patience

    def _leave(self) -> bool:
        """A signal came: save what is not, wait until the checkpoint is complete. Collective; always True."""
        step = self.counters.step
        if self._saved():
            saved = f"checkpoint of step {step} is complete" if step else "no step was made"
            log.warning("signal %s: %s", self.stop.received or "on a peer", saved)
        return True

    def optimizer_step(self, step: int, batches: Iterator[Batch]) -> tuple[dict[str, Any], bool]:
        """All micro-batches of one optimizer step; returns its line for metrics.jsonl and whether to stop.

        Raises:
            Stopped: on all ranks, between two micro-batches, where a signal came to any: a step can take longer than the
                launcher's patience.
        """
        began, engine = time.perf_counter(), self.engine
        rate = self._set_learning_rate(step)
        # Dropout is keyed by step and rank: there is no generator state to save, and a resumed run draws the same.
        torch.manual_seed(hash((self.config.seed, step, engine.rank)) & 0x7FFFFFFF)
        counts = self.counts.of(step)
        sums = torch.zeros(len(TERMS), dtype=torch.float64, device=engine.device)
        waited, seen = 0.0, 0
        unreadable: list[tuple[str, str]] = []
        faults: list[str] = []
        for micro in range(self.micro_steps):
            self.own_time.begin()
            self.heart.beat(step, "waiting for data")
            batch = next(batches)
            waited += batch.wait_s
            seen += int((batch.weight > 0).sum())
            unreadable += batch.skipped
            faults += batch.faults
            self.heart.beat(step, "forward")
            with self._first_use("training"):
                sums += self._micro_step(step, micro, batch, counts)
            if micro < self.micro_steps - 1 and self.stop.anywhere():
                raise Stopped
        self.heart.beat(step, "reducing the log")
        missed = len(unreadable) + len(faults)
        share = Share(sums, waited, self.own_time.take(), seen, missed, bool(self.stop.received))
        record, stop = self._record(step, rate, began, share)
        if record["skipped_samples"]:
            stop_on_faults(engine, faults)
            self._note_unreadable(unreadable)
        return record, stop

    @contextmanager
    def _first_use(self, graph: str) -> Iterator[None]:
        """Around what compiles: that can take longer than a launcher's patience, and all is saved when it begins."""
        if not self.config.model.compile or graph in self.compiled:
            yield
            return
        self.heart.beat(self.counters.step, "compiling")
        with self.stop.at_once():
            yield
        self.compiled.add(graph)

    def _note_unreadable(self, photos: list[tuple[str, str]]) -> None:
        """Name photos that did not decode, once, and stop every rank where they are too many. Collective."""
        known = {name for name, _ in self.counters.skipped}
        fresh = {name: reason for name, reason in self.engine.gather_object(photos) if name not in known}
        if not fresh:
            return
        self.counters.skipped += [[name, reason] for name, reason in sorted(fresh.items())]
        self.journal.unreadable(self.counters.skipped)
        for name, reason in sorted(fresh.items()) if self.engine.is_main else ():
            log.error("photo %s is left out: %s", name, reason)
        judge_budget(self.config, self.counters, len(self.data.train) + len(self.data.val), fresh)

    def _micro_step(self, step: int, micro: int, batch: Batch, counts: Counts) -> Tensor:
        engine = self.engine
        host = batch  # view mask, positions and epochs are read on the host: there without a synchronisation
        batch = batch.to(engine.device, non_blocking=True)
        pixels = batch.views.float() / 255
        views, masks = self.augment(pixels, host.position, host.epoch, self.config.seed, batch.masks, batch.view_mask)
        targets = Targets(batch.label, batch.weather, masks, batch.masks_valid, batch.weight, counts)
        last = micro == self.micro_steps - 1
        with engine.accelerator.accumulate(self.wrapped):
            outputs = self.wrapped(views, host.view_mask, batch.metadata, batch.boxes)
            loss, terms = self.loss(outputs, targets, self._ramp(step))
            self.heart.beat(step, "backward")
            self.gradients.backward(loss)
            self.own_time.end()
            if last:
                self.heart.beat(step, "reducing gradients")  # a rank whose backward pass hangs is not here
                self.gradients.step()
                self._apply(step, lambda: self._loss_again(step, views, host.view_mask, batch, targets))
        if last:
            self._show(step, views, batch, masks, outputs)
            if self.config.optimizer.name == "sophia" and step % self.config.optimizer.hessian_every == 0:
                self._curvature(views, batch)
        return torch.stack([terms[name].double() if name in terms else loss.new_zeros(()).double() for name in TERMS])

    def _apply(self, step: int, loss: Callable[[], Tensor]) -> None:
        """The optimizer step itself (ZeRO has made it already), then the average. `loss`: for Sophia-H."""
        if not self.engine.sharded:
            self.plain_norm = self.engine.accelerator.clip_grad_norm_(
                self.wrapped.parameters(), self.config.training.grad_clip or math.inf
            )
            self.plain_skipped = not bool(torch.isfinite(self.plain_norm))
            if not self.plain_skipped and self.config.optimizer.name == "sophia_h":
                due = step % self.config.optimizer.hessian_every == 0
                hessian = update_hessian(self.engine, self.masters, loss) if due else None
                step_sophia_h(self.masters.optimizer, step, hessian)
            elif not self.plain_skipped:
                self.optimizer.step()
            self.optimizer.zero_grad()
        if self.average is not None and not self._skipped():
            self.average.update()
            self.counters.average_updates = self.average.updates

    def _loss_again(self, step: int, views: Tensor, view_mask: Tensor, batch: Batch, targets: Targets) -> Tensor:
        """The last micro-batch's loss through the bare module, scaled so that its mean over processes estimates the step's."""
        outputs = self.model(views, view_mask, batch.metadata, batch.boxes)
        loss: Tensor = self.loss(outputs, targets, self._ramp(step))[0]
        return loss * (self.engine.world_size * self.micro_steps)

    def _curvature(self, views: Tensor, batch: Batch) -> None:
        outputs = self.wrapped(views, batch.view_mask, batch.metadata, batch.boxes)
        loss = sampled_loss(outputs, self.config.loss, batch.weight)
        update_curvature(self.engine, self.masters, loss, len(batch.weight), self.gradients.held)

    def _skipped(self) -> bool:
        return self.masters.skipped if self.engine.sharded else self.plain_skipped

    def _set_learning_rate(self, step: int) -> float:
        training = self.config.training
        factor = cosine_with_warmup(step, self.steps_total, training.warmup_steps, training.min_lr_ratio)
        rate = training.learning_rate * factor if self.fixed_rate is None else self.fixed_rate
        for group in self.masters.groups():
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate

    def _ramp(self, step: int) -> float:
        steps = self.config.loss.consistency_ramp_steps
        return min(1.0, (step + 1) / steps) if steps else 1.0

    def _record(self, step: int, rate: float, began: float, share: Share) -> tuple[dict[str, Any], bool]:
        """The step's line for metrics.jsonl, and whether any rank was asked to stop. Collective."""
        totals, experts = total(self.engine, share, self.masters.squared_norm(), self.experts)
        seconds = time.perf_counter() - began  # all ranks have made the step, and the device has
        if len(experts):
            self.journal.experts(step + 1, experts[:-1].view(self.config.model.num_layers, -1), float(experts[-1]))
            self.experts = self.experts.new_zeros(0)
        self._faulty = totals.faulty
        self.counters.samples_seen += totals.seen
        norm = self.masters.gradient_norm() if self.engine.sharded else self.plain_norm
        position = (step + 1) * self.config.training.global_batch
        record = {
            "step": step + 1,
            "epoch": position / len(self.data.train),
            "position": position,
            "samples_seen": self.counters.samples_seen,
            **totals.terms,
            "lr": rate,
            "grad_norm": float(norm) if norm is not None else None,
            "weight_norm": math.sqrt(totals.squared_norm),
            "images_per_s": totals.seen / seconds,
            "step_s": seconds,
            "mfu": self.utilisation.of(step, seconds),
            **totals.figures(),
            "nonfinite_steps": int(self._skipped()),
        }
        return record, totals.stop

    def _guard(self, record: dict[str, Any]) -> None:
        """A step with a NaN or infinite gradient was skipped by every rank; some in a row end the run. Spikes are noted."""
        photos = self.data.train.names(self.counts.samples(record["step"] - 1))
        if not record["nonfinite_steps"]:
            self.counters.nonfinite_steps = 0
            usual = self.spikes.usual(record["loss"])
            if usual is not None:
                log.warning("step %d: loss %.4g stands out from %.4g", record["step"], record["loss"], usual)
                self.journal.spike({"step": record["step"], "loss": record["loss"], "usual": usual, "photos": photos})
            return
        self.counters.nonfinite_steps += 1
        names = ", ".join(photos[:8])
        where = f"the loss of rank {', '.join(map(str, self._faulty))}" if self._faulty else "a gradient"
        tell = log.error if self.engine.is_main else log.warning  # one line on the console
        tell("step %d skipped on all ranks: %s is not finite; the batch holds %s", record["step"], where, names)
        if self.counters.nonfinite_steps >= self.config.training.max_nonfinite_steps:
            row, self.counters = self.counters.nonfinite_steps, self.finite  # a relaunch makes those steps again
            kept = "the checkpoint" if self._saved() else "no checkpoint could be written: the newest"
            raise UserError(
                f"{row} steps in a row had NaN or infinite gradients, the last at step {record['step']} (photos {names}); "
                f"{kept} is from before: lower training.learning_rate and launch again"
            )

    def _show(self, step: int, views: Tensor, batch: Batch, masks: Tensor | None, outputs: Any) -> None:
        """Rank 0: keep the experts' load on the device until `_record` reads the log anyway; pictures now and then."""
        if not self.engine.is_main:
            return
        if step % _EXPERTS_EVERY == 0:
            kept = outputs.view_mask.sum(1).double().mean().view(1)
            self.experts = torch.cat([outputs.expert_load.detach().double().flatten(), kept])
        every = self.config.training.image_every_steps
        if every and step % every == 0:
            self.journal.pictures(step + 1, views, batch, masks, outputs)

    def _validate(self) -> bool:
        """Score the averaged weights on the validation groups; keep them in best/ where they are better. Collective.

        Returns:
            False where a stop signal cut it short: nothing is then counted, and a relaunch validates again.
        """
        counters, step = self.counters, self.counters.step
        if self.config.model.compile and "validation" not in self.compiled:
            self._saved()
        self.heart.beat(step, "validation")
        whole = self.average.whole() if self.average is not None else None

        def interrupted() -> bool:
            self.heart.beat(step, "validation")
            return bool(self.stop.received)

        with self.masters.showing(whole), self._first_use("validation"):
            loader = self.data.val_loader(self.engine, self.config)
            scores = validate(
                self.engine,
                self.model,
                self.data.val,
                loader,
                interrupted=interrupted,
                image_only=self.config.predict.image_only,
            )
            if scores is not None and self.config.training.select_on == "challenge":
                asked = challenge_mcc(self.engine, self.model, self.data.val, self.config, interrupted)
                scores = None if asked is None else replace(scores, challenge=asked)
        if scores is None:
            return False
        counters.validated_step, counters.last_mcc = step, scores.selects
        if (scores.selects, -scores.loss) > (counters.best_mcc, -counters.best_loss):
            counters.best_mcc, counters.best_loss, counters.best_step = scores.selects, scores.loss, step
            counters.stale_validations = 0
            self._save_best(whole)
        else:
            counters.stale_validations += 1
        distance = self.average.distance() if self.average is not None else None
        if self.engine.is_main:
            self.journal.validation(step, scores, distance)
        if scores.skipped:  # the same on every rank
            self._note_unreadable(scores.skipped)
        return True

    def _save_best(self, whole: dict[str, Tensor] | None) -> None:
        tensors = whole or dict(self.masters.gather(self.masters.flats()))
        if self.engine.is_main:
            best.keep_best(self.folder, self.counters.step, self.model, {**self.constants, **tensors})

    def _mend_best(self) -> None:
        """Where somebody removed best/: from the checkpoint of its step, else the weights at hand are the first judged.
        Collective.
        """
        counters, engine = self.counters, self.engine
        if counters.best_step < 0 or engine.broadcast_object(best.is_there(self.folder)):
            return
        weights = best.weights_of(self.folder, counters.best_step) if engine.is_main else None
        if weights is not None:
            log.warning("best/ was gone: made again from the checkpoint of step %d", counters.best_step)
            best.keep_best(self.folder, counters.best_step, self.model, {**self.constants, **weights})
        if engine.broadcast_object(weights is not None):
            return
        log.error("best/ was gone, and so is the checkpoint of step %d: best/ starts anew", counters.best_step)
        counters.best_mcc, counters.best_loss, counters.best_step = Counters.best_mcc, Counters.best_loss, -1
        counters.validated_step = -1
        if counters.finished:
            stale = counters.stale_validations  # why it ended early, perhaps
            if self._validate():
                counters.stale_validations = stale
                self._save()

    def _finish(self) -> None:
        counters = self.counters
        if counters.validated_step != counters.step and not self._validate():
            self._leave()
            return
        counters.finished = True
        self._save()
        if not self.engine.broadcast_object(self.checkpoints.wait()):
            folder = self.checkpoints.folder
            raise UserError(f"{folder}: the last checkpoint could not be written; make room there and launch again")
        chosen_by = "val_challenge_mcc" if counters.select_on == "challenge" else "val_mcc"
        with self.journal.board() as board:
            board.hparams(self.config, {chosen_by: counters.best_mcc}, self.config.run.dir)

    def _saved(self) -> bool:
        """Save what is not; whether it then is. What no step changed needs no checkpoint. Collective."""
        step = self.counters.step
        if step and not self.checkpoints.holds(step):
            self._save()
        return not step or self.checkpoints.holds(step)

    def _save(self) -> None:
        began, step = time.perf_counter(), self.counters.step
        self.heart.beat(step, "checkpoint")
        with self.journal.board() as board:
            board.flush()
        self.checkpoints.save(step, self.masters, self.average, asdict(self.counters))
        with self.journal.board() as board:
            board.scalars(step, {"perf/checkpoint_stall_s": time.perf_counter() - began})

    def close(self) -> None:
        self.checkpoints.wait()
        self.heart.close()
        self.journal.close()
        self.lock.release()
