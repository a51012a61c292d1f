"""Augmentation: views/s of ours, of kornia and of torchvision v2, in one run on one machine.

    python -m benchmarks.augment [--json] [--device cpu|cuda] [--rounds N] [--sizes 512,128] [--threads N]
    python -m benchmarks.augment --sheet docs/augment_sheet.jpg [--photo FILE ...]

48 views at a time: 4 photos of 12 views for us and torchvision (parameters shared within a photo), 48 draws for kornia.
Median of alternating rounds, parameters drawn anew in each. The lists below are what is compared, call by call.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.augment_errors import max_errors
from roadwork.config import AugmentConfig
from roadwork.data.augment import Augment

PHOTOS, VIEWS = 4, 12
CONFIG = replace(AugmentConfig(), flip_p=0.7)  # the sketch's flip; all else are the defaults, which are the sketch's
TORCHVISION_HAS = ["flip", "rotation", "perspective", "zoom", "brightness", "contrast", "saturation", "hue"]
TORCHVISION_HAS += ["noise", "gaussian_blur"]


def kornia_list(size: int, plasma: bool) -> nn.Module:
    """The sketch's ops and probabilities with their arguments put right. Kornia has no fog: ours does that besides."""
    import kornia.augmentation as K

    sigma = CONFIG.gaussian_blur_sigma * size / 512
    taps = 2 * int(np.ceil(3 * sigma)) + 1
    longest = max(3, int(CONFIG.motion_blur_pixels * size / 512) // 2 * 2 + 1)
    ops: list[nn.Module] = [
        K.RandomHorizontalFlip(p=0.7),
        K.RandomRotation(degrees=15.0, p=0.5),
        K.RandomPerspective(distortion_scale=0.15, p=0.25),
        K.RandomAffine(degrees=0.0, scale=(0.7, 1.3), p=0.4),  # RandomResizedCrop cannot zoom out
        K.ColorJitter(brightness=0.3, p=0.5),
        K.ColorJitter(contrast=0.3, p=0.5),
        K.ColorJitter(saturation=0.2, p=0.4),
        K.ColorJitter(hue=15 / 360, p=0.25),
        K.RandomRain(number_of_drops=(1000, 2000), drop_height=(5, 20), drop_width=(-5, 5), p=0.25),
    ]
    if plasma:
        ops += [
            K.RandomPlasmaShadow(shade_intensity=(-0.5, 0.0), p=0.3),  # shadow
            K.RandomPlasmaBrightness(intensity=(0.0, 0.6), p=0.2),  # glare
        ]
    ops += [
        K.RandomGaussianNoise(mean=0.0, std=0.04, p=0.2),
        K.RandomMotionBlur(kernel_size=(3, longest) if longest > 3 else 3, angle=180.0, direction=0.0, p=0.15),
        K.RandomGaussianBlur(kernel_size=(taps, taps), sigma=(sigma / 4, sigma), p=0.15),
    ]
    return nn.Sequential(*ops)


def torchvision_list(size: int) -> nn.Module:
    """The ops that torchvision v2 has, at the same probabilities; one draw for the views of a photo."""
    from torchvision.transforms import v2

    sigma = CONFIG.gaussian_blur_sigma * size / 512
    taps = 2 * int(np.ceil(3 * sigma)) + 1
    bilinear = v2.InterpolationMode.BILINEAR

    def at(p: float, op: nn.Module) -> nn.Module:
        chance: nn.Module = v2.RandomApply([op], p=p)
        return chance

    ops: nn.Module = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.7),
            at(0.5, v2.RandomRotation(15, interpolation=bilinear)),
            v2.RandomPerspective(0.15, p=0.25),
            at(0.4, v2.RandomAffine(0, scale=(0.7, 1.3), interpolation=bilinear)),
            at(0.5, v2.ColorJitter(brightness=0.3)),
            at(0.5, v2.ColorJitter(contrast=0.3)),
            at(0.4, v2.ColorJitter(saturation=0.2)),
            at(0.25, v2.ColorJitter(hue=15 / 360)),
            at(0.2, v2.GaussianNoise(0.0, 0.04)),
            at(0.15, v2.GaussianBlur(taps, (sigma / 4, sigma))),
        ]
    )
    return ops


def contenders(size: int, device: torch.device) -> dict[str, Callable[[int], None]]:
    """Work on 48 views, by name; the argument makes each call draw anew."""
    views = torch.rand(PHOTOS, VIEWS, 3, size, size).to(device)
    off: dict[str, Any] = {name: 0.0 for name in vars(CONFIG) if name.endswith("_p")}
    off.update({f"{name}_p": getattr(CONFIG, f"{name}_p") for name in TORCHVISION_HAS})
    ours, ours_few = Augment(CONFIG), Augment(replace(CONFIG, **off))
    full, plain = kornia_list(size, plasma=True), kornia_list(size, plasma=False)
    photo_wise = torchvision_list(size)

    def run(augment: Augment, turn: int) -> None:
        augment(views, torch.arange(PHOTOS) + turn * PHOTOS, 0, 0)

    def by_photo(_: int) -> None:
        torch.stack([photo_wise(photo) for photo in views])

    return {
        "ours": lambda turn: run(ours, turn),
        "ours_torchvision_ops": lambda turn: run(ours_few, turn),
        "torchvision": by_photo,
        "kornia_noplasma": lambda _: plain(views.flatten(0, 1)),
        "kornia": lambda _: full(views.flatten(0, 1)),
    }


def measure(size: int, device: torch.device, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """views/s by name: the median of `rounds` alternating rounds; quick ones do more batches in a round."""
    for work in contenders(min(size, 64), device).values():
        work(0)  # warm up
    works = contenders(size, device)
    batches = {"ours": 12, "ours_torchvision_ops": 12, "torchvision": 6, "kornia_noplasma": 2, "kornia": 1}
    seen: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds):
        for name, work in works.items():
            _wait(device)
            start = clock()
            for batch in range(batches[name]):
                work(turn * 100 + batch)
            _wait(device)
            seen[name].append(batches[name] * PHOTOS * VIEWS / (clock() - start))
    return {f"{name}_{size}": round(statistics.median(values), 2) for name, values in seen.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Command line; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="512,128")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds instead of wall time: for a busy machine")
    parser.add_argument("--sheet", type=Path, help="write the contact sheet there instead of measuring")
    parser.add_argument("--photo", type=Path, nargs="*", default=[], help="photos of the sheet")
    options = parser.parse_args()
    if options.sheet:
        from benchmarks.augment_sheet import write_sheet

        write_sheet(options.sheet, options.photo)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    clock = time.process_time if options.cpu_time else time.perf_counter
    result: dict[str, Any] = {}
    for size in map(int, options.sizes.split(",")):
        torch.manual_seed(0)
        result.update(measure(size, device, options.rounds, clock))
        if not options.json:
            print({name: value for name, value in result.items() if name.endswith(f"_{size}")})
        result[f"over_kornia_{size}"] = round(result[f"ours_{size}"] / result[f"kornia_{size}"], 2)
        result[f"over_kornia_noplasma_{size}"] = round(result[f"ours_{size}"] / result[f"kornia_noplasma_{size}"], 2)
        few = result[f"ours_torchvision_ops_{size}"]
        result[f"over_torchvision_{size}"] = round(few / result[f"torchvision_{size}"], 2)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    result |= {
        "max_error": max_errors(device),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "clock": "cpu" if options.cpu_time else "wall",
    }
    result |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
