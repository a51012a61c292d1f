"""No call in the sources runs what a file from others says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("roadwork", "shards", "launch") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def faults(text: str) -> list[str]:
    """Line and reason of every call that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: imports {n}" for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {reason}" for reason in _unsafe(node)]
    return found


def _unsafe(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    reasons = [f"calls {name}"] if name in FORBIDDEN_CALLS else []
    if name == "torch.load" and given.get("weights_only") != "True":
        reasons.append("torch.load without weights_only=True")
    if name.endswith((".extractall", ".extract")):
        reasons.append("unpacks an archive")
    for word in ("allow_pickle", "trust_remote_code", "shell"):
        if given.get(word, "False") != "False":
            reasons.append(f"{word}={given[word]}")
    return reasons


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_from_others_is_run(path: Path) -> None:
    assert not faults(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(p)", "torch.load(p, weights_only=False)", "yaml.load(t)", "eval(t)", "import pickle",
        "from joblib import load", "np.load(p, allow_pickle=True)", "tar.extractall(d)", "run(w, shell=True)",
        "M.from_pretrained(d, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert faults(line)
