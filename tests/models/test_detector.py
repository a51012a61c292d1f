"""What callers of the detector rely on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from roadwork.errors import UserError
from roadwork.models import Encoded, Outputs, RoadworkDetector
from roadwork.models.metadata import METADATA_DIM, MetadataEncoder, gps_features
from roadwork.models.pruning import ViewPruner, keep_count

Build = Callable[..., RoadworkDetector]
Photos = Callable[..., tuple[Tensor, Tensor, Tensor]]
NETS = ["test_vit", "test_efficientnet"]


def _metadata(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "gps": torch.rand(batch, 2, generator=generator) * 90,
        "weather": torch.arange(batch) % 8 - 1,
        "daytime": torch.arange(batch) % 6 - 1,
        "scene": torch.arange(batch) % 7 - 1,
    }


def _loss(outputs: Outputs) -> Tensor:
    assert outputs.seg_logits is not None
    parts = [outputs.logits.square(), outputs.view_logits.square(), outputs.weather_logits.square(), outputs.seg_logits]
    return sum(p.mean() for p in parts) + 0.01 * outputs.balance  # type: ignore[return-value]


def _compute_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a mask on a GPU: padding goes through the net and is hidden."""
    monkeypatch.setattr("roadwork.models.slots.Slots.of", classmethod(lambda cls, m, d: cls(*m.shape, None)))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("padding", [0.7, 1e6, float("nan")])
@pytest.mark.parametrize("computed", ["skipped", "computed"])
def test_a_photo_alone_or_padded_gives_the_same(
    build: Build, photos: Photos, name: str, computed: str, padding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if computed == "computed":
        _compute_padding(monkeypatch)
    model = build(backbone=name).eval()
    counts = [12, 5, 1, 2]
    views, mask, boxes = photos(counts)
    views = torch.where(mask[:, :, None, None, None], views, padding)  # padding may hold anything
    boxes = torch.where(mask[:, :, None], boxes, padding)
    metadata = _metadata(4)
    together = model(views, mask, metadata, boxes)
    assert together.kept.shape == (4, 8)
    assert together.view_mask.sum(1).tolist() == [8, 4, 1, 2]
    for i, count in enumerate(counts):
        one = {key: value[i : i + 1] for key, value in metadata.items()}
        alone = model(views[i : i + 1, :count], None, one, boxes[i : i + 1, :count])
        kept = alone.kept.shape[1]
        assert torch.equal(alone.kept[0], together.kept[i, :kept])
        for field in ("logits", "weather_logits", "features"):
            torch.testing.assert_close(getattr(alone, field)[0], getattr(together, field)[i], atol=1e-5, rtol=1e-4)
        for field in ("view_logits", "seg_logits", "view_features", "attention"):
            value = getattr(together, field)[i]
            torch.testing.assert_close(getattr(alone, field)[0], value[:kept], atol=1e-5, rtol=1e-4)
        for deep, deeper in zip(alone.depth_features, together.depth_features, strict=True):
            torch.testing.assert_close(deep[0], deeper[i], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("computed", ["skipped", "computed"])
def test_no_gradient_learns_from_padding(
    build: Build, photos: Photos, name: str, computed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 * NaN is NaN: what padding holds must not enter the net at all."""
    if computed == "computed":
        _compute_padding(monkeypatch)
    views, mask, boxes = photos([4, 1, 2])
    found = []
    for padding in (0.0, 1e6, float("nan")):
        model = build(backbone=name, dropout=0.0, metadata_dropout=0.0).train()
        filled = torch.where(mask[:, :, None, None, None], views, padding)
        outputs = model(filled, mask, None, torch.where(mask[:, :, None], boxes, padding))
        _loss(outputs).backward()
        found.append((outputs.logits, {key: value.grad for key, value in model.named_parameters()}))
    for logits, gradients in found[1:]:
        assert torch.equal(logits, found[0][0])
        for key, value in gradients.items():
            torch.testing.assert_close(value, found[0][1][key], atol=0, rtol=0, msg=key)


@pytest.mark.parametrize("count", range(1, 13))
def test_any_number_of_views(build: Build, photos: Photos, count: int) -> None:
    model = build().eval()
    views, mask, boxes = photos([count])
    outputs = model(views, mask, None, boxes)
    kept = -(-2 * count // 3)
    assert outputs.view_logits.shape == (1, kept, 2)
    assert outputs.kept[0].tolist() == sorted(set(outputs.kept[0].tolist()))
    assert torch.isfinite(outputs.logits).all()
    torch.testing.assert_close(outputs.attention.sum(1), torch.ones(1), atol=1e-4, rtol=0)


def test_a_single_224_view_is_a_valid_input(build: Build) -> None:
    model = build(view_size=224).eval()
    outputs = model(torch.rand(1, 1, 3, 224, 224))
    assert outputs.logits.shape == (1, 2) and outputs.seg_logits.shape == (1, 1, 6, 16, 16)


def test_the_scorer_learns_and_views_masks_and_boxes_stay_together(build: Build, photos: Photos) -> None:
    model = build(trainable="frozen").train()
    views, mask, boxes = photos([6, 3])
    encoded = model.encode(views, mask, boxes)
    assert encoded.boxes is not None and encoded.patches is not None
    for i, count in enumerate((4, 2)):
        kept = encoded.kept[i, :count]
        assert torch.equal(encoded.boxes[i, :count], boxes[i, kept])
        best = encoded.scores[i, : mask[i].sum()].topk(count).indices.sort().values
        assert torch.equal(best, kept)
        # The token and patches of slot j are those of view kept[j]: that view alone, with the same score, gives them.
        for j, view in enumerate(kept.tolist()):
            single = model.encode(views[i : i + 1, view : view + 1], None, boxes[i : i + 1, view : view + 1])
            torch.testing.assert_close(single.tokens[0, 0], encoded.tokens[i, j], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(single.patches[0, 0], encoded.patches[i, j], atol=1e-5, rtol=1e-4)
    _loss(model.decide(encoded)).backward()
    for name, parameter in model.pruner.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_pruned_views_cost_nothing_after_the_pruning_depth(build: Build) -> None:
    model = build().eval()
    seen: list[int] = []
    for unit in model.backbone.units():
        unit.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0], mask[1, :3] = True, True
    model(torch.rand(2, 12, 3, 64, 64), mask)
    assert seen == [15, 15, 10, 10, 10, 10]


def test_keep_count_rounds_up_without_floating_point_surprises() -> None:
    assert [keep_count(v, 2 / 3) for v in range(1, 13)] == [-(-2 * v // 3) for v in range(1, 13)]
    assert keep_count(10, 0.7) == 7
    assert keep_count(100, 0.07) == 7
    pruner = ViewPruner(4, 2 / 3)
    mask = torch.arange(12)[None] < torch.arange(1, 13)[:, None]
    kept, kept_mask = pruner.choose(torch.randn(12, 12), mask)
    assert kept_mask.sum(1).tolist() == [-(-2 * v // 3) for v in range(1, 13)]
    assert all(mask[i, kept[i][kept_mask[i]]].all() for i in range(12))


@pytest.mark.parametrize("name", NETS)
def test_bf16_runs_forward_and_backward_near_fp32(build: Build, photos: Photos, name: str) -> None:
    model = build(backbone=name, keep_ratio=1.0, dropout=0.0, metadata_dropout=0.0)
    views, mask, boxes = photos([4, 2])
    metadata = _metadata(2)
    exact = model.eval()(views, mask, metadata, boxes).logits
    model.bfloat16().train()
    outputs = model(views, mask, metadata, boxes)
    assert outputs.logits.dtype == outputs.seg_logits.dtype == outputs.balance.dtype == torch.float32
    torch.testing.assert_close(outputs.logits, exact, atol=0.03, rtol=0.05)
    _loss(outputs).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name
    assert model.backbone.net.state_dict().keys() == build(backbone=name).backbone.net.state_dict().keys()


def test_float64_runs_forward_and_backward_near_fp32(build: Build, photos: Photos) -> None:
    model = build(dropout=0.0, metadata_dropout=0.0).eval()
    views, mask, boxes = photos([3, 2])
    exact = model(views, mask, _metadata(2), boxes).logits
    outputs = model.double()(views, mask, _metadata(2), boxes)
    torch.testing.assert_close(outputs.logits, exact, atol=1e-5, rtol=1e-4)
    _loss(outputs).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.pruner.parameters())


def test_a_plain_engines_autocast_runs_forward_and_backward(build: Build, photos: Photos) -> None:
    """Without ZeRO the weights stay fp32 and torch casts operation by operation: fusion then met an fp32 limit in bf16."""
    views, mask, boxes = photos([3, 2])
    model = build().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(views, mask, None, boxes)
    assert outputs.logits.dtype == torch.float32
    outputs.logits.sum().backward()
    assert model.fusion.seed.grad is not None and torch.isfinite(model.fusion.seed.grad).all()


def test_image_only_equals_all_null_and_hidden_fields_do_nothing(build: Build, photos: Photos) -> None:
    model = build(metadata_fields=["weather"]).eval()
    views, mask, boxes = photos([3, 2])
    nothing = {
        "gps": torch.full((2, 2), float("nan")),
        "weather": torch.tensor([-1, -1]),
        "daytime": torch.tensor([-1, -1]),
        "scene": torch.tensor([-1, -1]),
    }
    plain = model(views, mask, None, boxes).logits
    assert torch.equal(plain, model(views, mask, nothing, boxes).logits)
    hidden = {**nothing, "gps": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "text": torch.rand(2, 384)}
    assert torch.equal(plain, model(views, mask, hidden, boxes).logits)
    assert not torch.equal(plain, model(views, mask, {**nothing, "weather": torch.tensor([1, 2])}, boxes).logits)


def test_metadata_dropout_drops_whole_photos_in_training_only() -> None:
    torch.manual_seed(0)
    encoder = MetadataEncoder(["gps", "weather", "daytime", "scene", "text"], 0.5)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    metadata = {**_metadata(400), "text": torch.rand(400, 384)}
    metadata |= {key: metadata[key].clamp_min(0) for key in ("weather", "daytime", "scene")}
    null = encoder(None, 1)[0]
    assert null.shape == (METADATA_DIM,)
    kept = encoder.eval()(metadata, 400)
    assert not (kept == null).all(1).any()
    torch.manual_seed(1)
    first = encoder.train()(metadata, 400)
    torch.manual_seed(1)
    assert torch.equal(first, encoder(metadata, 400))
    dropped = (first == null).all(1)
    assert 150 < dropped.sum() < 250
    assert torch.equal(first[~dropped], kept[~dropped])


def test_gps_has_no_seam_and_keeps_fine_scales_in_a_bf16_model() -> None:
    near = gps_features(torch.tensor([[10.0, 179.99999], [10.0, -179.99999]]))
    assert (near[0] - near[1]).abs().max() < 0.1
    apart = gps_features(torch.tensor([[52.5, 13.4], [52.5, 13.401]]))  # 68 m
    assert (apart[0] - apart[1]).abs().max() > 0.3
    encoder = MetadataEncoder(["gps"], 0.0).bfloat16().eval()
    torch.nn.init.normal_(encoder.encoders["gps"].weight)
    out = encoder({"gps": torch.tensor([[52.5, 13.4], [52.5, 13.401]])}, 2)
    assert (out[0, :128] - out[1, :128]).abs().max() > 0.1


def test_encode_then_decide_is_forward_and_encodings_can_be_kept(build: Build, photos: Photos) -> None:
    model = build().eval()
    views, mask, boxes = photos([6, 2, 4])
    whole = model(views, mask, None, boxes)
    parts = [model.encode(views[i : i + 1, :n], None, boxes[i : i + 1, :n]) for i, n in enumerate((6, 2, 4))]
    joined = Encoded.cat(parts)
    torch.testing.assert_close(model.decide(joined).logits, whole.logits, atol=1e-5, rtol=1e-4)
    again = model.decide(joined.select(torch.tensor([2, 0])), segmentation=False)
    torch.testing.assert_close(again.logits, whole.logits[[2, 0]], atol=1e-5, rtol=1e-4)
    assert again.seg_logits is None


@pytest.mark.parametrize("name", NETS)
def test_checkpointing_gives_the_same_gradients(build: Build, photos: Photos, name: str) -> None:
    """Of every parameter, in train mode; and each unit is indeed computed twice."""
    views, mask, boxes = photos([3, 2])
    grads: list[dict[str, Tensor | None]] = []
    runs = []
    for on in (False, True):
        model = build(backbone=name, activation_checkpointing=on, dropout=0.0, metadata_dropout=0.0).train()
        runs.append(0)
        for block in model.backbone.blocks():
            block.register_forward_pre_hook(lambda module, inputs: runs.append(runs.pop() + 1))
        _loss(model(views, mask, None, boxes)).backward()
        grads.append({key: value.grad for key, value in model.named_parameters()})
    assert runs[1] == 2 * runs[0] > 0
    for key, value in grads[0].items():
        torch.testing.assert_close(grads[1][key], value, msg=key)


def test_same_seed_same_weights_and_no_all_zero_row(build: Build) -> None:
    first, second, other = build(seed=1), build(seed=1), build(seed=2)
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.projection.weight, other.projection.weight)
    for name, module in first.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert (module.weight.norm(dim=1) > 0).all(), name


def test_a_photo_without_views_is_finite(build: Build) -> None:
    model = build().train()
    mask = torch.tensor([[True, True], [False, False]])
    outputs = model(torch.rand(2, 2, 3, 64, 64), mask)
    assert torch.isfinite(outputs.logits).all()
    _loss(outputs).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bad_inputs_are_one_clear_value_error_each(build: Build) -> None:
    model = build().eval()
    good = torch.rand(2, 3, 3, 64, 64)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 3, 4)

    def box(width: float, height: float) -> Tensor:
        return torch.tensor([width, height, width, height])

    cases: list[tuple[str, tuple[object, ...]]] = [
        ("expected \\[B, V, 3, S, S\\]", (good[0],)),
        ("expected \\[B, V, 3, S, S\\]", (good[:, :, :1],)),
        ("expected \\[B, V, 3, S, S\\]", (good[:, :0],)),
        ("13 views of a photo; at most 12", (good[:, :1].expand(-1, 13, -1, -1, -1),)),
        ("expected \\[B, V, 3, S, S\\]", (good[..., :32],)),
        ("do not suit", (good[..., :60, :60],)),
        ("views are list; expected a tensor", ([good],)),
        ("views are ndarray; expected a tensor", (good.numpy(),)),
        ("expected \\[0, 1\\]", (good * 255,)),
        ("expected \\[0, 1\\]", (good * float("nan"),)),
        ("range from .* to 1e\\+06; expected", (torch.cat([good[:, :2], good[:, 2:] + 1e6], 1),)),
        ("expected floats", (good.long(),)),
        ("view_mask", (good, torch.ones(2, 3))),
        ("view_mask", (good, torch.ones(2, 4, dtype=torch.bool))),
        ("view_mask is list; expected bool \\(2, 3\\)", (good, [[True] * 3] * 2)),
        ("boxes are list", (good, None, None, [[[0.0, 0.0, 1.0, 1.0]] * 3] * 2)),
        ("boxes", (good, None, None, torch.rand(2, 3, 2))),
        ("boxes are torch.int64", (good, None, None, torch.ones(2, 3, 4, dtype=torch.int64))),
        ("a box is \\[0.0, 0.0, 640.0, 480.0\\]; expected fractions", (good, None, None, boxes * box(640, 480))),
        ("a box is \\[nan", (good, None, None, boxes * float("nan"))),
        ("a box is \\[1.0, 0.0, 0.0, 1.0\\]", (good, None, None, boxes[..., [2, 1, 0, 3]])),
        ("metadata\\['gps'\\]", (good, None, {"gps": torch.rand(2)})),
        (
            "has \\[500.0, 999.0\\]; expected \\[latitude, longitude\\]",
            (good, None, {"gps": torch.tensor([[500.0, 999.0], [40.0, -80.0]])}),
        ),
        ("metadata\\['weather'\\]", (good, None, {"weather": torch.tensor([1, 8])})),
        ("metadata\\['weather'\\] must be integers", (good, None, {"weather": torch.tensor([True, False])})),
        ("metadata\\['weather'\\] is list; expected a tensor", (good, None, {"weather": [1, 2]})),
        ("metadata are Tensor; expected a mapping of gps, weather", (good, None, torch.rand(2, 704))),
        (
            "a field 'wheather'; allowed: gps, weather, daytime, scene, text",
            (good, None, {"wheather": torch.tensor([1, 2])}),
        ),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message) as caught:
            model(*arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "used"), [("auto", "flash"), ("flash", "flash"), ("math", "math"), ("cudnn", "math")]
)
def test_attention_runs_on_the_kernels_that_were_asked_for_and_says_which(
    build: Build, photos: Photos, asked: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU torch has flash kernels and its own arithmetic; what cannot serve gives way to the latter."""
    model = build(attention=asked).eval()
    assert model.runtime()["attention"] == f"{asked} (views {used}, backbone {used})"
    convolutional = build(attention=asked, backbone="test_efficientnet")
    assert convolutional.runtime()["attention"] == f"{asked} (views {used})"
    chosen: list[tuple[tuple[int, ...], bool]] = []

    def choice(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> int:
        chosen.append((tuple(q.shape), attn_mask is None))
        return SDPBackend.MATH.value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    assert model.runtime()["attention"].endswith("(views math, backbone math)")
    assert chosen == [((1, 4, 12, 8), False), ((1, 2, 17, 32), True)]  # as they are computed: 12 views, 4 x 4 patches
    views, mask, boxes = photos([3, 2])
    torch.testing.assert_close(
        model(views, mask, None, boxes).logits, build().eval()(views, mask, None, boxes).logits, atol=1e-5, rtol=1e-4
    )


SWITCHES = {
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
}


@pytest.mark.parametrize("asked", ["auto", *SWITCHES])
def test_every_attention_is_computed_under_the_switches_that_were_asked_for(build: Build, asked: str) -> None:
    """In the backbone before and after pruning and over the views; torch's own arithmetic stays allowed as a last resort."""
    model = build(attention=asked).eval()
    seen: list[set[str]] = []

    def look(*_: object) -> None:
        seen.append({name for name, enabled in SWITCHES.items() if enabled()})

    places = [model.backbone.units()[0], model.backbone.units()[-1], *(layer.attention for layer in model.layers)]
    for module in places:
        module.register_forward_pre_hook(look)
    before = {name for name, enabled in SWITCHES.items() if enabled()}
    model(torch.rand(2, 3, 3, 64, 64))
    assert seen == [before if asked == "auto" else {asked, "math"}] * len(places)
    assert before == {name for name, enabled in SWITCHES.items() if enabled()} == set(SWITCHES)


def test_another_attention_is_refused_by_name(build: Build) -> None:
    with pytest.raises(UserError, match=r"model.attention is 'quick'; allowed: auto, flash, cudnn, efficient, math"):
        build(attention="quick")
