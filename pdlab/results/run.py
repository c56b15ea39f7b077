"""What is known of a run: its summary, its requests, its instances' load, and the files they are kept in.

`pdlab.report.result.Result`, which `simulate` gives back, is one that can be looked at, too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from pdlab.core.types import UsageError
from pdlab.results.gaps import Gaps
from pdlab.results.records import Records, Samples, Span
from pdlab.results.staged import staged
from pdlab.results.units import percent, seconds

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SUMMARY, REQUESTS, TIMELINE, EXPERIMENT = "summary.json", "requests.parquet", "timeline.parquet", "experiment.yaml"
MANIFEST = "manifest.json"  # of a `pdlab.results.run_store`
_GAPS = b"pdlab.itl"  # where requests.parquet keeps the inter-token latencies, which belong to no single request
_CHUNK = 1 << 17


if TYPE_CHECKING:
    Frame = pd.DataFrame
else:
    Frame = object


class RequestFrame(Frame):
    """`Run.requests`, for editors and type checkers: what its columns are. Times are seconds since the run began, NaN where they never
    came; a text is a category."""

    request_id: pd.Series[int]
    status: pd.Series[str]
    arrival_s: pd.Series[float]
    dispatched_s: pd.Series[float]
    prefill_start_s: pd.Series[float]
    first_token_s: pd.Series[float]
    handoff_s: pd.Series[float]
    transfer_start_s: pd.Series[float]
    transfer_end_s: pd.Series[float]
    decode_start_s: pd.Series[float]
    finish_s: pd.Series[float]
    prompt_tokens: pd.Series[int]
    cached_tokens: pd.Series[int]
    output_tokens: pd.Series[int]
    prefill_instance: pd.Series[str]
    decode_instance: pd.Series[str]
    transfer_bytes: pd.Series[int]
    attempts: pd.Series[int]
    preemptions: pd.Series[int]
    migrations: pd.Series[int]
    priority: pd.Series[int]
    ttft_slo_s: pd.Series[float]
    tpot_slo_s: pd.Series[float]
    n: pd.Series[int]
    reason: pd.Series[str]
    ttft_s: pd.Series[float]
    tpot_s: pd.Series[float]
    e2e_s: pd.Series[float]
    transfer_s: pd.Series[float]
    queue_s: pd.Series[float]
    good: pd.Series[bool]


class Run:
    """One run. `summary` is what summary.json holds, `experiment` the resolved experiment as plain values, `log` the event log's path
    and `spans` the instances' batches, where the run kept them."""

    def __init__(
        self,
        summary: dict[str, Any],
        records: Records,
        gaps: Gaps,
        samples: Samples,
        experiment: Mapping[str, Any] | None = None,
        *,
        log: Path | None = None,
        spans: Sequence[Span] = (),
    ) -> None:
        self.summary = summary
        self.records = records
        self.gaps = gaps
        self.samples = samples
        self.experiment = dict(experiment or {})
        self.log = log
        self.spans = spans
        if not samples.instances:
            samples.instances = list(records.instances)

    @property
    def name(self) -> str:
        return str(self.experiment.get("name") or "run")

    @property
    def slo(self) -> tuple[float, float]:
        """The experiment's (ttft_s, tpot_s); inf where there is none."""
        limits = [self.summary["slo"][key] for key in ("ttft_s", "tpot_s")]
        return (math.inf if limits[0] is None else limits[0], math.inf if limits[1] is None else limits[1])

    @cached_property
    def requests(self) -> RequestFrame:
        """One row a request, every timestamp in seconds since the run began."""
        return cast("RequestFrame", self.records.frame(self.slo))

    @cached_property
    def timeline(self) -> pd.DataFrame:
        """The instances' load over time, one row a report."""
        return self.samples.frame()

    def save(self, directory: str | Path) -> Path:
        """Write summary.json, requests.parquet, timeline.parquet and experiment.yaml, all or nothing: they are written aside and moved in
        place when whole. Files of an earlier run are replaced. A Result writes report.html, too, and trace.json.gz where spans were kept.

        Raises UsageError where `directory` cannot be written.
        """
        directory = Path(directory)
        with staged(directory) as aside:
            self._write(aside)
            self._move(aside, directory)
        return directory

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """The run that was saved there. Raises UsageError where its files are missing or are none of ours."""
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq
        import yaml

        directory = Path(directory)
        try:
            summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
            table = pq.read_table(directory / REQUESTS)
            records = Records.from_frame(table.to_pandas())
            gaps = Gaps.restore(json.loads((table.schema.metadata or {})[_GAPS]))
            samples = Samples.from_frame(pd.read_parquet(directory / TIMELINE))
            experiment = yaml.safe_load((directory / EXPERIMENT).read_text(encoding="utf-8"))
            for name, part in ((SUMMARY, summary), (SUMMARY + ": run", summary.get("run")), (EXPERIMENT, experiment)):
                if not isinstance(part, dict):
                    raise ValueError(f"{name} is no mapping of keys to values")
        except FileNotFoundError:
            if (directory / MANIFEST).is_file():
                raise UsageError(f"{directory}: the runs of pdlab validate, many results; its compare-*.html show them") from None
            missing = next((name for name in (SUMMARY, REQUESTS, TIMELINE, EXPERIMENT) if not (directory / name).exists()), "a file")
            raise UsageError(f"{directory}: no result is saved there ({missing} is missing)") from None
        except NotADirectoryError:
            file = next(path for path in (directory, *directory.parents) if path.is_file())
            raise UsageError(f"{directory}: no result is saved there ({file} is a file); give the folder that --out named") from None
        except (KeyError, ValueError, AttributeError, pa.ArrowException, yaml.YAMLError) as error:
            raise UsageError(f"{directory}: its files are not a pdlab result ({error})") from None
        return cls(summary, records, gaps, samples, experiment)

    def _write(self, directory: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq
        import yaml

        chunks = self._chunks()
        first = next(chunks)
        with pq.ParquetWriter(directory / REQUESTS, first.schema, compression="zstd") as writer:
            writer.write_table(first)
            for chunk in chunks:
                writer.write_table(chunk)
        pq.write_table(pa.Table.from_pandas(self.samples.frame(), preserve_index=False), directory / TIMELINE, compression="zstd")
        plain = yaml.safe_dump(self.experiment, sort_keys=False, allow_unicode=True)
        (directory / EXPERIMENT).write_text(plain, encoding="utf-8")
        text = json.dumps(self.summary, indent=2, allow_nan=False) + "\n"
        (directory / SUMMARY).write_text(text, encoding="utf-8")

    def _chunks(self) -> Iterator[pa.Table]:
        """The requests in pieces: a million of them as one frame, and again as one table, would double the memory of a run."""
        import pyarrow as pa

        state = json.dumps(self.gaps.state()).encode()
        for start in range(0, max(len(self.records), 1), _CHUNK):
            table = pa.Table.from_pandas(self.records.frame(self.slo, slice(start, start + _CHUNK)), preserve_index=False)
            yield table.replace_schema_metadata({**(table.schema.metadata or {}), _GAPS: state})

    @staticmethod
    def _move(aside: Path, directory: Path) -> None:
        if not directory.exists():
            aside.chmod(0o755)  # a temporary directory is its owner's alone
            try:
                os.rename(aside, directory)
                return
            except OSError:
                if not directory.is_dir():  # else another run's result is there since
                    raise
        for file in sorted(aside.iterdir(), key=lambda f: f.name == SUMMARY):
            os.replace(file, directory / file.name)

    def __repr__(self) -> str:
        s = self.summary
        served = f"{s['completed']:,} of {s['requests']:,} requests in {seconds(s['duration_s'])}"
        tails = f"TTFT p99 {seconds(s['ttft_s']['p99'])}, TPOT p99 {seconds(s['tpot_s']['p99'])}"
        end = f"bottleneck {s['bottleneck']['resource']}" + (", partial" if s["partial"] else "")
        return f"<{type(self).__name__} {self.name}: {served}, attainment {percent(s['slo_attainment'])}, {tails}, {end}>"
