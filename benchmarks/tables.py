"""README's results from the dated result files: `python -m benchmarks.tables [--check]`

Rewrites the block of README.md between the two markers and docs/ablation.svg, from the newest result of each benchmark.
No figure is typed by hand; a test fails where block or picture are not what the files say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.ablation_variants import CLAIMS
from benchmarks.headlines import HEADLINES
from benchmarks.paired import Difference
from benchmarks.results import RESULTS, ROOT, newest

BEGIN, END = "<!-- results: written by python -m benchmarks.tables -->", "<!-- end of results -->"
PICTURE = Path("docs/ablation.svg")
_LEFT, _WIDE, _ROW = 190, 720, 26
_COLOURS = {"helps": "#1a7f37", "harms": "#cf222e", "not shown": "#6e7781"}


def block(results: Mapping[str, dict[str, Any]]) -> str:
    """The text between the markers."""
    if not results:
        return "No dated result lies in `benchmarks/results/` yet.\n"
    parts = list(ablation(results["ablation"])) if "ablation" in results else []
    return "\n".join([*parts, *headlines(results), *origins(results)]) + "\n"


def headlines(results: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """The figures that tell most, one row each; the files hold all. What a result left out is named below."""
    rows = [line for line in HEADLINES if line.benchmark in results]
    told = {line: value(results[line.benchmark]["figures"], line.key) for line in rows}
    there = [line for line in rows if told[line] is not None]
    if there:
        yield "Rows that say `over` or `times` are ratios of speed: above 1, what is named first is the faster.\n"
        yield "| measured | figure | by |\n|---|---|---|"
    for line in there:
        yield f"| {line.says} | {figure(told[line])} | {line.benchmark} |"
    if there:
        yield ""
    if missing := [f"`{line.key}` of {line.benchmark}" for line in rows if line not in there]:
        yield f"Not measured by the newest run: {', '.join(missing)}.\n"


def value(figures: Mapping[str, Any], key: str) -> Any:
    """A figure by its name, None where it is not there; `runs.seconds` is the median of that figure over the runs."""
    name, _, part = key.partition(".")
    found = figures.get(name)
    return median(run[part] for run in found) if part and found else found


def figure(value: float) -> str:
    """Whole numbers from a thousand on with commas, others to three digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 or isinstance(value, int) else f"{value:.3g}"


def origins(results: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Where each benchmark's figures come from."""
    yield "| benchmark | measured on | by |\n|---|---|---|"
    for name, result in results.items():
        yield f"| {name} | {when(result)} | `{result['command']}` |"


def origin(result: Mapping[str, Any]) -> str:
    """When, on what and how a result was measured."""
    return f"{when(result)}, `{result['command']}`"


def when(result: Mapping[str, Any]) -> str:
    """When and on what a result was measured."""
    machine = result["machine"]
    instructions = f" with {machine['instructions']}" if "instructions" in machine else ""
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['processor']}{instructions}"
    return f"{result['date']}, commit {result['commit']}, {where}"


def ablation(result: Mapping[str, Any]) -> Iterator[str]:
    """What each component is worth, with its interval, what the run could have seen, and what follows for the default."""
    found, rows = result["figures"], result["figures"]["rows"]
    yield f"What each component is worth on the embedded benchmark ({origin(result)}): gains in MCC and AUC on"
    yield f"{found['test_photos']:,} test photos of {found['test_groups']} videos, from pixels alone, over all seeds, where the"
    yield f"network with everything has MCC {found['mcc']:.3f};"
    yield "95 % intervals over seeds and videos. Where a metric's interval holds 0, that metric showed nothing, in either"
    yield "direction. MCC decides about a default, AUC (how well photos are ranked) stands beside it; the rule is in"
    yield "[decisions](docs/decisions.md#proof)."
    yield f"Half-widths of the intervals: {_widths(rows, '')} in MCC, {_widths(rows, 'auc_')} in AUC: this run could not have"
    yield f"seen a gain smaller than its row's. Of {2 * len(rows)} such intervals luck alone leaves about"
    yield f"{0.05 * 2 * len(rows):.0f} without 0.\n"
    measured = {row["name"] for row in rows}
    if missing := [f"{claim.what} (`{claim.name}`)" for claim in CLAIMS if claim.name not in measured]:
        yield f"Part of the trainer, but not measured by this run: {', '.join(missing)}.\n"
    yield f"![gains in MCC with their intervals]({PICTURE})\n"
    yield "| component | gain in MCC | 95 % | gain in AUC | 95 % | seeds | by MCC | by AUC | so | the sketch's claim |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['what']} | {row['value']:+.3f} | {row['low']:+.3f} to {row['high']:+.3f} | {row['auc_value']:+.3f} "
            f"| {row['auc_low']:+.3f} to {row['auc_high']:+.3f} | {row['seeds']} | {_verdict(row, '')} "
            f"| {_verdict(row, 'auc_')} | {consequence(row)} | {claimed(row)} |"
        )
    yield ""
    if any(row["claimed"] for row in rows):
        yield "The sketch gave its claims in per cent and did not say of what. Here they are taken of the MCC without the"
        yield "component, the smaller number of each: excluded where it lies above the interval.\n"


def _verdict(row: Mapping[str, Any], metric: str) -> str:
    low, high = (row[f"{metric}{edge}"] for edge in ("low", "high"))
    return Difference(row[f"{metric}value"], low, high).verdict


def _widths(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The narrowest and the widest half of an interval."""
    halves = [(row[f"{metric}high"] - row[f"{metric}low"]) / 2 for row in rows]
    return f"{min(halves):.3f} to {max(halves):.3f}"


def claimed(row: Mapping[str, Any]) -> str:
    """What the sketch promised, and whether the interval leaves room for the smaller number of it."""
    if not row["claimed"]:
        return "none"
    least = float(re.findall(r"[\d.]+", row["claimed"])[0]) / 100 * row["mcc_without"]
    found = "holds here" if row["low"] >= least else "excluded here" if row["high"] < least else "not excluded"
    return f"{row['claimed']}: {found}"


def consequence(row: Mapping[str, Any]) -> str:
    """What follows for the default: MCC decides; where it shows nothing, the component stays, with its reason."""
    by_mcc, by_auc = _verdict(row, ""), _verdict(row, "auc_")
    if by_mcc == "helps":
        return "on: it helps"
    claim = next((claim for claim in CLAIMS if claim.name == row["name"]), None)
    if by_mcc == "harms":
        return f"off {claim.off}" if claim and claim.off else "to be switched off: it harms"
    seen = {"helps": "it ranks better", "harms": "it ranks worse", "not shown": "nothing shown"}[by_auc]
    return f"stays: {seen}" + (f"; {claim.kept}" if claim and claim.kept else "")


def picture(result: Mapping[str, Any]) -> str:
    """Gains in MCC and their intervals as an SVG, one line per component."""
    rows = result["figures"]["rows"]
    edge: float = max(0.01, *(abs(row[key]) for row in rows for key in ("low", "high", "value"))) * 1.05
    height = _ROW * (len(rows) + 2)

    def x(value: float) -> float:
        return round(_LEFT + (value / edge + 1) / 2 * (_WIDE - _LEFT - 20), 1)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDE}" height="{height}" fill="white"/>',
        f'<line x1="{x(0)}" y1="8" x2="{x(0)}" y2="{height - _ROW}" stroke="#999" stroke-dasharray="4 3"/>',
    ]
    for k, row in enumerate(rows):
        y, colour = _ROW * k + 20, _COLOURS[row["verdict"]]
        lines.append(f'<text x="8" y="{y + 4}">{escape(row["name"])} ({row["verdict"]})</text>')
        lines.append(
            f'<line x1="{x(row["low"])}" y1="{y}" x2="{x(row["high"])}" y2="{y}" stroke="{colour}" stroke-width="3"/>'
        )
        lines.append(f'<circle cx="{x(row["value"])}" cy="{y}" r="5" fill="{colour}"/>')
    for value in (-edge / 1.05, 0.0, edge / 1.05):
        lines.append(f'<text x="{x(value)}" y="{height - 10}" text-anchor="middle">{value:+.3f}</text>')
    lines.append(f'<text x="8" y="{height - 10}">gain in MCC, 95 % interval</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def wanted(readme: str, results: Mapping[str, dict[str, Any]]) -> dict[Path, str | None]:
    """Files as they should be; None: there should be none. SystemExit where README.md lacks the block's place."""
    text, times = re.subn(
        f"{re.escape(BEGIN)}\n.*?{re.escape(END)}",
        lambda _: f"{BEGIN}\n\n{block(results)}\n{END}",
        readme,
        flags=re.DOTALL,
    )
    if times != 1:
        raise SystemExit(f"README.md must hold one block between {BEGIN} and {END}; it holds {times}")
    return {Path("README.md"): text, PICTURE: picture(results["ablation"]) if "ablation" in results else None}


def main(argv: list[str] | None = None) -> int:
    """Write, or say what is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where something is stale")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the dated results")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md")
    options = parser.parse_args(argv)
    stale = []
    for name, text in wanted((options.root / "README.md").read_text(encoding="utf-8"), newest(options.results)).items():
        path = options.root / name
        if (path.read_text(encoding="utf-8") if path.is_file() else None) == text:
            continue
        stale.append(str(name))
        if not options.check:
            path.unlink(missing_ok=True) if text is None else path.write_text(text, encoding="utf-8")
    if stale and options.check:
        print(f"{', '.join(stale)}: not what the result files say; run `python -m benchmarks.tables`")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
