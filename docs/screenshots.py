"""Pictures of a run for the README: its report and TensorBoard's first screen, taken by a headless Chromium.

    python docs/screenshots.py RUN [--out docs]

RUN is a run folder with report/index.html and tensorboard/. Needs Debian's `chromium`.
"""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

LARGEST = 150_000
"""Bytes of a picture at most: it lies in the repository."""
NARROWEST = 500
"""A headless window is never narrower; a phone's page is shown in a frame of its own inside."""
CHROMIUM = [
    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip
FRAME = '<!DOCTYPE html><body style="margin:0"><iframe src="{url}" style="border:0;width:{width}px;height:{height}px">'
REPORT = {
    "report_desktop": ("", 1100, 1000),
    "report_errors": ("worst", 1100, 1000),
    "report_phone": ("", 390, 844),
}
"""Picture -> section of the report that it begins at (empty: its top), width and height in CSS pixels."""
BEGIN = (
    "<script>while (document.body.firstElementChild.id !== '{id}') document.body.firstElementChild.remove()</script>"
)
"""Scrolling would do, but a headless picture may be taken before the scrolled part is painted."""


def shoot(url: str, width: int, height: int, wait_ms: int = 10_000) -> Image.Image:
    """The page as a window of that size shows it. Raises CalledProcessError where the browser fails."""
    with tempfile.TemporaryDirectory() as folder:
        if width < NARROWEST:
            wrapper = Path(folder) / "frame.html"
            wrapper.write_text(FRAME.format(url=url, width=width, height=height), encoding="utf-8")
            url = wrapper.as_uri()
        target = Path(folder) / "page.png"
        command = [
            *CHROMIUM, f"--user-data-dir={folder}/profile", f"--window-size={max(width, NARROWEST)},{height}",
            f"--virtual-time-budget={wait_ms}", f"--screenshot={target}", url,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=400)
        with Image.open(target) as picture:
            return picture.convert("RGB").crop((0, 0, width, height))


def section(page: Path, name: str, width: int, height: int) -> Image.Image:
    """The report as a window shows it, from a section on."""
    if not name:
        return shoot(page.as_uri(), width, height)
    with tempfile.TemporaryDirectory() as folder:
        cut = Path(folder) / "index.html"
        text = page.read_text(encoding="utf-8")
        cut.write_text(text.replace("</body>", BEGIN.replace("{id}", name) + "</body>"), encoding="utf-8")
        return shoot(cut.as_uri(), width, height)


def compressed(picture: Image.Image) -> bytes:
    """JPEG bytes, as good as LARGEST allows; ValueError where quality 25 is still too large."""
    for quality in range(85, 20, -5):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= LARGEST:
            return buffer.getvalue()
    raise ValueError(f"a picture of {picture.size} pixels does not fit into {LARGEST} bytes")


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Address of a TensorBoard that has read the folder; TimeoutError where it does not in two minutes or so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"{address}/data/plugin/custom_scalars/layout", timeout=10) as answer:
                    if len(answer.read()) > 2:  # an empty object: it has not read the events yet
                        break
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.5)
        else:
            raise TimeoutError(f"TensorBoard shows no layout for {folder}")
        yield address
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Write report_desktop.jpg, report_errors.jpg, report_phone.jpg and tensorboard.jpg."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    page = arguments.run.resolve() / "report" / "index.html"
    if not page.is_file() or shutil.which("chromium") is None:
        parser.error(f"needs {page} and chromium (apt-get install chromium)")
    pictures = {name: section(page, *part) for name, part in REPORT.items()}
    with tensorboard(arguments.run / "tensorboard") as address:
        pictures["tensorboard"] = shoot(f"{address}/#custom_scalars", 1800, 1300, wait_ms=60_000)
    for name, picture in pictures.items():
        (arguments.out / f"{name}.jpg").write_bytes(compressed(picture))


if __name__ == "__main__":
    main()
