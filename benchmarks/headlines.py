"""Figures of the dated results that README shows, and what each of them says."""

from __future__ import annotations

from typing import NamedTuple


class Headline(NamedTuple):
    """One row of README's table."""

    benchmark: str
    key: str
    """Of a figure; `runs.seconds`: of one that each run has, whose median is told."""
    says: str
    """What was measured; `...` goes on from the row before."""


HEADLINES: tuple[Headline, ...] = (
    Headline("demo", "chosen_mcc", "`make demo`: MCC on held-out groups of the system that validation groups chose"),
    Headline("demo", "chosen_low", "... its 95 % interval, from"),
    Headline("demo", "chosen_high", "... to"),
    Headline("demo", "ensemble_mcc", "... MCC of the ensemble of folds and pre-trained network"),
    Headline("demo", "ensemble_low", "... its 95 % interval, from"),
    Headline("demo", "ensemble_high", "... to"),
    Headline("demo", "image_only_mcc", "... MCC of the one network that is exported, from pixels alone"),
    Headline("demo", "image_only_224_mcc", "... of the same on one 224 px view"),
    Headline("demo", "metadata_mcc", "... of a classifier on the metadata that the model may see"),
    Headline("demo", "minutes", "... minutes that all its stages took"),
    Headline("order", "positions_per_s", "order: positions per second on one core, a million photos"),
    Headline(
        "order", "worst_count_error_epoch", "order: furthest that a photo's count in one epoch is from its expectation"
    ),
    Headline(
        "order", "first_batch_at_end_s", "order: seconds to the first batch at the end of an epoch of 10^8 photos"
    ),
    Headline("build", "ratio", "building shards from 1280x720, over bare decoding and encoding on the same cores"),
    Headline("build", "large_ratio", "... from 3840x2160"),
    Headline("loader", "of_limit", "loader at 512 px, over a bare decoding loop"),
    Headline("loader", "over_webdataset", "... times `webdataset` with the same decoder and workers"),
    Headline("loader", "over_torch_dataset", "... times a torch `Dataset` with the same decoder and workers"),
    Headline("loader", "over_webdataset_pil", "... times `webdataset` with its own PIL pipeline"),
    Headline("loader", "over_litdata", "... times `litdata`"),
    Headline("loader", "over_streaming", "... times `mosaicml-streaming`"),
    Headline("augment", "over_kornia_512", "augmentation at 512 px, times kornia's list of the same operations"),
    Headline("augment", "over_kornia_noplasma_512", "... without its plasma operations"),
    Headline("augment", "over_torchvision_512", "... times torchvision v2, for the operations that it has"),
    Headline("augment", "over_kornia_128", "augmentation at 128 px, times kornia's list"),
    Headline("augment", "over_kornia_noplasma_128", "... without its plasma operations"),
    Headline("augment", "over_torchvision_128", "... times torchvision v2, for the operations that it has"),
    Headline("blocks", "attention_speedup", "gated attention, times Qwen3-Next's in transformers"),
    Headline("blocks", "moe_speedup", "mixture of experts, times Qwen3-MoE's in transformers"),
    Headline("vit_block", "compiled_speedup", "a compiled block of DINOv3's ViT, times timm's"),
    Headline("train_step", "zero2_over_plain", "a training step with ZeRO-2, times the plain loop (one process)"),
    Headline("train_step", "pruning_speedup", "photos per second with pruning, times without"),
    Headline("resume", "stall_share", "share of a checkpoint interval that the loop stands still"),
    Headline("resume", "resume_s", "seconds from a relaunch to the first batch"),
    Headline("folds", "speedup", "DoRA folds with the shared prefix, times recomputing it"),
    Headline("folds", "backbone_speedup", "the same with adapters on the backbone's last unit as well"),
    Headline("tta", "speedup", "test-time augmentation batched, times one by one"),
    Headline("masks", "ratio", "pseudo-masks with one vision pass for all prompts, times one for each"),
    Headline("serve", "p99_ms", "service: 99th percentile in milliseconds under load"),
    Headline("serve", "lost", "service: answers lost under load"),
    Headline("photographs", "line_mcc", "MCC on real photographs (cones against plain roads)"),
    Headline("photographs", "difference", "... less that of a plain timm classifier with the same weights and time"),
    Headline("photographs", "low", "... the paired difference's interval, from"),
    Headline("photographs", "high", "... to"),
    Headline("photographs", "runs.train", "... training photos, the median of its splits"),
    Headline(
        "photographs", "runs.seconds", "... seconds of learning on them, pre-training and folds, the median likewise"
    ),
    Headline("fairness", "histogram_mcc", "embedded benchmark: MCC of a colour histogram"),
    Headline("fairness", "metadata_mcc", "... of the metadata that the model may see, the best of several classifiers"),
    Headline("fairness", "global_mcc", "... of a plain network on one downscaled view"),
    Headline("fairness", "tiles_mcc", "... of the same network on tiles"),
    Headline("kills", "kills", "runs killed and started again"),
    Headline("kills", "differing_curves", "... whose result differs from that of the undisturbed run"),
)
