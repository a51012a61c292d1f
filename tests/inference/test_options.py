"""The command lines of the two tools outside a run."""

from __future__ import annotations

import pytest

from roadwork.command_line import parse_tool
from roadwork.errors import UserError
from roadwork.inference.options import ExportOptions, ServiceOptions, check_service


def test_flat_options_are_read_with_their_types() -> None:
    service = parse_tool("serve", ServiceOptions, ["--model", "m", "--port", "81", "--max_wait_ms=3"])
    assert (service.model, service.port, service.max_wait_ms, service.max_batch) == ("m", 81, 3.0, 16)
    assert parse_tool("export", ExportOptions, ["--format=both"]).format == "both"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--prt", "1"], "unknown option --prt; did you mean --port?"), (["--port", "x"], '"port".*int.*x')],
)
def test_a_wrong_option_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_tool("serve", ServiceOptions, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("port", 0), ("max_bytes", 0), ("timeout_s", -1.0), ("max_wait_ms", -1.0)])
def test_values_that_no_service_could_use(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--{name} is {value}"):
        check_service(ServiceOptions(**{name: value}))
