"""All stages in order, each resumable: `python launch/pipeline.py --config FILE [--a.b VALUE ...]`."""

from roadwork.cli import exit_on_user_error
from roadwork.command_line import parse


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parse and run the stages."""
    invocation = parse("pipeline", argv)
    from roadwork.pipeline import describe, run_pipeline

    if invocation.dry_run:
        describe(invocation.config)
    else:
        run_pipeline(invocation.config)


if __name__ == "__main__":
    raise SystemExit(main())
