"""YAML as people write it: duplicate keys are mistakes, 1e-3 is a number and 1:30 or a date is none, and `key.path=value` replaces one
value."""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pdlab.core.file_kinds import EXPERIMENT, FileKind, in_place_of, kind_by_ending, kind_by_keys, kind_of_file
from pdlab.core.types import UsageError


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1, which PyYAML reads, takes 1e-3 for text, 1:30 for 90 and 010 for 8; here numbers are those of 1.2, and dates are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} cannot be a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_TAG, _DIGITS = "tag:yaml.org,2002:", list("-+0123456789")
_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (f"{_TAG}int", f"{_TAG}float", f"{_TAG}timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), _DIGITS)
_YamlLoader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"^([-+]?([0-9][0-9_]*\.?[0-9_]*[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"
    ),
    [*_DIGITS, "."],
)


def read_yaml(path: Path, wanted: FileKind = EXPERIMENT) -> dict[str, Any]:
    """The mapping in a file. Raises UsageError naming file, line and column, or what the file is where it is not what is `wanted`."""
    ending = kind_by_ending(path)
    if ending not in (None, EXPERIMENT) and path.is_file():  # which might be long: it is not read as YAML first
        raise UsageError(in_place_of(path, kind_of_file(path) or ending, wanted))
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        inner = path / "experiment.yaml"
        raise UsageError(f"{path} is a folder: give {inner if inner.is_file() else 'a file in it'}") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file") from None
    found = _parse(text, str(path))
    if not isinstance(found, dict):
        what = "an empty file" if found is None else repr(found)[:40]
        raise UsageError(f"{path}: {wanted.what} is a mapping of keys to values, not {what}")
    if instead := in_place_of(path, kind_by_keys(found), wanted):
        raise UsageError(instead)
    return found


def read_mapping(text: str, source: str) -> dict[str, Any]:
    """The mapping in a text. Raises UsageError, after `source`."""
    found = _parse(text, source)
    if not isinstance(found, dict):
        what = "an empty file" if found is None else repr(found)[:40]
        raise UsageError(f"{source}: {EXPERIMENT.what} is a mapping of keys to values, not {what}")
    return found


def compose(text: str) -> yaml.Node | None:
    """The tree that a text is, in which an alias is the node that it names. Raises yaml.YAMLError."""
    return yaml.compose(text, _YamlLoader)


def overridden(mapping: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy with each `key.path=value` put in place; a number in the path is an index into a list. Raises UsageError."""
    result = copy.deepcopy(mapping)
    for override in overrides:
        where, equals, text = override.partition("=")
        if not equals or not all(where.split(".")):
            raise UsageError(f"--set {override}: write key.path=value, such as workload.rate=12")
        _put(result, where, _parse(text, f"--set {override}"), f"--set {override}")
    return result


def replaced(mapping: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """As `overridden`, with each path's value at hand."""
    result = copy.deepcopy(mapping)
    for where, value in values.items():
        if not all(where.split(".")):
            raise UsageError(f"{where}: write key.path, such as workload.rate")
        _put(result, where, value, where)
    return result


def read_list(text: str, source: str) -> list[Any]:
    """The values of `1,2,4` or `a,{b: c}`, as they stand within brackets. Raises UsageError, after `source`."""
    values = _parse(f"[{text}]", source)
    if not isinstance(values, list):
        raise UsageError(f"{source}: write values with commas between them")
    return values


def _put(result: dict[str, Any], where: str, value: Any, source: str) -> None:
    *path, last = where.split(".")
    node: Any = result
    for key in path:
        node = _entry(node, key, source, make=True)
    _entry(node, last, source)
    node[int(last) if isinstance(node, list) else last] = value


def _entry(node: Any, key: str, source: str, *, make: bool = False) -> Any:
    """node[key]; a missing mapping is made if asked. Raises UsageError, after `source`, where there cannot be one."""
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            raise UsageError(f"{source}: {key} is not an index into a list of {len(node)} (0 to {len(node) - 1})")
        return node[int(key)]
    if not isinstance(node, dict):
        raise UsageError(f"{source}: there is no {key} in {node!r}, which is not a mapping")
    if make and node.get(key) is None:
        node[key] = {}
    return node.get(key)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _YamlLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{source}: line {mark.line + 1}, column {mark.column + 1}" if mark is not None and "\n" in text else source
        raise UsageError(f"{place}: {error.problem}") from None
    except RecursionError:
        raise UsageError(f"{source}: nested too deeply") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: {' '.join(str(error).split())}") from None
