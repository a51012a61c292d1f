"""Everything that can be typed wrong, and the rules by which it is refused in one line before anything starts."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from roadwork.cli import exit_on_user_error, fail
from roadwork.command_line import parse, parse_tool, switch_names
from roadwork.config import AugmentConfig, Config, ModelConfig, accumulation, masks_folder, save, to_dict, validate
from roadwork.config_checks import PIPELINE
from roadwork.config_ranges import WIDEST_SIGMA, check_model
from roadwork.data.augment import Augment
from roadwork.errors import UserError
from roadwork.inference.options import ExportOptions, ServiceOptions, check_service
from roadwork.models import RoadworkDetector


def changed(path: str, value: object) -> Config:
    config = Config()
    part: object = config
    *parents, name = path.split(".")
    for parent in parents:
        part = getattr(part, parent)
    setattr(part, name, value)
    return config


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("training.global_batch", 0, "training.global_batch is 0; give a number > 0"),
        ("training.micro_batch", -1, "training.micro_batch is -1"),
        ("seed", -1, "seed is -1; give a whole number from 0 to 4294967295"),
        ("seed", 2**32, "seed is 4294967296"),
        ("lr_finder.start", 0.0, "lr_finder.start is 0.0; give a number > 0"),
        ("lr_finder.steps", 0, "lr_finder.steps is 0; give at least 1"),
        ("training.learning_rate", math.nan, "training.learning_rate is nan; give a number > 0"),
        ("training.learning_rate", math.inf, "training.learning_rate is inf"),
        ("training.max_steps", -1, "training.max_steps is -1; give 0 or more"),
        ("training.epochs", math.nan, "training.epochs is nan; give 0 or more"),
        ("training.spike_factor", -0.5, "training.spike_factor"),
        ("checkpoint.keep_every", -1, "checkpoint.keep_every"),
        ("checkpoint.every_steps", -5, "checkpoint.every_steps is -5; give 0 or more"),
        ("lr_finder.end", 1e-6, "lr_finder.start 1e-06 is not below lr_finder.end 1e-06; give a larger end"),
        ("run.dir", "", "run.dir is empty; give a folder"),
        (
            "monitoring.trackers",
            ["wanbd"],
            "unknown tracker 'wanbd' in monitoring.trackers; allowed: tensorboard, wandb",
        ),
        ("optimizer.hessian_every", 0, "optimizer.hessian_every is 0; give a number > 0"),
        ("optimizer.sophia_rho", 0.0, "optimizer.sophia_rho is 0.0"),
        ("checkpoint.keep_last", 0, "checkpoint.keep_last is 0; at least 2 are kept"),
        ("monitoring.ceiling_tflops", math.inf, "monitoring.ceiling_tflops"),
        ("model.top_k", 0, "model.top_k 0 must be between 1 and model.num_experts"),
        ("model.hidden_dim", 30, "model.hidden_dim 30 must be a multiple of model.num_heads"),
        ("model.num_kv_heads", 3, "and that of model.num_kv_heads 3"),
        ("model.keep_ratio", 0.0, r"model.keep_ratio is 0.0; it is the share of views kept, in \(0, 1\]"),
        ("model.keep_ratio", 1.01, "model.keep_ratio is 1.01"),
        ("model.trainable", "last-0", "model.trainable is 'last-0'; allowed: frozen, last-N"),
        ("model.trainable", "last-", "model.trainable"),
        ("predict.prior", 0.0, "a prior lies strictly between 0 and 1"),
        ("predict.prior", math.nan, "predict.prior is nan"),
        ("pipeline.stages", ["predict", "pretrain"], "allowed, in this order: fairness, shards"),
        ("pipeline.stages", ["pretraining"], "pipeline.stages is"),
        ("model.metadata_fields", ["gps", "colour"], r"model.metadata_fields has \['colour'\]"),
    ],
)
def test_impossible_values_are_refused_by_name(path: str, value: object, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        validate(changed(path, value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("model.dropout=1.5", "model.dropout is 1.5; give a probability in [0, 1]"),
        ("model.dropout=-1", "model.dropout is -1.0; give a probability in [0, 1]"),
        ("model.metadata_dropout=.nan", "model.metadata_dropout is nan; give a probability in [0, 1]"),
        ("model.layer_decay=-1", "model.layer_decay is -1.0; give a share in (0, 1]"),
        ("model.layer_decay=0", "model.layer_decay is 0.0; give a share in (0, 1]"),
        ("model.backbone_lr_factor=-0.1", "model.backbone_lr_factor is -0.1; give a factor >= 0"),
        ("model.num_kv_heads=0", "model.num_kv_heads is 0; give at least 1"),
        ("augment.rain_p=2", "augment.rain_p is 2.0; give a probability in [0, 1]"),
        ("augment.challenge_p=.nan", "augment.challenge_p is nan; give a probability in [0, 1]"),
        ("augment.noise_std=-1", "augment.noise_std is -1.0; give a share in [0, 1]"),
        ("augment.rotation_degrees=.inf", "augment.rotation_degrees is inf; give degrees in [0, 180]"),
        ("augment.brightness=1e30", "augment.brightness is 1e+30; give a strength in [0, 10]"),
        ("augment.magnitude_scale=.nan", "augment.magnitude_scale is nan; give a factor in [0, 10]"),
        ("augment.probability_scale=.inf", "augment.probability_scale is inf; give a factor >= 0"),
        ("augment.gaussian_blur_sigma=5000", "augment.gaussian_blur_sigma is 5000.0; give pixels of a 512 px view in [0, 128]"),
        ("augment.motion_blur_pixels=100000", "augment.motion_blur_pixels is 100000; give pixels of a 512 px view in [0, 512]"),
        ("augment.zoom_range=[1.3,0.7]", "augment.zoom_range is 1.3, 0.7; give smallest <= largest"),
        ("augment.zoom_range=[0,1]", "augment.zoom_range is 0.0; give factors in [0.05, 20]"),
        ("loss.alpha=[1]", "loss.alpha is [1.0]; give two weights, of the negative and the positive class"),
        ("loss.alpha=[1,.nan]", "loss.alpha is nan; give a weight >= 0"),
        ("loss.gamma=-1", "loss.gamma is -1.0; give a number >= 0 (0 is cross entropy)"),
        ("loss.gamma=.inf", "loss.gamma is inf; give a number >= 0 (0 is cross entropy)"),
        ("loss.temperature=0", "loss.temperature is 0.0; give a number > 0"),
        ("loss.label_smoothing=1", "loss.label_smoothing is 1.0; give a number in [0, 1)"),
        ("loss.focal=.nan", "loss.focal is nan; give a weight >= 0"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas is 1.0; give a number in [0, 1)"),
        ("training.ema_decay=2", "training.ema_decay is 2.0; give a number in [0, 1)"),
        ("data.cache_gib=.nan", "data.cache_gib is nan; give a number > 0"),
        ("data.workers=-1", "data.workers is -1; give 0 or more"),
        ("data.prefetch=0", "data.prefetch is 0; give at least 1"),
        ("data.bad_sample_budget=2", "data.bad_sample_budget is 2.0; give a share in [0, 1]"),
        ("predict.batch=0", "predict.batch is 0; give at least 1"),
        ("predict.max_train_features=-4", "predict.max_train_features is -4; give at least 1"),
        ("folds.learning_rate=-1", "folds.learning_rate is -1.0; give a number > 0"),
        ("folds.weight_decay=-3", "folds.weight_decay is -3.0; give a factor >= 0"),
        ("folds.augment_scale=-0.5", "folds.augment_scale is -0.5; give a factor >= 0"),
        ("folds.epochs=0", "folds.epochs is 0; give at least 1"),
        ("predict.bootstrap=0", "predict.bootstrap is 0; give at least 1"),
        ("training.patience=-1", "training.patience is -1; give 0 or more"),
        ("engine.timeout_s=0", "engine.timeout_s is 0.0; give a number > 0"),
        ("engine.threads=-1", "engine.threads is -1; give 0 or more"),
        ("pipeline.processes=-1", "pipeline.processes is -1; give 0 or more"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_as_they_are_read(option: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        parse("pretrain", [f"--{option}"])
    assert str(error.value) == line


def test_a_choice_from_python_is_held_to_the_same_words() -> None:
    check_model(ModelConfig())
    with pytest.raises(
        UserError, match="model.compile_mode is 'fast'; allowed: default, reduce-overhead, max-autotune"
    ):
        RoadworkDetector(ModelConfig(compile_mode="fast"), 64)  # type: ignore[arg-type]


def test_the_widest_blur_counts_with_the_scale_and_fits_any_view() -> None:
    with pytest.raises(
        UserError, match="gaussian_blur_sigma 20.0 times augment.magnitude_scale 10.0 is 200; it must be at most"
    ):
        Augment(AugmentConfig(gaussian_blur_sigma=20.0, magnitude_scale=10.0))
    off = dict.fromkeys((name for name in vars(AugmentConfig()) if name.endswith("_p")), 0.0)
    widest = Augment(AugmentConfig(**off | {"gaussian_blur_p": 1.0}, gaussian_blur_sigma=WIDEST_SIGMA))
    for size in (4, 16, 32, 128):
        views = torch.rand(8, 1, 3, size, size)
        assert widest(views, torch.arange(8), 0, 0)[0].isfinite().all()


@pytest.mark.parametrize("option", ["model.dropout=1.5", "augment.rain_p=2", "loss.alpha=[1]", "loss.gamma=-1"])
def test_a_launched_script_ends_with_status_2_and_one_line(option: str) -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, str(root / "launch" / "pretrain.py"), f"--{option}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {option.partition('=')[0]} is ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.layer_decay", 1.0), ("model.dropout", 1.0), ("model.backbone_lr_factor", 0.0), ("augment.noise_std", 0.0),
        ("augment.gaussian_blur_sigma", 128.0), ("augment.zoom_range", (1.0, 1.0)), ("loss.alpha", [0.0, 3.0]),
        ("model.keep_ratio", 1.0), ("model.trainable", "last-12"), ("model.trainable", "full"), ("training.max_steps", 1),
        ("pipeline.stages", []), ("pipeline.stages", list(PIPELINE)), ("predict.prior", 0.999), ("model.metadata_fields", []),
        ("checkpoint.keep_every", 0), ("predict.bootstrap", 1),
    ],
)  # fmt: skip
def test_values_at_the_edge_of_what_is_possible_are_accepted(path: str, value: object) -> None:
    validate(changed(path, value))


def test_a_run_needs_a_length() -> None:
    config = changed("training.max_steps", 0)
    config.training.epochs = 0
    with pytest.raises(UserError, match="are both 0; give one of them"):
        validate(config)


def test_a_generated_half_without_the_challenge_says_what_to_add() -> None:
    config = changed("predict.challenge_synthetic", "pictures")
    config.predict.challenge = False
    with pytest.raises(UserError, match="add --predict.challenge true"):
        validate(config)


def test_compiled_blocks_cannot_be_differentiated_twice() -> None:
    config = changed("optimizer.name", "sophia_h")
    validate(config)
    config.model.compile = True
    with pytest.raises(UserError, match="give --model.compile false, or --optimizer.name sophia"):
        validate(config)


@pytest.mark.parametrize("total", [8, 12, 24, 96])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, 4, 5])
def test_a_step_is_divided_exactly_or_refused_with_choices_that_work(total: int, world: int, micro: int) -> None:
    config = changed("training.global_batch", total)
    config.training.micro_batch = micro
    try:
        steps = accumulation(config, world)
    except UserError as error:
        text = str(error)
        assert total % world or (total // world) % micro
        if total % world:
            offered = text.partition("; use ")[2].partition(",")[0].split(" or ")
            assert all(int(choice) % world == 0 and int(choice) > 0 for choice in offered)
        else:
            offered = text.partition("allowed: ")[2].split(", ")
            for choice in offered:
                config.training.micro_batch = int(choice)
                assert accumulation(config, world) * int(choice) * world == total
        return
    assert steps * micro * world == total


def test_masks_lie_in_the_run_unless_said_otherwise() -> None:
    assert masks_folder(changed("run.dir", "runs/x")) == Path("runs/x/masks")
    assert masks_folder(changed("masks.out", "elsewhere")) == Path("elsewhere")


def test_a_saved_tree_is_plain_and_whole(tmp_path: Path) -> None:
    save(Config(), tmp_path / "deep" / "config.yaml")
    assert parse("pretrain", ["--config", str(tmp_path / "deep" / "config.yaml")]).config == Config()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["config.yaml"], "a temporary file was left"
    assert set(to_dict(Config())) == set(vars(Config()))


def test_every_option_that_is_true_or_false_may_stand_alone() -> None:
    names = list(switch_names(Config))
    assert {"masks.tiles", "data.gps_weighted", "monitoring.console", "augment.enabled"} <= set(names)
    assert len(names) == len(set(names)) and not any(name.startswith("--") for name in names)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainng.max_steps=3"], r"unknown option --trainng.max_steps; did you mean --training.max_steps\?"),
        (["--nothing.like.it=3"], "unknown option --nothing.like.it"),
        (["--seed", "one"], "seed"),
        (["--config", "/nowhere/at/all.yaml"], "/nowhere/at/all.yaml"),
        (["--data.shards"], "data.shards"),
    ],
)
def test_what_is_typed_wrong_is_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        parse("pretrain", arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("text", ["training: 3", "- a\n- b", "training:\n  max_steps: [1", "\x00"])
def test_a_file_that_is_no_tree_of_options_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse("pretrain", ["--config", str(path)])
    assert "\n" not in str(error.value)


def test_later_stages_without_a_saved_configuration_take_the_defaults(tmp_path: Path) -> None:
    assert parse("predict", ["--run.dir", str(tmp_path)]).config.run.dir == str(tmp_path)
    save(changed("training.global_batch", 24), tmp_path / "config.yaml")
    assert parse("evaluate", [f"--run.dir={tmp_path}"]).config.training.global_batch == 24
    assert parse("pretrain", [f"--run.dir={tmp_path}"]).config.training.global_batch == Config().training.global_batch


# ------------------------------------------------------------------------------------------------------- tools


def test_tools_have_flat_options_with_their_types(tmp_path: Path) -> None:
    made = parse_tool("export", ExportOptions, ["--views", "3", "--format=both"])
    assert (made.views, made.format, made.model) == (3, "both", ExportOptions().model)
    (tmp_path / "serve.yaml").write_text("port: 9000\nmax_wait_ms: 0\n")
    served = parse_tool("serve", ServiceOptions, ["--config", str(tmp_path / "serve.yaml"), "--port", "9001"])
    assert (served.port, served.max_wait_ms) == (9001, 0.0)
    check_service(served)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "tflite"], "format"),
        (["--views", "many"], "views"),
        (["--view", "3"], "unknown option --view; did you mean --views"),
    ],
)
def test_a_tools_wrong_option_is_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_tool("export", ExportOptions, arguments)


@pytest.mark.parametrize("name", ["timeout_s", "grace_s", "max_wait_ms"])
def test_a_service_waits_for_a_number_of_seconds(name: str) -> None:
    for value in (math.nan, math.inf, -1.0):
        with pytest.raises(UserError, match=f"--{name} is {value}; give"):
            check_service(ServiceOptions(**{name: value}))


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_does_not_exist_is_refused(port: int) -> None:
    with pytest.raises(UserError, match=f"--port is {port}; give 1 to 65535|--port"):
        check_service(ServiceOptions(port=port))


# ------------------------------------------------------------------------------------------------------- frame


def _raises(error: BaseException) -> Callable[[], int]:
    @exit_on_user_error
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(("error", "status"), [(UserError("x"), 2), (KeyboardInterrupt(), 130)])
def test_statuses(error: BaseException, status: int) -> None:
    with pytest.raises(SystemExit) as stop:
        _raises(error)()
    assert stop.value.code == status


def test_a_status_of_ones_own_is_kept() -> None:
    @exit_on_user_error
    def main(status: int) -> int:
        return status

    assert (main(0), main(1), main.__name__) == (0, 1, "main")


def test_of_a_launched_jobs_ranks_the_first_says_its_line_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        fail("several\nlines")
    assert capsys.readouterr().err == "error: several lines\n"


def test_the_challenge_has_a_short_name_where_it_is_run() -> None:
    assert parse("predict", ["--challenge"]).config.predict.challenge
    assert not parse("predict", []).config.predict.challenge
    with pytest.raises(UserError, match="unknown option --challenge"):
        parse("pretrain", ["--challenge"])
