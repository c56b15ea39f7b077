"""A policy's mistake is told by its file, line and class, and a hook that does not return comes to an end: simulated."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdlab import Experiment, Policy, UsageError, simulate
from pdlab.cli.main import app
from pdlab.core import endless_hooks
from pdlab.core.blame import culprit

SMALL = {
    "model": "llama-3.1-8b",
    "workload": {"source": "synthetic", "requests": 20, "rate": 8.0, "prompt": 200, "output": 30},
    "cluster": {"instances": [{"role": "prefill", "hardware": "h100-sxm"}, {"role": "decode", "count": 2, "hardware": "h100-sxm"}]},
}
HEAD = """\
import time
from pdlab import Policy


def helper(request):
    return {}[request.id]  # line 6


class Mine(Policy):
    tick_s = 0.2

"""


def mine(folder: Path, body: str, policy: object = "mine.py") -> Experiment:
    (folder / "mine.py").write_text(HEAD + body)
    return Experiment.parse({**SMALL, "base_dir": str(folder), "policy": policy})


def said(experiment: Experiment) -> str:
    with pytest.raises(UsageError) as caught:
        simulate(experiment)
    return str(caught.value)


WAITS = "    queues = True\n    def dispatch(self, request, cluster):\n        return None\n"
RAISES = [  # the class's body from line 12 on, the hook, the line, what is said
    ("    def dispatch(self, request, cluster):\n        return helper(request)\n", "dispatch for request 0", 6, "raised KeyError: 0"),
    ("    def dispatch(self, request, cluster):\n        raise SystemExit(0)\n", "dispatch for request 0", 13, "raised SystemExit: 0"),
    (
        "    def handoff(self, request, cluster):\n        1 / 0\n",
        "handoff for request 0",
        13,
        "raised ZeroDivisionError: division by zero",
    ),
    ("    def migrate(self, cluster):\n        yield\n        cluster.nothing\n", "migrate", 14, "raised AttributeError: "),
    ("    def resize(self, cluster):\n        int('x')\n", "resize", 13, "raised ValueError: invalid literal"),
    ("    def observe(self, event, cluster):\n        raise RuntimeError('oops')\n", "observe", 13, "raised RuntimeError: oops"),
    ("    def dispatch(self, request, cluster):\n        return 3\n", "dispatch for request 0", 12, "returned 3, not an instance"),
    (
        "    def dispatch(self, request, cluster):\n        return min(map(helper, [request]))\n",
        "dispatch for request 0",
        6,
        "raised KeyError",
    ),
    ("    def migrate(self, cluster):\n        return [7]\n", "migrate", 12, "returned 7, not a request's id and an instance"),
    ("    def resize(self, cluster):\n        return [cluster.instances[0]]\n", "resize", 12, "returned "),
    ("    def migrate(self, cluster):\n        return 7\n", "migrate", 12, "raised TypeError: 'int' object is not iterable"),
    (f"{WAITS}    def first(self, waiting, cluster):\n        return helper(waiting[0])\n", "first", 6, "raised KeyError: 0"),
    (f"{WAITS}    def first(self, waiting, cluster):\n        return 3\n", "first", 15, "returned 3, none of the requests that wait"),
    (f"{WAITS}    def evict(self, cluster):\n        return 1 / 0\n", "evict", 16, "raised ZeroDivisionError"),
]


@pytest.mark.parametrize(("body", "hook", "line", "what"), RAISES, ids=[f"{hook}-{what[:12]}" for _, hook, _, what in RAISES])
def test_a_mistake_has_the_line_of_the_policys_own_code(body: str, hook: str, line: int, what: str, tmp_path: Path) -> None:
    composed = {hook.partition(" ")[0]: "mine.py"}
    for policy in ("mine.py",) if hook in ("observe", "first", "evict") else ("mine.py", composed):
        text = said(mine(tmp_path, body, policy))
        assert text.startswith(f"{tmp_path / 'mine.py'}:{line}: policy Mine.{hook} at t=")
        assert what in text


def test_a_mistake_within_a_library_has_the_line_that_called_it(tmp_path: Path) -> None:
    text = said(mine(tmp_path, "    def dispatch(self, request, cluster):\n        import json\n        return json.loads('{')\n"))
    assert text.startswith(f"{tmp_path / 'mine.py'}:14: policy Mine.dispatch for request 0 at t=")


def test_a_mistake_of_a_class_typed_in_has_its_name() -> None:
    class Typed(Policy):
        def dispatch(self, request, cluster):  # type: ignore[no-untyped-def]
            raise LookupError

    with pytest.raises(UsageError, match=r"test_mistakes_of_policies\.py:\d+: policy Typed\.dispatch for request 0 .* raised LookupError"):
        simulate(Experiment.parse(SMALL), policy=Typed)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("x = 1\n\ndef f(:\n", "3: "),
        ("from pdlab import Policy\n\n\nclass A(Policy):\n    x = 1 / 0\n", "5: "),
        (f"{HEAD}    def __init__(self):\n        [][3]\n", "13: "),
        (
            "from dataclasses import dataclass\nfrom pdlab import Policy\n\n\n@dataclass\nclass Mine(Policy):\n    n: int = 0\n\n"
            "    def __post_init__(self):\n        {}[self.n]\n",
            "10: ",
        ),
    ],
)
def test_a_file_that_cannot_be_read_has_its_line(text: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UsageError) as caught:
        Experiment.parse({**SMALL, "base_dir": str(tmp_path), "policy": "mine.py"}, "x.yaml")
    assert str(caught.value).startswith(f"x.yaml: policy: {tmp_path / 'mine.py'}:{where}")


def test_all_is_shown_where_it_is_asked_for(tmp_path: Path) -> None:
    mine(tmp_path, RAISES[0][0])
    (tmp_path / "x.yaml").write_text(Experiment.parse({**SMALL, "policy": "least_loaded"}).to_yaml().replace("least_loaded", "mine.py"))
    text = (tmp_path / "x.yaml").read_text().splitlines()
    (tmp_path / "x.yaml").write_text("\n".join(line for line in text if not line.startswith("base_dir")))
    command = ["sim", str(tmp_path / "x.yaml"), "-q", "--out", str(tmp_path / "out")]
    plain, whole = CliRunner().invoke(app, command), CliRunner().invoke(app, [*command, "--traceback"])
    for ended in (plain, whole):
        assert isinstance(ended.exception, UsageError)
    assert "Traceback" not in plain.output
    assert "return {}[request.id]  # line 6" in whole.output
    assert "KeyError: 0" in whole.output
    (tmp_path / "mine.py").write_text("raise OSError('of the file itself')\n")
    assert "OSError: of the file itself\n\nThe above" in CliRunner().invoke(app, [*command, "--traceback"]).output


# ---------------------------------------------------------------- without an end

ENDLESS = [  # a hook's body
    ("while True:\n            try:\n                pass\n            except Exception:\n                pass", "loop"),
    ("time.sleep(1e6)", "sleep"),
    ("__import__('threading').Lock().acquire() and __import__('threading').Event().wait()", "wait"),
]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endless_hooks, "LOOK_S", 0.02)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("hook", ["dispatch", "handoff", "migrate", "resize", "observe", "first", "evict"])
@pytest.mark.parametrize("body", [body for body, _ in ENDLESS], ids=[name for _, name in ENDLESS])
def test_a_hook_that_does_not_return_is_cut_off(hook: str, body: str, tmp_path: Path) -> None:
    takes = {"dispatch": "request, cluster", "handoff": "request, cluster", "observe": "event, cluster", "first": "waiting, cluster"}
    before = WAITS if hook in ("first", "evict") else ""
    experiment = mine(tmp_path, f"{before}    def {hook}(self, {takes.get(hook, 'cluster')}):\n        {body}\n")
    assert f"policy Mine.{hook}" in (text := said(experiment))
    assert text.endswith("s does not return: it was cut off after 10 s")
    assert f"{tmp_path / 'mine.py'}:1" in text


@pytest.mark.usefixtures("impatient")
def test_of_a_policy_made_of_several_the_member_is_named(tmp_path: Path) -> None:
    body = f"    def handoff(self, request, cluster):\n        {ENDLESS[0][0]}\n"
    assert "policy Mine.handoff" in said(mine(tmp_path, body, {"dispatch": "round_robin", "handoff": "mine.py"}))


@pytest.mark.usefixtures("impatient")
def test_a_loop_is_cut_off_in_any_thread(tmp_path: Path) -> None:
    experiment = mine(tmp_path, f"    def dispatch(self, request, cluster):\n        {ENDLESS[0][0]}\n")
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(said(experiment)))
    thread.start()
    thread.join(60)
    assert texts
    assert "policy Mine.dispatch for request 0" in texts[0]


@pytest.mark.usefixtures("impatient")
def test_many_short_calls_are_no_long_one(tmp_path: Path) -> None:
    experiment = mine(tmp_path, "    def dispatch(self, request, cluster):\n        time.sleep(0.04)\n        return cluster.prefill[0]\n")
    assert simulate(experiment).summary["completed"] == 20  # 0.8 s of it, and no look at the same call twice ten times


def test_nothing_is_left_of_a_watch(tmp_path: Path) -> None:
    simulate(Experiment.parse(SMALL))
    assert not [thread for thread in threading.enumerate() if thread.name == "pdlab-watchdog"]


def test_without_a_traceback_the_hook_is_what_is_shown() -> None:
    place, name = culprit(Policy(), "dispatch", None)
    assert place.startswith("pdlab/core/policy.py:")
    assert name == "Policy"


# ---------------------------------------------------------------- what is hashed is what runs


def test_a_policys_file_runs_once_and_what_ran_is_hashed(tmp_path: Path) -> None:
    hook = "    def dispatch(self, request, cluster):\n        return cluster.prefill[0]\n\n\n"
    body = f"{hook}with open(__file__ + '.ran', 'a') as f:\n    f.write('x')\n"
    experiment = mine(tmp_path, body)
    first = simulate(experiment).summary["run"]["policy_hash"]
    assert (tmp_path / "mine.py.ran").read_text() == "x"
    from pdlab.policies.load import build, source_hash

    loaded = build("mine.py", tmp_path)
    (tmp_path / "mine.py").write_text("nothing like it")
    assert source_hash(loaded) == first
    (tmp_path / "mine.py").write_text(HEAD + body.replace("prefill[0]", "prefill[-1]"))
    assert simulate(experiment).summary["run"]["policy_hash"] != first
    assert source_hash(loaded) == first
    assert (tmp_path / "mine.py.ran").read_text() == "xx"


def test_a_module_that_was_changed_since_it_was_imported_is_hashed_as_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    from pdlab.policies.load import source_hash

    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "lying_policy.py"
    file.write_text(HEAD + "    def dispatch(self, request, cluster):\n        return cluster.prefill[0]\n")
    mine = import_module("lying_policy").Mine()
    before = source_hash(mine)
    file.write_text(HEAD + "    def dispatch(self, request, cluster):\n        return cluster.prefill[-1]\n")
    after = source_hash(mine)
    assert after != before  # no longer of the file
    file.write_text(HEAD + "    def dispatch(self, request, cluster):\n        return None\n")
    assert source_hash(mine) == after, "whatever the file says now"
