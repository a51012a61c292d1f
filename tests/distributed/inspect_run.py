"""Trains like launch/pretrain.py and writes what this rank saw: argv[1] is the path's stem, the rest are options."""

import hashlib
import json
import sys

import torch
from torch.distributed import distributed_c10d as c10d

import roadwork.training.loop as loop
import roadwork.training.masters as masters
import roadwork.training.pretrain as stage
from roadwork.command_line import parse
from roadwork.training.loop import Trainer
from roadwork.training.validation import validate
from tests.training.reads import Reads

stem, positions = sys.argv[1], {}
masters.BUCKET = 5000  # so that a small network is gathered in several


class Watched(Trainer):
    """Notes positions before each micro-step, and weights and partition after the run."""

    def _micro_step(self, step, micro, batch, counts):  # type: ignore[no-untyped-def]
        positions.setdefault(step, []).extend(int(p) for p in batch.position)
        return super()._micro_step(step, micro, batch, counts)

    def optimizer_step(self, step, batches):  # type: ignore[no-untyped-def]
        with Reads() as self.reads:
            return super().optimizer_step(step, batches)

    def _validate(self) -> bool:
        def watched(*given, **named):  # type: ignore[no-untyped-def]
            self.validated = {"average": self._computes_with(average), "weights": self._computes_with(weights)}
            return validate(*given, **named)

        average = self.average.whole()
        weights = dict(self.masters.gather(self.masters.flats()))
        loop.validate = watched
        return super()._validate()

    def _computes_with(self, whole: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(p, whole[name].to(p.dtype)) for name, p in self.masters.parameters.items())

    def _finish(self) -> None:
        super()._finish()
        weights = b"".join(p.detach().float().cpu().numpy().tobytes() for p in self.masters.parameters.values())
        engine = self.engine.accelerator.deepspeed_engine_wrapped.engine
        host = torch.device("cpu")
        seen = {
            "weights": hashlib.sha256(weights).hexdigest(),
            "dtype": str(next(iter(self.masters.parameters.values())).dtype),
            "stage": engine.zero_optimization_stage(),
            "world_size": self.engine.world_size,
            "positions": [positions[step] for step in sorted(positions)],
            "owned": sum(state["exp_avg"].numel() for state in self.masters.states()),
            "parameters": sum(p.numel() for p in self.masters.parameters.values()),
            "held": self._held(),
            "validated": self.validated,
            "gathered": self._computes_with(dict(self.masters.gather(self.masters.flats()))),
            "waits": self.reads.waits(),
            "timeouts": sorted(
                {group._get_backend(host).options._timeout.total_seconds() for group in c10d._world.pg_map}
            ),
        }
        with open(f"{stem}-{self.engine.rank}.json", "w") as file:
            json.dump(seen, file)

    def _held(self) -> dict[str, int]:
        """Bytes of the tensors that live from step to step."""
        states = [v for state in self.masters.states() for k, v in state.items() if k != "step"]
        return {
            "weights": sum(p.nbytes for p in self.model.parameters()),
            "masters": sum(flat.nbytes for flat in self.masters.flats()),
            "optimizer": sum(tensor.nbytes for tensor in states),
            "average": sum(flat.nbytes for flat in self.average.flats),
        }


stage.Trainer = Watched  # type: ignore[misc]
stage.pretrain(parse("pretrain", sys.argv[2:]).config)
