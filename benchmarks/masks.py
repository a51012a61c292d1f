"""Photos per second of SAM 3 with one vision pass for all prompts and with one per prompt, side by side.

`python -m benchmarks.masks [--size tiny|small|full] [--photos N] [--device cpu]`; the last line is one JSON object. Both
ways take the same photos through the same network in turn; the medians count. Weights are randomly initialised: they do
not change the work of the network, but no object passes the threshold, so the enlarging of masks, the same in both
ways, is not in the figures.

What can be gained depends on how much of the work is the vision pass. With V operations for it and P for one prompt
(text-image encoder, decoder, masks), six prompts cost 6 (V + P) apart and V + 6 P together. `full` is the published
840 M configuration; `small` is what a CPU finishes, with the share P / V of the published one. Both shares are counted
here, operation by operation on meta tensors (`share`, `published_share`), with the ratio that they allow (`bound`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from roadwork.data.street import draw
from roadwork.labelling import tiny
from roadwork.labelling.backend import PROMPTS, Limits, Photo
from roadwork.labelling.crops import whole_photo
from roadwork.labelling.sam3 import Sam3Backend


def main(argv: list[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks", description=__doc__)
    parser.add_argument("--size", choices=("tiny", "small", "full"), default="small")
    parser.add_argument("--photos", type=int, default=2, help="photos per round")
    parser.add_argument("--batch", type=int, default=1, help="photos per vision pass")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds; the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="only the last line")
    options = parser.parse_args(argv)
    figures = measure(options.size, options.photos, options.batch, options.rounds, options.device)
    if not options.json:
        print(f"{options.size}: {figures['shared']} photos/s shared, {figures['per_prompt']} per prompt")
    print(json.dumps(figures))


def measure(size: str, count: int, batch: int, rounds: int, device: str) -> dict[str, Any]:
    """Both ways in turn on the same network and photos."""
    backend = Sam3Backend("random-tiny", device, Limits(score=0.9), batch)
    if size != "tiny":
        _enlarge(backend, size)
    photos = [whole_photo(str(i), draw(i, 0).rgb) for i in range(count)]
    times: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    _time(backend, photos[:batch], True)  # warms up
    for shared in (True, False) * rounds:
        began = time.process_time()
        times[shared].append(_time(backend, photos, shared))
        cpu[shared].append(time.process_time() - began)
    rate = {shared: count / statistics.median(seconds) for shared, seconds in times.items()}
    parameters = sum(p.numel() for p in backend.model.parameters())
    vision = sum(p.numel() for p in backend.model.vision_encoder.parameters())
    return {
        "shared": round(rate[True], 4),
        "per_prompt": round(rate[False], 4),
        "ratio": round(rate[True] / rate[False], 2),
        # On a machine that others use as well, the processor's time says more than the clock.
        "cpu_time_ratio": round(statistics.median(cpu[False]) / statistics.median(cpu[True]), 2),
        **shares(backend.model.config),
        "size": size,
        "parameters": parameters,
        "vision_parameters": vision,
        "weights": "randomly initialised",
        "photos": count,
        "batch": batch,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else False,
        "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.startswith("cuda") else None,
    }


def _time(backend: Sam3Backend, photos: list[Photo], shared: bool) -> float:
    backend.shared_vision = shared
    began = time.perf_counter()
    backend.label(photos)
    if backend.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def shares(config: Any) -> dict[str, float]:
    """Share P / V of a configuration and of the published one, and the ratio of the two ways that each allows."""
    from transformers import Sam3Config

    found = {}
    for name, counted in (("", config), ("published_", Sam3Config())):
        vision, prompt = operations(counted)
        count = len(PROMPTS)
        found[f"{name}share"] = round(prompt / vision, 4)
        found[f"{name}bound"] = round(count * (vision + prompt) / (vision + count * prompt), 2)
    return found


class ValuesOnHost(TorchFunctionMode):
    """The network reads the sizes of its maps back from tensors, and the meta device holds no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        where = {"device": "cpu"} if func is torch.tensor else {}
        return func(*args, **{**(kwargs or {}), **where})


def operations(config: Any) -> tuple[int, int]:
    """Floating-point operations of a vision pass and of one prompt after it, for one photo; nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Sam3Model
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    side, width = config.vision_config.image_size, config.detr_encoder_config.hidden_size
    with torch.device("meta"), torch.no_grad(), ValuesOnHost():
        model: Any = Sam3Model(config).eval()
        pixels, text = torch.zeros(1, 3, side, side), torch.zeros(1, 32, width)
        with FlopCounterMode(display=False) as counter:
            seen = model.get_vision_features(pixel_values=pixels)
        vision = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            model(vision_embeds=seen, text_embeds=BaseModelOutputWithPooling(pooler_output=text))
    return vision, counter.get_total_flops()


def small_config() -> Any:
    """A configuration whose share P / V is near the published one's, at a hundredth of its operations."""
    from transformers import Sam3Config

    config: Any = Sam3Config()
    vision = config.vision_config
    vision.image_size = 336
    vision.backbone_feature_sizes = [[96, 96], [48, 48], [24, 24]]
    vision.fpn_hidden_size = 64
    small = {"hidden_size": 256, "intermediate_size": 1184, "num_attention_heads": 4, "num_hidden_layers": 32}
    for name, value in small.items():
        setattr(vision.backbone_config, name, value)
    for part in ("geometry_encoder_config", "detr_encoder_config", "detr_decoder_config", "mask_decoder_config"):
        getattr(config, part).hidden_size = 64
        if hasattr(getattr(config, part), "intermediate_size"):
            getattr(config, part).intermediate_size = 512
    config.text_config.num_hidden_layers = 2  # the text is encoded once, before the clock starts
    return config


def _enlarge(backend: Sam3Backend, size: str) -> None:
    """Put a network of another size under the backend; `full` is transformers' default, the published one."""
    from transformers import Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

    config: Any = small_config() if size == "small" else Sam3Config()
    config.text_config.vocab_size = len(tiny.byte_vocabulary())
    torch.manual_seed(0)
    with torch.device(backend.device):
        model: Any = Sam3Model(config)
    backend.model = model.to(backend.device, backend.dtype).eval()
    side = config.vision_config.image_size
    images = Sam3ImageProcessor(size={"height": side, "width": side})
    backend.processor = Sam3Processor(images, tiny.clip_tokenizer())
    backend.texts = [backend._text(prompt) for prompt in PROMPTS.values()]


if __name__ == "__main__":
    main()
