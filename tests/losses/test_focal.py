import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss as reference

from roadwork.errors import UserError
from roadwork.losses import FocalLoss, sigmoid_focal_loss


def batch(n: int = 64, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, classes, generator=g) * 3, torch.randint(0, classes, (n,), generator=g)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_gamma_zero_is_cross_entropy(smoothing):
    logits, target = batch()
    ours = FocalLoss(0.0, None, smoothing)(logits, target)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target, label_smoothing=smoothing))


def test_alpha_weighs_classes_as_cross_entropy_does_per_photo():
    logits, target = batch()
    alpha = [0.3, 1.7]
    ours = FocalLoss(0.0, alpha, 0.1)(logits, target)
    theirs = F.cross_entropy(logits, target, torch.tensor(alpha), reduction="sum", label_smoothing=0.1) / len(target)
    torch.testing.assert_close(ours, theirs)


def test_gamma_multiplies_by_one_minus_p():
    logits, target = batch(8)
    p = logits.double().softmax(-1)[torch.arange(8), target]
    torch.testing.assert_close(FocalLoss(2.0)(logits.double(), target), (-((1 - p) ** 2) * p.log()).mean())


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (-1.0, 2.0), (0.8, 0.0), (0.5, 1.5)])
def test_sigmoid_form_is_torchvisions(alpha, gamma):
    g = torch.Generator().manual_seed(1)
    logits, target = torch.randn(5, 7, generator=g) * 4, (torch.rand(5, 7, generator=g) > 0.5).float()
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, target, alpha, gamma), reference(logits, target, alpha, gamma), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("alpha", [0.25, 0.8, 0.0, 1.0, 1])
def test_one_alpha_is_the_positive_classs_as_in_torchvisions_sigmoid_form(alpha):
    """With a negative logit of 0, the softmax of two is the sigmoid of one."""
    logits, target = batch()
    logits[:, 0] = 0
    theirs = reference(logits[:, 1], target.float(), alpha, 2.0, "mean")
    torch.testing.assert_close(FocalLoss(2.0, alpha)(logits, target), theirs, rtol=1e-5, atol=1e-7)
    pair = FocalLoss(2.0, [1 - alpha, alpha], 0.1)
    assert torch.equal(FocalLoss(2.0, alpha, 0.1)(logits, target), pair(logits, target))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradcheck_in_float64(gamma):
    logits, target = batch(6)
    logits = logits.double().requires_grad_()
    target[0] = -100
    assert torch.autograd.gradcheck(lambda x: FocalLoss(gamma, [0.5, 2.0], 0.1)(x, target), logits)


def test_sure_answers_have_a_finite_gradient():
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    FocalLoss(0.5)(logits, torch.tensor([0, 0])).backward()
    assert logits.grad.isfinite().all()


def test_unknown_and_absent_photos_contribute_nothing():
    logits, target = batch(8)
    present = torch.ones(8, dtype=torch.bool)
    present[3] = False
    target[5] = -100
    broken = logits.clone()
    broken[3], broken[5] = float("nan"), float("nan")
    broken.requires_grad_()
    keep = torch.tensor([0, 1, 2, 4, 6, 7])
    loss = FocalLoss(2.0)(broken, target, present)
    torch.testing.assert_close(loss, FocalLoss(2.0)(logits[keep], target[keep]))
    loss.backward()
    assert broken.grad.isfinite().all() and (broken.grad[[3, 5]] == 0).all()


def test_nothing_labelled_is_a_zero_with_a_gradient():
    logits = torch.randn(4, 2, requires_grad=True)
    loss = FocalLoss()(logits, torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_half_precision_is_computed_in_fp32():
    logits, target = batch()
    half = logits.bfloat16()
    loss = FocalLoss(2.0)(half, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, FocalLoss(2.0)(half.float(), target), rtol=0, atol=0)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="gamma"):
        FocalLoss(-1.0)
    with pytest.raises(UserError, match="label_smoothing"):
        FocalLoss(2.0, None, 1.0)
    with pytest.raises(UserError, match=r"focal alpha is 1.5; give a share in \[0, 1\]"):
        FocalLoss(2.0, 1.5)
    with pytest.raises(UserError, match="focal gamma is nan"):
        FocalLoss(float("nan"))
    with pytest.raises(UserError, match="focal alpha is nan; give a weight >= 0"):
        FocalLoss(2.0, [float("nan"), 1.0])
    with pytest.raises(UserError, match="one per class"):
        FocalLoss(2.0, [1.0, 1.0, 1.0])(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[3\]"):
        FocalLoss()(torch.zeros(2, 2), torch.zeros(3, dtype=torch.long))
    for wrong in (2, -1):
        with pytest.raises(ValueError, match=f"focal loss got the label {wrong}; allowed: 0 to 1, and -100"):
            FocalLoss()(torch.zeros(2, 2), torch.tensor([1, wrong]))
    with pytest.raises(ValueError, match="integer labels, got torch.float32"):
        FocalLoss()(torch.zeros(2, 2), torch.tensor([1.0, 0.5]))
    # a photo that is not there may have any label
    assert FocalLoss()(torch.zeros(2, 2), torch.tensor([1, 2]), torch.tensor([True, False])).isfinite()
