"""What `pdlab validate` keeps: two files with every run of both worlds, `requests.parquet` and `manifest.json`.

The table has a row a request: of which run it is (its name, and the layout, policy, rate, world and repeat that make it up), then the
fields of `pdlab.results.records`, with times in whole microseconds since the run began (`arrival_us`). Inter-token latencies belong to no
single request; their histograms, one a run, are in the table's metadata. The manifest says what was run, where, and what came of it: for
each run a line with its summary, and what its experiment has other than the first of its kind. The instances' load over time is not kept.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdlab.core.types import UsageError
from pdlab.results.gaps import Gaps
from pdlab.results.records import FIELDS, Records, Samples
from pdlab.results.run import MANIFEST, REQUESTS, SUMMARY, Run

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_KEY = ("layout", "policy", "rate", "world", "repeat")
_TEXTS = ("status", "prefill_instance", "decode_instance", "reason")
_TIMES = {name: f"{name[:-2]}_us" for name in FIELDS if name.endswith("_s") and not name.endswith("_slo_s")}
_FIRST_TOKENS = "first_tokens"  # a field that few runs have
_ITL = b"pdlab.itl"
_LEVEL = 19  # of zstd: it is written a few times, and then kept


@dataclass(frozen=True, slots=True, eq=False)
class StoredRun:
    """`world` is "real" or "sim". `repeat` counts measured runs from 1; a simulation has that of the run whose slow cores it was given, or
    0 where it was given none. `loop_s`: of a measured run, `pdlab.proof.validate_host.seen`."""

    layout: str
    policy: str
    rate: float
    world: str
    repeat: int
    result: Run
    loop_s: list[list[float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return name_of(self.layout, self.policy, self.rate, self.world, self.repeat)

    @property
    def kind(self) -> str:
        """What runs share whose experiments differ little."""
        return f"{self.layout}-{self.policy}-{self.world}"


def name_of(layout: str, policy: str, rate: float, world: str, repeat: int) -> str:
    """1p1d-round_robin-2.5-real-1."""
    return f"{layout}-{policy}-{rate:g}-{world}" + (f"-{repeat}" if repeat else "")


class RunStore:
    """`runs` by their names; `checks` is what was judged of them, `machine` and `versions` what they ran on and with."""

    def __init__(self, machine: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        self.machine = dict(machine)
        self.versions = dict(versions)
        self.runs: dict[str, StoredRun] = {}
        self.checks: list[dict[str, Any]] = []

    def put(self, run: StoredRun) -> None:
        """In place of one of the same name."""
        self.runs[run.name] = run

    def save(self, folder: Path) -> None:
        """Raises UsageError where `folder` cannot be written."""
        import pyarrow.parquet as pq

        table = _table(self.runs.values())
        plain = [name for name in table.column_names if not name.endswith("_us")]
        packed = {name: "DELTA_BINARY_PACKED" for name in table.column_names if name.endswith("_us")}
        asides = {name: folder / f".{name}.partial" for name in (REQUESTS, MANIFEST)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(
                table, asides[REQUESTS], compression="zstd", compression_level=_LEVEL, use_dictionary=plain, column_encoding=packed
            )
            asides[MANIFEST].write_text(_manifest(self), encoding="utf-8")
            for name, aside in asides.items():
                os.replace(aside, folder / name)
        except OSError as error:
            raise UsageError(f"{folder}: cannot write there ({error.strerror}); give another directory with --out") from None

    @classmethod
    def load(cls, folder: Path) -> RunStore:
        """Raises UsageError where there is none."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            table = pq.read_table(folder / REQUESTS)
            return cls._restored(manifest, table)
        except FileNotFoundError:
            if any(folder.glob(f"*/{SUMMARY}")):
                raise UsageError(
                    f"{folder}: a folder for each run is how pdlab validate once kept them; measure again with --out"
                ) from None
            missing = next((name for name in (MANIFEST, REQUESTS) if not (folder / name).exists()), "a file")
            raise UsageError(f"{folder}: no runs are stored there ({missing} is missing): pdlab validate FILE --out {folder}") from None
        except OSError as error:
            raise UsageError(f"{folder}: {error.strerror}; give the folder that pdlab validate --out named") from None
        except (KeyError, ValueError, TypeError, AttributeError, zlib.error, pa.ArrowException) as error:
            raise UsageError(f"{folder}: its files are not the runs of pdlab validate ({error!r})") from None

    @classmethod
    def _restored(cls, manifest: Mapping[str, Any], table: pa.Table) -> RunStore:
        store = cls(manifest["machine"], manifest["versions"])
        store.checks = manifest["checks"]
        frames = dict(list(table.to_pandas().groupby("run", sort=False, observed=True)))
        none = table.slice(0, 0).to_pandas()  # a run of no request
        gaps = json.loads(zlib.decompress(table.schema.metadata[_ITL]))
        for entry in manifest["runs"]:
            name, summary = entry["run"], entry["summary"]
            experiment = {**manifest["experiments"].get(entry["experiment"], {}), **entry["changes"]}
            records = _records(frames.get(name, none), [use["name"] for use in summary["instances"]])
            result = Run(summary, records, Gaps.restore(gaps[name]), Samples(), experiment)
            store.put(StoredRun(**{key: entry[key] for key in _KEY}, result=result, loop_s=entry["loop_s"]))
        return store


def _table(runs: Iterable[StoredRun]) -> pa.Table:
    import pandas as pd
    import pyarrow as pa

    frames, gaps = [], {}
    for run in runs:
        frames.append(_frame(run))
        gaps[run.name] = run.result.gaps.state()
    every = pd.concat(frames, ignore_index=True)
    table = pa.Table.from_pandas(every, preserve_index=False)
    return table.replace_schema_metadata({**table.schema.metadata, _ITL: zlib.compress(json.dumps(gaps).encode(), 9)})


def _frame(run: StoredRun) -> pd.DataFrame:
    whole = run.result.records.frame()
    told = whole[[name for name in (*FIELDS, _FIRST_TOKENS) if name in whole]].astype(dict.fromkeys(_TEXTS, "object"))
    for name in _TIMES:
        told[name] = (told[name] * 1e6).round().astype("Int64")
    told = told.rename(columns=_TIMES)
    for place, name in enumerate(("run", *_KEY)):
        told.insert(place, name, run.name if name == "run" else getattr(run, name))
    return told


def _records(frame: pd.DataFrame, instances: Sequence[str]) -> Records:
    import pandas as pd

    found = {name: frame[_TIMES.get(name, name)] for name in FIELDS}
    for name in _TIMES:
        found[name] = found[name].astype(np.float64) / 1e6
    seen = pd.concat([found["prefill_instance"], found["decode_instance"]]).dropna()
    names = list(dict.fromkeys([*instances, *seen]))
    for name in ("prefill_instance", "decode_instance"):
        found[name] = pd.Series(pd.Categorical(found[name], categories=names), index=frame.index)
    found["reason"] = found["reason"].astype("category")
    if _FIRST_TOKENS in frame and frame[_FIRST_TOKENS].notna().all() and len(frame):
        found[_FIRST_TOKENS] = frame[_FIRST_TOKENS]
    return Records.from_frame(pd.DataFrame(found))


def _manifest(store: RunStore) -> str:
    experiments: dict[str, Mapping[str, Any]] = {}
    entries = []
    for run in store.runs.values():
        own = run.result.experiment
        first = experiments.setdefault(run.kind, own)
        alike = first.keys() == own.keys()
        entries.append(
            {
                "run": run.name,
                **{key: getattr(run, key) for key in _KEY},
                "experiment": run.kind if alike else None,
                "changes": {key: value for key, value in own.items() if not alike or first[key] != value},
                "loop_s": run.loop_s,
                "summary": run.result.summary,
            }
        )
    parts: dict[str, Any] = {"machine": store.machine, "versions": store.versions, "experiments": experiments}
    parts |= {"checks": store.checks, "runs": entries}
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(part)}" for key, part in parts.items()) + "\n}\n"


def _lines(part: Mapping[str, Any] | Sequence[Any]) -> str:
    """As JSON, each member on a line of its own."""
    if isinstance(part, Mapping):
        return "{" + ",".join(f"\n {json.dumps(key)}: {_compact(value)}" for key, value in part.items()) + "\n}"
    return "[" + ",".join(f"\n {_compact(value)}" for value in part) + "\n]"


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
