"""What policies see live, held against what was measured and what the simulator says: real engines of the embedded model on this machine.

    python -m experiments.live_view [--shape 1P1D] [--policy prefix_aware] [--requests 60] [--rate 1.0]

For each shape and policy `pdlab serve --role all` is started, the requests are sent, and the router's event log is read:
predictors   the logarithms of (predicted / told) for each step that reports tell of after the 20th request, before it is learnt from:
             their median, and the median of their absolute values, for prompts (alone or beside decodes) and for decodes
shares       how many of the prompts each instance got, and how many it gets in a simulation whose steps take what the instances have
             measured of themselves; the largest difference, in points
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import yaml

from pdlab.core.predict import DecodePredictor, PrefillPredictor, learn
from pdlab.core.types import Arrived, Dispatch, InstanceSpec, Joined, Report
from pdlab.experiment.experiment import Experiment
from pdlab.replay.log import Entry, read
from pdlab.sim import simulate
from pdlab.workload.base import Workload

SHAPES = {"1P1D": {"prefill": 1, "decode": 1}, "2P1D": {"prefill": 2, "decode": 1}, "2M": {"mixed": 2}}
POLICIES = ("xllm_slo_aware", "prefix_aware", "conditional", "llumnix")
AFTER = 20  # requests, until predictors are judged
START_S = 900.0
HASH_TOKENS = 16


def experiment(shape: str, policy: str) -> dict[str, Any]:
    """`hardware` is not used live; the simulation takes its step times from what was measured."""
    rows = [{"role": role, "count": count, "hardware": "l4", "host": "here"} for role, count in SHAPES[shape].items()]
    return {
        "name": f"live_view_{shape}_{policy}",
        "seed": 7,
        "model": "smollm2-135m",
        "workload": {"source": "azure-conv-2023", "requests": 100, "rate": 1.0},
        "cluster": {"instances": rows, "network": {"gbytes_per_s": 3}},
        "engine": {"block_tokens": HASH_TOKENS, "max_batch_tokens": 512, "max_seqs": 16, "kv_blocks": 1500},
        "policy": policy,
        "slo": {"ttft_s": 5.0, "tpot_s": 0.2},
        "limits": {"request_timeout_s": 3600.0},
    }


# ---------------------------------------------------------------- the run


def requests(count: int, rate: float, prompt: int, output: int, seed: int) -> list[tuple[float, list[int], int]]:
    """(at, prompt, output tokens): lengths vary by a factor of two to both sides."""
    draw, at_s, made = random.Random(seed), 0.0, []
    for _ in range(count):
        at_s += draw.expovariate(rate)
        tokens = [draw.randrange(1000, 20_000) for _ in range(round(prompt * 2 ** draw.uniform(-1, 1)))]
        made.append((at_s, tokens, max(2, round(output * 2 ** draw.uniform(-1, 1)))))
    return made


async def send(url: str, work: Sequence[tuple[float, list[int], int]]) -> None:
    began_s = time.monotonic()
    async with httpx.AsyncClient(timeout=None) as client:

        async def one(at_s: float, prompt: list[int], output: int) -> None:
            await asyncio.sleep(max(0.0, began_s + at_s - time.monotonic()))
            body = {"prompt": prompt, "max_tokens": output, "ignore_eos": True, "temperature": 0.0}
            (await client.post(f"{url}/v1/completions", json=body)).raise_for_status()

        await asyncio.gather(*(one(*request) for request in work))


def run(mapping: dict[str, Any], work: Sequence[tuple[float, list[int], int]], folder: Path) -> Path:
    """Serve, send; returns the router's event log."""
    file, events = folder / "experiment.yaml", folder / "events.jsonl"
    file.write_text(yaml.safe_dump(mapping), encoding="utf-8")
    command = [sys.executable, "-m", "pdlab", "serve", str(file), "--role", "all", "--port", "0", "--trace-events", str(events)]
    with (folder / "said.txt").open("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            asyncio.run(send(_ready(process, folder / "said.txt"), work))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)
    return events


def _ready(process: subprocess.Popen[bytes], said: Path) -> str:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        if found := re.search(r"ready after .*: (http://\S+)/v1$", said.read_text(), re.MULTILINE):
            return found[1]
        time.sleep(0.5)
    raise SystemExit(f"the cluster did not start: {said.read_text()[-2000:]}")


# ---------------------------------------------------------------- what its log says


@dataclass
class Found:
    """`prefill` and `decode`: logarithms of predicted over told."""

    specs: list[InstanceSpec] = field(default_factory=list)
    arrived: list[Arrived] = field(default_factory=list)
    shares: Counter[str] = field(default_factory=Counter)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def look(entries: Sequence[Entry]) -> Found:
    found = Found()
    predictors: dict[str, tuple[PrefillPredictor, DecodePredictor]] = {}
    for entry in entries:
        event = entry.event
        found.shares.update(action.instance for action in entry.actions if isinstance(action, Dispatch))
        if isinstance(event, Arrived):
            found.arrived.append(event)
        elif isinstance(event, Joined):
            found.specs.append(event.spec)
            predictors[event.spec.name] = PrefillPredictor(event.spec.prefill_profile), DecodePredictor(event.spec.decode_profile)
        elif isinstance(event, Report):
            prefill, decode = predictors[event.instance]
            for step in event.steps:
                if len(found.arrived) > AFTER and step.prompt_tokens:
                    beside_s = decode.share_s(step.batch, step.context_tokens) if step.batch else 0.0
                    found.prefill.append(log((prefill.step_s(step) + beside_s) / step.seconds))
                elif len(found.arrived) > AFTER:
                    found.decode.append(log(decode.seconds(step.batch, step.context_tokens) / step.seconds))
                learn(prefill, decode, step)
    return found


def simulated(mapping: dict[str, Any], found: Found, folder: Path) -> Counter[str]:
    """The same requests, where steps take what the instances' profiles say, their mean."""
    prefill = [PrefillPredictor(spec.prefill_profile) for spec in found.specs]
    decode = [DecodePredictor(spec.decode_profile) for spec in found.specs]
    mean = {key: [float(np.mean([getattr(one, key) for one in kind])) for kind in (prefill, decode)] for key in "abc"}
    fitted = {
        "prefill": {"base_s": mean["a"][0], "s_per_token": mean["b"][0], "s_per_token2": mean["c"][0]},
        "decode": {"base_s": mean["a"][1], "s_per_token": mean["c"][1], "s_per_sequence": mean["b"][1]},
    }
    arrived = sorted(found.arrived, key=lambda event: event.request.id)
    work = Workload(
        "live",
        np.array([event.request.arrival_s - arrived[0].request.arrival_s for event in arrived]),
        np.array([event.request.prompt_tokens for event in arrived], np.int32),
        np.array([event.max_tokens for event in arrived], np.int32),
        hashes=[event.request.hashes for event in arrived],
        hash_tokens=HASH_TOKENS,
    )
    events = folder / "simulated.jsonl"
    simulate(Experiment.parse({**mapping, "cost": {"fitted": fitted}}), workload=work, trace_events=events)
    _, entries = read(events)
    return Counter(action.instance for entry in entries for action in entry.actions if isinstance(action, Dispatch))


def line(mapping: dict[str, Any], events: Path) -> str:
    _, entries = read(events)
    found = look(list(entries))
    other = simulated(mapping, found, events.parent)

    def error(logs: list[float]) -> str:
        if not logs:
            return "none told"
        return f"{exp(median(logs)) - 1:+.0%}, {exp(median(map(abs, logs))) - 1:.0%} ({len(logs)})"

    names = sorted(found.shares.keys() | other.keys())
    live, sim = ([counts[name] / counts.total() for name in names] for counts in (found.shares, other))
    points = max(abs(a - b) for a, b in zip(live, sim, strict=True)) * 100
    shares = ", ".join(f"{name} {a:.0%} | {b:.0%}" for name, a, b in zip(names, live, sim, strict=True))
    return f"prefill {error(found.prefill)}; decode {error(found.decode)}; live | simulated: {shares}; {points:.0f} points apart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--policy", choices=POLICIES, action="append")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--output", type=int, default=24)
    args = parser.parse_args()
    work = requests(args.requests, args.rate, args.prompt, args.output, seed=3)
    for shape in args.shape or ("1P1D", "2M"):
        for policy in args.policy or POLICIES:
            mapping = experiment(shape, policy)
            with tempfile.TemporaryDirectory() as folder:
                before = os.getloadavg()[0]
                events = run(mapping, work, Path(folder))
                print(f"{shape} {policy} (load {before:.1f} to {os.getloadavg()[0]:.1f}): {line(mapping, events)}", flush=True)


if __name__ == "__main__":
    main()
