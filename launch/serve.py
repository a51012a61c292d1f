"""Service: `python launch/serve.py --model DIR [--port 8000]`."""

from roadwork.cli import exit_on_user_error
from roadwork.command_line import parse_tool
from roadwork.errors import UserError
from roadwork.inference.options import ServiceOptions


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parse, serve. UserError where the packages of the extra `serve` are missing."""
    options = parse_tool("serve", ServiceOptions, argv)
    try:
        from roadwork.inference.service import serve
    except ModuleNotFoundError as error:
        raise UserError(f"the service needs the package {error.name}: pip install -e '.[serve]'") from None
    serve(options)


if __name__ == "__main__":
    raise SystemExit(main())
