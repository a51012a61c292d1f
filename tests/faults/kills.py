"""The kill drill: `python -m tests.faults.kills --folder DIR [--kills 100] [--save]`.

SIGKILL to one rank, to all ranks or to the launcher alone, half of them at a random instant of the training and half
inside the write of a checkpoint. The same command is started again at once, with nothing cleaned up by hand, until the
run ends; it is then compared, bit for bit, with a run that nobody disturbed, and the next run begins. Every kill and
every comparison is a line of DIR/kills.jsonl: a drill that was interrupted goes on where it was, and ends with status 1
where anything was not as promised. `--save` keeps the counts as a dated result; docs/reliability.md shows the newest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.results import provenance, save
from roadwork.monitoring.runlog import RunLog, read_last_per_step, read_lines
from roadwork.training.checkpoint import MARKER, complete_checkpoints, damage, reached_end
from tests.faults.scenes import assert_same_end, options
from tests.launching import Job, build_shards, start

VICTIMS = {"rank 0": (0,), "rank 1": (1,), "all ranks": (0, 1), "the launcher": ()}
PLACES = ("inside a checkpoint write", "at a random instant")
STEPS = 24
SHARE = 3
"""A kill falls into this part of the steps, or of the writes, of a run, counted from the ranks' start on."""
END_S, GONE_S = 180.0, 10.0
"""A launcher ends by itself this soon after a rank was killed; whatever still lives so long after its launcher is an orphan."""
COUNTED = ("inside", "torn", "relaunched", "orphans", "checkpoints_lost")
"""What is counted of each kill: an incomplete folder when the signal was sent, and when nobody lived any more; and so on."""
WORD = "ROADWORK_LAUNCH"
"""Variable by which all processes of a launch are known, whoever their parent is by now."""


def of_launch(pid: int, word: str) -> bool:
    """Whether a process lives and was started by this launch or by one of its processes."""
    try:
        return f"{WORD}={word}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def members(word: str) -> list[int]:
    """All living processes of a launch."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if of_launch(int(path.name), word)]


def torn(run: Path) -> set[tuple[str, int]]:
    """Folders of checkpoints that were begun and are not complete, by name and inode; half-retired old ones are none."""
    folder = run / "checkpoints"
    newest = max((path.name for path in complete_checkpoints(folder)), default="")
    found = set()
    for path in (*folder.glob("step-*"), *folder.glob(".writing-step-*")):
        with suppress(OSError):
            if path.name.removeprefix(".writing-") > newest and not (path / MARKER).is_file():
                found.add((path.name, path.stat().st_ino))
    return found


def newest(run: Path) -> str:
    """Name of the newest complete checkpoint that loads; empty where there is none.

    One that was moved aside, to be written again, counts: the next launch puts it back.
    """
    folder, old = run / "checkpoints", ".writing-old-"
    aside = {path.name.removeprefix(old).rpartition("-")[0]: path for path in folder.glob(f"{old}step-*")}
    every = {name: path for name, path in aside.items() if (path / MARKER).is_file()}
    every |= {path.name: path for path in complete_checkpoints(folder)}
    if every and damage(path := every[max(every)]) is None and all(load_file(f) for f in path.glob("*.safetensors")):
        return max(every)
    return ""


def logged(run: Path) -> int:
    """Lines of metrics.jsonl, those of repeated steps included."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@dataclass
class Launched:
    """A job, and what it found in its run folder."""

    run: Path
    job: Job
    word: str
    newest: str
    left: set[tuple[str, int]]

    def ranks(self) -> list[int]:
        """Wait for the training to begin: pids by rank; empty where the job ended before."""
        while self.job.process.poll() is None:
            files = sorted(self.run.glob("ranks/rank-*.json"))
            pids = [json.loads(path.read_text())["pid"] for path in files]
            if len(pids) == 2 and all(of_launch(pid, self.word) for pid in pids):
                return pids
            time.sleep(0.05)
        return []

    def steps(self, number: float, pace: tuple[float, float]) -> None:
        """Wait for an instant of the training, or for the job's end. Told by steps, since the load of a machine changes.

        Args:
            number: steps since the ranks' start; of the one in which it falls, this fraction of its usual time goes by.
            pace: seconds to the first step's end and of a step, of the undisturbed run.
        """
        before, times = logged(self.run), [time.monotonic()]
        while self.job.process.poll() is None:
            done = logged(self.run) - before
            times += [time.monotonic()] * (done + 1 - len(times))
            if done >= int(number):
                usual = min(pace[1], times[-1] - times[-2]) if done else pace[0]
                with suppress(subprocess.TimeoutExpired):
                    self.job.process.wait(usual * (number - int(number)))
                return
            time.sleep(0.01)

    def write(self, writer: int, number: int, files: int) -> None:
        """Wait for an instant of a write, or for the job's end.

        Args:
            writer: pid of rank 0, by which its folders are told from those that kills left.
            number: which write of this launch.
            files: how many files lie in the folder by then; 99: it has its name and lacks only COMPLETE.
        """
        folder, seen = self.run / "checkpoints", set[str]()
        while self.job.process.poll() is None:
            seen |= {path.name for path in folder.glob(f".writing-step-*-{writer}")}
            if len(seen) >= number:
                temporary = folder / max(seen)
                final = folder / temporary.name.split("-", 1)[1].rpartition("-")[0]
                if final.exists() and not (final / MARKER).exists():
                    return
                with suppress(FileNotFoundError):
                    if len(os.listdir(temporary)) >= files:
                        return
            time.sleep(0.0005)


class Drill:
    """All kills of one folder.

    Args:
        folder: where runs and lines are kept.
        kills: kills that fell where they were aimed.
        steps: optimizer steps of a run.
    """

    def __init__(self, folder: Path, kills: int, steps: int = STEPS) -> None:
        self.folder, self.kills, self.steps = folder.resolve(), kills, steps
        self.shards, self.whole = self.folder / "shards", self.folder / "whole"
        self.lines_file = self.folder / "kills.jsonl"
        self.began = provenance()
        if not (self.shards / "manifest.json").is_file():
            build_shards(self.shards)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """What was written of one kind: undisturbed, kill, curve, refused."""
        return (
            [line for line in read_lines(self.lines_file) if line["kind"] == kind] if self.lines_file.exists() else []
        )

    def note(self, kind: str, **line: Any) -> None:
        """Write one line."""
        with RunLog(self.lines_file) as log:
            log.append({"kind": kind, "commit": self.began["commit"], **line})

    def launch(self, run: Path) -> Launched:
        """The command that is killed and started again."""
        more = (f"--training.max_steps={self.steps}", "--checkpoint.every_steps=1", "--training.validate_every_steps=6")
        word, left, found = uuid.uuid4().hex, torn(run), newest(run)
        job = start("launch/pretrain.py", *options(run, self.shards, *more), **{WORD: word})
        return Launched(run, job, word, found, left)

    def undisturbed(self) -> tuple[float, float]:
        """The run that nobody disturbs, trained once: seconds to its first step's end and of each later step."""
        if not self.lines("undisturbed"):
            shutil.rmtree(self.whole, ignore_errors=True)
            launched = self.launch(self.whole)
            try:
                launched.ranks()
                began = time.monotonic()
                launched.steps(1, (0, 0))
                first = time.monotonic()
                self.ended_well(launched)
                step = (time.monotonic() - first) / self.steps
                self.note("undisturbed", first_s=round(first - began, 2), step_s=round(step, 2))
            finally:
                launched.job.kill()
        line = self.lines("undisturbed")[-1]
        return line["first_s"], line["step_s"]

    def go_on(self) -> None:
        """Kill until there are enough; the last run is let go to its end."""
        pace = self.undisturbed()
        killed: tuple[Launched, dict[str, Any]] | None = None
        while killed or self.left() or self.current().exists():
            launched = self.launch(self.current())
            try:
                if killed is not None:
                    self.look_after(*killed)
                pids = launched.ranks()
                if killed is not None:
                    self.note("kill", **killed[1], relaunched=bool(pids) or launched.job.process.wait() == 0)
                line = self.strike(launched, pids, pace)
                if line is None:
                    self.ended_well(launched)
            except BaseException:
                launched.job.kill()
                raise
            killed = None if line is None else (launched, line)
            if killed is None:
                self.compare(launched.run)

    def current(self) -> Path:
        """The folder of the run in hand."""
        return self.folder / f"run-{len(self.lines('curve')):03d}"

    def left(self) -> int:
        """Kills that are still to be done."""
        return max(0, self.kills - sum(line["outcome"] == "hit" for line in self.lines("kill")))

    def strike(self, launched: Launched, pids: list[int], pace: tuple[float, float]) -> dict[str, Any] | None:
        """One kill where the fewest were so far; what happened, or None where the job ended by itself."""
        process, kills = launched.job.process, self.lines("kill")
        if not self.left() or not pids or reached_end(launched.run / "checkpoints"):
            process.wait()
            return None
        hits = [(line["where"], line["victim"]) for line in kills if line["outcome"] == "hit"]
        where, victim = min(((place, v) for v in VICTIMS for place in PLACES), key=hits.count)
        draw = random.Random(len(kills))
        if where == PLACES[1]:
            launched.steps(draw.uniform(0, self.steps / SHARE), pace)
        else:
            names = len(list((self.whole / "checkpoints" / f"step-{self.steps:08d}").iterdir())) - 1
            files = draw.choice([*range(names + 1), 99])
            launched.write(pids[0], draw.randint(1, self.steps // SHARE), files)
        if process.poll() is not None:
            self.note("kill", victim=victim, where=where, outcome="late")
            return None
        for pid in [pids[rank] for rank in VICTIMS[victim]] or [process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        inside, late, at = (
            bool(torn(launched.run) - launched.left),
            reached_end(launched.run / "checkpoints"),
            time.monotonic(),
        )
        outcome = "late" if late else "hit" if inside or where == PLACES[1] else "missed"
        if victim != "the launcher":  # a job whose launcher lives cannot be launched again
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
        step = max((line["step"] for line in read_last_per_step(launched.run / "metrics.jsonl")), default=0)
        return {"victim": victim, "where": where, "outcome": outcome, "inside": inside, "step": step, "at": at}

    def look_after(self, launched: Launched, line: dict[str, Any]) -> None:
        """What a kill left, while the next launch is on its way: adds to its line. Orphans are put down."""
        until = time.monotonic() + GONE_S
        while (orphans := members(launched.word)) and time.monotonic() < until:
            time.sleep(0.02)
        line["gone_s"] = round(time.monotonic() - line.pop("at"), 2)
        line["orphans"] = len(orphans)
        for pid in orphans:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        line["torn"] = len(torn(launched.run) - launched.left)
        line["checkpoints_lost"] = newest(launched.run) < launched.newest
        launched.job.kill()
        launched.job.process.communicate()

    def ended_well(self, launched: Launched) -> None:
        """A job that nobody killed ends with 0; another end is noted and ends the drill."""
        done = launched.job.wait(900)
        if done.status:
            self.note("refused", status=done.status, output=done.output[-4000:])
            raise SystemExit(f"{launched.run}: status {done.status} without a kill\n{done.output[-4000:]}")

    def compare(self, run: Path) -> None:
        """Note whether a run that has ended is the undisturbed one; an equal one is removed."""
        fault = ""
        try:
            assert_same_end(run, self.whole)
        except AssertionError as error:
            fault = traceback.extract_tb(error.__traceback__)[-1].line or "they differ"
        seen = [read_last_per_step(path / "metrics.jsonl")[-1]["samples_seen"] for path in (run, self.whole)]
        self.note("curve", run=run.name, fault=fault, samples=seen[0] - seen[1])
        if not fault:
            shutil.rmtree(run)

    def figures(self) -> dict[str, Any]:
        """Counts of all lines so far."""
        every, curves = self.lines("kill"), self.lines("curve")
        done = [line for line in every if "gone_s" in line]  # the others fell behind the end: nobody was killed
        rows = []
        for where in PLACES:
            for victim in VICTIMS:
                hits = [k for k in done if (k["where"], k["victim"], k["outcome"]) == (where, victim, "hit")]
                counts = {name: sum(int(k[name]) for k in hits) for name in COUNTED}
                rows.append({"where": where, "victim": victim, "kills": len(hits), **counts})
        return {
            "benchmark": "kills",
            **{name: sum(row[name] for row in rows) for name in ("kills", "inside", "torn", "relaunched")},
            "missed_the_write": sum(k["outcome"] == "missed" for k in every),
            "after_the_end": sum(k["outcome"] == "late" for k in every),
            "refused": len(self.lines("refused")),
            "orphans": sum(k["orphans"] for k in done),
            "checkpoints_lost": sum(k["checkpoints_lost"] for k in done),
            "curves": len(curves),
            "differing_curves": sum(bool(c["fault"]) for c in curves),
            "samples_lost_or_doubled": sum(abs(c["samples"]) for c in curves),
            "longest_end_s": max((k["gone_s"] for k in done), default=0.0),
            "steps": self.steps,
            "commits": sorted({line["commit"] for line in [*every, *curves]}),
            "rows": rows,
        }


def broken(figures: dict[str, Any]) -> list[str]:
    """Promises that the counts do not bear out."""
    never = ("refused", "orphans", "checkpoints_lost", "differing_curves", "samples_lost_or_doubled")
    return [f"{name}: {figures[name]}" for name in never if figures[name]]


def main(argv: list[str] | None = None) -> int:
    """Go on with a drill; 1 where something was not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="runs and lines; a drill in it goes on")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--save", action="store_true", help="keep a dated result in benchmarks/results")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the job in hand is ended, too
    given.folder.mkdir(parents=True, exist_ok=True)
    drill = Drill(given.folder, given.kills)
    drill.go_on()
    figures = drill.figures()
    if given.save:
        save("kills", figures, f"python -m tests.faults.kills --folder DIR --kills {given.kills}", drill.began)
    print(json.dumps(figures))
    return 1 if broken(figures) else 0


if __name__ == "__main__":
    sys.exit(main())
