"""A cluster of a prefill and two decode instances around a tiny model, as `pdlab serve --role all` starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from tests.support import served
from tests.support.waiting import until

ROWS = [{"role": "prefill", "hardware": "l4"}, {"role": "decode", "count": 2, "hardware": "l4"}]


class SmallCluster:
    """`pdlab serve --role all`, which has made its token for itself."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.model = served.make(folder / "model")
        experiment = {
            "model": str(self.model),
            "cluster": {"instances": ROWS, "reports": {"period_s": 0.2}},
            "engine": {"block_tokens": 4, "kv_blocks": 300, "max_seqs": 8, "max_batch_tokens": 128},
            "policy": "round_robin",
        }
        (folder / "tiny.yaml").write_text(json.dumps(experiment))
        command = [sys.executable, "-m", "pdlab", "serve", str(folder / "tiny.yaml"), "--role", "all", "--port", "0", "--threads", "1"]
        command += options
        self.log = folder / "log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--served-model-name", "tiny"], stdout=out, stderr=out, env={**os.environ, "PYTHONUNBUFFERED": "1"}
            )
        until(lambda: self.url or self.process.poll() is not None)
        assert self.url, self.log.read_text()

    @property
    def url(self) -> str:
        found = re.search(r"ready after .*: (http://\S+)/v1", self.log.read_text())
        return found[1] if found else ""

    def ask(self, tokens: int = 20) -> None:
        body = {"model": "tiny", "prompt": list(range(1, 30)), "max_tokens": tokens, "ignore_eos": True}
        httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).raise_for_status()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
