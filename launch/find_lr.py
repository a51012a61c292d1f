"""Learning-rate range test: `accelerate launch [--config_file accelerate_configs/X.yaml] launch/find_lr.py [...]`."""

from roadwork.cli import exit_on_user_error
from roadwork.command_line import parse


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parse, build, search."""
    invocation = parse("find_lr", argv)
    from roadwork.training.dry_run import describe
    from roadwork.training.lr_finder import find_learning_rate

    if invocation.dry_run:
        describe(invocation.config)
    else:
        find_learning_rate(invocation.config)


if __name__ == "__main__":
    raise SystemExit(main())
