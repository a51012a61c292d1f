"""Each backend at a tiny randomly initialised configuration of its real classes, through its real processors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from roadwork.data.street import draw
from roadwork.errors import UserError
from roadwork.labelling import grounded, tiny
from roadwork.labelling.backend import PROMPTS, Limits
from roadwork.labelling.crops import tiled_photo, whole_photo
from roadwork.labelling.grounded import GroundedSamBackend, load_sam
from roadwork.labelling.sam3 import Sam3Backend
from roadwork.labelling.weights import model_folder, sam_checkpoint

EASY = Limits(score=0.2, presence=0.2, min_object_size=100)


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    return draw(3, 0).rgb


@pytest.fixture(scope="module")
def sam3() -> Sam3Backend:
    return Sam3Backend("random-tiny", limits=EASY, batch=2)


def test_sam3_looks_once_per_crop(sam3: Sam3Backend, rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    handle = sam3.model.vision_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    texts: list[int] = []
    text_handle = sam3.model.text_encoder.register_forward_pre_hook(lambda module, args: texts.append(1))
    found = sam3.label([whole_photo("a", rgb), whole_photo("b", rgb[:400]), whole_photo("c", rgb[:, :300])])
    handle.remove()
    text_handle.remove()
    assert passes == [2, 1], "one vision pass per batch of crops, whatever the number of prompts"
    assert texts == [], "text features are those of the start"
    assert [m.bits.shape for m in found if m] == [(720, 1280), (400, 1280), (720, 300)]
    assert all(m is not None and m.valid == (True,) * 6 and "randomly initialised" in m.origin for m in found)


def test_sam3_shared_vision_draws_what_separate_passes_draw(sam3: Sam3Backend, rgb: np.ndarray) -> None:
    apart = Sam3Backend("random-tiny", limits=EASY, batch=2, shared_vision=False)
    one, two = sam3.label([whole_photo("a", rgb)])[0], apart.label([whole_photo("a", rgb)])[0]
    assert one is not None and two is not None and sum(one.objects) > 0
    assert (one.bits != two.bits).mean() < 1e-3
    assert one.confidence == pytest.approx(two.confidence, abs=1e-5)


def test_sam3_agrees_with_the_models_own_forward(sam3: Sam3Backend, rgb: np.ndarray) -> None:
    inputs = sam3.processor(images=rgb, text=PROMPTS["sign"], return_tensors="pt")
    with torch.no_grad():
        outputs = sam3.model(**inputs)
    expected = sam3.processor.post_process_instance_segmentation(outputs, 0.2, 0.5, [(720, 1280)])[0]
    union = expected["masks"].bool().any(0).numpy()
    found = sam3.label([whole_photo("a", rgb)])[0]
    assert found is not None
    assert ((found.bits >> 2 & 1) != union).mean() < 0.01, "only objects below the smallest size may differ"
    assert found.confidence[2] == pytest.approx(float(expected["scores"].max()), abs=1e-4)


def test_sam3_tiles_see_more(sam3: Sam3Backend, rgb: np.ndarray) -> None:
    tiled = sam3.label([tiled_photo("a", rgb)])[0]
    whole = sam3.label([whole_photo("a", rgb)])[0]
    assert tiled is not None and whole is not None
    assert all(t >= w for t, w in zip(tiled.objects, whole.objects, strict=True)) and sum(tiled.objects) > sum(
        whole.objects
    )


def test_sam3_from_a_local_folder(tmp_path: Path, sam3: Sam3Backend, rgb: np.ndarray) -> None:
    sam3.model.save_pretrained(tmp_path)
    sam3.processor.save_pretrained(tmp_path)
    loaded = Sam3Backend(str(tmp_path), limits=EASY, batch=2)
    assert loaded.origin == str(tmp_path)
    one, two = sam3.label([whole_photo("a", rgb)])[0], loaded.label([whole_photo("a", rgb)])[0]
    assert one is not None and two is not None and (one.bits == two.bits).all() and one.confidence == two.confidence


@pytest.mark.parametrize(("model", "box_score"), [("random-tiny", 0.3), ("random-tiny-owlv2", 0.01)])
def test_boxes_and_sam(model: str, box_score: float, rgb: np.ndarray) -> None:
    backend = GroundedSamBackend(model, limits=Limits(score=-9.0), box_score=box_score, batch=2)
    small = np.ascontiguousarray(rgb[::4, ::4])
    photos = [whole_photo("a", small), whole_photo("b", small[:100])]
    boxes = backend.detect([photo.crops[0] for photo in photos])
    found = backend.label(photos)
    assert sum(map(len, boxes)) > 0 and all(box.score > box_score for mine in boxes for box in mine)
    for mine, masks in zip(boxes, found, strict=True):
        assert masks is not None and masks.valid == (True,) * 6
        for k in range(6):
            best = max((box.score for box in mine if box.class_index == k), default=0.0)
            assert masks.confidence[k] <= best + 1e-6
            assert (masks.bits >> k & 1).any() == (masks.objects[k] > 0)
    strict = GroundedSamBackend(model, limits=Limits(score=99.0), box_score=box_score).label(photos)
    assert all(m is not None and not m.bits.any() for m in strict), "no mask is that good"


def test_boxes_get_the_class_of_their_best_prompt() -> None:
    backend = GroundedSamBackend("random-tiny", box_score=0.5)
    ids = backend.processor(text=[list(PROMPTS.values())], return_tensors="pt")["input_ids"]
    words = backend.processor.tokenizer.convert_ids_to_tokens(ids[0])
    logits = torch.full((1, 4, 64), -9.0)
    logits[0, 0, words.index("cone")] = 3.0
    logits[0, 1, words.index("equipment")] = 3.0
    logits[0, 1, words.index("construction")] = 2.0  # the first "construction" is the barrier's
    logits[0, 2, words.index("sign")] = -1.0  # below box_score
    logits[0, 3, len(words) - 1] = 3.0  # the closing token is no word
    logits[0, 3, words.index("worker")] = -1.0
    ((classes, scores),) = backend._named(logits, ids)
    assert classes == [0, 5, 3]
    assert scores == pytest.approx(torch.tensor([3.0, 3.0, -1.0]).sigmoid().tolist())


def test_a_detector_that_was_saved_in_bf16_sees_photos(
    tmp_path: Path, rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = GroundedSamBackend("random-tiny")
    backend.detector.to(torch.bfloat16).save_pretrained(tmp_path)
    backend.processor.save_pretrained(tmp_path)
    monkeypatch.setattr(grounded, "load_sam", lambda name: tiny.sam1(0))  # its checkpoints are of full size only
    loaded = GroundedSamBackend(f"{tmp_path}+vit_b", box_score=0.3)
    assert len(loaded.detect([whole_photo("a", np.ascontiguousarray(rgb[::4, ::4])).crops[0]])) == 1


def test_weights_that_cannot_be_had_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.pth").write_bytes(b"junk")
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 2, 2, 5)}, tmp_path / "other.pth")
    for call in (
        lambda: model_folder("no-such-owner/no-such-model"),
        lambda: model_folder(str(tmp_path / "nowhere")),
        lambda: model_folder(str(tmp_path / "empty")),
        lambda: sam_checkpoint("vit_x"),
        lambda: load_sam(str(tmp_path / "junk.pth")),
        lambda: load_sam(str(tmp_path / "other.pth")),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value) and "masks.model" in str(caught.value)


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one, two, other = tiny.sam1(0), tiny.sam1(0), tiny.sam1(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    key = "image_encoder.patch_embed.proj.weight"
    assert torch.equal(one.state_dict()[key], two.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])
