"""What a real browser makes of a report."""

import html
import json
import re
import subprocess
from pathlib import Path

from tests.launching import require

PROBE = """<script>window.addEventListener('load', () => {
const all = [...document.images], bad = all.filter(i => !i.complete || i.naturalWidth === 0);
parent.postMessage(JSON.stringify({images: all.length, bad: bad.map(i => i.alt), width: window.innerWidth,
  overflow: document.documentElement.scrollWidth - window.innerWidth}), '*'); });</script></body>"""
FRAME = """<!DOCTYPE html><body style="margin:0"><script>
addEventListener('message', m => document.body.dataset.probe = m.data);</script>
<iframe src="index.html" style="border:0;width:{width}px;height:900px"></iframe></body>"""
"""A headless window is never narrower than 500 px, so a phone's page stands in a frame."""


def look(report: Path, folder: Path, width: int) -> None:
    """Open a report in a window of that width: every picture loads, nothing is wider, the console says nothing."""
    require("browser", "chromium", "apt-get install chromium")
    page = report.read_text()
    (folder / "index.html").write_text(page.replace("</body>", PROBE))
    (folder / "frame.html").write_text(FRAME.replace("{width}", str(width)))
    command = [
        "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1300,900", "--enable-logging=stderr", "--v=0",
        "--virtual-time-budget=5000", "--dump-dom", (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    state = json.loads(html.unescape(found[1]))
    assert state["width"] == width
    assert state["images"] == page.count("<img ") > 10 and state["bad"] == []
    assert state["overflow"] <= 0, "the page is wider than the screen"
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
