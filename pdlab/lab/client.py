"""The lab from Python, over its API.

run = Client("http://127.0.0.1:8800").submit("experiments/quickstart.yaml", tags=["first"]).wait()
run.summary["slo_attainment"], run.requests().ttft_s.mean()
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.yaml import read_yaml
from pdlab.lab.settings import TOKEN
from pdlab.real.net.credentials import secret

if TYPE_CHECKING:
    import pandas as pd

API = "/api/v1"
AGAIN_S = (0.1, 0.5, 1.0, 2.0, 5.0)  # before each new try where a lab that is watched does not answer
HEARD_S = 60.0  # a lab that says nothing for so long is asked again


class Client:
    """Of the lab at `url`. The token is PDLAB_LAB_TOKEN's, or _FILE's, where none is given. Every method raises UsageError: with the lab's
    own lines, or where it does not answer."""

    def __init__(self, url: str, token: str | None = None, *, timeout_s: float = 60.0) -> None:
        token = secret(TOKEN, os.environ.get(TOKEN)) if token is None else token
        headers = {b"authorization": f"Bearer {token}".encode()} if token else {}
        self.url = url.rstrip("/")
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    def submit(
        self,
        experiment: Experiment | Mapping[str, Any] | str | Path,
        *,
        seeds: int = 1,
        tags: Sequence[str] = (),
        kind: str = "experiments",
        **options: Any,
    ) -> LabJob:
        """An experiment, its mapping, or its file. `kind` is experiments, plans, sweeps or tunings, with the options of each, such as
        `grid=["workload.rate=4,8"]`. Files that it names have to be uploaded."""
        body = {"experiment": _mapping(experiment), "seeds": seeds, "tags": list(tags), "options": options}
        found = self.call("POST", f"/{kind}", json=body)
        return LabJob(self, kind, found["id"], found)

    def board(self, rows: str, *, models: Sequence[str] = (), tags: Sequence[str] = ()) -> LabJob:
        """Of measured rows that were uploaded under that name."""
        found = self.call("POST", "/boards", json={"rows": rows, "models": list(models), "tags": list(tags)})
        return LabJob(self, "boards", found["id"], found)

    def validate(
        self, experiment: Experiment | Mapping[str, Any] | str | Path, kind: str = "experiments", **options: Any
    ) -> dict[str, Any]:
        """`mistakes`, `doubts`, and the `id` that it would run as."""
        found: dict[str, Any] = self.call("POST", f"/{kind}/validate", json={"experiment": _mapping(experiment), "options": options})
        return found

    def get(self, id: str, kind: str = "experiments") -> LabJob:
        return LabJob(self, kind, id, self.call("GET", f"/{kind}/{id}"))

    def experiments(self, **filters: Any) -> list[dict[str, Any]]:
        """The newest first: `tag`, `policy`, `model`, `state`, `text`; `sort`, `descending`, `offset`, `limit`."""
        found: list[dict[str, Any]] = self.call("GET", "/experiments", params=filters)["jobs"]
        return found

    def compare(self, ids: Sequence[str]) -> dict[str, Any]:
        """The others with the first."""
        found: dict[str, Any] = self.call("POST", "/compare", json={"ids": list(ids)})
        return found

    def upload(self, path: str | Path, kind: str, name: str | None = None) -> dict[str, Any]:
        """A trace, config, profile, rows, or policy, which experiments may name then. Raises UsageError, also where it cannot be read."""
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
        found: dict[str, Any] = self.call("POST", "/uploads", params={"name": name or path.name, "kind": kind}, content=content)
        return found

    def call(self, method: str, path: str, **how: Any) -> Any:
        return self.raw(method, path, **how).json()

    def raw(self, method: str, path: str, **how: Any) -> httpx.Response:
        try:
            answer = self.http.request(method, f"{API}{path}", **how)
        except httpx.HTTPError as error:
            raise UsageError(f"no lab answers at {self.url} ({error or type(error).__name__}): pdlab lab starts one") from None
        _check(answer)
        return answer


class LabJob:
    """An experiment of a lab's, or another job. `state` and what comes with it are as they were when last asked for."""

    def __init__(self, client: Client, kind: str, id: str, told: Mapping[str, Any]) -> None:
        self.client, self.kind, self.id = client, kind, id
        self.told = dict(told)

    @property
    def state(self) -> str:
        return str(self.told["state"])

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json has. Raises UsageError where there is none."""
        found: dict[str, Any] | None = self.told.get("summary")
        if found is None:
            raise UsageError(f"{self.kind} {self.id} is {self.state}, and has no summary: wait() for it")
        return found

    def refresh(self) -> Self:
        self.told = self.client.call("GET", f"/{self.kind}/{self.id}")
        return self

    def wait(self, within_s: float | None = None) -> Self:
        """Until it is done. Raises UsageError where it failed or was cancelled, and TimeoutError."""
        ends_s = None if within_s is None else time.monotonic() + within_s
        for _ in self.events():
            if ends_s is not None and time.monotonic() > ends_s:
                raise TimeoutError(f"{self.kind} {self.id} is {self.state} after {within_s:g} s")
        if self.refresh().state != "done":
            raise UsageError(f"{self.kind} {self.id} {self.state}: {self.told['failure'] or 'it was cancelled'}")
        return self

    def events(self) -> Iterator[dict[str, Any]]:
        """Its state whenever there is news, until it has ended; across a lab that ends and starts again, too."""
        tries = 0
        while True:
            try:
                for event in self._heard():
                    tries, self.told = 0, {**self.told, **event}
                    yield event
                    if event["state"] in ("done", "failed", "cancelled"):
                        return
            except httpx.HTTPError as error:
                if tries == len(AGAIN_S):
                    raise UsageError(f"no lab answers at {self.client.url} any more ({error})") from None
            time.sleep(AGAIN_S[min(tries, len(AGAIN_S) - 1)])
            tries += 1

    def requests(self) -> pd.DataFrame:
        """A row a request."""
        import pyarrow.parquet as pq

        raw = self.client.raw("GET", f"/{self.kind}/{self.id}/requests", params={"format": "parquet"})
        frame: pd.DataFrame = pq.read_table(io.BytesIO(raw.content)).to_pandas()
        return frame

    def report(self) -> str:
        """The page, as HTML."""
        return self.client.raw("GET", f"/{self.kind}/{self.id}/report").text

    def cancel(self) -> Self:
        self.told = self.client.call("DELETE", f"/{self.kind}/{self.id}")
        return self

    def delete(self) -> dict[str, Any]:
        """It has to have ended. Its files go, too; what it was."""
        found: dict[str, Any] = self.client.call("DELETE", f"/{self.kind}/{self.id}/results")
        return found

    def __repr__(self) -> str:
        return f"<{self.kind} {self.id}, {self.told.get('name', '')}: {self.state}>"

    def _heard(self) -> Iterator[dict[str, Any]]:
        path = f"{API}/{self.kind}/{self.id}/events"
        with self.client.http.stream("GET", path, timeout=httpx.Timeout(HEARD_S)) as answer:
            if answer.is_error:
                answer.read()
            _check(answer)
            for line in answer.iter_lines():
                if line.startswith("data: {") and "state" in line:
                    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    yield event


def _mapping(experiment: Experiment | Mapping[str, Any] | str | Path) -> Any:
    if isinstance(experiment, Experiment):
        return experiment.model_dump(mode="json", exclude_unset=True, exclude={"base_dir"})
    if isinstance(experiment, Mapping):
        return dict(experiment)
    path = Path(experiment)
    return {"name": path.stem, **read_yaml(path)}


def _check(answer: httpx.Response) -> None:
    """Raises UsageError with the lab's lines."""
    if not answer.is_error:
        return
    try:
        lines = [str(line) for line in answer.json()["errors"]]
    except (ValueError, KeyError, TypeError):
        lines = [f"{answer.request.url} answers {answer.status_code}: it is no lab of pdlab's"]
    raise UsageError("\n".join(lines))
