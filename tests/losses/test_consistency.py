import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon

from roadwork.errors import UserError
from roadwork.losses import ViewConsistencyLoss, ViewSupervision, pool_views


def logits(b: int = 5, v: int = 4, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(b, v, 2, generator=torch.Generator().manual_seed(0)) * scale


def test_two_views_are_scipys_jensen_shannon():
    z = logits(20, 2).double()
    p = z.softmax(-1).numpy()
    theirs = np.mean([jensenshannon(a, b) ** 2 for a, b in p])
    assert ViewConsistencyLoss()(z).item() == pytest.approx(theirs, rel=1e-9)


def test_it_is_the_mean_divergence_from_the_mean():
    z = logits(1, 6)
    p = z[0].softmax(-1)
    mean = p.mean(0)
    by_torch = F.kl_div(mean.log().expand_as(p), p, reduction="none").sum(-1).mean()
    torch.testing.assert_close(ViewConsistencyLoss()(z), by_torch)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1e4])
def test_never_negative_and_at_most_ln_two(scale):
    loss = ViewConsistencyLoss()
    for z in logits(50, 8, scale):
        assert 0 <= loss(z[None]).item() <= math.log(2) + 1e-6


@pytest.mark.parametrize("views", [2, 3, 5, 8, 12])
def test_equal_views_give_zero_and_rounding_nothing_below(views):
    """Half of these would be negative, were rounding left as it falls."""
    z = logits(1000, 1).expand(-1, views, 2)
    each = ViewConsistencyLoss().elements(z, torch.ones(1000, views, dtype=torch.bool))
    assert each.min() >= 0 and each.max() < 2e-7


def test_descent_lowers_disagreement():
    z = logits().requires_grad_()
    loss = ViewConsistencyLoss()
    before = loss(z)
    before.backward()
    assert loss(z - 5.0 * z.grad) < before


def test_padding_and_single_views_do_not_count():
    z, mask = logits(3, 4), torch.ones(3, 4, dtype=torch.bool)
    mask[0, 2:] = False
    mask[1, 1:] = False
    z[0, 2:], z[1] = float("nan"), 7.0
    z.requires_grad_()
    got = ViewConsistencyLoss()(z, mask)
    alone = ViewConsistencyLoss()
    torch.testing.assert_close(got, (alone(z[:1, :2]) + alone(z[2:])) / 2)
    got.backward()
    assert z.grad.isfinite().all() and (z.grad[1] == 0).all()


def test_temperature_divides_logits():
    z = logits()
    torch.testing.assert_close(ViewConsistencyLoss(2.0)(z), ViewConsistencyLoss()(z / 2))
    with pytest.raises(UserError, match="temperature"):
        ViewConsistencyLoss(0.0)


def test_gradcheck_in_float64():
    z = logits(3, 4).double().requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: ViewConsistencyLoss(1.5)(x, mask), z)
    target = torch.tensor([1, 0, -100])
    for how in ("attention", "noisy_or", "max", "mean"):
        weight = torch.rand(3, 4, dtype=torch.float64) + 0.1
        assert torch.autograd.gradcheck(
            lambda x, w, how=how: ViewSupervision(how)(x, target, mask, w), (z, weight.requires_grad_())
        )


def test_pooling():
    z = torch.tensor([[[0.0, 2.0], [0.0, -3.0], [0.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    p = torch.sigmoid(torch.tensor([2.0, -3.0]))
    noisy = pool_views(z, mask, how="noisy_or").softmax(-1)[0, 1]
    torch.testing.assert_close(noisy, 1 - (1 - p).prod())
    torch.testing.assert_close(pool_views(z, mask, how="max"), z[:, 0])
    torch.testing.assert_close(pool_views(z, mask), z[:, :2].mean(1))
    attention = torch.tensor([[0.2, 0.6, 0.2]])
    torch.testing.assert_close(pool_views(z, mask, attention), (0.25 * z[:, 0] + 0.75 * z[:, 1]))


def test_view_supervision_is_cross_entropy_of_the_pooled_logits_and_trains_every_view():
    z = logits(4, 3).requires_grad_()
    target = torch.tensor([0, 1, 1, -100])
    loss = ViewSupervision()(z, target)
    torch.testing.assert_close(loss, F.cross_entropy(z.mean(1), target))
    loss.backward()
    assert (z.grad[:3] != 0).all() and (z.grad[3] == 0).all()


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\[B, V, C\]"):
        ViewConsistencyLoss()(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="view_mask"):
        ViewConsistencyLoss()(torch.zeros(3, 4, 2), torch.ones(3, 4))
