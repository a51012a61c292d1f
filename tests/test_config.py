"""The typed tree: what is read, and what is refused with one line."""

import sys
from pathlib import Path

import pytest

from roadwork.command_line import parse
from roadwork.config import Config, accumulation, save
from roadwork.errors import UserError


def test_exponents_in_yaml_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training:\n  learning_rate: 3e-4\noptimizer:\n  eps: 1e-8\n")
    config = parse("pretrain", ["--config", str(tmp_path / "run.yaml")]).config
    assert config.training.learning_rate == 3e-4 and config.optimizer.eps == 1e-8


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training:\n  global_batch: 64\nseed: 5\n")
    config = parse("pretrain", ["--config", str(tmp_path / "run.yaml"), "--training.global_batch", "16"]).config
    assert (config.training.global_batch, config.seed) == (16, 5)


def test_what_is_saved_reads_back_equal(tmp_path: Path) -> None:
    config = parse("pretrain", ["--augment.zoom_range", "[0.8, 1.1]", "--loss.alpha", "[2, 0.5]"]).config
    save(config, tmp_path / "config.yaml")
    assert parse("pretrain", ["--config", str(tmp_path / "config.yaml")]).config == config


@pytest.mark.parametrize(
    ("arguments", "tiles"),
    [
        (["--masks.tiles"], True),
        (["--masks.tiles", "--masks.batch", "2"], True),
        (["--masks.tiles", "false", "--masks.batch", "2"], False),
        (["--masks.tiles=false"], False),
    ],
)
def test_an_option_that_is_true_or_false_needs_no_value(arguments: list[str], tiles: bool) -> None:
    assert parse("pseudo_masks", arguments).config.masks.tiles is tiles


def test_later_stages_start_from_the_runs_own_configuration(tmp_path: Path) -> None:
    save(parse("pretrain", ["--training.global_batch", "24"]).config, tmp_path / "config.yaml")
    config = parse("predict", ["--run.dir", str(tmp_path), "--predict.prior", "0.4"]).config
    assert (config.training.global_batch, config.predict.prior) == (24, 0.4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainin.max_steps", "3"], ["--trainin.max_steps", "--training.max_steps"]),
        (["--training.max_steps", "many"], ["training.max_steps", "many"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--model.top_k", "9"], ["model.top_k 9", "model.num_experts 4"]),
        (["--model.trainable", "some"], ["some", "frozen", "full"]),
        (["--checkpoint.keep_last", "1"], ["checkpoint.keep_last", "at least 2"]),
        (["--training.learning_rate", "-1"], ["training.learning_rate", "give a number > 0"]),
        (["--predict.prior", "1.0"], ["predict.prior", "between 0 and 1"]),
        (["--pipeline.stages", "[evaluate,pretrain]"], ["pipeline.stages", "in this order"]),
    ],
)
def test_mistakes_are_one_line_that_names_them(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse("pretrain", arguments)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training:\n  learning_rat: 3e-4\n")
    with pytest.raises(UserError, match=r"training\.learning_rat; did you mean training\.learning_rate"):
        parse("pretrain", ["--config", str(tmp_path / "run.yaml")])


def test_a_section_that_stands_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    """YAML's usual reader takes the last one: what the first says would be lost without a word."""
    file = tmp_path / "run.yaml"
    file.write_text("training:\n  max_steps: 3\nseed: 1\ntraining:\n  micro_batch: 2\n")
    with pytest.raises(UserError, match=r"run\.yaml gives training twice; write it once"):
        parse("pretrain", ["--config", str(file)])
    file.write_text("training: {max_steps: 3, epochs: 2, max_steps: 4}\n")
    with pytest.raises(UserError, match="gives max_steps twice"):
        parse("predict", [f"--config={file}"])
    file.write_text("training: {max_steps: 3}\nlr_finder: {steps: 4}\n")
    assert parse("pretrain", ["--config", str(file)]).config.training.max_steps == 3


def test_a_tracker_that_is_not_installed_is_refused_where_it_would_be_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--monitoring.trackers", "[tensorboard,wandb]"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    for stage in ("pretrain", "find_lr", "pipeline"):
        with pytest.raises(UserError, match="names wandb, which is not installed: pip install"):
            parse(stage, words)
    assert parse("evaluate", words).config.monitoring.trackers == ["tensorboard", "wandb"]


def test_accumulation_is_derived_and_an_indivisible_choice_names_what_works() -> None:
    config = Config()
    config.training.global_batch, config.training.micro_batch = 24, 4
    assert accumulation(config, 1) == 6 and accumulation(config, 3) == 2
    with pytest.raises(UserError, match=r"allowed: 1, 2, 3, 6, 12|allowed: 1, 2, 3, 4, 6, 12") as caught:
        config.training.micro_batch = 5
        accumulation(config, 2)
    assert "micro_batch 5" in str(caught.value)
    with pytest.raises(UserError, match="20 or 25"):
        accumulation(config, 5)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_the_defaults_start_on_any_usual_node(gpus):
    assert accumulation(Config(), gpus) == 8 // gpus
