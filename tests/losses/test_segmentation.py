import pytest
import torch
import torch.nn.functional as F
from torchmetrics.segmentation import DiceScore

from roadwork.losses import SegmentationLoss
from roadwork.losses.segmentation import coverage


def batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, size, size, generator=g)
    target = (torch.rand(2, 3, 6, size, size, generator=g) > 0.6).to(torch.uint8)
    return logits, target, torch.rand(2, 3, 6, generator=g) > 0.4


def test_each_valid_triple_weighs_the_same():
    logits, target, valid = batch()
    expected = []
    for b, v, c in valid.nonzero().tolist():
        p, t = logits[b, v, c].sigmoid(), target[b, v, c].float()
        dice = (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        expected.append(1 - dice + F.binary_cross_entropy(p, t))
    torch.testing.assert_close(SegmentationLoss()(logits, target, valid), torch.stack(expected).mean())


def test_dice_of_hard_answers_is_torchmetrics():
    _, target, _ = batch()
    answer = torch.rand(target.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    theirs = DiceScore(num_classes=6, average="none", aggregation_level="samplewise")
    flat_answer, flat_target = answer.flatten(0, 1).long(), target.flatten(0, 1).long()
    by_class = theirs(flat_answer, flat_target)
    hard = SegmentationLoss(smooth=0.0)
    logits = torch.where(answer, 60.0, -60.0)
    bce = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none").mean((-2, -1))
    ours = 1 - (hard.elements(logits, target.float()) - bce)
    torch.testing.assert_close(ours.mean((0, 1)), by_class.to(ours.dtype), rtol=1e-5, atol=1e-5)


def test_loss_lies_in_its_range_also_for_masks_that_are_not_bits():
    logits, target, valid = batch()
    loss = SegmentationLoss()
    torch.testing.assert_close(loss(logits, target * 255, valid), loss(logits, target, valid), rtol=0, atol=0)
    perfect = torch.where(target > 0, 40.0, -40.0)
    assert 0 <= loss(perfect, target * 6, valid).item() < 1e-5


def test_invalid_triples_contribute_nothing():
    logits, target, valid = batch()
    logits[~valid] = float("nan")
    logits.requires_grad_()
    loss = SegmentationLoss()(logits, target, valid)
    loss.backward()
    assert loss.isfinite() and (logits.grad[~valid] == 0).all()
    none = SegmentationLoss()(logits, target, torch.zeros_like(valid))
    none.backward()
    assert none.item() == 0


def test_larger_masks_are_brought_down_by_area():
    target = torch.zeros(1, 1, 1, 8, 8, dtype=torch.uint8)
    target[..., :2, :1] = 1
    assert coverage(target, (4, 4), torch.float32)[0, 0, 0, 0, 0].item() == 0.5
    assert coverage(target, (3, 3), torch.float32).shape[-2:] == (3, 3)


def test_gradcheck_in_float64():
    logits, target, valid = batch(4)
    logits = logits[:1, :2].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SegmentationLoss()(x, target[:1, :2], valid[:1, :2]), logits)


def test_wrong_shapes_are_named():
    logits, target, valid = batch()
    with pytest.raises(ValueError, match="valid"):
        SegmentationLoss()(logits, target, valid.float())
    with pytest.raises(ValueError, match=r"\[B, V, C, H, W\]"):
        SegmentationLoss()(logits, target[:, :2], valid)
    with pytest.raises(ValueError, match=r"C = 6, got \[2, 3, 5, 8, 8\] and \[2, 3, 5, 8, 8\]"):
        SegmentationLoss()(logits[:, :, :5], target[:, :, :5], valid[:, :, :5])


def test_without_a_word_on_validity_all_is_valid():
    logits, target, valid = batch()
    whole = SegmentationLoss()(logits, target, torch.ones_like(valid))
    assert torch.equal(SegmentationLoss()(logits, target), whole)


@pytest.mark.parametrize("size", [8, 16])
def test_a_mask_with_a_nan_is_unknown(size):
    logits, _, valid = batch()
    valid[0, :2] = True
    target = torch.rand(2, 3, 6, size, size, generator=torch.Generator().manual_seed(1))
    without = valid.clone()
    without[0, 0, 2] = without[0, 1, 5] = False
    expected = SegmentationLoss()(logits, target, without)
    target[0, 0, 2, 3, 3], target[0, 1, 5] = float("nan"), float("nan")
    logits.requires_grad_()
    loss = SegmentationLoss()(logits, target, valid)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert logits.grad.isfinite().all() and (logits.grad[0, 1, 5] == 0).all()
