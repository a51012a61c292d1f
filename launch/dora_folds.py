"""DoRA folds: `accelerate launch [--config_file accelerate_configs/X.yaml] launch/dora_folds.py --run.dir DIR`."""

from roadwork.cli import exit_on_user_error
from roadwork.command_line import parse


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parse, check, fine-tune."""
    invocation = parse("dora_folds", argv)
    from roadwork.training.folds import describe, run_folds

    if invocation.dry_run:
        describe(invocation.config)
    else:
        run_folds(invocation.config)


if __name__ == "__main__":
    raise SystemExit(main())
