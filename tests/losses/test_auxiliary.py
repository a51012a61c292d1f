import pytest
import torch
import torch.nn.functional as F

from roadwork.data.record import MASK_CLASSES, WEATHER
from roadwork.losses import WeatherLoss, auxiliary, segmentation


def test_nulls_are_ignored_as_cross_entropy_ignores_them():
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, -100, 7, 3, -100, 1])
    torch.testing.assert_close(WeatherLoss()(logits, target), F.cross_entropy(logits, target, ignore_index=-100))


def test_a_batch_of_nulls_is_a_zero_with_a_gradient():
    logits = torch.randn(6, 8, requires_grad=True)
    loss = WeatherLoss()(logits, torch.full((6,), -100))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and (logits.grad == 0).all()


def test_gradcheck_in_float64():
    logits = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 5, 0])
    assert torch.autograd.gradcheck(lambda x: WeatherLoss()(x, target), logits)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\[B, 8\]"):
        WeatherLoss()(torch.zeros(2, 3, 8), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"needs logits \[B, 8\] and target \[B\], got \[2, 7\]"):
        WeatherLoss()(torch.zeros(2, 7), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("wrong", [8, 9, -1])
def test_a_label_that_is_no_weather_is_named(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"weather loss got the label {wrong}; allowed: 0 to 7, and -100"):
        WeatherLoss()(torch.zeros(2, 8), torch.tensor([1, wrong]))


def test_losses_and_records_know_the_same_classes():
    assert (len(WEATHER), len(MASK_CLASSES)) == (auxiliary.CLASSES, segmentation.CLASSES)
