"""Runs of two worlds, taken apart into the terms of a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.two_worlds_terms import PROMPT_TERMS, TOKEN_TERMS, fitted, main, rows, union
from pdlab import Experiment, simulate
from pdlab.cost.profile import (
    AddedGrid,
    DecodeGrid,
    EngineShape,
    FrontCosts,
    InstanceProfile,
    Interference,
    Machine,
    ModelShape,
    Overheads,
    PrefillGrid,
    StepTimes,
    save_instance_profile,
)
from pdlab.results.run_store import RunStore, StoredRun

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TOKENS, CACHED, BATCH, CONTEXT = (1, 256), (0, 500), (1, 16), (1, 1000)
ALONE_S, SEQUENCE_S, TOKEN_S = 0.010, 0.0006, 0.00025


def profile(beside_decode_s: float) -> InstanceProfile:
    """Of an engine whose steps take that much longer while another decodes."""
    steps = StepTimes(
        prefill=PrefillGrid(tokens=TOKENS, cached=CACHED, seconds=tuple((ALONE_S + TOKEN_S * n,) * 2 for n in TOKENS)),
        decode=DecodeGrid(batch=BATCH, context=CONTEXT, seconds=tuple((ALONE_S + SEQUENCE_S * n,) * 2 for n in BATCH)),
        added=AddedGrid(tokens=TOKENS, batch=BATCH, seconds=(tuple(SEQUENCE_S * n for n in BATCH),) * 2),
    )
    shape = {"layers": 12, "hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "vocab": 32000, "kv_bytes_per_token": 24576}
    return InstanceProfile(
        name="an engine",
        machine=Machine(cpu="a CPU", cores=2, memory_bytes=8 << 30),
        model=ModelShape(name="tiny", dtype="float32", **shape),
        engine=EngineShape(block_tokens=16, kv_blocks=3000, max_batch_tokens=256, max_seqs=16, max_tokens=1024),
        steps=steps,
        overheads=Overheads(request_s=0.004),
        beside=Interference(decode_beside_prefill_s=0.002, decode_beside_decode_s=beside_decode_s),
        front=FrontCosts(request_s=0.002, step_s=0.0008, token_s=0.0002),
    )


def run(folder: Path, world: str, beside_decode_s: float, seed: int) -> StoredRun:
    hardware = folder / f"{world}.json"
    save_instance_profile(profile(beside_decode_s), hardware)
    made = Experiment.parse(
        {
            "seed": seed,
            "model": str(EXPERIMENTS / "tiny" / "config.json"),
            "workload": {"source": "synthetic", "requests": 120, "rate": 3.0, "prompt": 200, "output": {"uniform": [20, 60]}},
            "cluster": {"instances": [{"role": "mixed", "count": 2, "hardware": str(hardware), "host": "this machine"}]},
            "engine": {"max_batch_tokens": 256, "max_seqs": 16},
            "policy": "round_robin",
        }
    )
    result = simulate(made, trim=False)
    result.summary["run"] |= {"engines_cpu_s": 12.0, "front_end_cpu_s": 1.2}
    return StoredRun("2mixed", "round_robin", 3.0, world, 1 if world == "real" else 0, result)


def test_the_term_that_differs_is_named_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    store = RunStore({"cpu": "a CPU"}, {})
    store.put(run(tmp_path, "real", 0.0005, seed=1))
    store.put(run(tmp_path, "sim", 0.0035, seed=2))
    store.save(tmp_path)
    monkeypatch.setattr("sys.argv", ["two_worlds_terms.py", str(tmp_path), "--layout", "2mixed"])
    main()
    whole = capsys.readouterr().out.split("all policies")[1]
    said = whole.split("of a prompt")[0]
    assert "| engines | 0.100 | " in whole and "| HTTP, router and client | 0.010 |" in whole
    apart = {line.split(" | ")[0][2:]: float(line.split(" | ")[-1].split()[0]) for line in said.splitlines() if line.endswith(" errors |")}
    assert set(apart) == set(TOKEN_TERMS)
    assert max(apart, key=apart.__getitem__) == "the other decodes"
    assert apart.pop("the other decodes") > 6.0 > 3.0 * max(apart.values()) / 2.0


def test_the_terms_are_what_the_profile_says(tmp_path: Path) -> None:
    tokens, prompts = rows(run(tmp_path, "sim", 0.003, seed=3))
    found, error = fitted(tokens)
    assert len(found) == len(TOKEN_TERMS) and len(prompts[0]) == 1 + len(PROMPT_TERMS)
    expected = {"a step alone": ALONE_S + SEQUENCE_S, "each other sequence here": SEQUENCE_S, "the other decodes": 0.003}
    for term, seconds in expected.items():
        k = TOKEN_TERMS.index(term)
        assert abs(found[k] - seconds) < max(5 * error[k], 0.0012)


def test_what_overlaps_counts_once() -> None:
    assert union(np.array([[2.0, 3.0], [0.0, 1.0], [0.5, 2.5], [9.0, 9.5]])).tolist() == [[0.0, 3.0], [9.0, 9.5]]
