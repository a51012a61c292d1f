"""Prediction: `accelerate launch [--config_file accelerate_configs/X.yaml] launch/predict.py --run.dir DIR [...]`."""

from roadwork.cli import exit_on_user_error
from roadwork.command_line import parse


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parse, check, predict."""
    invocation = parse("predict", argv)
    from roadwork.inference.predict import describe, run_predict

    if invocation.dry_run:
        describe(invocation.config)
    else:
        run_predict(invocation.config)


if __name__ == "__main__":
    raise SystemExit(main())
