"""ZeRO-2 through the trainer against a plain loop, and checkpoints that change the number of processes.

Three launches (2, 1 and 3 processes) run every trial; the tests only compare what they left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from roadwork.command_line import parse
from roadwork.training.parts import build_data, build_model
from roadwork.training.schedule import cosine_with_warmup
from tests.distributed.plain_loop import Plain, Run
from tests.launching import TINY, start

pytestmark = pytest.mark.timeout(900)  # the first test waits for all launches
FP32 = "--engine.ds_config=ds_configs/zero2_fp32_cpu.json"
EXACT = [
    *TINY, "--augment.enabled=false", "--model.dropout=0", "--model.metadata_dropout=0", "--loss.balance=0",
    "--data.workers=0", "--engine.threads=1", "--training.validate_every_steps=1000000", "--training.grad_clip=0",
]  # fmt: skip
"""Same micro-batches give the same numbers: no dropout, no balance term (not linear in the ranks), no clipping."""
STEPS = 6
SHORT = 3
"""Photos of a last step that is cut short by the end of the run."""
TRIALS: dict[str, tuple[int, list[str]]] = {
    "bf16-2x4x1": (2, ["--training.micro_batch=4"]),
    "bf16-2x1x4": (2, ["--training.micro_batch=1"]),
    "bf16-1x2x4": (1, ["--training.micro_batch=2"]),
    "fp32-2x1x4": (2, ["--training.micro_batch=1", FP32]),
    "clip-2x2x2": (2, ["--training.micro_batch=2", FP32, "--training.grad_clip=0.3"]),
    "sophia-2x2x2": (2, ["--training.micro_batch=2", "--optimizer.name=sophia", "--optimizer.hessian_every=2"]),
}
"""Trial -> processes and options; the name says precision, processes x micro-batch x accumulation."""
ELASTIC: dict[str, list[str]] = {
    "adam": ["--training.global_batch=12"],
    "sophia": ["--training.global_batch=12", FP32, "--optimizer.name=sophia", "--optimizer.hessian_every=2"],
}


def exact(shards: Path, *more: str) -> list[str]:
    return [*EXACT, f"--data.shards={shards}", *more]


def end_of_run(shards: Path) -> str:
    """An option that ends the run in step STEPS with SHORT photos."""
    from roadwork.data.index import ShardIndex

    return f"--training.epochs={((STEPS - 1) * 8 + SHORT) / len(ShardIndex.open(str(shards), 'train'))!r}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


def launched(folder: Path, processes: int, trials: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run the trials on that many processes; what each left, by name."""
    place = folder / str(processes)
    place.mkdir(exist_ok=True)
    (place / "trials.json").write_text(json.dumps(trials))
    job = start("tests/distributed/exact_worker.py", str(place / "trials.json"), processes=processes)
    try:
        done = job.wait(280)
    finally:
        job.kill()
    assert done.status == 0, done.output[-4000:]
    return {t["name"]: torch.load(place / f"{t['name']}.pt", weights_only=True) for t in trials}


def stranger(folder: Path, shards: Path) -> Path:
    """A saved model with other weights than a fresh run's."""
    config = parse("pretrain", exact(shards, "--seed=7")).config
    model = build_model(config, build_data(config).view_size).model
    return model.save_pretrained(folder / "stranger")


@pytest.fixture(scope="module")
def runs(folder: Path, shards: Path) -> dict[str, Any]:
    """Every trial's results; the elastic ones as NAME@PROCESSES."""
    found: dict[str, Any] = {}

    def parity(processes: int) -> list[dict[str, Any]]:
        return [
            {"name": name, "options": exact(shards, end_of_run(shards), *options), "until": STEPS}
            for name, (world, options) in TRIALS.items()
            if world == processes
        ]

    def elastic(processes: int, until: int, save_at: int) -> list[dict[str, Any]]:
        common = exact(shards, "--training.max_steps=4")
        return [
            {"name": name, "options": [*common, *options], "until": until, "save_at": save_at}
            for name, options in ELASTIC.items()
        ]

    def keep(processes: int, trials: list[dict[str, Any]]) -> None:
        for name, seen in launched(folder, processes, trials).items():
            found[f"{name}@{processes}" if name in ELASTIC else name] = seen

    warm = {"name": "warm", "options": exact(shards, f"--model.init_from={stranger(folder, shards)}"), "until": 0}
    keep(2, [*parity(2), *elastic(2, 4, 2)])
    for name in ELASTIC:  # 2 -> 1
        shutil.copytree(folder / "2" / name, folder / "1" / name)
    keep(1, [*parity(1), *elastic(1, 4, 3), warm])
    for name in ELASTIC:  # 2 -> 1 -> 3
        shutil.copytree(folder / "1" / name, folder / "3" / name)
    keep(3, elastic(3, 4, 4))
    return found


@pytest.fixture(scope="module")
def plain(shards: Path) -> Iterator[Callable[[str], Plain]]:
    """The reference of a trial, computed once."""
    made: dict[str, Plain] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: the order of summation depends on it

    def of(name: str) -> Plain:
        if name not in made:
            world, options = TRIALS[name]
            dtype = torch.float32 if FP32 in options else torch.bfloat16
            run = Run(exact(shards, end_of_run(shards), *options), world, dtype)
            c = run.config.training
            made[name] = run.train(STEPS, lambda s: cosine_with_warmup(s, STEPS, c.warmup_steps, c.min_lr_ratio))
        return made[name]

    yield of
    torch.set_num_threads(threads)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over all tensors."""
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


BITWISE = [name for name in TRIALS if not name.startswith("clip")]


@pytest.mark.parametrize("name", BITWISE)
def test_weights_and_average_equal_a_plain_loop(runs: dict[str, Any], plain: Callable[[str], Plain], name: str) -> None:
    """Catches bf16 accumulation, a lost micro-batch, a short last step that is weighted wrong, rounded masters."""
    end, reference = runs[name]["end"], plain(name)
    # fp32 products are summed in an order that depends on where the process's memory lies: an ulp, in some processes.
    allowed = 1e-6 if FP32 in TRIALS[name][1] else 0.0
    assert apart(end["master"], reference.masters) <= allowed
    assert apart(end["average"], reference.average) <= allowed
    assert apart(runs[name]["start"]["master"], end["master"]) > 1e-4, "nothing was trained"
    if "hessian" in end:
        assert max(float(h.max()) for h in reference.hessian.values()) > 0
        assert apart(end["hessian"], reference.hessian) <= allowed


def test_clipping_is_of_the_global_norm(runs: dict[str, Any], plain: Callable[[str], Plain]) -> None:
    """Every step's norm is above the limit; clipped per rank or per tensor, the weights would be far off."""
    name = "clip-2x2x2"
    assert min(plain(name).norms) > 0.3
    assert apart(runs[name]["end"]["master"], plain(name).masters) < 1e-6


@pytest.mark.parametrize("name", TRIALS)
def test_the_gradient_of_the_first_step_is_right_in_every_tensor(
    runs: dict[str, Any], plain: Callable[[str], Plain], name: str
) -> None:
    """Adam hides a wrong scale of the gradient (a loss divided twice); its first moment does not."""
    config, reference = parse("pretrain", [*EXACT, *TRIALS[name][1]]).config, plain(name)
    o = config.optimizer
    beta = o.betas[0] if o.name == "adamw" else o.sophia_betas[0]
    limit = config.training.grad_clip
    factor = limit / (reference.norms[0] + 1e-6) if limit else 1.0
    for tensor, moment in runs[name]["first"]["exp_avg"].items():
        expected = reference.first_gradient[tensor] * factor
        assert float((moment / (1 - beta) - expected).abs().max()) <= 1e-6 * float(expected.abs().max()), tensor


@pytest.mark.parametrize("name", TRIALS)
def test_what_is_logged_is_global_and_the_rate_is_the_schedules(
    runs: dict[str, Any], plain: Callable[[str], Plain], name: str
) -> None:
    seen, reference = runs[name], plain(name)
    lines = seen["records"]
    assert [line["loss"] for line in lines] == pytest.approx(reference.losses, rel=1e-6)
    assert [line["grad_norm"] for line in lines] == pytest.approx(reference.norms, rel=1e-5)
    # Stepped once per process (AcceleratedScheduler), the rate would be at its floor half-way.
    assert [line["lr"] for line in lines] == reference.rates
    assert seen["rates"] == pytest.approx([reference.rates[-1]] * len(seen["rates"]))
    assert [line["samples_seen"] for line in lines] == [8, 16, 24, 32, 40, 40 + SHORT]


@pytest.mark.parametrize("name", [name for name in TRIALS if not name.startswith("sophia")])
def test_pruning_keeps_the_same_views(runs: dict[str, Any], plain: Callable[[str], Plain], name: str) -> None:
    assert runs[name]["kept"] == plain(name).kept


def test_curvature_leaves_the_engines_counters_alone(runs: dict[str, Any]) -> None:
    """Three curvature passes in six steps: only the six real steps are counted."""
    assert runs["sophia-2x2x2"]["engine"] == {"global_steps": STEPS, "micro_steps": STEPS, "skipped": 0}


def test_a_warm_start_begins_from_the_given_weights_in_fp32(runs: dict[str, Any], folder: Path) -> None:
    given = load_file(folder / "stranger" / "model.safetensors")
    begun = runs["warm"]["start"]["master"]
    assert runs["warm"]["counters"]["step"] == 0
    assert apart(begun, {name: given[name].float() for name in begun}) == 0
    assert apart(begun, runs["bf16-1x2x4"]["start"]["master"]) > 1e-3


@pytest.mark.parametrize("name", ELASTIC)
@pytest.mark.parametrize(("to", "source"), [(1, 2), (3, 1)], ids=["2 to 1", "2 to 1 to 3"])
def test_another_number_of_processes_loads_every_bit(runs: dict[str, Any], name: str, to: int, source: int) -> None:
    """Masters, moments, average, curvature: what was gathered right after loading is what was saved."""
    stored, loaded = runs[f"{name}@{source}"]["saved"], runs[f"{name}@{to}"]["start"]
    expected = {"master", "average", "exp_avg", "exp_avg_sq", "scalars"}
    assert set(loaded) == expected | ({"hessian", "adam_avg"} if name == "sophia" else set())
    for part, tensors in loaded.items():
        assert apart(tensors, stored[part]) == 0, part


def test_losses_after_a_change_of_processes_are_the_same(runs: dict[str, Any]) -> None:
    """fp32: only the order of summation differs."""
    stayed = {line["step"]: line["loss"] for line in runs["sophia@2"]["records"]}
    for processes, steps in ((1, {3, 4}), (3, {4})):
        lines = {line["step"]: line["loss"] for line in runs[f"sophia@{processes}"]["records"]}
        assert set(lines) == steps
        for step, loss in lines.items():
            assert loss == pytest.approx(stayed[step], abs=1e-6)
