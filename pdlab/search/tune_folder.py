"""A tuning's folder: `study.db` where no other database was asked for, `tune.json` with what the judge found, and for each who was judged
the `policy` of an experiment file, in YAML."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from pdlab.core.types import UsageError
from pdlab.search.tune import Judgement, TunePlan
from pdlab.search.tune_space import placed
from pdlab.search.tune_study import TuneStudy
from pdlab.search.tune_table import best_line, difference

STUDY, FOUND = "study.db", "tune.json"


@dataclass(frozen=True, slots=True)
class TuneFolder:
    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Raises UsageError where it has something else, or cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            names = {file.name for file in folder.iterdir()}
            if names and not names & {STUDY, FOUND}:
                raise UsageError(f"{folder}: has something else than a tuning; give another directory with --out")
            if not os.access(folder, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise UsageError(f"{folder}: cannot write there ({error.strerror}); give another directory with --out") from None
        return cls(folder)

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder / STUDY}"

    def write(self, plan: TunePlan, study: TuneStudy, judgements: Sequence[Judgement]) -> list[Path]:
        """The files of those that were judged. Raises UsageError where the disk is full."""
        judged = [_plain(one) for one in judgements]
        found = {
            "study": study.name,
            "policy": plan.space.policy,
            "trials": asdict(study.counts),
            "objectives": [one.name for one in plan.objectives],
            "judged_on": plan.cases.worded(),
            "untuned": dict(plan.untuned),
            "judged": judged,
            "verdict": best_line(plan, judgements),
        }
        paths = [self.folder / (f"policy-{one.trial.number}.yaml" if len(judgements) > 1 else "policy.yaml") for one in judgements]
        try:
            for stale in self.folder.glob("policy*.yaml"):
                stale.unlink()
            for path, one in zip(paths, judgements, strict=True):
                _write(path, fragment(plan, study, one))
            _write(self.folder / FOUND, json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"{self.folder}: {error.strerror}; the study is kept, and the same command goes on") from None
        return paths


def fragment(plan: TunePlan, study: TuneStudy, one: Judgement) -> str:
    """What replaces the `policy` of the file, under what the judge says of it."""
    head = [f"# pdlab tune, study {study.name}, trial {one.trial.number}: {best_line(plan, [one])}"]
    head += [f"# {figure.objective.name}: {difference(figure)} against the untuned, {figure.verdict}" for figure in one.figures]
    policy = placed(plan.experiment.policy, plan.space.policy, one.trial.parameters)
    return "\n".join([*head, yaml.safe_dump({"policy": policy}, sort_keys=False, width=120, allow_unicode=True)])


def _plain(one: Judgement) -> Mapping[str, Any]:
    figures = {
        figure.objective.name: {
            **{key: asdict(getattr(figure, key)) for key in ("untuned", "tuned", "difference")},
            "verdict": figure.verdict,
        }
        for figure in one.figures
    }
    return {"trial": one.trial.number, "parameters": dict(one.trial.parameters), "verdict": one.verdict, "figures": figures}


def _write(path: Path, content: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(content, encoding="utf-8")
    os.replace(aside, path)
