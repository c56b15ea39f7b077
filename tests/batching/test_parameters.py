"""A batching's parameters: from YAML to the object that forms batches, the same in both worlds."""

from __future__ import annotations

import pytest

from pdlab import batching
from pdlab.batching.slide_batching import SlideBatching
from pdlab.core.types import UsageError
from pdlab.experiment.experiment import Experiment
from pdlab.real.engine.options import EngineOptions
from pdlab.replay.scheduler_log import Setup
from pdlab.sim.plans import plans
from tests.experiment.test_spec import PLAIN

ASKED = {"name": "slide_batching", "urgency": 0.8, "as_found": True}
LINE = "slide_batching(as_found=True, urgency=0.8)"


def experiment(asked: object) -> Experiment:
    return Experiment.parse({**PLAIN, "engine": {"batching": asked}})


def test_parameters_reach_whoever_forms_the_batches_in_both_worlds() -> None:
    engine = experiment(ASKED).engine
    assert engine.batching == LINE
    simulated = plans(experiment(ASKED), 16)[0].scheduler(16).batching
    live = Setup(100, batching=EngineOptions(model="m", batching=engine.batching).batching).scheduler().batching
    for made in (simulated, live):
        assert made == SlideBatching(urgency=0.8, as_found=True)


def test_a_line_says_the_same_as_its_mapping_and_what_is_plain_stays_a_name() -> None:
    assert experiment(LINE).engine.batching == experiment(ASKED).engine.batching
    assert experiment({"name": "chunked"}).engine.batching == "chunked"
    assert batching.chunks(LINE) and not batching.chunks("prefill_first")


def test_what_was_parsed_is_parsed_again_as_it_is_written() -> None:
    told = experiment(ASKED).model_dump(mode="json")["engine"]["batching"]
    assert experiment(told).engine.batching == LINE


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"name": "slide_batching", "urgencey": 1}, "slide_batching has no parameter 'urgencey'; nearest is urgency; it has urgency, star"),
        ({"name": "slide_batching", "tpot_share": 1.5}, "slide_batching: tpot_share must be above 0 and at most 1, not 1.5"),
        ({"name": "slide_batching", "least_chunk_tokens": "many"}, "slide_batching: least_chunk_tokens is 'many': Expected `int`"),
        ({"name": "chunked", "urgency": 1}, "chunked has no parameter 'urgency'; it has none"),
        ({"urgency": 1}, "'' is not one of chunked"),
        ("slide_batching(urgency=", "'slide_batching(urgency=' is not like slide_batching(urgency=0.8)"),
        ("slide_batching(__import__('os'))", "is not like slide_batching(urgency=0.8)"),
        ("slide_batching(urgency=open('x'))", "is not like slide_batching(urgency=0.8)"),
        (7, "batching"),
    ],
)
def test_a_mistake_is_one_line(asked: object, line: str) -> None:
    with pytest.raises(UsageError) as told:
        experiment(asked)
    assert line in str(told.value) and "\n" not in str(told.value), str(told.value)
