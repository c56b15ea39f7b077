from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import pdlab.policies
from pdlab.core.policy import Policy
from pdlab.core.types import UsageError
from pdlab.policies.compose import Composed
from pdlab.policies.least_kv import LeastKv
from pdlab.policies.llumnix import Llumnix
from pdlab.policies.load import build, instantiate, names, policy_class, source_hash
from pdlab.policies.parameters import parameters
from pdlab.policies.prefix_aware import PrefixAware

HERE = Path(__file__).parent
MINE = """
from __future__ import annotations
from dataclasses import dataclass
from pdlab.core.policy import Policy

@dataclass
class Mine(Policy):
    {field}: int = 3

    def dispatch(self, request, cluster):
        return cluster.prefill[0]
"""


def test_every_file_in_the_folder_is_a_policy_by_its_name():
    files = {p.stem for p in Path(pdlab.policies.__file__).parent.glob("*.py")} - {"__init__", "compose", "load", "parameters"}
    assert set(names()) == files
    assert all(issubclass(policy_class(name, HERE), Policy) for name in names())
    assert {"round_robin", "random", "prefix_aware", "llumnix", "xllm_slo_aware", "fastdeploy_splitwise"} <= files


def test_a_name_answers_all_hooks():
    assert isinstance(build("prefix_aware", HERE), PrefixAware)


def test_parameters_are_the_fields_of_the_class():
    assert build({"name": "llumnix", "migrate_out_threshold": 5, "tick_s": None}, HERE) == Llumnix(migrate_out_threshold=5.0, tick_s=None)


def test_one_for_each_hook():
    policy = build({"dispatch": "prefix_aware", "handoff": {"name": "least_kv"}, "migrate": {"name": "llumnix", "tick_s": 0.7}}, HERE)
    assert isinstance(policy, Composed)
    assert [type(m) for m in policy.members.values()] == [PrefixAware, LeastKv, Llumnix, Policy]
    assert policy.tick_s == 0.7


def test_a_policy_named_twice_alike_is_one_object():
    same = build({"dispatch": "xllm_slo_aware", "handoff": "least_kv", "resize": {"name": "xllm_slo_aware"}}, HERE)
    assert isinstance(same, Composed)
    assert same.members["dispatch"] is same.members["resize"]
    two = build({"dispatch": "xllm_slo_aware", "resize": {"name": "xllm_slo_aware", "as_found": True}}, HERE)
    assert isinstance(two, Composed)
    assert two.members["dispatch"] is not two.members["resize"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prefix_awre", r"unknown policy 'prefix_awre' \(did you mean prefix_aware.*\); there are autoscale_sla, conditional, "),
        ({"name": "llumnix", "migrate_out_treshold": 3}, r"no parameter 'migrate_out_treshold' \(did you mean migrate_out_threshold\?\)"),
        ({"name": "round_robin", "n": 3}, "policy round_robin has no parameter 'n'; it has none"),
        ({"name": "llumnix", "migrate_out_threshold": "3.0"}, "migrate_out_threshold is '3.0': Expected `float`, got `str`"),
        ({"name": "llumnix", "stay_on_prefill": 1}, "stay_on_prefill is 1: Expected `bool`, got `int`"),
        ({"name": "llumnix", "request_order": "XX"}, "request_order is 'XX'"),
        ({"name": "llumnix", "migrate_out_threshold": -1}, "migrate_out_threshold must be 0 or more, not -1.0"),
        ({"name": "llumnix", "tick_s": 0}, "tick_s must be above 0, or null, not 0.0"),
        ({"name": "llumnix", "tick_s": float("nan")}, "tick_s must be above 0, or null, not nan"),
        ({"name": "conditional", "max_kv_use": 1.1}, "max_kv_use must be above 0 and at most 1, not 1.1"),
        ({"name": 7}, "policy name must be text, not 7"),
        ({"dispach": "random"}, r"unknown key 'dispach' \(did you mean dispatch\?\)"),
        ({"dispatch": 7}, r"policy.dispatch must be a name, or a mapping with a name, not 7"),
        ({"dispatch": {"by": "tokens"}}, "policy.dispatch must be a name, or a mapping with a name"),
        ({"dispatch": "least_kv"}, "policy.dispatch: least_kv does not decide dispatch, only handoff"),
        ({"migrate": "random"}, "policy.migrate: random does not decide migrate, only dispatch and handoff"),
        (["random"], "policy must be a name or a mapping"),
        ("nowhere.py:Mine", "there is no file"),
    ],
)
def test_mistakes_are_the_users_in_one_line(spec, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(spec, HERE)
    assert "\n" not in str(caught.value)


def test_every_number_of_a_shipped_policy_has_bounds_and_its_default_lies_within():
    for name in names():
        for parameter in parameters(policy_class(name, HERE)).values():
            bounds = parameter.bounds
            assert parameter.choices or bounds or parameter.name in ("high_priority", "of"), (name, parameter.name)  # any number; a policy
            parameter.check(parameter.default)
            if bounds is not None and bounds.searched is not None:
                low, high = bounds.searched
                assert parameter.default is None or low <= parameter.default <= high
                assert bounds.hold(low) and bounds.hold(high)
                assert low > 0 or not bounds.log


def test_a_field_of_the_users_is_bounded_by_its_annotation(tmp_path):
    text = MINE.replace("{field}: int = 3", "depth: Annotated[int, Range(ge=1, lt=9)] = 3").replace(
        "import dataclass", "import dataclass\nfrom typing import Annotated"
    )
    (tmp_path / "mine.py").write_text(text.replace("import Policy", "import Range, Policy"))
    assert build({"name": "mine.py", "depth": 8}, tmp_path).depth == 8
    with pytest.raises(UsageError, match=r"^policy parameter depth must be 1 or more and below 9, not 9$"):
        build({"name": "mine.py", "depth": 9}, tmp_path)


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        (Llumnix(tick_s=-1.0), "tick_s must be above 0, or null, not -1.0"),
        (Llumnix(pairing="all"), "pairing must be defrag or balanced, not 'all'"),  # type: ignore[arg-type]
        (Composed(migrate=Llumnix(priority_tokens=0)), "priority_tokens must be above 0, or null, not 0"),
    ],
)
def test_an_object_is_held_to_its_bounds_before_it_runs(policy, line):
    with pytest.raises(UsageError, match=line):
        instantiate(policy, HERE)


def test_a_file_of_the_users(tmp_path):
    (tmp_path / "mine.py").write_text(MINE.format(field="depth"))
    for spec in ("mine.py:Mine", "mine.py", str(tmp_path / "mine.py")):
        assert type(build(spec, tmp_path)).__name__ == "Mine"
    policy = build({"dispatch": {"name": "mine.py:Mine", "depth": 4}}, tmp_path)
    assert isinstance(policy, Composed)
    assert dataclasses.asdict(policy.members["dispatch"]) == {"depth": 4}  # type: ignore[call-overload]
    with pytest.raises(UsageError, match=r"no Yours in .*mine\.py; it defines Mine"):
        build("mine.py:Yours", tmp_path)


def test_a_file_that_cannot_be_imported(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(UsageError, match="raised ModuleNotFoundError: No module named 'nothing_of_that_name'"):
        build("broken.py", tmp_path)
    (tmp_path / "empty.py").write_text("from pdlab.core.policy import Policy\n")
    with pytest.raises(UsageError, match=r"no one Policy, or one named Empty in .*; it defines no Policy"):
        build("empty.py", tmp_path)


@pytest.mark.parametrize("source", ["raise SystemExit(0)", "class Quits(Policy):\n    def __init__(self): exit()"], ids=["import", "init"])
def test_a_policy_that_ends_the_process_is_said_to(source, tmp_path):
    (tmp_path / "quits.py").write_text(f"from sys import exit\nfrom pdlab import Policy\n{source}\n")
    with pytest.raises(UsageError, match=r"quits\.py.* raised SystemExit"):
        build("quits.py", tmp_path)


def test_of_several_policies_in_a_file_its_name_decides(tmp_path):
    (tmp_path / "two_here.py").write_text("from pdlab.core.policy import Policy\nclass Base(Policy): ...\nclass TwoHere(Base): ...\n")
    assert policy_class("two_here.py", tmp_path).__name__ == "TwoHere"
    assert policy_class("two_here.py:Base", tmp_path).__name__ == "Base"


def test_the_hash_is_of_the_sources_of_all_classes_involved(tmp_path):
    assert source_hash(build("random", HERE)) == source_hash(build("random", HERE))
    assert source_hash(build("random", HERE)) != source_hash(build("round_robin", HERE))
    one, other = ({"dispatch": "random", "handoff": name} for name in ("least_kv", "round_robin"))
    assert source_hash(build(one, HERE)) != source_hash(build(other, HERE))
    (tmp_path / "mine.py").write_text(MINE.format(field="depth"))
    before = source_hash(build("mine.py", tmp_path))
    (tmp_path / "mine.py").write_text(MINE.format(field="width"))
    assert source_hash(build("mine.py", tmp_path)) != before
    assert len(before) == 64
