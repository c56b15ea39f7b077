"""Fit the roofline's coefficients to measured servers: python -m pdlab.search.board.fit ROWS.csv [MORE.csv] [--write]

Each engine on each generation of accelerators has a set of its own, and all sets are held near one another. The logarithm of a
coefficient is a sum of four: what all share, what a generation adds, what an engine adds, and what the pair adds. Each is a normal variable
about nothing whose spread is a part of the coefficient's own (`PRIORS`, `SHARES`), so that a pair with few rows has what its engine and its
generation have. A generation without rows has what all share, and an error that says so.

TPOT and TTFT of a row are computed by `pdlab.cost.loops`, and multiplied by simulated / computed of that row under the coefficients that
ship: so the fit is to what `pdlab board` simulates, at thousands of rows a second. Differences of logarithms count by Cauchy's function:
some rows measure something else than they say (`strange`, and what nobody marked), and count the less the farther off they are. It is
minimised by Gauss and Newton's steps with a numerical Jacobian, damped as Levenberg and Marquardt do.

The error of a set is that of configurations that were left out, each as a whole (`MeasuredRow.setup`): one Newton step from the minimum
takes a configuration's rows out of the fit, which is then asked for them. `error` is the 95 % quantile of the absolute differences of
logarithms, over bands of rows that count alike.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdlab.core.types import UsageError
from pdlab.cost import roofline
from pdlab.cost.loops import Loops, Rates, closed_loops, loops
from pdlab.cost.measurements import MeasuredRow, read_rows
from pdlab.cost.roofline import Coefficients, coefficients_of
from pdlab.search.board.page import WORDS, coverage_lines, order_lines
from pdlab.search.board.run import ScoredRow, score
from pdlab.search.pool import ProcessPool, usable_cores

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prior:
    """Before anything is measured: a value, how far it may be off as a standard deviation of its logarithm, and the most it can be."""

    value: float
    spread: float
    most: float = np.inf


PRIORS = {
    "compute": Prior(0.6, 0.25, 0.97),
    "compute_8bit": Prior(0.5, 0.3, 0.97),
    "compute_4bit": Prior(0.4, 0.4, 0.97),
    "compute_widened": Prior(0.3, 0.4, 0.97),
    "experts": Prior(0.6, 0.4, 0.97),
    "memory": Prior(0.75, 0.15, 0.97),
    "experts_memory": Prior(0.7, 0.2, 0.97),
    "four_bit_read": Prior(1.0, 0.2),
    "attention_memory": Prior(0.7, 0.2, 0.97),
    "attention_compute": Prior(0.4, 0.4, 0.97),
    "activations": Prior(1.0, 0.7),
    "expert_activations": Prior(1.0, 0.7),
    "collective": Prior(0.6, 0.4, 0.97),
    "collective_latency": Prior(1.0, 0.4),
    "step_s": Prior(1e-3, 0.7),
    "layer_s": Prior(15e-6, 0.6),
    "expert_layer_s": Prior(20e-6, 0.7),
    "latent_layer_s": Prior(8e-6, 0.7),
    "sparse_layer_s": Prior(15e-6, 0.7),
    "recurrent_layer_s": Prior(10e-6, 0.7),
    "sequence_s": Prior(5e-6, 0.7),
    "request_s": Prior(20e-3, 1.0),
    "imbalance": Prior(0.7, 0.35),
    "diversity": Prior(0.8, 0.2, 1.0),
    "acceptance": Prior(0.65, 0.1, 0.95),  # of drafts: nobody's coefficient, for which experiments have a key
}
SHARES = (1.0, 0.5, 0.6, 0.35)  # of a prior's spread: what all have in common, a generation, an engine, a pair of them
GENERATIONS = ("h100", "blackwell")
ENGINES = ("vllm", "sglang", "trtllm")
UNMEASURED = ("a100", "ampere", "ada", "cdna", "ascend")
UNMEASURED_ERROR = 0.5  # of the logarithm, at 95 %
TPOT_TAIL, TTFT_TAIL = 0.15, 0.4  # differences of logarithms beyond which a row counts less and less
TPOT_NOISE, TTFT_NOISE = 0.08, 0.17
APART = 2.0  # how much TPOT of P/D rows counts, of which there are few
FIRST_TOKENS = {"sglang": 0.1}  # how much TTFT counts: SGLang's has first waves of many seconds, in which it compiled
FIRST_TOKENS_APART = 1.0  # the same of P/D rows: they say most of how quickly prompts are computed many at a time
_STEP = 1e-3


def strange(row: MeasuredRow) -> str:
    """Why a row of the training table cannot be what it says; empty where it may."""
    if row.hardware_name.startswith("gb200") and not row.disaggregated:
        return "listed as one server of up to 48 accelerators, and measured on several"
    if row.model_name.startswith("gpt-oss") and row.hardware_name == "h100-sxm" and row.concurrency >= 512:
        return "the server had fewer sequences at once"
    if row.model_name == "qwen3-235b-a22b" and row.engine == "vllm" and row.sides[0].parallel.dp_attention > 1:
        return "57 ms at any concurrency"
    if row.engine == "sglang" and row.model_name == "qwen3-32b" and row.gpus == 1:
        return "the server had fewer sequences at once"
    if row.version == "1.3.0rc1" and row.model_name == "deepseek-r1":
        return "90 ms at any concurrency"
    return "7 times as quick as its KV cache allows" if row.prompt_tokens == 15000 and not row.disaggregated else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitProblem:
    """Rows as arrays, [n] each. `tpot_ratio` and `ttft_ratio`: simulated / computed."""

    rows: tuple[MeasuredRow, ...]
    arrays: Loops
    tpot_s: Floats
    ttft_s: Floats
    tpot_ratio: Floats
    ttft_ratio: Floats
    columns: NDArray[np.int64]  # [n, 4]: the blocks of a row's coefficients
    tpot_weight: Floats
    ttft_weight: Floats

    def logs(self, x: Floats) -> Floats:
        """[n, coefficients] logarithms of each row's coefficients; x has a block of them for each of `blocks()`, in units of spread."""
        names = list(PRIORS)
        blocks = x.reshape(-1, len(names)) * np.array([share for share, _ in blocks_()])[:, None]
        start = np.log([PRIORS[name].value for name in names])
        spread = np.array([PRIORS[name].spread for name in names])
        most = np.log([PRIORS[name].most for name in names])
        logs: Floats = np.minimum(start + spread * blocks[self.columns].sum(axis=1), most)
        return logs

    def misses(self, logs: Floats) -> tuple[Floats, Floats]:
        """log(computed / measured) of TPOT and TTFT."""
        rates = Rates({name: np.exp(logs[:, k]) for k, name in enumerate(PRIORS)})
        tpot_s, ttft_s = closed_loops(self.arrays, rates)
        return np.log(tpot_s * self.tpot_ratio / self.tpot_s), np.log(ttft_s * self.ttft_ratio / self.ttft_s)


def blocks_() -> list[tuple[float, str]]:
    """Each block of coefficients: its share of the priors' spread, and whose it is."""
    pairs = [f"{generation}-{engine}" for generation in GENERATIONS for engine in ENGINES]
    everybody = [(SHARES[0], "all")]
    return [*everybody, *((SHARES[1], g) for g in GENERATIONS), *((SHARES[2], e) for e in ENGINES), *((SHARES[3], p) for p in pairs)]


def problem(rows: Sequence[MeasuredRow]) -> FitProblem:
    """Of rows whose model fits their accelerators, engine and generation have a set. Ratios are 1 until `with_ratios`."""
    known = [row for row in rows if row.engine in ENGINES and row.hardware().family in GENERATIONS and _fits(row)]
    names = [name for _, name in blocks_()]
    columns = [
        [names.index(name) for name in ("all", family, row.engine, f"{family}-{row.engine}")]
        for row in known
        if (family := row.hardware().family)
    ]
    count = len(known)
    sound = np.array([0.0 if strange(row) else 1.0 for row in known])
    apart = np.array([APART if row.disaggregated else 1.0 for row in known])
    shown = np.array([FIRST_TOKENS_APART if row.disaggregated else FIRST_TOKENS.get(row.engine, 1.0) for row in known])
    return FitProblem(
        rows=tuple(known),
        arrays=loops(known),
        tpot_s=np.array([row.tpot_s for row in known]),
        ttft_s=np.array([row.ttft_s for row in known]),
        tpot_ratio=np.ones(count),
        ttft_ratio=np.ones(count),
        columns=np.array(columns),
        tpot_weight=sound * apart,
        ttft_weight=sound * shown,
    )


def _fits(row: MeasuredRow) -> bool:
    try:
        loops([row])
    except UsageError:
        return False
    return True


def with_ratios(of: FitProblem, scored: Sequence[ScoredRow]) -> FitProblem:
    """With simulated / computed under the coefficients that ship. A row without a simulated figure does not count."""
    simulated = {one.row: one for one in scored}
    logs = np.array([_shipped_logs(row) for row in of.rows])
    rates = Rates({name: np.exp(logs[:, k]) for k, name in enumerate(PRIORS)})
    tpot_s, ttft_s = closed_loops(of.arrays, rates)
    found = [simulated.get(row) for row in of.rows]
    there = np.array([0.0 if one is None or one.failure else 1.0 for one in found])
    own_tpot = np.array([one.tpot_s if one is not None and not one.failure else own for one, own in zip(found, tpot_s, strict=True)])
    own_ttft = np.array([one.ttft_s if one is not None and not one.failure else own for one, own in zip(found, ttft_s, strict=True)])
    fields = {name: getattr(of, name) for name in FitProblem.__slots__}
    fields |= {"tpot_ratio": own_tpot / tpot_s, "ttft_ratio": own_ttft / ttft_s}
    fields |= {"tpot_weight": of.tpot_weight * there, "ttft_weight": of.ttft_weight * there}
    return FitProblem(**fields)


def _shipped_logs(row: MeasuredRow) -> list[float]:
    shipped = asdict(coefficients_of(row.hardware(), row.engine))
    return [float(np.log(shipped.get(name) or PRIORS[name].value)) for name in PRIORS]


@dataclass(frozen=True, slots=True)
class Minimum:
    """Where the fit ended: the unknowns, and of each row its weighted misses and their derivatives, TPOT's and then TTFT's."""

    x: Floats
    misses: Floats  # [2 n]
    jacobian: Floats  # [2 n, unknowns]


def minimise(of: FitProblem, rounds: int = 100) -> Minimum:
    x = np.zeros(len(blocks_()) * len(PRIORS))
    damping, now = 1e-2, _loss(of, x)
    for _ in range(rounds):
        at = _linear(of, x)
        normal = at.jacobian.T @ at.jacobian + np.eye(len(x))
        gradient = at.jacobian.T @ at.misses + x
        for _ in range(14):
            tried = x - np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
            loss = _loss(of, tried)
            if loss < now:
                break
            damping *= 4.0
        else:
            break
        gain, x, now, damping = 1.0 - loss / now, tried, loss, damping / 3.0
        if gain < 2e-5:
            break
    return _linear(of, x)


def _loss(of: FitProblem, x: Floats) -> float:
    tpot, ttft = of.misses(of.logs(x))
    rows = of.tpot_weight * _cauchy(tpot, TPOT_TAIL) / TPOT_NOISE**2 + of.ttft_weight * _cauchy(ttft, TTFT_TAIL) / TTFT_NOISE**2
    return float(rows.sum() + x @ x)


def _cauchy(miss: Floats, tail: float) -> Floats:
    counted: Floats = tail**2 * np.log1p((miss / tail) ** 2)
    return counted


def _linear(of: FitProblem, x: Floats) -> Minimum:
    """Weighted misses at x, and their derivatives."""
    logs = of.logs(x)
    tpot, ttft = of.misses(logs)
    weights = (
        np.sqrt(of.tpot_weight / (1.0 + (tpot / TPOT_TAIL) ** 2)) / TPOT_NOISE,
        np.sqrt(of.ttft_weight / (1.0 + (ttft / TTFT_TAIL) ** 2)) / TTFT_NOISE,
    )
    slopes = np.zeros((2, *logs.shape))
    for k, prior in enumerate(PRIORS.values()):
        moved = logs.copy()
        moved[:, k] -= _STEP
        for kind, (before, after) in enumerate(zip(of.misses(moved), (tpot, ttft), strict=True)):
            slopes[kind, :, k] = (after - before) / _STEP * prior.spread
    jacobian = np.concatenate([_spread_out(of, slope * weight[:, None]) for slope, weight in zip(slopes, weights, strict=True)])
    return Minimum(x, np.concatenate([tpot * weights[0], ttft * weights[1]]), jacobian)


def _spread_out(of: FitProblem, slope: Floats) -> Floats:
    """[n, coefficients] derivatives in each of a row's four blocks."""
    count, width = slope.shape
    out = np.zeros((count, len(blocks_()), width))
    for shares, column in zip(SHARES, of.columns.T, strict=True):
        out[np.arange(count), column] += shares * slope
    return out.reshape(count, -1)


def left_out(of: FitProblem, at: Minimum) -> tuple[Floats, Floats]:
    """Each row's log(computed / measured) of TPOT and TTFT, fitted without its configuration."""
    count = len(of.rows)
    normal = at.jacobian.T @ at.jacobian + np.eye(len(at.x))
    tpot, ttft = np.zeros(count), np.zeros(count)
    setups: dict[str, list[int]] = {}
    for index, row in enumerate(of.rows):
        setups.setdefault(row.setup, []).append(index)
    for members in setups.values():
        own = np.array([*members, *(count + k for k in members)])
        part = at.jacobian[own]
        moved = at.x + np.linalg.solve(normal - part.T @ part, part.T @ at.misses[own])
        of_all = of.misses(of.logs(moved))
        tpot[members], ttft[members] = of_all[0][members], of_all[1][members]
    return tpot, ttft


def coefficient_sets(of: FitProblem, at: Minimum) -> dict[str, Coefficients]:
    """What ships: a set for each engine on each generation, one for each generation, and what all share for those without a row."""
    tpot, ttft = left_out(of, at)
    sound = of.tpot_weight > 0
    bands = np.array([_kind(row) for row in of.rows])
    found = {}
    for generation in GENERATIONS:
        own = sound & np.array([row.hardware().family == generation for row in of.rows])
        made = _values(at.x, "all", generation)
        found[generation] = _named(made, own, tpot, ttft, bands, f"fitted to {generation}'s measured servers, all engines together")
        for engine in ENGINES:
            pair = own & np.array([row.engine == engine for row in of.rows])
            made = _values(at.x, "all", generation, engine, f"{generation}-{engine}")
            found[f"{generation}-{engine}"] = _named(
                made, pair, tpot, ttft, bands, f"fitted to measured servers of {engine} on {generation}"
            )
    for family in UNMEASURED:
        source = "not calibrated: what all measured generations share"
        found[family] = Coefficients(**_values(at.x, "all"), error=UNMEASURED_ERROR, ttft_error=1.0, source=source)
        for engine in ENGINES:
            made = _values(at.x, "all", engine)
            found[f"{family}-{engine}"] = Coefficients(
                **made, error=UNMEASURED_ERROR, ttft_error=1.0, source=f"{source}, and what {engine} adds on them"
            )
    return found


def _values(x: Floats, *names: str) -> dict[str, Any]:
    """The coefficients that these blocks add up to, of four digits; acceptance is none."""
    blocks = dict(zip([name for _, name in blocks_()], x.reshape(-1, len(PRIORS)), strict=True))
    shares = {name: share for share, name in blocks_()}
    total = np.sum([shares[name] * blocks[name] for name in names], axis=0)
    values = {name: min(float(prior.value * np.exp(prior.spread * total[k])), prior.most) for k, (name, prior) in enumerate(PRIORS.items())}
    return {name: float(f"{value:.4g}") for name, value in values.items() if name != "acceptance"}


def _named(
    made: Mapping[str, Any], own: NDArray[np.bool_], tpot: Floats, ttft: Floats, bands: NDArray[np.str_], source: str
) -> Coefficients:
    if not own.any():
        return Coefficients(**made, error=UNMEASURED_ERROR, ttft_error=1.0, source=f"not calibrated: {source}, of which the table has none")
    error, ttft_error = (float(f"{_widest(np.abs(misses[own]), bands[own]):.3g}") for misses in (tpot, ttft))
    return Coefficients(**made, error=error, ttft_error=ttft_error, rows=int(own.sum()), calibrated=True, source=source)


def _widest(misses: Floats, bands: NDArray[np.str_]) -> float:
    """The 95 % quantile, each band of rows counting alike: few of them are full or disaggregated servers, which differ most."""
    weight = np.zeros(len(misses))
    for band in set(bands.tolist()):
        weight[bands == band] = 1.0 / (bands == band).sum()
    by_size = np.argsort(misses)
    reached = np.cumsum(weight[by_size]) / weight.sum()
    return float(misses[by_size][min(int(np.searchsorted(reached, 0.95)), len(misses) - 1)])


def report(of: FitProblem, at: Minimum) -> Iterator[str]:
    """Errors of configurations that were left out, how often the better of two is told, and how often the shipped intervals hold."""
    asked = [
        ScoredRow(row, float(row.ttft_s * np.exp(ttft)), float(row.tpot_s * np.exp(tpot)))
        for row, tpot, ttft in zip(of.rows, *left_out(of, at), strict=True)
    ]
    kinds = [_kind(one.row) for one in asked]
    for kind in sorted(set(kinds)):
        own = [one for one, its in zip(asked, kinds, strict=True) if its == kind]
        for measure, word in WORDS.items():
            errors = np.array([one.errors[measure] for one in own])
            figures = f"mean {np.abs(errors).mean():6.1%}  median {np.median(np.abs(errors)):6.1%}  bias {errors.mean():+6.1%}"
            yield f"{kind:16} {word:12} {len(own):5} rows  {figures}"
    sound = [one for one in asked if not strange(one.row)]
    yield from (*order_lines(sound), *coverage_lines(sound))
    yield f"strange, and in no fit: {len(asked) - len(sound)} rows"


def _kind(row: MeasuredRow) -> str:
    if strange(row):
        return "strange"
    if row.disaggregated:
        return "P/D"
    if row.concurrency > 64:
        return "> 64"
    return "<= 64, experts" if row.model().experts else "<= 64, dense"


def fit(paths: Sequence[Path], jobs: int) -> tuple[FitProblem, Minimum]:
    """Simulate the rows under what ships, and fit. Raises UsageError when a table can't be read."""
    of = problem([row for path in paths for row in read_rows(path)[0]])
    with closing(ProcessPool(jobs)) as pool:
        of = with_ratios(of, list(score(of.rows, pool)))
    return of, minimise(of)


def write(sets: Mapping[str, Coefficients], path: Path) -> None:
    """Into the shipped file, beside the sets that are fitted elsewhere (`pdlab.cost.calibrate`)."""
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kept |= {name: asdict(made) for name, made in sets.items()}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def of_engines(sets: Mapping[str, Coefficients], engines: Sequence[str] | None) -> dict[str, Coefficients]:
    """Those engines' own, of every generation; all sets where none is named."""
    return {name: made for name, made in sets.items() if not engines or name.rpartition("-")[2] in engines}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, print the errors, and with --write replace the shipped sets. Once more changes little: ratios hardly depend on the sets."""
    parser = argparse.ArgumentParser(prog="python -m pdlab.search.board.fit", description="Fit the roofline to measured servers.")
    parser.add_argument("rows", type=Path, nargs="+", help="tables of measured rows")
    parser.add_argument("--jobs", type=int, default=usable_cores())
    parser.add_argument("--write", action="store_true", help="replace the shipped coefficients.json")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="write their sets alone, and leave the others as they are")
    given = parser.parse_args(arguments)
    try:
        of, at = fit(given.rows, given.jobs)
    except UsageError as error:
        parser.error(str(error))
    print("\n".join(report(of, at)))
    if given.write:
        write(of_engines(coefficient_sets(of, at), given.engines), Path(roofline.__file__).with_name("coefficients.json"))


if __name__ == "__main__":
    main()
