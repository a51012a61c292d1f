"""ZeRO-2 through the trainer against a plain loop, and checkpoints that change the number of processes.

Five launches (2, 1, 3 and 4 processes, and 2 without ZeRO) run every trial; the tests only compare what they left.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
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

pytestmark = pytest.mark.timeout(1800)  # the first test waits for all launches
FP32 = "--engine.ds_config=ds_configs/zero2_fp32_cpu.json"
EXACT = [
    *TINY, "--augment.enabled=false", "--model.dropout=0", "--model.metadata_dropout=0", "--loss.balance=0",
    "--data.workers=0", "--engine.threads=1", "--training.validate_every_steps=1000000", "--training.grad_clip=0",
]  # fmt: skip
"""Same micro-batches give the same numbers: no dropout, no balance term (not linear in the ranks), no clipping."""
STEPS = 6
BITWISE: dict[str, list[str]] = {
    **{name: [] for name in ("bf16-1x8x1", "bf16-1x2x4", "bf16-2x4x1", "bf16-2x1x4", "bf16-4x2x1", "bf16-4x1x4")},
    "bf16-2x1x4-short": [],
    "each-2x1x4": ["--engine.hold_gradients=false"],
    "sophia-2x2x2": ["--optimizer.name=sophia", "--optimizer.hessian_every=2"],
    "sophia-2x4x1": ["--optimizer.name=sophia", "--optimizer.hessian_every=2"],
    **{name: [FP32] for name in ("fp32-1x1x4", "fp32-2x1x4", "fp32-4x1x1")},
}
TRIALS = {**BITWISE, "clip-2x2x2": [FP32, "--training.grad_clip=0.3"]}
"""Trial -> its options; the name says precision, processes x micro-batch x accumulation."""
STEPS_OF = dict.fromkeys(BITWISE, 20) | {"bf16-2x1x4-short": 2}
"""Optimizer steps of a trial that is not STEPS long: in twenty a rounding that is lost now and then has time to show."""
TRAPS = {
    "bf16 sums": "gradient",
    "only the last micro-batch": "gradient",
    "a sum that is cleared": "gradient",
    "divided twice": "gradient",
    "a scheduler per process": "rate",
    "a short last step counted as full": "loss",
}
"""Trap -> the comparison that must notice it. Sprung in the trial TRAPPED."""
TRAPPED = "bf16-2x1x4-short"
SGD_STEPS = 20
SGD_OPTIONS = [
    FP32, "--training.learning_rate=0.02", f"--training.max_steps={SGD_STEPS}", "--optimizer.weight_decay=0",
]  # fmt: skip
ONE_BATCH = "sgd-1x16x1"
SGD = dict.fromkeys([ONE_BATCH, "sgd-1x4x4", "sgd-2x8x1", "sgd-2x2x4", "sgd-4x4x1", "sgd-4x1x4"], SGD_OPTIONS)
"""1, 2 and 4 processes, accumulation 1 and 4: all of them against ONE process that takes the 16 photos of a step at once."""
PLAIN_ENGINE, HUTCHINSON = "plain-2x2x2", "sophia_h-2x2x2"
WITHOUT_ZERO = {
    PLAIN_ENGINE: [],
    HUTCHINSON: ["--optimizer.name=sophia_h", "--optimizer.hessian_every=2"],
}
"""No ZeRO, bf16 autocast over fp32 weights (ddp.yaml): close to the reference."""
CLIPPED = {f"clipped-{world}x1x{steps}": ["--training.grad_clip=0.3"] for world in (1, 2, 4) for steps in (1, 4)}
"""bf16 whose gradients are clipped: close as well, for an ulp of the norm becomes a rounding of every weight."""
STEPS_OF |= {name: 20 for name in CLIPPED if name.endswith("x1")}
DIRECT = "sophia-direct"
"""The elastic trial of that optimizer, on three processes from the checkpoint of two."""
ELASTIC: dict[str, list[str]] = {
    "adam": ["--training.global_batch=12"],
    "sophia": ["--training.global_batch=12", FP32, "--optimizer.name=sophia", "--optimizer.hessian_every=2"],
}


def exact(shards: Path, *more: str) -> list[str]:
    return [*EXACT, f"--data.shards={shards}", *more]


def steps_of(name: str) -> int:
    return SGD_STEPS if name in SGD else STEPS_OF.get(name, STEPS)


def shape(name: str) -> tuple[int, int, int]:
    """Processes, micro-batch and accumulation of a trial."""
    world, micro, steps = (int(number) for number in name.split("-")[1].split("x"))
    return world, micro, steps


def batch_of(name: str) -> int:
    """Photos of an optimizer step."""
    return math.prod(shape(name))


def photos_of(name: str) -> int:
    """Photos of a trial whose last step is cut short by the end of the run, to a third of a batch."""
    batch = batch_of(name)
    return (steps_of(name) - 1) * batch + -(-batch // 3)


def options_of(name: str, shards: Path) -> list[str]:
    """Everything that a trial is started with."""
    from roadwork.data.index import ShardIndex

    options = {**TRIALS, **SGD, **CLIPPED, **WITHOUT_ZERO}[name]
    end = f"--training.epochs={photos_of(name) / len(ShardIndex.open(str(shards), 'train'))!r}"
    sizes = [f"--training.micro_batch={shape(name)[1]}", f"--training.global_batch={batch_of(name)}"]
    return exact(shards, *sizes, *options, *([] if name in SGD else [end]))


def trials_on(processes: int, names: Iterable[str], shards: Path, **more: Any) -> list[dict[str, Any]]:
    """What the worker is told of the trials with that many processes."""
    return [
        {"name": name, "options": options_of(name, shards), "until": steps_of(name), **more}
        for name in names
        if shape(name)[0] == processes
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


def launched(
    folder: Path, processes: int, trials: list[dict[str, Any]], config: str = "cpu.yaml"
) -> dict[str, dict[str, Any]]:
    """Run the trials on that many processes; what each left, by name."""
    place = folder / (str(processes) if config == "cpu.yaml" else config)
    place.mkdir(exist_ok=True)
    (place / "trials.json").write_text(json.dumps(trials))
    job = start("tests/distributed/exact_worker.py", str(place / "trials.json"), processes=processes, config=config)
    try:
        done = job.wait(900)
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

    def elastic(processes: int, until: int, save_at: int) -> list[dict[str, Any]]:
        common = exact(shards, "--training.max_steps=4")
        return [
            {"name": name, "options": [*common, *options], "until": until, "save_at": save_at}
            for name, options in ELASTIC.items()
        ]

    def keep(processes: int, trials: list[dict[str, Any]]) -> None:
        for name, seen in launched(folder, processes, trials).items():
            found[f"{name}@{processes}" if name in ELASTIC else name] = seen

    def parity(processes: int) -> list[dict[str, Any]]:
        return [
            *trials_on(processes, [*TRIALS, *CLIPPED], shards),
            *trials_on(processes, SGD, shards, sgd=True),
        ]

    warm = {"name": "warm", "options": exact(shards, f"--model.init_from={stranger(folder, shards)}"), "until": 0}
    (healthy,) = trials_on(2, [TRAPPED], shards)
    trapped = [{**healthy, "name": trap, "trap": trap} for trap in TRAPS]
    for trial in trapped:  # DeepSpeed's own accumulation has traps of its own
        if trial["trap"] == "only the last micro-batch":
            trial["options"] = [*trial["options"], "--engine.hold_gradients=false"]
    keep(2, [*parity(2), *elastic(2, 4, 2), *trapped])
    for name in ELASTIC:  # 2 -> 1
        shutil.copytree(folder / "2" / name, folder / "1" / name)
    keep(1, [*parity(1), *elastic(1, 4, 3), warm])
    for name in ELASTIC:  # 2 -> 1 -> 3
        shutil.copytree(folder / "1" / name, folder / "3" / name)
    shutil.copytree(folder / "2" / "sophia", folder / "3" / DIRECT)  # 2 -> 3
    direct = next(t for t in elastic(3, 4, 4) if t["name"] == "sophia") | {"name": DIRECT}
    keep(3, [*elastic(3, 4, 4), direct])
    for name in ELASTIC:  # 2 -> 4; twelve photos are three for each, so the micro-batches shrink
        shutil.copytree(folder / "2" / name, folder / "4" / name)
    four = [{**t, "options": [*t["options"], "--training.micro_batch=1"]} for t in elastic(4, 3, 3)]
    keep(4, [*parity(4), *four])
    found |= launched(folder, 2, trials_on(2, WITHOUT_ZERO, shards), config="ddp.yaml")
    return found


@pytest.fixture(scope="module")
def plain(shards: Path) -> Iterator[Callable[[str], Plain]]:
    """The reference of a trial, computed once."""
    made: dict[str, Plain] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: the order of summation depends on it

    def of(name: str) -> Plain:
        if name not in made:
            options, steps = options_of(name, shards), steps_of(name)
            autocast = name in WITHOUT_ZERO
            dtype = torch.float32 if FP32 in options or autocast else torch.bfloat16
            run = Run(options, shape(name)[0], dtype, autocast)
            c = run.config.training
            made[name] = run.train(steps, lambda s: cosine_with_warmup(s, steps, c.warmup_steps, c.min_lr_ratio))
        return made[name]

    yield of
    torch.set_num_threads(threads)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over all tensors."""
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", BITWISE)
def test_weights_and_average_equal_a_plain_loop(runs: dict[str, Any], plain: Callable[[str], Plain], name: str) -> None:
    """Catches bf16 accumulation, a lost micro-batch, a short last step that is weighted wrong, rounded masters.

    Bit-equal, AdamW and Sophia-G alike: bf16 with fp32 masters on 1, 2 and 4 processes, accumulation 1 and 4, after 20 steps.
    """
    end, reference = runs[name]["end"], plain(name)
    # fp32 products are summed in an order that depends on where the process's memory lies: an ulp, in some processes.
    allowed = 1e-5 if FP32 in TRIALS[name] else 0.0
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
    config, reference = parse("pretrain", [*EXACT, *TRIALS[name]]).config, plain(name)
    o = config.optimizer
    beta = o.betas[0] if o.name == "adamw" else o.sophia_betas[0]
    limit = config.training.grad_clip
    factor = limit / (reference.norms[0] + 1e-6) if limit else 1.0
    expected = {tensor: g * factor for tensor, g in reference.first_gradient.items()}
    assert not wrong_gradients(runs[name], expected, beta)


def wrong_gradients(
    seen: dict[str, Any], expected: dict[str, torch.Tensor], beta: float = 0.9, summed_otherwise: bool = False
) -> set[str]:
    """Tensors whose gradient in the first step is further than 1e-6 of its largest element from the expected one.

    `summed_otherwise`: micro-batches or ranks are added in another order than the reference's. A tensor whose gradient is a
    sum of terms that all but cancel (the last bias of the fusion's importance net: the quotient takes out what all gates
    share) then has the rounding of its terms, so 1e-8 of the model's largest gradient is allowed besides.
    """
    found = {name: moment / (1 - beta) for name, moment in seen["first"]["exp_avg"].items()}
    size = {name: float(expected[name].abs().max()) for name in found}
    rounding = 1e-8 * max(size.values()) if summed_otherwise else 0.0
    return {name for name, g in found.items() if float((g - expected[name]).abs().max()) > 1e-6 * size[name] + rounding}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_that_is_put_back_is_noticed(runs: dict[str, Any], plain: Callable[[str], Plain], trap: str) -> None:
    """Each of the silent ways to go wrong makes the comparison fail that is meant for it, and the trial is else healthy."""
    seen, healthy, reference = runs[trap], runs[TRAPPED], plain(TRAPPED)
    noticed = {
        "gradient": bool(wrong_gradients(seen, reference.first_gradient)),
        "rate": [line["lr"] for line in seen["records"]] != reference.rates,
        "loss": [line["loss"] for line in seen["records"]] != pytest.approx(reference.losses, rel=1e-6),
    }
    assert noticed[TRAPS[trap]]
    assert apart(seen["end"]["master"], healthy["end"]["master"]) > 0, "the trap changed nothing"


@pytest.mark.parametrize("name", CLIPPED)
def test_clipped_in_bf16_every_shape_starts_as_the_plain_loop_and_stays_close(
    runs: dict[str, Any], plain: Callable[[str], Plain], name: str
) -> None:
    """Within noise: losses to 2 %, and weights to a fifth of the way that they went."""
    seen, reference = runs[name], plain(name)
    begun, lines = seen["start"]["master"], seen["records"]
    assert max(reference.norms) > 0.3, "nothing was clipped"
    assert lines[0]["grad_norm"] == pytest.approx(reference.norms[0], rel=1e-5)
    assert lines[0]["loss"] == pytest.approx(reference.losses[0], rel=1e-6)
    assert [line["loss"] for line in lines] == pytest.approx(reference.losses, rel=0.02)
    moved = sum(float((whole - begun[n]).square().sum()) for n, whole in reference.masters.items()) ** 0.5
    off = sum(float((whole - seen["end"]["master"][n]).square().sum()) for n, whole in reference.masters.items()) ** 0.5
    assert off < 0.2 * moved


def test_plain_data_parallelism_computes_what_one_process_computes(
    runs: dict[str, Any], plain: Callable[[str], Plain]
) -> None:
    """accelerate_configs/ddp.yaml: the same loop without ZeRO, averaged over two processes."""
    seen, reference = runs[PLAIN_ENGINE], plain(PLAIN_ENGINE)
    assert seen["ranks"] == 2 and "engine" not in seen
    lines = seen["records"]
    assert [line["lr"] for line in lines] == reference.rates
    assert [line["loss"] for line in lines] == pytest.approx(reference.losses, rel=1e-3)
    assert lines[0]["grad_norm"] == pytest.approx(reference.norms[0], rel=1e-5)
    assert not wrong_gradients(seen, reference.first_gradient, summed_otherwise=True)
    assert all(seen["chosen"][position] == reference.chosen[position] for position in range(8))


def test_sophia_h_on_two_processes_averages_the_hessian_and_leaves_data_parallelism_alone(
    runs: dict[str, Any], plain: Callable[[str], Plain]
) -> None:
    """An estimate of one rank alone, or a hook of torch's data parallelism that fires in it, would show."""
    seen, reference = runs[HUTCHINSON], plain(HUTCHINSON)
    found = seen["first"]["hessian"]
    assert set(found) == set(reference.first_estimate)
    largest = max(float(h.abs().max()) for h in reference.first_estimate.values())
    assert largest > 0 and apart(found, reference.first_estimate) < 1e-5 * largest
    lines = seen["records"]
    assert lines[0]["grad_norm"] == pytest.approx(reference.norms[0], rel=1e-5)
    assert [line["lr"] for line in lines] == reference.rates
    assert [line["loss"] for line in lines] == pytest.approx(reference.losses, rel=1e-3)


@pytest.mark.parametrize("name", TRIALS)
def test_what_is_logged_is_global_and_the_rate_is_the_schedules(
    runs: dict[str, Any], plain: Callable[[str], Plain], name: str
) -> None:
    seen, reference = runs[name], plain(name)
    steps = steps_of(name)
    lines = seen["records"]
    assert [line["loss"] for line in lines] == pytest.approx(reference.losses, rel=1e-6)
    assert [line["grad_norm"] for line in lines] == pytest.approx(reference.norms, rel=1e-5)
    # Stepped once per process (AcceleratedScheduler), the rate would be at its floor half-way.
    assert [line["lr"] for line in lines] == reference.rates
    assert seen["rates"] == pytest.approx([reference.rates[-1]] * len(seen["rates"]))
    batch = batch_of(name)
    assert [line["samples_seen"] for line in lines] == [*range(batch, batch * steps, batch), photos_of(name)]


@pytest.mark.parametrize("name", TRIALS)
def test_the_same_views_are_kept_and_go_to_the_same_experts(
    runs: dict[str, Any], plain: Callable[[str], Plain], name: str
) -> None:
    chosen = runs[name]["chosen"]
    assert sorted(chosen) == list(range(batch_of(name) * steps_of(name)))
    assert chosen == plain(name).chosen
    experts = {tuple(pair) for _, tokens in chosen.values() for layers in tokens for pair in layers}
    assert len(experts) > 1, "every view went to the same experts: nothing was compared"


def plain_descent(shards: Path, name: str, steps: int) -> Plain:
    """Gradient descent in fp32 with the micro-batches of a trial, in one process and without the engine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = Run(options_of(name, shards), shape(name)[0], torch.float32, sgd=True)
    c = run.config.training
    found = run.train(steps, lambda s: cosine_with_warmup(s, SGD_STEPS, c.warmup_steps, c.min_lr_ratio))
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def descent(shards: Path) -> Plain:
    """Twenty steps of one process that takes the 16 photos of a step at once."""
    return plain_descent(shards, ONE_BATCH, SGD_STEPS)


@pytest.mark.parametrize("name", SGD)
def test_the_first_step_of_gradient_descent_has_the_gradients_of_a_plain_loop(
    runs: dict[str, Any], shards: Path, name: str
) -> None:
    """With the same micro-batches: other shapes of a product add up in another order, a few 1e-6 of the largest."""
    reference = plain_descent(shards, name, 1)
    velocity = {"first": {"exp_avg": runs[name]["first"]["momentum_buffer"]}}
    assert not wrong_gradients(velocity, reference.first_gradient, beta=0.0, summed_otherwise=True)


@pytest.mark.parametrize("name", SGD)
def test_twenty_steps_of_gradient_descent_are_those_of_one_plain_process(
    runs: dict[str, Any], descent: Plain, name: str
) -> None:
    """Losses, rates and choices of 20 steps, and the weights after them, whatever the micro-batches."""
    seen = runs[name]
    assert apart(seen["end"]["master"], descent.masters) < 1e-6
    assert apart(seen["start"]["master"], descent.masters) > 1e-3, "nothing was trained"
    assert [line["loss"] for line in seen["records"]] == pytest.approx(descent.losses, abs=1e-6)
    assert [line["lr"] for line in seen["records"]] == descent.rates
    assert seen["chosen"] == descent.chosen


def test_curvature_leaves_the_engines_counters_alone(runs: dict[str, Any]) -> None:
    """A curvature pass every other step: only the real steps are counted."""
    name = "sophia-2x2x2"
    assert runs[name]["engine"] == {"global_steps": steps_of(name), "micro_steps": steps_of(name), "skipped": 0}


def test_a_warm_start_begins_from_the_given_weights_in_fp32(runs: dict[str, Any], folder: Path) -> None:
    given = load_file(folder / "stranger" / "model.safetensors")
    begun = runs["warm"]["start"]["master"]
    assert runs["warm"]["counters"]["step"] == 0
    assert apart(begun, {name: given[name].float() for name in begun}) == 0
    assert apart(begun, runs["bf16-1x2x4"]["start"]["master"]) > 1e-3


@pytest.mark.parametrize("name", ELASTIC)
@pytest.mark.parametrize(("to", "source"), [(1, 2), (3, 1), (4, 2)], ids=["2 to 1", "2 to 1 to 3", "2 to 4"])
def test_another_number_of_processes_loads_every_bit(runs: dict[str, Any], name: str, to: int, source: int) -> None:
    """Masters, moments, average, curvature: what was gathered right after loading is what was saved."""
    stored, loaded = runs[f"{name}@{source}"]["saved"], runs[f"{name}@{to}"]["start"]
    expected = {"master", "average", "exp_avg", "exp_avg_sq", "scalars"}
    assert set(loaded) == expected | ({"hessian", "adam_avg"} if name == "sophia" else set())
    for part, tensors in loaded.items():
        assert apart(tensors, stored[part]) == 0, part


def test_three_processes_load_every_bit_of_two(runs: dict[str, Any]) -> None:
    for part, tensors in runs[DIRECT]["start"].items():
        assert apart(tensors, runs["sophia@2"]["saved"][part]) == 0, part


@pytest.mark.parametrize(
    ("name", "steps"), [("sophia@1", {3, 4}), ("sophia@3", {4}), ("sophia@4", {3}), (DIRECT, {3, 4})]
)
def test_after_a_change_of_processes_a_step_has_the_same_photos(
    runs: dict[str, Any], name: str, steps: set[int]
) -> None:
    """And in fp32 the same views and experts for each."""
    stayed, chosen = runs["sophia@2"]["chosen"], runs[name]["chosen"]
    assert set(chosen) == {position for step in steps for position in range((step - 1) * 12, step * 12)}
    assert chosen == {position: stayed[position] for position in chosen}


def test_losses_after_a_change_of_processes_are_the_same(runs: dict[str, Any]) -> None:
    """fp32: only the order of summation differs."""
    stayed = {line["step"]: line["loss"] for line in runs["sophia@2"]["records"]}
    for name, steps in (("sophia@1", {3, 4}), ("sophia@3", {4}), ("sophia@4", {3}), (DIRECT, {3, 4})):
        lines = {line["step"]: line["loss"] for line in runs[name]["records"]}
        assert set(lines) == steps
        for step, loss in lines.items():
            assert loss == pytest.approx(stayed[step], abs=1e-6)
