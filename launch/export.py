"""Export: `python launch/export.py --model DIR [--format onnx|torch|both] [--views N]`."""

import sys

from roadwork.cli import exit_on_user_error
from roadwork.command_line import parse_tool
from roadwork.inference.options import ExportOptions


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parse, export, compare."""
    options = parse_tool("export", ExportOptions, argv)
    from roadwork.inference.portable import export

    for path, error in export(options).items():
        sys.stdout.write(f"{path}: largest difference in probability from the model {error:.2g}\n")


if __name__ == "__main__":
    raise SystemExit(main())
