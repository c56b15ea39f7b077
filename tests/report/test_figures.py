from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.container import BarContainer

from pdlab.report import figures
from pdlab.report.result import Result
from pdlab.report.stages import stretches
from pdlab.results.records import Records, Samples

Made = Callable[..., Result]


def test_distributions_draw_the_objectives_and_the_true_curve(made_run: Made) -> None:
    result = made_run(500)
    axes = figures.distributions(result.records, result.slo).get_axes()
    curve = axes[2].get_lines()[0]
    x, y = np.asarray(curve.get_xdata(), float), np.asarray(curve.get_ydata(), float)
    ttft = result.requests["ttft_s"]
    assert np.interp(0.9, y, x) == pytest.approx(ttft.quantile(0.9), rel=0.01)
    for k, limit in ((0, 1.0), (2, 1.0), (1, 0.05), (3, 0.05)):
        assert any(list(line.get_xdata()) == [limit, limit] for line in axes[k].get_lines())
        low, high = axes[k].get_xlim()
        assert low < limit < high


def test_load_shows_each_instance_or_each_role(made_run: Made) -> None:
    few = figures.load(made_run(100).samples)
    assert [line.get_label() for line in few.get_axes()[0].get_lines()] == ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    many = Samples(instances=[f"prefill-{k}" for k in range(10)] + [f"decode-{k}" for k in range(10)])
    for t in range(50):
        for k in range(20):
            many.rows.extend((t, k, k, 0, 1, 0, 10, 100))
    lines = figures.load(many).get_axes()[0].get_lines()
    assert [str(line.get_label()).split(":")[0] for line in lines] == ["prefill", "decode"]
    assert np.asarray(lines[0].get_ydata(), float).mean() == pytest.approx(4.5)


def test_shares_on_an_axis_are_written_as_in_the_text(made_run: Made) -> None:
    result = made_run(100)
    axes = [figures.load(result.samples).get_axes()[2], *figures.distributions(result.records, result.slo).get_axes()]
    written = {one.yaxis.get_major_formatter()(0.5) for one in axes}
    assert written <= {"50 %", "50.0 %"}


def test_without_any_load_its_picture_is_left_out(made_run: Made) -> None:
    result = made_run(30)
    told = len(figures.overview(result.records, result.samples, result.slo).get_axes())
    idle = Samples(instances=["server"])
    idle.rows.extend((1, 0, 0, 0, 0, 0, 0, 100))
    for samples in (idle, Samples()):
        assert len(figures.overview(result.records, samples, result.slo).get_axes()) == told - 3


def test_few_requests_are_counted_in_whole_numbers() -> None:
    idle = Samples(instances=["mixed-0"])
    for t in range(20):
        idle.rows.extend((t, 0, 0, 0, 0, 0, 0, 10))
    for axes in figures.load(idle).get_axes()[:2]:
        assert axes.get_ylim() == (0, 1)
        assert all(tick == round(tick) for tick in axes.get_yticks())


def test_timeline_bars_are_the_requests_stages(made_run: Made) -> None:
    result = made_run(100)
    axes = figures.timeline(result.records, 10).get_axes()[0]
    assert len(axes.get_yticks()) == 10
    drawn = sum(len(c.patches) for c in axes.containers if isinstance(c, BarContainer))
    assert drawn >= 10 * 4


def test_stages_meet_end_to_end(made_run: Made) -> None:
    records = made_run(80).records
    stages = {s.name: s for s in stretches(records)}
    chain = ["queued", "prefill", "wait for room", "KV transfer", "wait to decode", "decode"]
    for before, after in pairwise(chain):
        np.testing.assert_allclose(stages[before].end_s, stages[after].start_s)


@pytest.mark.parametrize("slo", [(1.0, 0.05), (None, None), (float("inf"), 0.05)])
def test_nothing_can_be_drawn_too(slo: tuple[float | None, float | None]) -> None:
    figures.overview(Records(), Samples(), slo).savefig("/dev/null", format="png")


def test_one_request_can_be_drawn(made_run: Made) -> None:
    result = made_run(1)
    result.plot().savefig("/dev/null", format="png")
    figures.compared_distributions([("a", result.records), ("b", Records())], result.slo).savefig("/dev/null", format="png")


def test_the_load_stays_what_it_was_while_nothing_is_reported() -> None:
    samples = Samples(instances=["mixed-0"])
    for t, running in ((0.0, 4), (1.0, 4), (2.0, 0), (999.0, 0), (1000.0, 6)):
        samples.rows.extend((t, 0, 0, 0, running, 10 * running, running, 100))
    assert len(samples) == 5
    curve = figures.load(samples).get_axes()[1].get_lines()[0]
    x, y = np.asarray(curve.get_xdata(), float), np.asarray(curve.get_ydata(), float)
    assert len(x) > 3 and (y[(x > 250) & (x < 750)] == 0).all()
