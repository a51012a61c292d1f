"""The texts tell the truth: links lead somewhere, and what is named by name is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from docs import generate_reliability
from roadwork import command_line
from roadwork.config import accumulation
from roadwork.errors import UserError
from roadwork.inference.options import ExportOptions, ServiceOptions
from shards import build

TOOLS: dict[str, type] = {"export": ExportOptions, "serve": ServiceOptions}
ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".", "docs", "benchmarks")
PAGES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
OTHERS = {
    "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port", "--config_file",
    "--logdir", "--nodes", "--gpus-per-node", "--cpus-per-gpu", "--exclusive", "--mem", "--array", "--help", "--check",
    "--batch", "--ntasks-per-node", "--signal",
}  # fmt: skip
"""Options of `accelerate launch`, tensorboard, sbatch and the page's own generator."""


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as the usual viewers make them."""
    titles = re.findall(r"^#+ (.+)$", prose(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def known_options() -> set[str]:
    """Every option of the stages, of the tools for shards, of the benchmarks and of the drills."""
    parsers = [command_line.parser(stage) for stage in ("pretrain", "predict")]
    found = {name for parser in parsers for action in parser._actions for name in action.option_strings}
    for name, kind in TOOLS.items():
        found |= {
            option for action in command_line.tool_parser(name, kind)._actions for option in action.option_strings
        }
    folders = ("shards", "benchmarks", "tests/faults")
    for tool in sorted(path for folder in folders for path in (ROOT / folder).glob("*.py")):
        found |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', tool.read_text(encoding="utf-8")))
    return found | OTHERS


@pytest.mark.parametrize("page", ["configuration", "reliability"])
def test_a_generated_page_is_what_code_and_results_say(page: str) -> None:
    command = [sys.executable, f"docs/generate_{page}.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        goal = (page.parent / name).resolve() if name else page
        assert goal.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(goal), f"{page.name} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_in_a_page_exist(page: Path) -> None:
    pattern = r"\b((?:roadwork|launch|shards|tests|benchmarks|docs|accelerate_configs|ds_configs)/[\w./*-]*[\w/*])"
    for name in re.findall(pattern, page.read_text(encoding="utf-8")):
        if name in ("shards/natix", "docs/runs") or name.startswith("benchmarks/results"):
            continue
        assert list(ROOT.glob(name.rstrip("/"))), f"{page.name} names {name}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_named_in_a_page_exist(page: Path) -> None:
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page.name} names {file}::{name}"


def test_make_targets_and_modules_named_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.M))
        assert named <= targets, f"{page.name}: make has no {', '.join(sorted(named - targets))}"
        for module in set(re.findall(r"python -m ([a-z_.]+[a-z_])", text)):
            assert importlib.util.find_spec(module), f"{page.name}: there is no module {module}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_named_in_a_page_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z0-9]", page.read_text(encoding="utf-8")))
    unknown = sorted(named - known_options())
    assert not unknown, f"{page.name} names options that no command knows: {', '.join(unknown)}"


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command in a page's shell blocks, fenced or indented; `...` stands for the command above it."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    blocks += re.findall(r"(?:^    \S.*\n)+", text, flags=re.M)
    before: list[str] = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if not re.match(r" *(accelerate|sbatch|python|\.\.\.) ", line):
            continue
        words = shlex.split(line, comments=True)
        words = before + words[1:] if words[0] == "..." else words
        before = words[: script_at(words) + 1]
        yield words


def script_at(words: list[str]) -> int:
    """Where a command's words name a script of `launch/`; -1 for none."""
    names = (i for i, word in enumerate(words) if re.fullmatch(r"launch/(slurm/)?\w+\.(py|sbatch)", word))
    return next(names, -1)


def understand(words: list[str]) -> str:
    """The kind of a command, once the parser that would read it has done so; none is run.

    What trains is told its shards, for without them it would train on those of `make demo`.
    """
    at = script_at(words)
    stage = Path(words[at]).stem
    if at < 0:
        if words[:3] == ["python", "-m", "shards.build"]:
            build.options_of(build.parser().parse_args(words[3:]))
            return "tool"
        return "other"
    if stage in TOOLS:
        command_line.parse_tool(stage, TOOLS[stage], words[at + 1 :])
        return "tool"
    config = command_line.parse(stage, words[at + 1 :]).config
    if stage in ("pretrain", "find_lr", "pipeline"):
        assert "--data.shards" in words, f"{shlex.join(words)} trains on the shards of `make demo`"
    if stage == "pretrain" and (number := processes(words)):
        accumulation(config, number)
    return "stage"


def processes(words: list[str]) -> int:
    """How many processes a command line starts, where it says so: to a launcher or to Slurm."""
    said = {
        name: int(value) for word in words if "=" in word for name, value in [word.split("=", 1)] if value.isdigit()
    }
    if "--gpus-per-node" in said:
        return said.get("--nodes", 1) * said["--gpus-per-node"]
    return int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 0


def test_the_commands_of_the_pages_are_understood() -> None:
    kinds = {str(page.relative_to(ROOT)): Counter(map(understand, commands(page))) for page in PAGES}
    assert kinds["README.md"]["stage"] >= 12 and kinds["README.md"]["tool"] >= 4
    assert kinds["docs/slurm.md"]["stage"] == 5 and kinds["docs/masks.md"]["stage"] >= 8


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("sbatch launch/slurm/pretrain.sbatch --config launch/configs/natix.yaml --run.dir runs/natix", "make demo"),
        ("python launch/pipeline.py --config launch/configs/natix.yaml --pipeline.source natix", "make demo"),
        (
            "accelerate launch --num_processes 3 launch/pretrain.py --data.shards shards --training.global_batch 32",
            "divide",
        ),
    ],
)
def test_a_command_that_would_train_otherwise_than_its_reader_thinks_is_found(line: str, what: str) -> None:
    with pytest.raises((AssertionError, UserError), match=what):
        understand(shlex.split(line))


def test_an_old_python_is_refused_in_one_line_before_anything_is_installed(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    act = "import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{act}" "$2"\n')
    old.chmod(0o755)
    command = ["make", "install", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not (tmp_path / "venv").exists()
    said = f"error: {old} is Python 3.9, and 3.11 or newer is needed: give PYTHON=python3.11"
    assert done.stderr.splitlines()[0] == said and len(done.stderr.splitlines()) == 2, "make adds a line of its own"


def test_the_pictures_of_the_readme_are_pictures_and_small() -> None:
    """Whoever fetches the repository fetches them."""
    named = re.findall(r"!\[[^\]]+\]\((docs/[^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"docs/report_desktop.jpg", "docs/report_phone.jpg", "docs/tensorboard.jpg"} <= set(named)
    for name in named:
        if name.endswith(".svg"):
            assert ElementTree.parse(ROOT / name).getroot().tag.endswith("svg")
        else:
            with Image.open(ROOT / name) as picture:
                picture.load()
        assert (ROOT / name).stat().st_size < 150_000, name


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    text = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8").partition("## Dependencies")[2].lower()
    cells = {name.strip() for row in re.findall(r"^\| ([^|]+) \|", text, flags=re.M) for name in row.split(",")}
    missing = {re.split(r"[\[<>=~! ]", name)[0].lower() for name in wanted} - cells
    assert not missing, f"docs/decisions.md gives no reason for {', '.join(sorted(missing))}"


def test_the_counts_of_the_reliability_page_are_renewed_and_nothing_else() -> None:
    one, other = "tests/faults/a.py::test_one", "tests/faults/a.py::test_other"
    page = f"# A\n\n| event | test | cases |\n|---|---|---|\n| x | `{one}`, `{other}` | |\n| y | `{one}` | 99 |\n\n"
    page += f"{generate_reliability.BEGIN}\nold\n{generate_reliability.END}\nafter\n"
    row = {"where": "here", "victim": "rank 0", "kills": 7, **dict.fromkeys(generate_reliability.COUNTS, 3)}
    figures = {"kills": 7, "steps": 24, "missed_the_write": 1, "after_the_end": 2, "longest_end_s": 1.5, "curves": 4}
    never = {"differing_curves": 0, "samples_lost_or_doubled": 0, "refused": 0}
    machine = {"gpu": None, "cores": 2, "processor": "a chip"}
    result = {"date": "2026-01-02", "commit": "abc", "command": "a command", "machine": machine}
    result["figures"] = {**figures, **never, "rows": [row]}
    text = generate_reliability.wanted(page, {one: 2, other: 3}, result)
    assert f"| x | `{one}`, `{other}` | 5 |\n| y | `{one}` | 2 |\n" in text
    assert "| here | rank 0 | 7 | 3 | 3 | 3 | 3 | 3 |" in text and "2026-01-02, commit abc" in text
    assert "old" not in text and text.startswith("# A\n") and text.endswith("after\n")
    assert generate_reliability.wanted(text, {one: 2, other: 3}, result) == text, "writing twice changes nothing"
    assert "No dated result" in generate_reliability.wanted(text, {}, None)
    with pytest.raises(SystemExit, match="holds 0"):
        generate_reliability.wanted("no block", {}, None)


def test_the_changelog_tells_of_this_version_with_its_date() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    released = re.findall(r"^## (\S+) - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert released and released[0][0] == version, "the newest section is that of pyproject.toml's version"
    assert [date for _, date in released] == sorted((date for _, date in released), reverse=True)


def test_extras_are_installed_into_this_checkout_with_the_tested_versions() -> None:
    """A plain `pip install .[extra]` would put an unpinned copy in place of the checkout."""
    for page in PAGES:
        for line in re.findall(r"pip install [^`\n]*\[\w+\][^`\n]*", page.read_text(encoding="utf-8")):
            assert "-c constraints.txt -e " in line, f"{page.name}: {line}"
