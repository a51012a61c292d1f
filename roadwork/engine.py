"""Starts Accelerate, DeepSpeed and the process group, and checks that they agree.

Training, inference and labelling stand on this. An accelerate configuration decides how many processes run and on which
engine; without one, ZeRO-2 bf16 is built here from `ds_configs/` for however many processes the launcher started.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from roadwork.config import Config, accumulation
from roadwork.cpu_bf16 import widen_products
from roadwork.cpu_memory import keep_freed_memory
from roadwork.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

ROOT = Path(__file__).resolve().parent.parent
GPU_CONFIG = ROOT / "ds_configs" / "zero2_bf16.json"
CPU_CONFIG = ROOT / "ds_configs" / "zero2_bf16_cpu.json"
GRACE_S = 15.0
"""Seconds by which a collective outlives `engine.timeout_s`, so that the heartbeats can say first who hangs."""
_PARENT = os.getppid()
Value = TypeVar("Value")


def launched_rank() -> int:
    """Rank that the launcher gave this process; 0 where it gave none."""
    return int(os.environ.get("RANK", 0))


def launched_world_size() -> int:
    """Processes that the launcher started; 1 where it does not say."""
    return int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Engine:
    """One process's view of the running job.

    Attributes:
        accelerator: Accelerate's object; `prepare` and `backward` go through it.
        rank: index of this process, 0..world_size-1.
        world_size: number of processes.
        device: where tensors live.
        sharded: whether DeepSpeed ZeRO partitions the optimizer.
    """

    accelerator: Accelerator
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    sharded: bool
    timeout_s: float

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files."""
        return self.rank == 0

    @classmethod
    def start(cls, config: Config, stage: str, trains: bool = False) -> Engine:
        """Join the process group and build the engine.

        Args:
            config: the run's options.
            stage: name of the stage, for messages.
            trains: the stage calls `prepare`; its batch sizes must then divide over the processes.

        Raises:
            UserError: batch sizes that do not divide, what `zero_settings` refuses, an engine other than asked for.
        """
        steps = accumulation(config, launched_world_size()) if trains else 1
        die_with_parent()
        on_cpu = set_up_device(config)
        _default_environment()
        plugin = _deepspeed_plugin(config, zero_settings(config, on_cpu, trains), on_cpu, steps)
        accelerator = _accelerator(config, plugin, on_cpu, steps)
        engine = cls(
            accelerator=accelerator,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            local_rank=accelerator.local_process_index,
            device=accelerator.device,
            sharded=plugin is not None,
            timeout_s=config.engine.timeout_s,
        )
        engine._check(stage)
        return engine

    def _check(self, stage: str) -> None:
        """Accelerate can report one process while DeepSpeed sees two: a run that only LOOKS distributed."""
        seen = {"launcher": launched_world_size(), "accelerate": self.world_size}
        if dist.is_initialized():
            seen["process group"] = dist.get_world_size()
        if len(set(seen.values())) != 1:
            raise UserError(
                f"{stage}: {', '.join(f'{k} sees {v}' for k, v in seen.items())} processes; they must agree "
                "(remove use_cpu from the accelerate configuration: the CPU engine runs over gloo without it)"
            )

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Wrap model and optimizer; every process group gets the engine's time-out.

        UserError where DeepSpeed counts other processes than Accelerate.
        """
        model, optimizer = self.accelerator.prepare(model, optimizer)
        if self.sharded:
            world = self.accelerator.deepspeed_engine_wrapped.engine.dp_world_size
            if world != self.world_size:
                raise UserError(f"DeepSpeed sees {world} processes and Accelerate {self.world_size}; they must agree")
        self._set_timeouts()
        return model, optimizer

    def _set_timeouts(self) -> None:
        """DeepSpeed makes its groups without a time-out (30 minutes); Accelerate's reaches only the default group."""
        if not dist.is_initialized():
            return
        from torch.distributed import distributed_c10d as c10d

        set_timeout = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout  # private up to torch 2.13
        for group in list(c10d._world.pg_map):
            set_timeout(timedelta(seconds=self.timeout_s + GRACE_S), group)

    def all_reduce(self, value: torch.Tensor, op: Any = None) -> torch.Tensor:
        """Reduce a tensor of any shape in place over all processes (sum by default); returns it. Collective."""
        if self.world_size > 1:
            dist.all_reduce(value, op=op or dist.ReduceOp.SUM)
        return value

    def gather_object(self, items: list[Any]) -> list[Any]:
        """Every process's list, concatenated in rank order, on every process."""
        if self.world_size == 1:
            return list(items)
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def broadcast_object(self, value: Value) -> Value:
        """Rank 0's value on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def die_with_parent() -> None:
    """Let the kernel kill this process when its launcher dies (Linux; elsewhere nothing), so that no orphan trains on."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return
    if os.getppid() != _PARENT:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def set_up_device(config: Config) -> bool:
    """Choose the device, and this process's threads and kernels for it; True: the CPU. Must run before CUDA is touched.

    A stage that builds a model before its engine calls it itself; the engine's own call then changes nothing.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    on_cpu = _choose_device(config)
    _set_threads(config.engine.threads)
    if on_cpu:
        widen_products()
        keep_freed_memory()
    return on_cpu


def _choose_device(config: Config) -> bool:
    """Whether to compute on the CPU."""
    asked = config.engine.device
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    # A launcher configuration chooses the CPU by its DeepSpeed file: this variable would leave each rank alone.
    by_launcher = named.endswith("_cpu.json") or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device is cuda, but this machine shows no GPU; use cpu or auto")
    on_cpu = asked == "cpu" or (asked == "auto" and (by_launcher or not torch.cuda.is_available()))
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    return on_cpu


def _default_environment() -> None:
    """Rank and rendezvous for a process that no launcher described (plain `python`, one-process `accelerate launch`)."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))


def _set_threads(threads: int) -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local))


def ds_config_file(config: Config, on_cpu: bool) -> Path | None:
    """The DeepSpeed file in force: `engine.ds_config`, else the launcher's, else the built-in one; None: no ZeRO."""
    launcher_engine = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    launcher_plain = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no" and not launcher_engine
    if config.engine.ds_config == "none" or (launcher_plain and not config.engine.ds_config):
        return None
    given = config.engine.ds_config or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    return Path(given) if given else (CPU_CONFIG if on_cpu else GPU_CONFIG)


def zero_settings(config: Config, on_cpu: bool, trains: bool = True) -> dict[str, Any] | None:
    """DeepSpeed's settings from the file in force; None: no ZeRO. Starts nothing.

    Raises:
        UserError: what `read_ds_config` refuses, or an optimizer that ZeRO cannot train with.
    """
    path = ds_config_file(config, on_cpu)
    if path is None:
        return None
    if trains and config.optimizer.name == "sophia_h":
        raise UserError(
            "optimizer.name sophia_h steps on whole parameters, ZeRO on flat shards of them; give "
            "--engine.ds_config none (with accelerate_configs/ddp.yaml for several processes), or --optimizer.name sophia"
        )
    return read_ds_config(path)


def _deepspeed_plugin(config: Config, settings: dict[str, Any] | None, on_cpu: bool, steps: int) -> Any:
    """The ZeRO plugin of `zero_settings`; None: no ZeRO."""
    if settings is None:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # else Accelerate builds the launcher's engine all the same
        return None
    from accelerate import DeepSpeedPlugin

    _spare_the_compiler(on_cpu)
    settings["train_micro_batch_size_per_gpu"] = config.training.micro_batch
    settings["gradient_accumulation_steps"] = steps
    settings["gradient_clipping"] = config.training.grad_clip
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(steps)
    os.environ.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)
    return DeepSpeedPlugin(hf_ds_config=settings)


def _spare_the_compiler(on_cpu: bool) -> None:
    """Keep DeepSpeed from compiling, or loading compilers for, what nothing here calls.

    Its Muon asks for `torch.compile` when it is imported, which loads Inductor in every rank (3 s). On a CPU it builds an
    operation in shared memory at start (a minute once, then 20 s per launch), which serves `inference_all_reduce` alone:
    gloo does every reduction of ZeRO.
    """
    import deepspeed.ops

    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read at each request
    with contextlib.suppress(ImportError):  # it lies elsewhere in another version: only the time is lost
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    if before is None:
        del os.environ["TORCHDYNAMO_DISABLE"]
    else:
        os.environ["TORCHDYNAMO_DISABLE"] = before


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed file. Raises UserError for a setting that this trainer cannot keep exact."""
    if not path.is_file():
        raise UserError(f"no DeepSpeed configuration at {path}; use one of {', '.join(sorted(_shipped()))}")
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2):
        raise UserError(f"{path} asks for ZeRO stage {stage}; supported: 1, 2")
    if "train_batch_size" in settings:
        raise UserError(f"{path} sets train_batch_size; remove it: training.global_batch decides")
    if settings.get("bf16", {}).get("enabled"):
        for key, found in (
            ("data_types.grad_accum_dtype", settings.get("data_types", {}).get("grad_accum_dtype")),
            ("communication_data_type", settings.get("communication_data_type")),
        ):
            if found != "fp32":
                raise UserError(f"{path} has {key} {found}; it must be fp32, or micro-batches are summed in bf16")
        if not settings["bf16"].get("check_grad_overflow", True):
            raise UserError(f"{path} turns bf16.check_grad_overflow off; a NaN would then reach the weights")
    return settings


def _shipped() -> list[str]:
    return [f"ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")]


def _accelerator(config: Config, plugin: Any, on_cpu: bool, steps: int) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs

    bf16 = plugin is None or plugin.deepspeed_config.get("bf16", {}).get("enabled", False)
    group = InitProcessGroupKwargs(
        backend="gloo" if on_cpu else "nccl", timeout=timedelta(seconds=config.engine.timeout_s)
    )
    # Some trainable parameters get no gradient, such as a token that the backbone's forward pass does not use.
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    return Accelerator(
        # Without DeepSpeed, Accelerate sees one process on each rank of a machine without GPUs unless it is told.
        cpu=plugin is None and on_cpu and launched_world_size() > 1,
        mixed_precision="bf16" if bf16 else "no",
        deepspeed_plugin=plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps, sync_with_dataloader=False),
        kwargs_handlers=[group, parallel],
        step_scheduler_with_optimizer=False,
    )
