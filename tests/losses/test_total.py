import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from roadwork.config import LossConfig
from roadwork.errors import UserError
from roadwork.losses import (
    Counts,
    FocalLoss,
    SegmentationLoss,
    Targets,
    TotalLoss,
    ViewConsistencyLoss,
    WeatherLoss,
)
from tests.launching import free_port, spawn

B, V, K = 8, 6, 4


def outputs(dtype=torch.float32, seed=0) -> SimpleNamespace:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    mask = torch.ones(B, K, dtype=torch.bool)
    mask[0, 2:] = False
    mask[1, 1:] = False
    return SimpleNamespace(
        logits=randn(B, 2),
        view_logits=randn(B, K, 2),
        view_mask=mask,
        kept=torch.stack([torch.randperm(V, generator=g)[:K].sort().values for _ in range(B)]),
        weather_logits=randn(B, 8),
        seg_logits=randn(B, K, 6, 8, 8),
        attention=torch.rand(B, K, generator=g).to(dtype),
        balance=torch.tensor(2.0, requires_grad=True),
    )


def targets(**changes) -> Targets:
    g = torch.Generator().manual_seed(1)
    values = {
        "label": torch.randint(0, 2, (B,), generator=g),
        "weather": torch.randint(0, 8, (B,), generator=g),
        "masks": (torch.rand(B, V, 6, 16, 16, generator=g) > 0.5).to(torch.uint8),
        "masks_valid": torch.rand(B, 6, generator=g) > 0.3,
        "weight": torch.ones(B),
    }
    return Targets(**{**values, **changes})


def tensors(out: SimpleNamespace) -> list[torch.Tensor]:
    return [out.logits, out.view_logits, out.weather_logits, out.seg_logits]


def rows(out: SimpleNamespace, keep: slice) -> SimpleNamespace:
    return SimpleNamespace(**{k: v if k == "balance" else v[keep] for k, v in vars(out).items()})


def target_rows(t: Targets, keep: slice, counts: Counts) -> Targets:
    masks = None if t.masks is None else t.masks[keep]
    return Targets(t.label[keep], t.weather[keep], masks, t.masks_valid[keep], t.weight[keep], counts)


def test_the_weights_are_the_configured_ones():
    config = LossConfig()
    total, terms = TotalLoss(config)(outputs(), targets())
    by_hand = (
        0.40 * terms["focal"]
        + 0.25 * (0.5 * terms["consistency"] + 0.5 * terms["view"])
        + 0.15 * terms["weather"]
        + 0.20 * terms["segmentation"]
        + 0.5 * terms["view_labels"]
        + 0.01 * terms["balance"]
    )
    torch.testing.assert_close(total, by_hand)
    torch.testing.assert_close(terms["loss"], by_hand)
    assert {"loss", "focal", "consistency", "weather", "segmentation", "balance"} <= set(terms)
    assert not any(t.requires_grad or t.dim() for t in terms.values())


def test_masks_follow_the_kept_views():
    out, t = outputs(), targets()
    gathered = torch.stack([t.masks[b, out.kept[b]] for b in range(B)])
    valid = out.view_mask[:, :, None] & t.masks_valid[:, None]
    loss = TotalLoss(LossConfig())
    torch.testing.assert_close(loss(out, t)[1]["segmentation"], loss.segmentation(out.seg_logits, gathered, valid))


def test_ramp_scales_only_the_agreement():
    loss = TotalLoss(LossConfig())
    full, terms = loss(outputs(), targets())
    none, _ = loss(outputs(), targets(), ramp=0.0)
    torch.testing.assert_close(full - none, 0.125 * terms["consistency"])


@pytest.mark.parametrize("as_tensors", [False, True])
def test_absent_terms_leave_their_weight_to_the_others(as_tensors):
    out = outputs()
    t = targets(weather=torch.full((B,), -100), masks=None, masks_valid=torch.zeros(B, 6, dtype=torch.bool))
    if not as_tensors:
        t.counts = Counts(label=8.0, weather=0.0, views=7.0, segmentation=0.0)
    total, terms = TotalLoss(LossConfig(balance=0.0))(out, t)
    expected = (0.40 * terms["focal"] + 0.125 * (terms["view"] + terms["consistency"])) / 0.65
    torch.testing.assert_close(total, expected)
    total.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors(out))


def test_a_term_absent_here_but_present_in_the_step_keeps_its_weight():
    t = targets(weather=torch.full((B,), -100), counts=Counts(label=8.0, weather=3.0, views=7.0, segmentation=80.0))
    weights = TotalLoss(LossConfig()).weights(t.counts)
    assert weights["weather"] == pytest.approx(0.15) and weights["focal"] == pytest.approx(0.40)
    assert TotalLoss(LossConfig())(outputs(), t)[1]["weather"].item() == 0


def test_nothing_at_all_is_a_zero_with_a_gradient():
    out = outputs()
    total, _ = TotalLoss(LossConfig(balance=0.0))(out, targets(weight=torch.zeros(B)))
    total.backward()
    assert total.item() == 0 and all((x.grad == 0).all() for x in tensors(out))


def test_photos_of_weight_zero_contribute_nothing():
    out, t = outputs(), targets()
    t.weight[[2, 5]] = 0
    with torch.no_grad():
        for x in tensors(out):
            x[[2, 5]] = float("nan")
    total, _ = TotalLoss(LossConfig())(out, t)
    total.backward()
    keep = torch.tensor([0, 1, 3, 4, 6, 7])
    small = TotalLoss(LossConfig())(rows(out, keep), target_rows(t, keep, None))[0]
    torch.testing.assert_close(total, small)
    assert all(x.grad.isfinite().all() and (x.grad[[2, 5]] == 0).all() for x in tensors(out))


@pytest.mark.parametrize("on_host", [False, True])
def test_parts_sum_to_the_whole_step(on_host):
    out, t = outputs(), targets()
    t.label[3], t.weather[:5] = -100, -100
    loss = TotalLoss(LossConfig())
    whole, terms = loss(out, t)
    expected = torch.autograd.grad(whole, tensors(out))
    pieces = [slice(0, 1), slice(1, 4), slice(4, 8)]
    vector = sum(
        Counts.local(t.label[s], t.weather[s], out.view_mask[s].sum(1), t.masks_valid[s], t.weight[s]) for s in pieces
    )
    counts = Counts.of(vector, parts=3) if on_host else Counts(*vector.unbind(), parts=3)
    parts = [loss(rows(out, s), target_rows(t, s, counts)) for s in pieces]
    torch.testing.assert_close(sum(p[0] for p in parts), whole)
    for name, term in terms.items():
        torch.testing.assert_close(sum(p[1][name] for p in parts), term)
    torch.testing.assert_close(torch.autograd.grad(sum(p[0] for p in parts), tensors(out)), expected)


def test_half_precision_outputs_are_computed_in_fp32():
    total, terms = TotalLoss(LossConfig())(outputs(torch.bfloat16), targets())
    assert total.dtype == torch.float32 and all(v.dtype == torch.float32 for v in terms.values())


def test_gradcheck_in_float64():
    t = targets(label=torch.tensor([0, 1, -100, 1, 0, 1, 0, 1]))

    def total(logits, view_logits, weather_logits, seg_logits):
        out = outputs(torch.float64)
        out.logits, out.view_logits, out.weather_logits, out.seg_logits = (
            logits,
            view_logits,
            weather_logits,
            seg_logits,
        )
        return TotalLoss(LossConfig())(out, t)[0]

    out = outputs(torch.float64)
    out.seg_logits = torch.randn(B, K, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total, tuple(tensors(out)), fast_mode=True)


class Syncs(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else ()
        boolean = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name in self.WAITING or boolean or (name == "lift_fresh" and args[0].numel()):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tensor_counts", [False, True])
def test_no_host_sync_forward_or_backward(tensor_counts):
    out, t = outputs(torch.bfloat16), targets()
    t.weight[2] = 0
    if not tensor_counts:
        t.counts = Counts(7.0, 7.0, 6.0, 80.0, parts=2.0)
    with Syncs() as syncs:
        TotalLoss(LossConfig(alpha=[0.5, 1.5]))(out, t, 0.3)[0].backward()
    assert syncs.seen == []


def test_the_counter_sees_a_sync():
    x = torch.randn(4)
    with Syncs() as syncs:
        x.sum().item()
        x[x > 0]
        x.new_tensor([1.0, 2.0])
    assert len(syncs.seen) >= 3


def _uneven_process(rank: int, port: int, results: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    logits, label = torch.load(results + "/in.pt", weights_only=True)
    mine = logits[:8] if rank == 0 else logits[8:]
    target = torch.full((8,), -100)
    target[: 1 if rank == 0 else 7] = label[:1] if rank == 0 else label[1:]
    leaf = mine.clone().requires_grad_()
    out = SimpleNamespace(
        logits=leaf,
        view_logits=torch.zeros(8, 1, 2, requires_grad=True),
        view_mask=torch.ones(8, 1, dtype=torch.bool),
        kept=torch.zeros(8, 1, dtype=torch.long),
        weather_logits=torch.zeros(8, 8, requires_grad=True),
        seg_logits=None,
        balance=None,
    )
    t = Targets(target, torch.full((8,), -100), None, torch.zeros(8, 6, dtype=torch.bool), torch.ones(8))
    vector = Counts.local(t.label, t.weather, out.view_mask.sum(1), t.masks_valid, t.weight)
    dist.all_reduce(vector)
    t.counts = Counts.of(vector, parts=2)
    config = LossConfig(consistency=0.0, gamma=0.0, label_smoothing=0.0)
    loss, _ = TotalLoss(config)(out, t)
    loss.backward()
    whole = loss.detach().clone()
    dist.all_reduce(whole)
    torch.save((whole, leaf.grad), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_one_label_here_and_seven_there_give_the_mean_of_eight(tmp_path):
    g = torch.Generator().manual_seed(5)
    logits, label = torch.randn(16, 2, generator=g), torch.randint(0, 2, (8,), generator=g)
    torch.save((logits, label), tmp_path / "in.pt")
    spawn(_uneven_process, free_port(), str(tmp_path))
    labelled = torch.cat([logits[:1], logits[8:15]]).requires_grad_()
    # the only term present takes the whole weight that is configured: 0.40 + 0.15 + 0.20
    expected = 0.75 * F.cross_entropy(labelled, label)
    expected.backward()
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(saved[0][0], expected.detach())
    torch.testing.assert_close(torch.cat([saved[0][1][:1], saved[1][1][:7]]), labelled.grad)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="loss.weather"):
        TotalLoss(LossConfig(weather=-0.1))
    with pytest.raises(UserError, match="view_supervision"):
        TotalLoss(LossConfig(view_supervision=1.5))


FOUR = (0.40, 0.25, 0.15, 0.20)
NAMES = ("focal", "consistency", "weather", "segmentation")


@pytest.mark.parametrize("weights", [FOUR, list(FOUR), dict(zip(NAMES, FOUR, strict=True))])
def test_four_weights_are_the_sum_of_the_four_single_losses_and_nothing_else(weights):
    out, t = outputs(torch.float64), targets()
    counted = TotalLoss(weights)(out, t)[0]  # from tensors, whose weights are fp32
    batch = torch.arange(B)[:, None]
    valid = out.view_mask[:, :, None] & t.masks_valid[:, None]
    by_hand = (
        0.40 * FocalLoss(2.0, None, 0.1)(out.logits, t.label)
        + 0.25 * ViewConsistencyLoss()(out.view_logits, out.view_mask)
        + 0.15 * WeatherLoss()(out.weather_logits, t.weather)
        + 0.20 * SegmentationLoss()(out.seg_logits, t.masks[batch, out.kept], valid)
    )
    t.counts = Counts(float(B), float(B), float((out.view_mask.sum(1) >= 2).sum()), float(valid.sum()))
    torch.testing.assert_close(TotalLoss(weights)(out, t)[0], by_hand, rtol=1e-14, atol=0)
    torch.testing.assert_close(counted, by_hand, rtol=3e-7, atol=0)


def test_without_weights_the_defaults_count():
    assert TotalLoss().config == LossConfig()
    assert torch.equal(TotalLoss()(outputs(), targets())[0], TotalLoss(weights=LossConfig())(outputs(), targets())[0])


@pytest.mark.parametrize(
    "weights",
    [(0.4, 0.25, 0.15), 0.4, "four", {"focal": 1.0}, dict.fromkeys((*NAMES, "balance"), 0.1), (0.4, 0.25, 0.15, -1),
     (0.4, 0.25, float("nan"), 0.2), (0.4, 0.25, "x", 0.2), (0.4, 0.25, float("inf"), 0.2)],
)  # fmt: skip
def test_other_weights_are_refused_in_one_line(weights):
    with pytest.raises(UserError, match=r"give (a LossConfig, or the four of focal|a weight >= 0)") as error:
        TotalLoss(weights)
    assert "\n" not in str(error.value)


def test_masks_tell_the_view_head_which_views_show_roadwork() -> None:
    """Cross entropy against 'any pixel of any class', only where every class's mask is valid."""
    out, t = outputs(), targets()
    assert t.masks is not None
    t.masks_valid = torch.ones_like(t.masks_valid)
    t.masks_valid[0, 2] = False  # one class unknown: what the view shows is unknown
    _, terms = TotalLoss(LossConfig())(out, t)
    there = (t.weight > 0)[:, None] & out.view_mask
    there[0] = False
    batch = torch.arange(B)[:, None]
    shows = (t.masks[batch, out.kept] > 0.5).flatten(2).any(-1).long()
    expected = torch.nn.functional.cross_entropy(out.view_logits[there], shows[there])
    torch.testing.assert_close(terms["view_labels"], expected.float(), rtol=1e-5, atol=1e-6)
