"""Pre-training: `accelerate launch [--config_file accelerate_configs/X.yaml] launch/pretrain.py [--a.b VALUE ...]`."""

from roadwork.cli import exit_on_user_error
from roadwork.command_line import parse


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parse, build, train."""
    invocation = parse("pretrain", argv)
    # heavy imports come after the options are known to be right
    from roadwork.training.dry_run import describe
    from roadwork.training.pretrain import pretrain

    if invocation.dry_run:
        describe(invocation.config)
    else:
        pretrain(invocation.config)


if __name__ == "__main__":
    raise SystemExit(main())
