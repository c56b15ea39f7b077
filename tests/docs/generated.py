"""The parts of the reference that the code writes.

`python -m tests.docs.generated` puts them into the pages, and `test_generated.py` holds them true. A part stands between
`<!-- generated: NAME -->` and `<!-- end -->`. They are in the repository, so that the pages can be read there.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import re
import tempfile
import typing
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import msgspec
import typer

from pdlab import Policy
from pdlab.cli.main import COMMANDS, app, command
from pdlab.core.policy import HOOKS
from pdlab.cost import hardware_names, model_names
from pdlab.cost.catalogue import hardware
from pdlab.experiment.schema import schema
from pdlab.experiment.table import table as worlds
from pdlab.policies import load as load_policy
from pdlab.policies.parameters import Parameter, parameters
from pdlab.real.net import wire
from pdlab.results.metrics import DEFINITIONS
from pdlab.workload import builtin
from tests.docs.pages import PART, pages
from tests.real.router.test_cluster_engine import LiveWorld, served
from tests.support import echo_engine
from tests.support.local_instances import instance


def cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(head: str, rows: Iterator[str] | list[str]) -> str:
    titles = head.split(", ")
    return "\n".join([row(*titles), "|" + "---|" * len(titles), *rows])


def code(text: object) -> str:
    return f"`{text}`"


# The command line


def cli() -> str:
    """Every command, its arguments and its options."""
    whole = [command_pages(typer.main.get_command(app), "pdlab"), *(command_pages(command(name), f"pdlab {name}") for name in COMMANDS)]
    return "\n\n".join(chain.from_iterable(whole))


def command_pages(command: Any, name: str) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    params = [p for p in command.params if not p.hidden and p.name not in ("install_completion", "show_completion")]
    if name != "pdlab":
        arguments = "".join(f" {p.metavar or p.name.upper()}" for p in params if p.param_type_name == "argument")
        options = " [OPTIONS]" if any(p.param_type_name == "option" for p in params) else ""
        usage = f"{name}{' COMMAND ...' if inner else f'{options}{arguments}'}"
        yield f"{'#' * (name.count(' ') + 1)} {name}\n\n```\n{usage}\n```\n\n{prose(command.help)}"
    if params:
        yield table("option, takes, default, meaning", [option(p) for p in params])
    for key, each in inner.items():
        yield from command_pages(each, f"{name} {key}")


def option(p: Any) -> str:
    names = ", ".join(code(x) for x in ([p.metavar or p.name.upper()] if p.param_type_name == "argument" else [*p.opts, *p.secondary_opts]))
    flag = getattr(p, "is_flag", False)
    kind = "" if flag or p.param_type_name == "argument" else p.metavar or p.type_descriptor.annotation.__name__.upper()
    words = (("at least", getattr(p, "min", None)), ("at most", getattr(p, "max", None)))
    bounds = ", ".join(f"{word} {x:,.10g}" for word, x in words if x is not None)
    several = "; several times" if p.multiple else ""
    default = p.show_default if isinstance(p.show_default, str) else p.default
    shown = "" if default in (None, "", False, ...) or callable(default) or p.show_default is False else cell(default)
    named = isinstance(p.show_default, str) or not shown
    environment = f" Also: `{p.envvar}`." if isinstance(p.envvar, str) else ""
    return row(
        names, cell(kind + (f", {bounds}" if bounds else "") + several), shown if named else code(shown), prose(p.help) + environment
    )


def prose(text: str | None) -> str:
    return cell(text or "")


# The experiment file


def keys(name: str) -> str:
    """The keys of one mapping of the experiment file: what each takes, its default, its meaning."""
    whole = schema()
    kind = whole if name == "Experiment" else whole["$defs"][name]
    required = kind.get("required", [])
    rows = []
    for key, of in kind["properties"].items():
        default = of.get("default")
        shown = "required" if key in required else "" if default is None or isinstance(default, list | dict) else code(as_yaml(default))
        rows.append(row(code(key), takes(of), shown, cell(of["description"])))
    return table("key, takes, default, meaning", rows)


def as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.10g}" if isinstance(value, float) else str(value)


def takes(of: dict[str, Any]) -> str:
    if "anyOf" in of:
        kinds = [takes(one) for one in of["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in of:
        return ", ".join(code(x) for x in of["enum"])
    if "const" in of:
        return code(of["const"])
    if "$ref" in of:
        return "a mapping"
    if of.get("type") == "array":
        return "a list"
    if of.get("type") in ("integer", "number"):
        return "a whole number" * (of["type"] == "integer") + "a number" * (of["type"] == "number") + bounds(of)
    return {"boolean": "`true`, `false`", "string": "text", "object": "a mapping", None: "anything"}[of.get("type")]


def bounds(of: dict[str, Any]) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    there = [f"{word} {of[key]:,.10g}" for key, word in words.items() if key in of]
    return f", {', '.join(there)}" if there else ""


# Policies


def policies() -> str:
    """Each built-in policy: what it decides, how, and its parameters."""
    return "\n\n".join(policy(name) for name in load_policy.names())


def policy(name: str) -> str:
    cls = load_policy.policy_class(name, Path())
    module = importlib.import_module(cls.__module__)
    decides = [hook for hook in HOOKS if getattr(cls, hook) is not getattr(Policy, hook)]
    text = reflowed(inspect.getdoc(module) or "")
    rows = [row(code(p.name), code(spelt(p)), code(as_yaml(p.default)), searched(p)) for p in parameters(cls).values()]
    table_of = table("parameter, takes, default, searched by `pdlab tune`", rows) if rows else "It has no parameters."
    return f"### {name}\n\nIt decides {listed(decides)}.\n\n{text}\n\n{table_of}"


def listed(names: list[str]) -> str:
    *most, last = map(code, names)
    return f"{', '.join(most)} and {last}" if most else last


def spelt(p: Parameter) -> str:
    """float above 0 or null."""
    words = [p.kind.__name__ if p.choices is None or p.kind is bool else " or ".join(map(repr, p.choices))]
    words += [str(p.bounds)] if p.bounds is not None else []
    return " ".join([*words, *(["or null"] if p.optional else [])])


def searched(p: Parameter) -> str:
    if p.bounds is None or p.bounds.searched is None:
        return "" if p.choices is None else "each"
    low, high = map(as_yaml, p.bounds.searched)
    return f"{low} to {high}{', by factors' * p.bounds.log}"


def reflowed(text: str) -> str:
    """Paragraphs on a line each; what is indented stays, as code."""
    there = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" ") and not re.match(r" *\d\. ", paragraph):
            there.append(f"```\n{inspect.cleandoc(paragraph)}\n```")
        else:
            there.append(re.sub(r"\n *(\d\. )", r"\n\1", re.sub(r"\n(?! *\d\. ) *", " ", paragraph)).lstrip())
    return "\n\n".join(there)


# Metrics


def metrics(of: str) -> str:
    """The series that a server tells: an `engine`'s, as an instance of a cluster, or a `router`'s."""
    rows = []
    for name, kind, text, labels in series(exposed()[of]):
        if name.startswith(("vllm:", "pdlab:")):
            own = [label for label in labels if of == "router" or label not in ("instance", "role")]
            rows.append(row(code(name), kind, cell(text), ", ".join(map(code, own))))
    return table("series, kind, meaning, labels", sorted(rows))


def series(page: str) -> Iterator[tuple[str, str, str, list[str]]]:
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", page, re.MULTILINE))
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE):
        labels: dict[str, None] = {}
        for braces in re.findall(rf"^{re.escape(name)}(?:_bucket|_sum|_count|_created)?{{(.*?)}} ", page, re.MULTILINE):
            labels |= dict.fromkeys(re.findall(r"(\w+)=", braces))
        if not name.endswith("_created"):
            yield name, kind, helps.get(name, ""), [x for x in labels if x not in ("le", "engine", "model_name")]


_EXPOSED: dict[str, str] = {}


def exposed() -> dict[str, str]:
    """What the two kinds of servers answer to /metrics: real ones, with an engine that stands in."""
    if _EXPOSED:
        return _EXPOSED

    async def router(http: httpx.AsyncClient, made: LiveWorld) -> None:
        _EXPOSED["router"] = (await http.get("/metrics")).text

    async def engine(folder: Path) -> None:
        async with instance(folder, "p") as p:
            _EXPOSED["engine"] = (await p.http.get("/metrics")).text

    with tempfile.TemporaryDirectory() as folder:
        echo_engine.byte_tokenizer(Path(folder))
        served(Path(folder), router)
        asyncio.run(engine(Path(folder)))
    return _EXPOSED


# What else has a list in the code


def definitions() -> str:
    return table("figure, definition", [row(name, cell(text)) for name, text in DEFINITIONS.items()])


def messages() -> str:
    """The types that pass between a router and an instance."""
    there = []
    for name, cls in vars(wire).items():
        if isinstance(cls, type) and issubclass(cls, msgspec.Struct) and cls.__module__ == wire.__name__:
            hints = typing.get_type_hints(cls)
            rows = [row(code(f.name), code(named(hints[f.name])), default_of(f)) for f in msgspec.structs.fields(cls)]
            there.append(f"### {name}\n\n{reflowed(inspect.getdoc(cls) or '')}\n\n{table('field, type, default', rows)}")
    return "\n\n".join(there)


def named(kind: object) -> str:
    return re.sub(
        r"\b(?:\w+\.)+(\w+)", r"\1", kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    ).replace("|", "or")


def default_of(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    return code(msgspec.json.encode(default).decode())


def accelerators() -> str:
    rows = []
    for x in map(hardware, hardware_names()):
        figures = (
            f"{x.hbm_bytes / 2**30:,.0f}",
            f"{x.hbm_bytes_per_s / 1e12:.2f}",
            f"{x.bf16_flops / 1e12:,.0f}",
            f"{x.nic_bytes_per_s / 1e9:g}",
        )
        rows.append(row(code(x.name), x.vendor, *figures, "" if x.verified else "recalled"))
    return table("name, vendor, memory in GiB, TB/s, bf16 TFLOP/s, NIC in GB/s, source", rows)


def models() -> str:
    return ", ".join(map(code, model_names()))


def workloads() -> str:
    return ", ".join(map(code, sorted(builtin.NAMES)))


PARTS: dict[str, Callable[..., str]] = {
    "cli": cli,
    "keys": keys,
    "worlds": worlds,
    "policies": policies,
    "metrics": metrics,
    "definitions": definitions,
    "messages": messages,
    "accelerators": accelerators,
    "models": models,
    "workloads": workloads,
}


def part(name: str) -> str:
    key, *rest = name.split()
    text = PARTS[key](*rest)
    return f"{text}\n"


def renewed(text: str) -> str:
    """A page with what the code says today."""
    return PART.sub(lambda m: f"<!-- generated: {m[1]} -->\n{part(m[1])}<!-- end -->", text)


if __name__ == "__main__":
    for page in pages():
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
