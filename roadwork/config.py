"""The typed tree of every option; what is impossible in it is refused by `roadwork/config_checks.py`."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from roadwork.config_checks import PIPELINE as PIPELINE
from roadwork.config_checks import accumulation as accumulation
from roadwork.config_checks import validate as validate


@dataclass
class RunConfig:
    """Where a run lives."""

    dir: str = "runs/default"
    """Run folder: configuration, metrics, checkpoints, models, predictions, report."""


@dataclass
class DataConfig:
    """Which shards are read, and how."""

    shards: str = "runs/demo/shards"
    """Folder of shards made by `python -m shards.build`."""
    workers: int = 2
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch: int = 4
    """Micro-batches that each worker prepares ahead."""
    gps_weighted: bool = True
    """Draw training photos by their GPS weight; false draws each photo once per epoch."""
    order: Literal["global", "windowed"] = "global"
    """`global`: any photo may follow any other; `windowed`: `data.window` photos at a time from few shards, for remote
    or slow storage. Each photo is drawn equally often in both."""
    window: int = 8192
    """Photos that a window of `data.order=windowed` shuffles together; the cache should hold the shards of two."""
    bad_sample_budget: float = 0.001
    """Share of drawn samples that may fail to decode before the run stops with an error."""
    cache_dir: str = ""
    """Local cache for remote shards; empty: `~/.cache/roadwork`."""
    cache_gib: float = 50.0
    """Upper bound of that cache in GiB."""


@dataclass
class ModelConfig:
    """The detector's shape. Shapes and sources are documented beside each block in `roadwork/models`."""

    backbone: str = "auto"
    """Any timm name; `auto`: vit_huge_plus_patch16_dinov3 on a GPU, efficientnet_lite0 elsewhere."""
    weights: str = "auto"
    """`auto` (a package or the hub, else an error), `random` (said so everywhere), or a local file."""
    trainable: str = "full"
    """Backbone training: `frozen`, `last-N` (its last N blocks or stages) or `full`."""
    layer_decay: float = 0.75
    """Learning-rate factor from one backbone block to the one before it."""
    backbone_lr_factor: float = 0.1
    """Learning rate of the backbone's last block over the heads' learning rate."""
    prune_after: int = 4
    """View pruning after this backbone block or stage; -1: after the last one."""
    keep_ratio: float = 2 / 3
    """Share of views that pruning keeps: ceil(keep_ratio * V); 1 keeps all."""
    hidden_dim: int = 512
    """Width of the view tokens behind the backbone."""
    num_layers: int = 4
    """Layers of gated attention and mixture of experts over the views."""
    num_heads: int = 8
    """Query heads of that attention."""
    num_kv_heads: int = 4
    """Key and value heads (grouped queries); divides num_heads."""
    num_experts: int = 4
    """Experts per layer."""
    top_k: int = 2
    """Experts per token; at most num_experts."""
    expert_dim: int = 1024
    """Inner width of one expert (SwiGLU)."""
    dropout: float = 0.1
    """Dropout in the heads."""
    metadata: bool = True
    """Use the metadata encoder (GPS, weather, day time, scene, text)."""
    metadata_dropout: float = 0.5
    """Probability of replacing ALL metadata of a photo by the learned NULLs in training (the service has none)."""
    metadata_fields: list[str] = field(default_factory=lambda: ["gps", "weather", "daytime", "scene"])
    """Fields that the encoder may see. `text` needs shards built with --text-encoder; it leaks the label in the public data."""
    segmentation_size: int = 32
    """Height and width of the mask that the segmentation decoder predicts per view."""
    init_from: str = ""
    """Folder of a saved model: warm start of a new run from its weights."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Kernels of attention: auto leaves it to torch; another serves where it can, torch's plain arithmetic elsewhere."""
    compile: bool = False
    """torch.compile each block."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode; reduce-overhead replays CUDA graphs, which small backbones want."""
    activation_checkpointing: bool = False
    """Recompute the backbone's activations in the backward pass."""

    @property
    def reads_text(self) -> bool:
        """Whether the metadata encoder sees vectors of descriptions."""
        return self.metadata and "text" in self.metadata_fields


@dataclass
class AugmentConfig:
    """Device augmentation; probabilities per photo, magnitudes as the widest draw."""

    enabled: bool = True
    """Augment in training (never in validation or prediction)."""
    probability_scale: float = 1.0
    """Multiplies every probability; fine-tuning uses 0.5."""
    magnitude_scale: float = 1.0
    """Multiplies every magnitude."""
    flip_p: float = 0.5
    """Horizontal flip."""
    rotation_p: float = 0.5
    """Rotation."""
    rotation_degrees: float = 15.0
    """Largest rotation, degrees."""
    perspective_p: float = 0.25
    """Perspective."""
    perspective_scale: float = 0.15
    """Largest corner shift as a share of half the view."""
    zoom_p: float = 0.4
    """Zoom."""
    zoom_range: tuple[float, float] = (0.7, 1.3)
    """Smallest and largest zoom factor."""
    brightness_p: float = 0.5
    """Brightness."""
    brightness: float = 0.3
    """Brightness factor in 1 +- this."""
    contrast_p: float = 0.5
    """Contrast."""
    contrast: float = 0.3
    """Contrast factor in 1 +- this."""
    saturation_p: float = 0.4
    """Saturation."""
    saturation: float = 0.2
    """Saturation factor in 1 +- this."""
    hue_p: float = 0.25
    """Hue."""
    hue_degrees: float = 15.0
    """Largest hue rotation, degrees."""
    rain_p: float = 0.25
    """Rain streaks."""
    fog_p: float = 0.25
    """Fog."""
    fog_density: float = 0.6
    """Largest optical depth's opacity."""
    shadow_p: float = 0.3
    """Cast shadow."""
    shadow_strength: float = 0.5
    """Largest darkening."""
    glare_p: float = 0.2
    """Sun glare."""
    glare_strength: float = 0.6
    """Largest added light."""
    noise_p: float = 0.2
    """Gaussian noise."""
    noise_std: float = 0.04
    """Largest standard deviation (10/255)."""
    motion_blur_p: float = 0.15
    """Motion blur."""
    motion_blur_pixels: int = 15
    """Longest blur at a 512 px view; scales with the view."""
    gaussian_blur_p: float = 0.15
    """Gaussian blur."""
    gaussian_blur_sigma: float = 2.0
    """Largest sigma at a 512 px view; scales with the view."""
    challenge_p: float = 0.0
    """Share of photos that get the challenge's own distribution (rotation, crop, resampling, noise, blur, JPEG) instead."""


@dataclass
class LossConfig:
    """Weights and shapes of the four terms."""

    focal: float = 0.40
    """Weight of the focal term."""
    consistency: float = 0.25
    """Weight of the view consistency (Jensen-Shannon) term."""
    weather: float = 0.15
    """Weight of the weather term."""
    segmentation: float = 0.20
    """Weight of the segmentation (Dice + BCE) term."""
    gamma: float = 2.0
    """Focusing parameter; 0 is cross entropy."""
    alpha: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Weight of each class (negative, positive)."""
    label_smoothing: float = 0.1
    """Label smoothing of the focal term."""
    temperature: float = 1.0
    """Temperature of the view predictions in the consistency term."""
    consistency_ramp_steps: int = 100
    """Optimizer steps over which the consistency term grows to its weight."""
    view_supervision: float = 0.5
    """Share of the consistency term's weight that supervises the shared view head with the photo's label (attention-pooled)."""
    view_labels: float = 0.5
    """Coefficient of the view head's cross entropy against what the masks show: a view with any object is positive."""
    balance: float = 0.01
    """Coefficient of the experts' load-balance term."""


@dataclass
class OptimizerConfig:
    """The optimizer behind the engine."""

    name: Literal["adamw", "sophia", "sophia_h"] = "adamw"
    """AdamW (fused where the device has it); Sophia-G on the sharded masters; Sophia-H of pytorch_optimizer (extra `sophia`),
    without ZeRO only: its Hessian is differentiated twice."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1.0e-8
    """Epsilon of AdamW and, below which a curvature does not count, of Sophia."""
    weight_decay: float = 0.05
    """Decoupled decay; norms, biases, magnitudes and tokens get none."""
    sophia_betas: tuple[float, float] = (0.965, 0.99)
    """Decay of Sophia's moment and curvature."""
    sophia_rho: float = 0.04
    """Sophia's clipping scale."""
    hessian_every: int = 10
    """Optimizer steps between curvature estimates."""


@dataclass
class TrainingConfig:
    """The loop."""

    global_batch: int = 32
    """Photos per optimizer step over all processes; constant for the run whatever the number of processes."""
    micro_batch: int = 4
    """Photos per process and backward; accumulation = global_batch / (micro_batch * processes)."""
    epochs: float = 30.0
    """Passes over the training draws; used where max_steps is 0."""
    max_steps: int = 0
    """Optimizer steps; 0: from epochs."""
    learning_rate: float = 3.0e-4
    """Peak learning rate of the heads."""
    min_lr_ratio: float = 0.01
    """Learning rate at the end over the peak."""
    warmup_steps: int = 500
    """Optimizer steps of linear warm-up; at most a tenth of a run is used."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    ema_decay: float = 0.999
    """Decay of the average of the fp32 master weights; warmed up. 0: no average."""
    validate_every_steps: int = 0
    """Optimizer steps between validations; 0: validate_every_epochs decides."""
    validate_every_epochs: float = 1.0
    """Epochs between validations, parts of one too; used where validate_every_steps is 0."""
    select_on: Literal["mcc", "challenge"] = "mcc"
    """What best/ and early stopping go by: MCC of the validation photos, or of the same as the challenge sends them; either at
    the threshold that gives the photos their own share of positives, not at 0.5."""
    patience: int = 5
    """Validations without a better MCC before the run stops early; 0: never."""
    max_nonfinite_steps: int = 3
    """Skipped (NaN or infinite) optimizer steps in a row that stop the run."""
    spike_factor: float = 10.0
    """A loss this many median deviations above the median of the last 64 is noted in spikes.jsonl with its photos; 0: never."""
    image_every_steps: int = 200
    """Optimizer steps between pictures in TensorBoard; 0: none."""
    gc_every_steps: int = 50
    """Optimizer steps between garbage collections, on the same step on all ranks; 0: whenever Python wants, on each alone."""


@dataclass
class CheckpointConfig:
    """What is kept for a relaunch."""

    every_steps: int = 200
    """Optimizer steps between checkpoints; 0: only at the end and on signals."""
    keep_last: int = 2
    """Complete checkpoints that are kept; at least 2, since the newest may be the one being damaged."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept for good, too; 0: none."""


@dataclass
class EngineConfig:
    """Accelerate and DeepSpeed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: the accelerate configuration, else a GPU where there is one."""
    ds_config: str = ""
    """DeepSpeed JSON; empty: the launcher's own, else ds_configs/zero2_bf16.json."""
    hold_gradients: bool = True
    """Reduce gradients once per optimizer step; false: ZeRO-2 reduces and shards them at each micro-batch, less memory."""
    timeout_s: float = 600.0
    """A collective that waits longer than this ends the run and names the hung rank."""
    threads: int = 0
    """CPU threads per process; 0: cores / processes."""


@dataclass
class FoldsConfig:
    """DoRA fine-tuning of folds."""

    num_folds: int = 5
    """Folds, by group and stratified."""
    r: int = 16
    """Rank."""
    lora_alpha: float = 32.0
    """Scale numerator."""
    rslora: bool = False
    """Scale alpha / sqrt(r) instead of alpha / r."""
    target_modules: list[str] = field(
        default_factory=lambda: [
            "layers.0.attention.qkv_proj",
            "layers.0.attention.out_proj",
            "fusion.importance_net.0",
        ]
    )
    """Linear layers (name suffixes) that get adapters."""
    modules_to_save: list[str] = field(default_factory=lambda: ["classifier"])
    """Heads trained and saved whole with each adapter."""
    copies: int = 2
    """Fixed augmented copies per photo whose prefix is computed once."""
    epochs: int = 5
    """Passes per fold."""
    batch: int = 32
    """Photos per step."""
    learning_rate: float = 3.0e-4
    """Peak learning rate."""
    weight_decay: float = 0.02
    """Decoupled decay; magnitudes get none."""
    patience: int = 2
    """Epochs without a better held-out MCC before a fold stops."""
    augment_scale: float = 0.5
    """Factor on every augmentation probability."""
    cache_gib: float = 4.0
    """Upper bound of the cached prefix, GiB. Activations inside the backbone (for adapters there) are not kept above it."""


@dataclass
class PredictConfig:
    """FOODS test-time augmentation, ensemble and calibration."""

    split: str = "test"
    """Split to predict."""
    prior: float = 0.5
    """Class prior of the place where the answers are used."""
    tta: Literal["auto", "on", "off"] = "auto"
    """FOODS test-time augmentation; auto: where a paired bootstrap on held-out groups says that it helps."""
    ensemble: Literal["auto", "on", "off"] = "auto"
    """Average folds and pre-trained model; auto: as for tta."""
    num_augmentations: int = 16
    """Augmentations, the original included."""
    filter: Literal["knn", "mahalanobis"] = "knn"
    """Out-of-distribution filter: nearest neighbours at three depths, or one shrunk Gaussian."""
    keep: Literal["threshold", "ratio"] = "threshold"
    """Keep within the 95th percentile of the training features, or the nearest keep_ratio."""
    keep_ratio: float = 0.8
    """Share kept with keep = ratio."""
    neighbours: int = 5
    """k of the nearest-neighbour distance."""
    max_train_features: int = 4096
    """Training photos whose features describe the training distribution."""
    batch: int = 8
    """Photos per forward pass."""
    bootstrap: int = 1000
    """Resamples of groups for intervals and decisions."""
    image_only: bool = False
    """Predict without metadata, as the service does."""
    challenge: bool = False
    """Score under the challenge's replicated distribution as well."""
    challenge_synthetic: str = ""
    """Its generated half: a folder with 0/ and 1/, or a CSV `path,label`. Empty: every standing says 'real half only'."""


@dataclass
class MasksConfig:
    """Pseudo-masks."""

    backend: Literal["sam3", "grounded_sam", "real"] = "sam3"
    """Segmentation by text, boxes + SAM, or published masks."""
    model: str = ""
    """Local folder or hub name; empty: the backend's default; `random-tiny`: a tiny randomly initialised model."""
    source: str = ""
    """Photos to label: as `shards.build --source`; empty: the shards of data.shards."""
    annotations: str = ""
    """COCO JSON with RLE masks: they come first, whatever the backend; for backend real they are all there is."""
    out: str = ""
    """Folder of masks; empty: RUN/masks."""
    score_threshold: float = 0.7
    """Smallest score of an object: SAM 3's own times presence; behind boxes SAM's estimate of the mask's quality."""
    presence_threshold: float = 0.0
    """Smallest probability that the photo (or tile) shows the class at all, SAM 3 only; score_threshold if that is larger."""
    box_threshold: float = 0.3
    """Smallest score of a detector's box; grounded_sam only."""
    min_object_size: int = 100
    """Smallest object, pixels of the photo."""
    semantic: bool = False
    """Take SAM 3's union map of a class instead of its single objects: less work, one score for all of them."""
    tiles: bool = False
    """Look at overlapping 1008 px tiles besides the whole photo: far objects of a large photo."""
    batch: int = 1
    """Photos taken together, and crops (whole photos or tiles) per vision pass."""
    part: str = ""
    """Label part I of N only, as `2/8` (1 to N); empty: the task of a Slurm job array, else all photos."""
    compare: str = ""
    """Folder of another backend's masks of the same photos: the quality report says how far the two agree."""
    keep_real: bool = True
    """The pipeline leaves masks alone that people drew; only others are replaced in the shards."""


@dataclass
class LrFinderConfig:
    """The learning-rate range test."""

    start: float = 1.0e-6
    """Smallest learning rate."""
    end: float = 1.0
    """Largest learning rate."""
    steps: int = 60
    """Optimizer steps, exponentially spaced."""
    smoothing: float = 0.9
    """Decay of the averaged loss."""
    divergence: float = 4.0
    """Stop where the smoothed loss exceeds this many times the best."""


@dataclass
class MonitoringConfig:
    """What a person watches."""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """tensorboard and, if wanted, wandb."""
    console: bool = True
    """A progress line on rank 0."""
    ceiling_tflops: float = 0.0
    """Most that one process can reach, TFLOP/s, for perf/mfu; 0: one large matrix product, measured at the start."""


@dataclass
class PipelineConfig:
    """All stages in order."""

    stages: list[str] = field(default_factory=lambda: ["shards", "pretrain", "dora_folds", "predict", "evaluate"])
    """Of fairness, shards, pseudo_masks, shard_masks, find_lr, pretrain, dora_folds, predict, evaluate; in this order.
    fairness measures the embedded benchmark; shard_masks puts the masks into the shards and follows pseudo_masks by itself."""
    source: str = ""
    """Photos for `shards.build --source`; empty: data.shards must be there."""
    build: list[str] = field(default_factory=list)
    """Further words for `shards.build`, such as `[--target-cities, "A,B", --view-size, "512"]`."""
    accelerate_config: str = ""
    """`accelerate launch --config_file`; empty: accelerate_configs/gpu.yaml on GPUs, else cpu.yaml."""
    processes: int = 0
    """`accelerate launch --num_processes`; 0: as many GPUs as divide a step, else what the configuration says."""


@dataclass
class Config:
    """Everything that a stage can be told."""

    seed: int = 0
    """Seed of the order, the augmentation and the initial weights."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    folds: FoldsConfig = field(default_factory=FoldsConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    lr_finder: LrFinderConfig = field(default_factory=LrFinderConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)


def masks_folder(config: Config) -> Path:
    """Where the pseudo-masks of a run are."""
    return Path(config.masks.out or Path(config.run.dir, "masks"))


def to_dict(config: Config) -> dict[str, Any]:
    """The tree as plain values, as written to `config.yaml`."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return plain


def save(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    temporary.replace(target)
