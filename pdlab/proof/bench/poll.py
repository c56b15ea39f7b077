"""A server's own load over time, from `/metrics` under vLLM's names, as the samples that a simulation keeps."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from pdlab.real.net.http import Broken, HttpClient
from pdlab.results.records import SAMPLE_FIELDS, Samples

WAITING, RUNNING = "vllm:num_requests_waiting", "vllm:num_requests_running"
KV_USE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
GEOMETRY = "vllm:cache_config_info"
ANSWER_S = 10.0
_LINE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


async def poll(client: HttpClient, samples: Samples, now_s: Callable[[], float], period_s: float) -> None:
    """Take down a sample each period, for each engine that the page tells of; until cancelled, or until there is no such page."""
    while True:
        try:
            status, page = await client.call(b"GET", b"/metrics", within_s=ANSWER_S)
        except Broken:
            return
        if status != 200 or not read(page.decode("utf-8", "replace"), samples, now_s()):
            return
        await asyncio.sleep(period_s)


def read(text: str, samples: Samples, now_s: float) -> int:
    """Add what a page says at `now_s`, and return of how many engines it spoke. An engine is named by its label `instance`, or `engine`
    where there are several; a lone one is "server"."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in _LINE.findall(text):
        key = "kv_use" if name in KV_USE else {WAITING: "waiting", RUNNING: "running", GEOMETRY: "kv_blocks"}.get(name)
        if key is None:
            continue
        said = dict(_LABEL.findall(labels))
        if key == "kv_blocks":
            value = said.get("num_gpu_blocks", "0")
        try:
            found.setdefault(said.get("instance") or said.get("engine") or "", {})[key] = float(value)
        except ValueError:
            continue
    for engine, own in found.items():
        name = "server" if len(found) == 1 and engine in ("", "0") else engine
        if name not in samples.instances:
            samples.instances.append(name)
        blocks = own.get("kv_blocks", 0.0)
        row = {
            "t_s": now_s,
            "instance": samples.instances.index(name),
            "waiting": own.get("waiting", 0.0),
            "waiting_tokens": 0.0,  # not told, nor the context
            "running": own.get("running", 0.0),
            "context_tokens": 0.0,
            "used_blocks": own.get("kv_use", 0.0) * blocks,
            "kv_blocks": blocks,
        }
        samples.rows.extend([row[name] for name in SAMPLE_FIELDS])
    return len(found)
