"""Draws the Grafana dashboard with Grafana's own components from npm, in a browser without a screen.

    .venv/bin/python -m tools.draw_dashboard docs/images/dashboard.png

Starts the demo pair, clients that ask it, and a Prometheus that scrapes both (`dashboard_load`), or takes what another
one has (`--prometheus URL`). Every panel's own queries are asked. The page is tools/dashboard_page: units, legends,
stacking and colours are Grafana's, its server has no part in it. Needs Node.js with npm, chromium, and prometheus.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from tools.dashboard_load import observed

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "tools/dashboard_page"
# Where the page and its packages are put together.
BUILT = ROOT / "build/dashboard_page"
DASHBOARD = ROOT / "deploy/grafana/dashboards/specpair.json"
CONFIGURATION = ROOT / "deploy/prometheus/prometheus.yml"

# What Grafana's components look for below the address of their page, and what has it in the packages.
_PUBLIC = {
    "public/build/img": "@grafana/ui/dist/public/img",
    "public/fonts/inter/Inter-Regular.woff2": "@fontsource/inter/files/inter-latin-400-normal.woff2",
    "public/fonts/inter/Inter-Medium.woff2": "@fontsource/inter/files/inter-latin-500-normal.woff2",
}
# Pixels of a row of the dashboard's grid, and of what stands above it.
_ROW, _HEADER = 38, 64
# Seconds: of the browser's own clock, which does not run while it waits for an answer, and of everybody's.
_PATIENCE, _WITHIN = 60, 300


def main() -> None:
    """Reads the command line, draws, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="the picture, .png")
    parser.add_argument("--prometheus", help="a server that has data already")
    parser.add_argument("--seconds", type=float, default=420.0, help="how long it is asked, or how far back it is seen")
    parser.add_argument("--width", type=int, default=1500, help="pixels")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(built())
        url = given.prometheus or stack.enter_context(observed(given.seconds, CONFIGURATION))
        draw(site, given.output, url, given.seconds, given.width)


@contextlib.contextmanager
def built() -> Iterator[Path]:
    """A directory with the page, its packages bundled, and everything that it fetches besides data."""
    shutil.copytree(PAGE, BUILT, dirs_exist_ok=True)
    # The stamp is written last, so that an installation that broke off is done again.
    lock, stamp = (PAGE / "package-lock.json").read_bytes(), BUILT / "node_modules/.installed"
    if not stamp.is_file() or stamp.read_bytes() != lock:
        install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(install, cwd=BUILT, check=True)
        stamp.write_bytes(lock)
    with tempfile.TemporaryDirectory(prefix="specpair-dashboard-") as made:
        site = Path(made)
        subprocess.run(["npm", "run", "--silent", "build", "--", f"--outdir={site}"], cwd=BUILT, check=True)
        shutil.copy(PAGE / "index.html", site)
        shutil.copy(DASHBOARD, site / "dashboard.json")
        for place, source in _PUBLIC.items():
            (site / place).parent.mkdir(parents=True, exist_ok=True)
            (site / place).symlink_to(BUILT / "node_modules" / source)
        yield site


def draw(site: Path, output: Path, prometheus: str, seconds: float, width: int) -> None:
    """Writes the picture of the last `seconds`, `width` pixels wide. Raises RuntimeError when the page gives up."""
    panels = json.loads((site / "dashboard.json").read_text())["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) * _ROW + _HEADER
    now = time.time()
    asked = {
        "dashboard": "dashboard.json",
        "prometheus": prometheus,
        "from": round((now - seconds) * 1000),
        "to": round(now * 1000),
        "scrape": yaml.safe_load(CONFIGURATION.read_text())["global"]["scrape_interval"],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with _served(site) as (address, told), tempfile.TemporaryDirectory(prefix="specpair-chromium-") as profile:
        flags = [
            "--headless=new",
            "--hide-scrollbars",
            "--no-first-run",
            "--no-proxy-server",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            f"--virtual-time-budget={_PATIENCE * 1000}",
            f"--screenshot={output.absolute()}",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]
        command = ["chromium", *flags, f"{address}/index.html?{urllib.parse.urlencode(asked)}"]
        subprocess.run(command, check=True, timeout=_WITHIN, stderr=subprocess.DEVNULL)
        said = "nothing" if told.empty() else told.get()
        if said != "drawn":
            raise RuntimeError(f"the page says: {said}")


@contextlib.contextmanager
def _served(site: Path) -> Iterator[tuple[str, queue.Queue[str]]]:
    """A directory on loopback: its address, and what the page there has told."""
    told: queue.Queue[str] = queue.Queue()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            told.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:  # noqa: ANN401 - as its base has it
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", told
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    main()
