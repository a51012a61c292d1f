"""Evaluation: `accelerate launch [--config_file accelerate_configs/X.yaml] launch/evaluate.py --run.dir DIR [...]`."""

from roadwork.cli import exit_on_user_error
from roadwork.command_line import parse


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parse, check, evaluate."""
    invocation = parse("evaluate", argv)
    from roadwork.inference.evaluate import describe, run_evaluate

    if invocation.dry_run:
        describe(invocation.config)
    else:
        run_evaluate(invocation.config)


if __name__ == "__main__":
    raise SystemExit(main())
