"""Which term of the simulated step times is off? What `make validate` has measured, taken apart as the simulation is taken apart.

    python experiments/two_worlds_terms.py out/two_worlds [--layout 2mixed]

A request's seconds a token (and those of its prompt) are fitted by a line over what went on meanwhile: who else computed on its own engine
and on the other, and whether its engine shares its core with the router. That is done with the measured requests and with the simulated
ones, so a coefficient that differs by more than both errors names the term. The choices of a policy do not matter here: a request is
compared with what was around it, not with the same request in the other world.

Then the processor time of the engines and of all else, measured, against what the simulation has engines busy for.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pdlab.results.run_store import RunStore, StoredRun

Spans = NDArray[np.float64]  # (begin, end), a row each
TOKEN_TERMS = (
    "a step alone",
    "each other sequence here",
    "a prompt here, all the time",
    "the other decodes",
    "the other prefills",
    "the router's core",
)
PROMPT_TERMS = (
    "a prompt alone",
    "each token",
    "decodes here, all the time",
    "the other decodes",
    "the other prefills",
    "the router's core",
)


def overlaps_s(begin: float, end: float, spans: Spans) -> float:
    """Seconds of `begin` to `end` in each of the spans, added up."""
    return float(np.clip(np.minimum(spans[:, 1], end) - np.maximum(spans[:, 0], begin), 0.0, None).sum())


def union(spans: Spans) -> Spans:
    """The same time, each moment of it once."""
    merged: list[list[float]] = []
    for begin, end in spans[np.argsort(spans[:, 0])].tolist():
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return np.array(merged).reshape(-1, 2)


def rows(run: StoredRun) -> tuple[list[list[float]], list[list[float]]]:
    """Of each request with tokens to count: (seconds a token, and its terms), and (seconds of its prompt, and its terms)."""
    frame = run.result.records.frame()
    frame = frame[frame["status"] == "done"].assign(computed=frame["prompt_tokens"] - frame["cached_tokens"])
    names = sorted({*frame["prefill_instance"].dropna(), *frame["decode_instance"].dropna()})
    prompts = {name: frame.loc[frame["prefill_instance"] == name, ["prefill_start_s", "first_token_s"]].to_numpy() for name in names}
    decodes = {name: _decoding(frame[frame["decode_instance"] == name]) for name in names}
    tokens, firsts = [], []
    for one in frame.itertuples():
        for name, begin, end, found in (
            (one.decode_instance, _began(one), one.finish_s, tokens),
            (one.prefill_instance, one.prefill_start_s, one.first_token_s, firsts),
        ):
            long_s = end - begin
            if not long_s > 0.0 or (found is tokens and one.output_tokens < 3):
                continue
            others = [other for other in names if other != name]
            own = overlaps_s(begin, end, decodes[name]) - (long_s if found is tokens else 0.0)
            decoding, computing = (_any(spans, others, begin, end) / long_s for spans in (decodes, prompts))
            last = float(name == names[-1])
            if found is tokens:
                here = overlaps_s(begin, end, union(prompts[name]))
                found.append([long_s / (one.output_tokens - 1), 1.0, own / long_s, here / long_s, decoding, computing, last])
            else:
                found.append([long_s, 1.0, one.computed, min(1.0, own / long_s), decoding, computing, last])
    return tokens, firsts


def _began(one: object) -> float:
    """When its first decode step began; where nobody says, when it had its first token."""
    return float(np.nanmax([one.first_token_s, one.decode_start_s]))  # type: ignore[attr-defined]


def _decoding(frame: pd.DataFrame) -> Spans:
    begin = np.fmax(frame["first_token_s"].to_numpy(float), frame["decode_start_s"].to_numpy(float))
    return np.column_stack([begin, frame["finish_s"].to_numpy(float)])


def _any(spans: dict[str, Spans], names: Iterable[str], begin: float, end: float) -> float:
    found = [spans[name] for name in names if len(spans[name])]
    return overlaps_s(begin, end, union(np.vstack(found))) if found else 0.0


def fitted(table: Sequence[Sequence[float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coefficients and their standard errors, nan where nothing tells them apart."""
    every = np.array(table, dtype=float)
    y, x = every[:, 0], every[:, 1:]
    told = np.ptp(x, axis=0) > 0.0
    told[0] = True
    a = x[:, told]
    solved, *_ = np.linalg.lstsq(a, y, rcond=None)
    spread = float(((y - a @ solved) ** 2).sum()) / max(1, len(y) - a.shape[1])
    coefficients, errors = np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    coefficients[told] = solved
    errors[told] = np.sqrt(np.clip(np.diag(np.linalg.pinv(a.T @ a)) * spread, 0.0, None))
    return coefficients, errors


def show(runs: Sequence[StoredRun]) -> None:
    worlds = {world: [run for run in runs if run.world == world] for world in ("real", "sim")}
    taken = {world: [rows(run) for run in of] for world, of in worlds.items()}
    for what, number, terms in (("milliseconds a token", 0, TOKEN_TERMS), ("milliseconds of a prompt", 1, PROMPT_TERMS)):
        found = {world: fitted([row for of in taken[world] for row in of[number]]) for world in worlds}
        print(f"\n| {what} | measured | simulated | apart |\n| --- | ---: | ---: | ---: |")
        for k, term in enumerate(terms):
            (real, error), (simulated, other) = ((1e3 * c[k], 1e3 * e[k]) for c, e in (found["real"], found["sim"]))
            apart = abs(real - simulated) / max(1e-9, np.hypot(error, other))
            print(f"| {term} | {real:.3f} ±{error:.3f} | {simulated:.3f} ±{other:.3f} | {apart:.1f} errors |")
    print("\n| processor seconds a request | measured | simulated |\n| --- | ---: | ---: |")
    requests = {world: sum(run.result.summary["requests"] for run in of) for world, of in worlds.items()}
    engines_s = sum(run.result.summary["run"]["engines_cpu_s"] for run in worlds["real"])
    front_s = sum(run.result.summary["run"]["front_end_cpu_s"] for run in worlds["real"])
    busy_s = sum(use["busy_fraction"] * use["up_s"] for run in worlds["sim"] for use in run.result.summary["instances"])
    print(f"| engines | {engines_s / requests['real']:.3f} | {busy_s / requests['sim']:.3f} |")
    print(f"| HTTP, router and client | {front_s / requests['real']:.3f} | in the engines' |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of pdlab validate --out")
    parser.add_argument("--layout", help="one of them; all by default")
    asked = parser.parse_args()
    store = RunStore.load(asked.folder)
    kinds = {(run.layout, run.policy): None for run in store.runs.values() if asked.layout in (None, run.layout)}
    for layout in dict.fromkeys(layout for layout, _ in kinds):
        told = any(run.world == "sim" and run.repeat for run in store.runs.values())
        for policies in (*([policy] for at, policy in kinds if at == layout), None):
            runs = [
                run
                for run in store.runs.values()
                if run.layout == layout
                and (policies is None or run.policy in policies)
                and (run.world == "real" or bool(run.repeat) == told)
            ]
            print(f"\n## {layout}, {policies[0] if policies else 'all policies'}")
            show(runs)


if __name__ == "__main__":
    main()
