"""Photos per second of SAM 3 with one vision pass for all prompts and with one per prompt, side by side.

`python -m benchmarks.masks [--size tiny|small|full] [--photos N] [--device cpu]`; the last line is one JSON object. The
weights are randomly initialised (they do not change the work): `full` is the published 840 M configuration, `small`
keeps its proportions (vision to decoder) at a size that a CPU finishes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from roadwork.data.street import draw
from roadwork.labelling import tiny
from roadwork.labelling.backend import Limits, Photo
from roadwork.labelling.crops import whole_photo
from roadwork.labelling.sam3 import Sam3Backend


def main(argv: list[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks", description=__doc__)
    parser.add_argument("--size", choices=("tiny", "small", "full"), default="small")
    parser.add_argument("--photos", type=int, default=4, help="photos per round")
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
    for shared in (True, False) * (rounds + 1):
        began = time.process_time()
        times[shared].append(_time(backend, photos, shared))
        cpu[shared].append(time.process_time() - began)
    rate = {shared: count / statistics.median(seconds[1:]) for shared, seconds in times.items()}  # the first warms up
    parameters = sum(p.numel() for p in backend.model.parameters())
    vision = sum(p.numel() for p in backend.model.vision_encoder.parameters())
    return {
        "shared": round(rate[True], 4),
        "per_prompt": round(rate[False], 4),
        "ratio": round(rate[True] / rate[False], 2),
        # On a machine that others use as well, the processor's time says more than the clock.
        "cpu_time_ratio": round(statistics.median(cpu[False][1:]) / statistics.median(cpu[True][1:]), 2),
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


def _enlarge(backend: Sam3Backend, size: str) -> None:
    """Put a network of another size under the backend; `full` is transformers' default, the published one."""
    from transformers import Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

    config: Any = Sam3Config()
    if size == "small":
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
    config.text_config.vocab_size = len(tiny.byte_vocabulary())
    torch.manual_seed(0)
    with torch.device(backend.device):
        model: Any = Sam3Model(config)
    backend.model = model.to(backend.device, backend.dtype).eval()
    side = config.vision_config.image_size
    images = Sam3ImageProcessor(size={"height": side, "width": side})
    backend.processor = Sam3Processor(images, tiny.clip_tokenizer())
    backend.texts = [backend._text(prompt) for prompt in _prompts()]


def _prompts() -> list[str]:
    from roadwork.labelling.backend import PROMPTS

    return list(PROMPTS.values())


if __name__ == "__main__":
    np.random.seed(0)
    main()
