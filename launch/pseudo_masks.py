"""Pseudo-masks: `accelerate launch [--config_file accelerate_configs/X.yaml] launch/pseudo_masks.py [...]`."""

from roadwork.cli import exit_on_user_error
from roadwork.command_line import parse


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parse, build, label."""
    invocation = parse("pseudo_masks", argv)
    from roadwork.labelling.run import describe, make_pseudo_masks  # heavy imports come after the options are known

    if invocation.dry_run:
        describe(invocation.config)
    else:
        make_pseudo_masks(invocation.config)


if __name__ == "__main__":
    raise SystemExit(main())
