"""From the `policy` of an experiment file to a Policy.

    policy: prefix_aware                                       one for all hooks
    policy: {name: llumnix, migrate_out_threshold: 3.0}        with parameters
    policy: {dispatch: prefix_aware, handoff: {name: least_kv}, migrate: mine/steal.py:Steal}

A name is a file in `pdlab/policies/`; `path/to/mine.py:MyPolicy` (or only the path) is a file of the user's, relative to the experiment.
There is no registry: the file is the registration. A file of the user's is read once: what runs is compiled of the bytes that are hashed.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import importlib.util
import sys
import threading
import typing
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import msgspec

from pdlab.core.blame import shown, within
from pdlab.core.policy import HOOKS, Policy
from pdlab.core.types import UsageError
from pdlab.policies.compose import Composed
from pdlab.policies.parameters import check, parameters

_FILES = "pdlab_policy_"  # how the module of a file of the user's is called
_FOLDER = Path(__file__).parent
_BESIDE = ("compose", "load", "parameters")  # which are no policies
_LOADING = threading.RLock()  # nobody gets a module of which only half is there


def names() -> list[str]:
    """The built-in policies, in alphabetical order."""
    return sorted(p.stem for p in _FOLDER.glob("*.py") if not p.stem.startswith("_") and p.stem not in _BESIDE)


def policy_class(name: str, base_dir: Path) -> type[Policy]:
    """The class behind a built-in name, or behind `file.py:Class` relative to `base_dir`. Raises UsageError."""
    if not name.endswith(".py") and ".py:" not in name:
        if name not in names():
            raise UsageError(
                f"unknown policy {name!r}{_nearest(name, names())}; there are {', '.join(names())}, or give path/to/file.py:Class"
            )
        return _only_policy(importlib.import_module(f"pdlab.policies.{name}"), name, None)
    file, _, wanted = name.rpartition(":") if ".py:" in name else (name, "", "")
    return _only_policy(_load_file(base_dir / file, name), name, wanted or None)


def build(spec: object, base_dir: Path) -> Policy:
    """The policy that an experiment's value asks for. A policy named twice with the same parameters is one object, so that its hooks
    share what it remembers. Raises UsageError for an unknown name or parameter, or a value of the wrong type or range."""
    if isinstance(spec, str):
        return _with_parameters({"name": spec}, base_dir)
    if not isinstance(spec, Mapping):
        raise UsageError(f"policy must be a name or a mapping, not {spec!r}")
    if "name" in spec:
        return _with_parameters(spec, base_dir)
    for key in spec:
        if key not in HOOKS:
            raise UsageError(
                f"policy: unknown key {key!r}{_nearest(str(key), [*HOOKS, 'name'])}; give a name, or any of {', '.join(HOOKS)}"
            )
    made: list[tuple[object, Policy]] = []
    members: dict[str, Policy] = {}
    for hook, value in spec.items():
        asked = {"name": value} if isinstance(value, str) else value
        member = next((policy for known, policy in made if known == asked), None)
        if member is None:
            if not isinstance(asked, Mapping) or "name" not in asked:
                raise UsageError(f"policy.{hook} must be a name, or a mapping with a name, not {value!r}")
            member = _with_parameters(asked, base_dir)
            made.append((asked, member))
        if getattr(type(member), hook) is getattr(Policy, hook):
            able = [h for h in HOOKS if getattr(type(member), h) is not getattr(Policy, h)]
            raise UsageError(f"policy.{hook}: {asked['name']} does not decide {hook}, only {' and '.join(able) or 'nothing'}")
        members[hook] = member
    return Composed(**members)


def instantiate(policy: object, base_dir: Path) -> Policy:
    """From an object, a class, or what an experiment file may say. An object is copied, so that a run leaves it as it was. Raises
    UsageError."""
    if isinstance(policy, Policy):
        for member in policy.members.values() if isinstance(policy, Composed) else [policy]:
            check(member)
        return copy.deepcopy(policy)
    if isinstance(policy, type) and issubclass(policy, Policy):
        try:
            return policy()
        except TypeError as error:
            raise UsageError(f"policy {policy.__name__}: {error}; give an object of it, with its parameters") from None
    if isinstance(policy, str | Mapping):
        return build(policy, base_dir)
    raise UsageError(f"policy must be a Policy, a class of it, a name or a mapping, not {' '.join(repr(policy).split())[:80]}")


def describe(policy: Policy) -> dict[str, object]:
    """What an experiment file would say for it: names, and parameters that are not the defaults. A class that is in no file of its own, as
    a notebook's, is told by {"class": "module:Name"}, which no file can say."""
    if isinstance(policy, Composed):
        return {hook: describe(member) for hook, member in policy.members.items() if type(member) is not Policy}
    cls = type(policy)
    found: dict[str, object] = {"class": f"{cls.__module__}:{cls.__qualname__}"}
    if cls.__module__.startswith("pdlab.policies."):
        found = {"name": cls.__module__.rpartition(".")[2]}
    elif cls.__module__.startswith(_FILES):
        found = {"name": f"{sys.modules[cls.__module__].__file__}:{cls.__qualname__}"}
    fields: tuple[dataclasses.Field[object], ...] = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    for field in fields:
        value = getattr(policy, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.init and ("class" in found or value != default):
            found[field.name] = msgspec.to_builtins(value, str_keys=True, enc_hook=repr)
    return found


def source_hash(policy: Policy) -> str:
    """SHA-256, in hex, over the source files of the policy's classes and their bases: equal hashes, equal decisions."""
    members = policy.members.values() if isinstance(policy, Composed) else [policy]
    classes = {c for m in members for c in type(m).__mro__ if issubclass(c, Policy)}
    digest = hashlib.sha256()
    for module in sorted({c.__module__ for c in classes}):
        own = sorted((c for c in classes if c.__module__ == module), key=lambda c: c.__qualname__)
        source = _source(sys.modules[module], own)
        if source is not None:
            digest.update(source)
        else:  # typed into a notebook, or a file that was changed since
            for cls in own:
                digest.update(f"{module}:{cls.__qualname__}".encode())
                digest.update("".join(_code(value) for _, value in sorted(vars(cls).items())).encode())
    return digest.hexdigest()


class _ReadOnce(SourceFileLoader):
    """Of a module compiled of `source`, whatever becomes of the file."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self.source = source

    def get_data(self, path: str) -> bytes:
        return self.source

    def path_stats(self, path: str) -> typing.NoReturn:
        raise OSError("its bytecode is kept nowhere")


def _source(module: ModuleType, classes: Iterable[type]) -> bytes | None:
    """That these classes of the module were compiled of; None where it is not known."""
    loader = getattr(module, "__loader__", None)
    if isinstance(loader, _ReadOnce):
        return loader.source
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        return None
    source = Path(file).read_bytes()
    try:
        compiled = _compiled(source, file)
    except (SyntaxError, ValueError):
        return None
    functions = [value for cls in classes for value in vars(cls).values() if isinstance(value, FunctionType)]
    running = {_code(function.__code__) for function in functions if function.__code__.co_filename == file}
    return source if running <= compiled else None


@lru_cache(maxsize=64)
def _compiled(source: bytes, file: str) -> frozenset[str]:
    """Each function's code in it. A sweep asks for the same again and again. Raises SyntaxError, ValueError."""
    return frozenset(_code(code) for code in _nested(compile(source, file, "exec", dont_inherit=True)))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _nested(inner)


def _code(value: object) -> str:
    """What a function does, or a plain value, as text that is the same in every process."""
    if isinstance(value, property):
        return "".join(map(_code, (value.fget, value.fset)))
    if isinstance(value, staticmethod | classmethod):
        return _code(value.__func__)
    if isinstance(value, FunctionType):
        return f"{_code(value.__code__)}{_code(value.__defaults__)}{_code(value.__kwdefaults__)}"
    if isinstance(value, CodeType):
        return f"{value.co_code.hex()}{value.co_names}{value.co_varnames}{''.join(map(_code, value.co_consts))}"
    if isinstance(value, tuple):
        return f"({','.join(map(_code, value))})"
    return repr(value) if isinstance(value, str | bytes | int | float | None) else ""


def _with_parameters(spec: Mapping[object, object], base_dir: Path) -> Policy:
    name = spec["name"]
    if not isinstance(name, str):
        raise UsageError(f"policy name must be text, not {name!r}")
    cls = policy_class(name, base_dir)
    fields = parameters(cls)
    values: dict[str, object] = {}
    for key, value in spec.items():
        if key == "name":
            continue
        if key not in fields:
            known = f"it has {', '.join(fields)}" if fields else "it has none"
            raise UsageError(f"policy {name} has no parameter {key!r}{_nearest(str(key), fields)}; {known}")
        try:
            values[str(key)] = msgspec.convert(value, fields[str(key)].hint)
        except msgspec.ValidationError as error:
            raise UsageError(f"policy {name}: {key} is {value!r}: {error}") from error
    try:
        policy = cls(**values)
        check(policy)
        return policy
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        place = within(error, {c.__module__ for c in cls.__mro__})
        what = str(error) if isinstance(error, TypeError) and not place else f"raised {type(error).__name__}: {error}"
        raise UsageError(f"{place}policy {name}: {what}") from error


def _load_file(path: Path, name: str) -> ModuleType:
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"policy {name!r}: there is no file {path}") from None
    except OSError as error:
        raise UsageError(f"policy {name!r}: {path}: {error.strerror}") from None
    path = path.resolve()
    module_name = f"{_FILES}{hashlib.sha256(str(path).encode() + bytes(1) + source).hexdigest()[:16]}"
    with _LOADING:
        return sys.modules.get(module_name) or _executed(module_name, path, name, source)


def _executed(module_name: str, path: Path, name: str, source: bytes) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module_name, path, loader=_ReadOnce(module_name, str(path), source))
    assert spec is not None, f"{path} ends in .py"
    assert spec.loader is not None, f"{path} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        place = f"{shown(str(path))}:{error.lineno}: " if isinstance(error, SyntaxError) else within(error, {module_name})
        raise UsageError(f"{place}policy {name!r}: importing {path} raised {type(error).__name__}: {error}") from error
    return module


def _only_policy(module: ModuleType, name: str, wanted: str | None) -> type[Policy]:
    """The class asked for; else the one Policy defined there, or of several the one named as the file is."""
    found = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Policy) and value.__module__ == module.__name__
    }
    if wanted is None and len(found) == 1:
        return next(iter(found.values()))
    camel = "".join(word.capitalize() for word in Path(str(module.__file__)).stem.split("_"))
    chosen = found.get(wanted or camel)
    if chosen is None:
        asked = wanted or f"one Policy, or one named {camel}"
        raise UsageError(f"policy {name!r}: no {asked} in {module.__file__}; it defines {', '.join(found) or 'no Policy'}")
    return chosen


def _nearest(word: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
