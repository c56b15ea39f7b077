"""Engines over tiny models, and a driver that plays the process around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pdlab.core.prefix import chain
from pdlab.real.engine.engine import Engine
from pdlab.real.engine.load import load
from pdlab.real.engine.messages import Sampling, Submit, Tokens
from pdlab.real.engine.options import EngineOptions
from tests.support import tiny_models
from tests.support.rank_threads import RankThreads


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """(folder, transformers' model) of a family, made once."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def of(family: str) -> tuple[Path, PreTrainedModel]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, tiny_models.make(family, folder)
        return made[family]

    return of


class Driver:
    """Runs an engine to the end of all it was given, without clock or process, and checks what it says on the way: token indices without
    gap or repeat, nothing after the end, books in order after every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.finish: dict[tuple[int, int], str] = {}
        self.outputs: dict[tuple[int, int], list[Tokens]] = {}
        self.now = 0.0
        self.arrivals: list[Callable[[], None]] = []  # each is called, and gone, before a later pass

    def submit(self, id: int, prompt: list[int], sampling: Sampling, *, cached: bool = True, priority: int = 0) -> None:
        hashes = chain(prompt, self.engine.runner.block_tokens) if cached else ()
        self.engine.submit(Submit(id, prompt, sampling, hashes, priority), self.now)

    def emit(self, outputs: Iterable[Tokens]) -> None:
        for o in outputs:
            key = o.id, o.candidate
            assert key not in self.finish, f"{o} after the end"
            known = self.tokens.setdefault(key, [])
            assert o.start == len(known), f"{o} after {len(known)} tokens"
            known += o.tokens
            self.outputs.setdefault(key, []).append(o)
            if o.finish:
                self.finish[key] = o.finish

    def step(self) -> None:
        self.now += 0.01
        self.engine.step(self.now, self.emit, lambda: bool(self.arrivals))
        self.engine.worker.check()

    def run(self) -> None:
        """To the end; at most one of `arrivals` between two steps."""
        while not self.engine.idle or self.arrivals:
            if self.arrivals:
                self.arrivals.pop(0)()
            self.step()
        assert self.engine.scheduler.idle
        assert self.engine.scheduler.pool.used == 0
        assert self.engine.load([], 0.0).leaked_blocks == 0


@pytest.fixture
def driver(tiny: Callable[[str], tuple[Path, PreTrainedModel]]) -> Iterator[Callable[..., Driver]]:
    """A driver of an engine of that family; keyword arguments are its options. Of several ranks, the others are threads."""

    def of(family: str, **options: object) -> Driver:
        given = {"block_tokens": 4, "kv_blocks": 400, "max_batch_tokens": 64, "max_seqs": 16, "threads": 1, **options}
        asked = EngineOptions(model=str(tiny(family)[0]), **given)  # type: ignore[arg-type]
        return Driver(load(asked).engine if asked.tp == 1 else RankThreads(asked, stack).loaded.engine)

    with ExitStack() as stack:
        yield of
