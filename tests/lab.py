"""A real JupyterLab and a real Chromium, as a user would have them."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_client import BlockingKernelClient

NAMES = ("chromium", "chromium-browser", "google-chrome")  # as in .ci/run
CHROMIUM = Path(next(filter(None, map(shutil.which, NAMES)), "/usr/bin/chromium"))
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass(frozen=True)
class Lab:
    """A running server: `url`, `token`, the `folder` it serves, its `log` and `runtime` files."""

    url: str
    folder: Path
    token: str
    log: Path
    runtime: Path

    def notebook(self, name: str) -> str:
        return f"{self.url}/lab/tree/{name}?token={self.token}"


def in_kernel(lab: Lab, code: str) -> str:
    """Run code in the newest kernel of a server, beside the page; what it printed."""
    client = BlockingKernelClient()
    files = lab.runtime.glob("kernel-*.json")
    client.load_connection_file(str(max(files, key=lambda path: path.stat().st_mtime)))
    client.start_channels()
    try:
        printed: list[str] = []

        def collect(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = client.execute_interactive(code, timeout=60, output_hook=collect)
        assert reply["content"]["status"] == "ok", reply["content"]
        return "".join(printed).strip()
    finally:
        client.stop_channels()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def jupyterlab(folder: Path, dark: bool = False) -> Iterator[Lab]:
    """JupyterLab on 127.0.0.1 with a token, its own settings, serving `folder`."""
    token, port = secrets.token_hex(16), _free_port()
    home = Path(tempfile.mkdtemp(prefix="lmd-lab-"))
    settings = home / "user-settings" / "@jupyterlab"
    themes = settings / "apputils-extension" / "themes.jupyterlab-settings"
    themes.parent.mkdir(parents=True)
    themes.write_text(json.dumps({"theme": f"JupyterLab {'Dark' if dark else 'Light'}"}))
    news = settings / "apputils-extension" / "notification.jupyterlab-settings"
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "user-settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
    }
    log = home / "lab.log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"]
    command += [
        f"--port={port}",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}",
    ]
    command += ["--ServerApp.port_retries=0", "--allow-root"]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            lab = Lab(f"http://127.0.0.1:{port}", folder, token, log, home / "runtime")
            _wait_for(lab, server)
            yield lab
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(20)
            shutil.rmtree(home, ignore_errors=True)


def _wait_for(lab: Lab, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert server.poll() is None, lab.log.read_text()
        try:
            with urllib.request.urlopen(f"{lab.url}/api/status?token={lab.token}", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"JupyterLab did not start: {lab.log.read_text()[-2000:]}")
