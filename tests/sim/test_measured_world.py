"""What measured instances do and others do not: engines of one machine slow each other, and KV is asked for between steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlab.core.types import Role
from pdlab.cost.profile import FrontCosts, Interference, save_instance_profile
from pdlab.experiment.experiment import Experiment
from pdlab.report.result import Result
from pdlab.sim import simulate
from pdlab.sim.calls import call_later
from pdlab.sim.moves import TransferMode
from tests.cost.test_measured import PROFILE
from tests.support.small_world import Linear, small_world, workload


def run(
    folder: Path,
    beside: Interference,
    hosts: tuple[str, ...],
    front: FrontCosts | None = None,
    cores: int = 2,
    new_size_s: float = 0.0,
    unfinished_chunk_saving_s: float = 0.0,
    step_tokens: int = 2048,
    **work: object,
) -> Result:
    """As many mixed instances as hosts, each with one request of 100 tokens and 50 of output at the same time. `cores` of the machine; each
    engine has one."""
    machine = PROFILE.machine.model_copy(update={"cores": cores, "threads": 1})
    overheads = PROFILE.overheads.model_copy(update={"new_size_s": new_size_s})
    steps = PROFILE.steps.model_copy(update={"unfinished_chunk_saving_s": unfinished_chunk_saving_s})
    changes = {"steps": steps, "beside": beside, "front": front or FrontCosts(), "machine": machine, "overheads": overheads}
    save_instance_profile(PROFILE.model_copy(update=changes), folder / "profile.json")
    plan = {
        "model": "smollm2-135m",
        "workload": {
            "source": "synthetic",
            "prompt": 100,
            "output": 50,
            "arrival": "constant",
            "rate": 1e9,
            "requests": len(hosts),
            **work,
        },
        "cluster": {"instances": [{"role": "mixed", "hardware": "profile.json", "host": host} for host in hosts]},
        "policy": "round_robin",
        "engine": {"max_batch_tokens": step_tokens},
        "base_dir": str(folder),
    }
    return simulate(Experiment.parse(plan, "test"))


def seconds(result: Result) -> tuple[float, float]:
    """(of the prompts, of the decodes)"""
    rows = result.records.frame()
    return (rows.first_token_s - rows.prefill_start_s).max(), (rows.finish_s - rows.first_token_s).max()


def test_engines_of_one_machine_slow_each_other(tmp_path: Path) -> None:
    prefills, decodes = Interference(prefill_beside_prefill_s=0.05), Interference(decode_beside_decode_s=0.01)
    alone = seconds(run(tmp_path, prefills, ("a",)))
    assert seconds(run(tmp_path, prefills, ("a", "b"))) == pytest.approx(alone)
    assert seconds(run(tmp_path, prefills, ("a", "a"))) == pytest.approx((alone[0] + 0.05, alone[1]), rel=0.02)
    assert seconds(run(tmp_path, decodes, ("a", "b"))) == pytest.approx(alone)
    assert seconds(run(tmp_path, decodes, ("a", "a"))) == pytest.approx((alone[0], alone[1] + 49 * 0.01), rel=0.02)


def test_each_further_engine_slows_them_again(tmp_path: Path) -> None:
    beside = Interference(decode_beside_decode_s=0.01)
    alone, three = seconds(run(tmp_path, beside, ("a",))), seconds(run(tmp_path, beside, ("a", "a", "a")))
    assert three[1] == pytest.approx(alone[1] + 49 * 0.02, rel=0.02)


def test_a_longer_prefill_is_slowed_more(tmp_path: Path) -> None:
    beside = Interference(prefill_beside_prefill_s=0.05, prefill_token_beside_prefill_s=0.001)
    alone, two = seconds(run(tmp_path, beside, ("a",))), seconds(run(tmp_path, beside, ("a", "a")))
    assert two[0] == pytest.approx(alone[0] + 0.05 + 100 * 0.001, rel=0.02)


def test_the_first_step_of_each_size_takes_longer_on_each_instance(tmp_path: Path) -> None:
    apart = {"requests": 5, "rate": 0.01}  # one after the other, by turns
    before = run(tmp_path, Interference(), ("a", "b"), **apart).records.frame()
    after = run(tmp_path, Interference(), ("a", "b"), new_size_s=0.25, **apart).records.frame()
    assert list(after.first_token_s - before.first_token_s) == pytest.approx([0.25, 0.25, 0.0, 0.0, 0.0])
    assert list(after.finish_s - before.finish_s) == pytest.approx([0.25, 0.25, 0.0, 0.0, 0.0]), "decodes alone have no new size"


def test_a_step_in_which_no_prompt_ends_and_nothing_decodes_is_shorter(tmp_path: Path) -> None:
    def more_s(prompt: int) -> float:
        took_s = [
            seconds(run(tmp_path, Interference(), ("a",), unfinished_chunk_saving_s=s, step_tokens=256, prompt=prompt, output=2))[0]
            for s in (0.01, 0.0)
        ]
        return took_s[1] - took_s[0]

    assert more_s(256) == 0.0
    assert more_s(600) == pytest.approx(2 * 0.01), "of three steps two end no prompt"


def by_instance(result: Result) -> list[float]:
    """Seconds from the first token to the last on each."""
    rows = result.records.frame().sort_values("prefill_instance")
    return list(rows.finish_s - rows.first_token_s)


def test_the_front_end_takes_its_time_from_the_instance_on_whose_core_it_runs(tmp_path: Path) -> None:
    front = FrontCosts(step_s=0.001, token_s=0.0005)
    before = by_instance(run(tmp_path, Interference(), ("a", "a")))
    first, last = by_instance(run(tmp_path, Interference(), ("a", "a"), front))
    assert first == pytest.approx(before[0])
    told = (last - before[1]) / 0.0015
    assert 49 < told < 2 * 49 + 1, "its own tokens, and the other's while it computes"
    assert by_instance(run(tmp_path, Interference(), ("a", "a"), front, cores=3)) == pytest.approx(before), "the third core has it"
    assert by_instance(run(tmp_path, Interference(), ("a", "b"), front)) == pytest.approx(before), "two machines"
    alone = by_instance(run(tmp_path, Interference(), ("a",), front, cores=1))
    assert alone[0] == pytest.approx(before[0] + 49 * 0.0015, abs=0.0016)


def test_a_request_that_arrives_takes_time_from_the_step_under_way_there(tmp_path: Path) -> None:
    arriving = {"requests": 3, "rate": 10.0}  # the second is on the last instance from 0.1 s on, and decodes when the third comes
    before = run(tmp_path, Interference(), ("a", "a"), **arriving).records.frame()
    after = run(tmp_path, Interference(), ("a", "a"), FrontCosts(request_s=0.003), **arriving).records.frame()
    decodes = (before.first_token_s[1], before.finish_s[1])
    assert decodes[0] < before.arrival_s[2] < decodes[1]
    assert list(after.finish_s - before.finish_s) == pytest.approx([0.0, 0.003, 0.0])


@pytest.mark.parametrize(("at_s", "first_s"), [(0.12, 0.003), (0.22, 0.0)])
def test_a_first_token_comes_as_late_as_its_step_ends(at_s: float, first_s: float) -> None:
    """The decode instance samples it, from 0.1 s to 0.2 s, then decodes in steps of 0.05 s; one step is made 3 ms longer at `at_s`."""
    found = []
    for extra_s in (0.0, 0.003):
        cost = Linear(a=0.1, b=0.0, c=0.05, d=0.0, e=0.0)
        transfer = TransferMode(first_token="decode")
        world = small_world(
            workload([0.0], 32, 5), members=(("p", Role.PREFILL), ("d", Role.DECODE)), cost=cost, horizon=1, transfer=transfer
        )
        call_later(world.env, at_s, lambda _, seconds=extra_s, world=world: world.instances["d"].stretch(seconds))
        world.run()
        found.append(world.records.frame().iloc[0])
    assert found[1].first_token_s - found[0].first_token_s == pytest.approx(first_s)
    assert found[1].finish_s - found[0].finish_s == pytest.approx(0.003)


def test_a_pull_begins_when_no_step_is_under_way() -> None:
    cost = Linear(a=0.1, b=0.0, c=0.05, d=0.0, e=0.0)  # prefills of 0.1 s, steps of 0.05 s
    members = (("p", Role.PREFILL), ("d", Role.DECODE))
    starts = {}
    for between_steps in (False, True):
        # The first decodes from 0.1 s on in steps of 0.05 s; the second's prompt is computed at 0.12 + 0.1 = 0.22 s.
        work = workload([0.0, 0.12], 32, 20)
        world = small_world(work, members=members, cost=cost, transfer=TransferMode(between_steps=between_steps, ask_s=0.001))
        world.run()
        rows = world.records.frame().set_index("request_id")
        first_step_s = rows.decode_start_s[0] % 0.05
        starts[between_steps] = rows.transfer_start_s[1]
        assert rows.handoff_s[1] == pytest.approx(0.22, abs=1e-3)
    assert starts[False] == pytest.approx(0.22, abs=1e-3)
    assert starts[True] == pytest.approx(0.25 + first_step_s, abs=1e-3)
