"""Opens a page in headless Chromium, as a person's browser would, without a network."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Page:
    """What the browser made of a file: its document as HTML, a picture, and the console."""

    dom: str
    screenshot: bytes
    console: str


def open_page(page: Path, scratch: Path, *, width: int = 1280, height: int = 2000) -> Page:
    """Open a local file; fails the test where there is no Chromium."""
    chromium = shutil.which("chromium")
    assert chromium, "no chromium: `make test` installs it (apt-get install chromium)"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        f"--window-size={width},{height}",
    ]
    picture = scratch / "page.png"
    found: dict[str, str] = {}
    for name, flag in (("dom", "--dump-dom"), ("screenshot", f"--screenshot={picture}")):
        done = subprocess.run(
            [chromium, *flags, f"--user-data-dir={scratch / name}", flag, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        found[name] = done.stdout
        found["console"] = found.get("console", "") + "\n".join(
            line for line in done.stderr.splitlines() if "CONSOLE" in line
        )
    return Page(found["dom"], picture.read_bytes(), found["console"])
