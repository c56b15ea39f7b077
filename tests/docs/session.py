"""The commands of a page, run as a reader would paste them, from the page's top to its end, in a folder that begins as a clone does.

- A `console` block: each line that begins with `$ ` is a command of bash, with the lines that a backslash joins to it. The other lines are
  what one sees; they are not compared.
- A `python` block is run by Python. Any block with `title="NAME"` is written to that file instead.
- `pdlab serve` and `make serve` stay until the next of them begins, and end with the page. The next command waits until they are ready.
  Port 8000 is another one, a free one, wherever it is named; engines do not measure themselves, which takes seconds.
- A comment in the line before a block says what else holds: `<!-- not run: REASON -->`, one of `REASONS`; `<!-- slow -->`, it is run by
  `pytest -m slow` alone, since it starts several engines; `<!-- exit: 1 -->`, all of its commands end so.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.docs.pages import ROOT, Block

REASONS = {
    "hardware": "it needs an accelerator",
    "installs": "it installs software",
    "network": "it fetches something",
    "machines": "it needs several machines, or a program that is not pdlab's",
    "time": "it takes minutes",
    "a sketch": "it names files that the reader has",
    "elsewhere": "another page has the same commands, and they are run there",
}
SERVE = re.compile(r"(?:^|/|\s)pdlab serve\b|^make serve")
WAIT_S = 180.0


class Session:
    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.server: subprocess.Popen[bytes] | None = None
        for each in ("Makefile", "experiments", "kernels", "pyproject.toml", "setup.py", "pdlab"):
            (folder / each).symlink_to(ROOT / each)
        venv = folder / ".venv"
        venv.mkdir()
        (venv / "bin").symlink_to(Path(sys.prefix) / "bin")
        for stamp in ("sim", "real", "docs", "test"):
            (venv / f"{stamp}.stamp").touch()
        self.env = {**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "COLUMNS": "110", "PYTHONWARNINGS": "default"}

    def play(self, block: Block) -> None:
        if block.title:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            self.run([sys.executable, "-c", self.here(block.text)], block.text, 0)
        else:
            status = int(block.note.removeprefix("exit: ")) if block.note.startswith("exit: ") else 0
            for command in commands(block):
                self.perform(command, status)

    def perform(self, command: str, status: int) -> None:
        joined = command.replace("\\\n", " ")
        plain = " ".join(shlex.split(joined, comments=True)) if SERVE.search(command) else ""
        if SERVE.search(plain) and "--help" not in plain:
            self.serve(plain)
        else:
            self.run(["bash", "-euo", "pipefail", "-c", self.here(command)], command, status)

    def here(self, text: str) -> str:
        return re.sub(r"(127\.0\.0\.1|localhost):8000\b", rf"\1:{self.port}", text)

    def run(self, argv: list[str], shown: str, status: int) -> None:
        done = subprocess.run(
            argv, cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=WAIT_S, check=False
        )
        assert done.returncode == status, f"{shown}\nends with {done.returncode}:\n{done.stdout.decode()[-3000:]}"

    def serve(self, command: str) -> None:
        self.end()
        options = f"--port {self.port} --no-self-profile"
        own = f"{command} SERVE='{options}'" if command.startswith("make") else f"{command} {options}"
        log = self.folder / "server.log"
        with log.open("wb") as out:
            self.server = subprocess.Popen(
                ["bash", "-c", f"exec {own}"], cwd=self.folder, env=self.env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        until = time.monotonic() + WAIT_S
        while f":{self.port}/v1" not in log.read_text():
            assert self.server.poll() is None, f"{command}\nends with {self.server.returncode}:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < until, f"{command}\nis not ready after {WAIT_S:.0f} s:\n{log.read_text()[-3000:]}"
            time.sleep(0.1)

    def end(self) -> None:
        if self.server is None:
            return
        os.killpg(self.server.pid, signal.SIGINT)
        try:
            self.server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()
        self.server = None


def commands(block: Block) -> list[str]:
    """The lines of a console that begin with `$ `, each with those that a backslash joins to it."""
    there: list[str] = []
    lines = iter(block.text.splitlines())
    for line in lines:
        if not line.startswith("$ "):
            continue
        command = line.removeprefix("$ ")
        while command.endswith("\\"):
            command = f"{command}\n{next(lines)}"
        there.append(command)
    return there
