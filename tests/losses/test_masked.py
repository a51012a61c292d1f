"""The pieces under every loss: sums over what is valid, counts of a whole step, values that must not leak."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from roadwork.config import LossConfig
from roadwork.losses import Counts, FocalLoss, SegmentationLoss, Targets, TotalLoss, ViewConsistencyLoss, WeatherLoss
from roadwork.losses.consistency import Pooling, pool_views
from roadwork.losses.masked import hide, masked_mean, over_count, upcast
from roadwork.losses.segmentation import coverage


@pytest.mark.parametrize(
    ("given_type", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_alone_is_raised(given_type: torch.dtype, computed: torch.dtype) -> None:
    assert upcast(torch.zeros(2, dtype=given_type)).dtype == computed


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_hidden_values_pass_neither_themselves_nor_a_gradient(poison: float) -> None:
    x = torch.tensor([[1.0, 2.0], [poison, poison], [3.0, 4.0]], requires_grad=True)
    valid = torch.tensor([True, False, True])
    hidden = hide(x, valid)
    assert hidden.tolist() == [[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]
    hidden.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("count", "mean"), [(None, 2.0), (4.0, 1.0), (torch.tensor(4.0), 1.0), (torch.tensor(8, dtype=torch.int64), 0.5)]
)
def test_the_mean_is_over_the_count_that_is_given(count: float | Tensor | None, mean: float) -> None:
    values, valid = torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False])
    assert masked_mean(values, valid, count).item() == mean


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0), torch.tensor(0)])
def test_over_nothing_is_an_exact_zero_with_a_gradient(zero: float | Tensor) -> None:
    x = torch.ones(3, requires_grad=True)
    loss = over_count(hide(x, torch.zeros(3, dtype=torch.bool)).sum(), zero)
    loss.backward()
    assert loss.item() == 0 and x.grad is not None and not x.grad.any()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=1, max_size=20), st.integers(1, 5))
def test_parts_over_one_count_add_up_however_they_are_cut(rows: list[tuple[float, bool]], parts: int) -> None:
    values = torch.tensor([value for value, _ in rows], dtype=torch.float64)
    valid = torch.tensor([good for _, good in rows])
    whole = masked_mean(values, valid)
    edges = [len(rows) * i // parts for i in range(parts + 1)]
    count = float(valid.sum())
    pieces = [masked_mean(values[a:b], valid[a:b], count) for a, b in itertools.pairwise(edges)]
    assert float(sum(pieces)) == pytest.approx(float(whole), abs=1e-9)


# ----------------------------------------------------------------------------------------- values by hand


def test_focal_by_hand() -> None:
    """p = 0.8 for the truth: 0.2^2 * -ln 0.8; with smoothing 0.1, both classes count."""
    logits, target = torch.tensor([[0.0, math.log(4.0)]]), torch.tensor([1])
    plain = 0.2**2 * -math.log(0.8)
    assert FocalLoss(2.0)(logits, target).item() == pytest.approx(plain, rel=1e-5)
    assert FocalLoss(2.0, [1.0, 0.25])(logits, target).item() == pytest.approx(0.25 * plain, rel=1e-5)
    smooth = 0.95 * plain + 0.05 * 0.8**2 * -math.log(0.2)
    assert FocalLoss(2.0, None, 0.1)(logits, target).item() == pytest.approx(smooth, rel=1e-5)


@settings(max_examples=60)
@given(st.floats(-20, 20), st.floats(0, 5), st.floats(0, 5))
def test_more_focus_never_raises_the_loss(margin: float, gamma: float, more: float) -> None:
    logits, target = torch.tensor([[0.0, margin]], dtype=torch.float64), torch.tensor([1])
    less = FocalLoss(gamma)(logits, target).item()
    assert 0 <= FocalLoss(gamma + more)(logits, target).item() <= less * (1 + 1e-9)


def test_weather_by_hand() -> None:
    logits = torch.zeros(2, 8)
    logits[0, 3] = math.log(7.0)
    target = torch.tensor([3, 0])
    assert WeatherLoss()(logits, target).item() == pytest.approx((math.log(2.0) + math.log(8.0)) / 2, rel=1e-6)


def test_consistency_by_hand() -> None:
    """Two views that are sure of opposite classes: ln 2. Two of three agreeing: the entropy of 1/3."""
    sure = 40.0
    opposite = torch.tensor([[[sure, 0.0], [0.0, sure]]])
    assert ViewConsistencyLoss()(opposite).item() == pytest.approx(math.log(2), rel=1e-5)
    third = torch.tensor([[[sure, 0.0], [0.0, sure], [0.0, sure]]])
    entropy = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    assert ViewConsistencyLoss()(third).item() == pytest.approx(entropy, rel=1e-5)


@settings(max_examples=40)
@given(st.permutations(range(5)), st.integers(0, 1000))
def test_the_order_of_the_views_means_nothing(order: list[int], seed: int) -> None:
    views = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    attention = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    torch.testing.assert_close(
        ViewConsistencyLoss()(views[:, order], mask[:, order]), ViewConsistencyLoss()(views, mask)
    )
    hows: tuple[Pooling, ...] = ("attention", "noisy_or", "max", "mean")
    for how in hows:
        one = pool_views(views, mask, attention, how)
        torch.testing.assert_close(pool_views(views[:, order], mask[:, order], attention[:, order], how), one)


def test_pooling_by_hand() -> None:
    views = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    p = torch.sigmoid(torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64))
    either = 1 - (1 - p).prod()
    assert pool_views(views, how="noisy_or").softmax(-1)[0, 1].item() == pytest.approx(float(either))
    assert pool_views(views, how="mean")[0].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert pool_views(views, how="max")[0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("how", ["attention", "noisy_or", "max", "mean"])
def test_a_photo_without_a_view_and_views_without_attention_stay_finite(how: Pooling) -> None:
    views = torch.full((2, 3, 2), math.nan)
    views[1] = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)) * 30
    mask = torch.tensor([[False] * 3, [True] * 3])
    pooled = pool_views(views, mask, torch.zeros(2, 3), how)
    assert pooled.isfinite().all()


@pytest.mark.parametrize("margin", [-200.0, 200.0])
def test_noisy_or_of_certain_views_is_finite_with_its_gradient(margin: float) -> None:
    views = torch.tensor([[[0.0, margin]] * 12], requires_grad=True)
    pooled = pool_views(views, how="noisy_or")
    pooled.logsumexp(-1).sum().backward()
    assert pooled.isfinite().all() and views.grad is not None and views.grad.isfinite().all()
    assert (pooled.argmax(-1).item() == 1) == (margin > 0)


def test_noisy_or_still_learns_where_every_view_denies_what_is_there() -> None:
    views = torch.tensor([[[0.0, -40.0]] * 3], requires_grad=True)
    pooled = pool_views(views, how="noisy_or").log_softmax(-1)[0, 1]
    pooled.backward()
    assert pooled.item() == pytest.approx(math.log(3) - 40)
    assert views.grad is not None
    torch.testing.assert_close(views.grad[0, :, 1], torch.full((3,), 1 / 3))


def test_segmentation_by_hand() -> None:
    """One triple of 2 x 2 pixels with p = 1/2 everywhere and one pixel set."""
    logits = torch.zeros(1, 1, 6, 2, 2)
    target = torch.tensor([[1, 0], [0, 0]]).expand(1, 1, 6, 2, 2)
    dice = (2 * 0.5 + 1) / (2.0 + 1.0 + 1)
    loss = SegmentationLoss()(logits, target)
    assert loss.item() == pytest.approx(1 - dice + math.log(2), rel=1e-6)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_an_empty_mask_that_is_answered_with_nothing_costs_nothing(size: int) -> None:
    """Smoothing 1: without it, Dice of two empty masks would be 0 / 0."""
    logits = torch.full((1, 1, 6, size, size), -60.0)
    loss = SegmentationLoss()(logits, torch.zeros_like(logits), torch.ones(1, 1, 6, dtype=torch.bool))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("value", [1, 6, 255])
def test_any_number_but_zero_is_there(kind: torch.dtype, value: int) -> None:
    masks = torch.zeros(1, 1, 1, 4, 4, dtype=torch.int64)
    masks[..., :2, :] = value
    share = coverage(masks.to(kind), (2, 2), torch.float32)
    assert share[0, 0, 0].tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_a_share_of_a_cell_stays_a_share() -> None:
    soft = torch.tensor([[[[[0.25, -1.0], [3.0, 0.5]]]]])
    assert coverage(soft, (2, 2), torch.float64).flatten().tolist() == [0.25, 0.0, 1.0, 0.5]
    assert coverage(soft, (1, 1), torch.float32).item() == pytest.approx((0.25 + 0 + 1 + 0.5) / 4)


# --------------------------------------------------------------------------------------------- the whole


def outputs(batch: int, kept: int, views: int) -> SimpleNamespace:
    g = torch.Generator().manual_seed(batch)
    return SimpleNamespace(
        logits=torch.randn(batch, 2, generator=g, requires_grad=True),
        view_logits=torch.randn(batch, kept, 2, generator=g, requires_grad=True),
        view_mask=torch.ones(batch, kept, dtype=torch.bool),
        kept=torch.stack([torch.randperm(views, generator=g)[:kept] for _ in range(batch)]),
        weather_logits=torch.randn(batch, 8, generator=g, requires_grad=True),
        seg_logits=torch.randn(batch, kept, 6, 4, 4, generator=g, requires_grad=True),
        balance=None,
    )


def targets(batch: int, views: int) -> Targets:
    g = torch.Generator().manual_seed(batch + 1)
    return Targets(
        torch.randint(0, 2, (batch,), generator=g),
        torch.randint(0, 8, (batch,), generator=g),
        (torch.rand(batch, views, 6, 8, 8, generator=g) > 0.5).to(torch.uint8),
        torch.ones(batch, 6, dtype=torch.bool),
        torch.ones(batch),
    )


TERMS = ("focal", "consistency", "weather", "segmentation")


@pytest.mark.parametrize("missing", [c for n in range(4) for c in itertools.combinations(TERMS, n)])
def test_what_is_absent_from_a_step_leaves_its_weight_to_the_others(missing: tuple[str, ...]) -> None:
    counts = {name: 0.0 if name in missing else 5.0 for name in TERMS}
    found = TotalLoss(LossConfig(view_supervision=0.0)).weights(
        Counts(counts["focal"], counts["weather"], counts["consistency"], counts["segmentation"])
    )
    assert sum(float(weight) for weight in found.values()) == pytest.approx(1.0)
    assert {name for name in TERMS if float(found[name]) == 0} == set(missing)
    config = LossConfig()
    left = [name for name in TERMS if name not in missing]
    ratios = {float(found[name]) / getattr(config, name) for name in left}
    assert max(ratios) == pytest.approx(min(ratios))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_step_of_nothing_has_no_weights_and_no_division_by_zero(as_tensor: bool) -> None:
    counts = Counts.of(torch.zeros(5, dtype=torch.float64))
    if as_tensor:
        counts = Counts(*torch.zeros(5).unbind())
    weights = TotalLoss(LossConfig()).weights(counts)
    assert all(float(weight) == 0 for weight in weights.values())


def test_counts_of_a_micro_batch_by_hand() -> None:
    found = Counts.local(
        label=torch.tensor([0, 1, -100, 1]),
        weather=torch.tensor([2, -100, -100, 7]),
        kept_views=torch.tensor([8, 1, 4, 8]),
        masks_valid=torch.tensor([[True] * 6, [True] * 6, [True] + [False] * 5, [True] * 6]),
        weight=torch.tensor([1.0, 1.0, 1.0, 0.0]),
    )
    # the last photo is not there; view labels need every class
    assert found.tolist() == [2, 1, 2, 8 * 6 + 6 + 4, 8 + 1]
    assert Counts.of(found, parts=3) == Counts(2.0, 1.0, 2.0, 58.0, 9.0, 3)


@pytest.mark.parametrize("ramp", [0.0, 0.5, 1.0])
def test_the_ramp_weighs_agreement_alone(ramp: float) -> None:
    out, t = outputs(4, 3, 5), targets(4, 5)
    config = LossConfig(view_labels=0.0, balance=0.0)
    full, terms = TotalLoss(config)(out, t)
    ramped, _ = TotalLoss(config)(out, t, ramp)
    weight = float(TotalLoss(config).weights(Counts(4.0, 4.0, 4.0, 72.0))["consistency"])
    torch.testing.assert_close(ramped, full.detach() - (1 - ramp) * weight * terms["consistency"])


@pytest.mark.parametrize("without", ["masks", "seg_logits"])
def test_without_masks_or_their_head_segmentation_is_a_zero(without: str) -> None:
    out, t = outputs(3, 2, 4), targets(3, 4)
    if without == "masks":
        t.masks = None
    else:
        out.seg_logits = None
    loss, terms = TotalLoss(LossConfig())(out, t)
    assert terms["segmentation"].item() == terms["view_labels"].item() == 0 and loss.isfinite()
    loss.backward()
    assert out.logits.grad.isfinite().all()


def test_a_photo_is_told_by_its_label_whatever_stands_beside_it() -> None:
    """One labelled photo among unknown ones gives the loss of that photo alone."""
    out, t = outputs(5, 2, 3), targets(5, 3)
    config = LossConfig(consistency=0.0, weather=0.0, segmentation=0.0, view_labels=0.0, balance=0.0)
    t.label[:] = -100
    t.label[2] = 1
    loss, _ = TotalLoss(config)(out, t)
    alone = config.focal * FocalLoss(config.gamma, config.alpha, config.label_smoothing)(
        out.logits[2:3], torch.tensor([1])
    )
    torch.testing.assert_close(loss, alone)
    assert F.cross_entropy(out.logits[2:3], torch.tensor([1])).item() > 0
