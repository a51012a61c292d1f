"""Operations of a backbone, as the project counts them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from roadwork.models.backbone import Backbone
from roadwork.models.operations import backbone_operations
from roadwork.models.weights import plan
from roadwork.monitoring.throughput import view_operations


def backbone(name: str, size: int, trainable: str = "full") -> Backbone:
    return Backbone(plan(name, "random"), size, trainable)


def test_a_vit_is_counted_by_the_formula_and_pruned_views_while_they_are_there():
    net = backbone("test_vit", 64)
    parameters, tokens = sum(p.numel() for p in net.parameters()), (64 // net.stride) ** 2 + net.net.num_prefix_tokens
    per_view = view_operations(parameters, tokens, net.depth, net.dim)
    found = backbone_operations(net, 64, prune_unit=2)
    assert not found.counted
    pruned = per_view * (12 * 2 + 8 * (net.depth - 2)) / net.depth
    assert found.forward(12, 8) == pytest.approx(pruned)
    assert found.training(12, 8) == pytest.approx(3 * pruned)


def test_a_frozen_share_is_only_run_forward():
    whole, last = (backbone_operations(backbone("test_vit", 64, t), 64, 1) for t in ("full", "last-2"))
    share = 2 / backbone("test_vit", 64).depth
    assert last.training(4, 4) == pytest.approx(whole.forward(4, 4) * (1 + 2 * share))
    assert backbone_operations(backbone("test_vit", 64, "frozen"), 64, 1).training(4, 4) == last.forward(4, 4)


def test_a_convolutional_nets_units_add_up_to_what_torch_counts_for_the_whole():
    net = backbone("efficientnet_lite0", 64).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 64, 64))
    found = backbone_operations(net, 64, prune_unit=3)
    assert found.counted and found.before > 0 and found.behind > 0
    assert found.forward(1, 1) == counter.get_total_flops()
