"""From a URL to a registry."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from urllib.parse import parse_qs, urlsplit

from pdlab.core.types import UsageError
from pdlab.real.net.credentials import without_password
from pdlab.real.net.host_names import host_mistake
from pdlab.real.net.host_names import shown as cut
from pdlab.real.net.tls import PLAIN, Tls
from pdlab.real.registry.memory import MemoryStore
from pdlab.real.registry.records import check_name
from pdlab.real.registry.registry import Registry
from pdlab.real.registry.store import Denied, RegistrySilent, Store, StoreAway

FORMS = "memory://, etcd://host:2379[,host:2379], redis://host:6379[/db], or etcds:// and rediss:// for TLS"
PACKAGES = {"etcd": "etcd3aio", "etcds": "etcd3aio", "redis": "redis", "rediss": "redis"}
REMEDY = {
    "etcd": "start one (etcd --auto-compaction-retention=10m) or correct the address, user or password",
    "redis": "start one (redis-server --appendonly yes) or correct the address, user or password",
}


async def open_registry(url: str, *, timeout_s: float = 5.0, tls: Tls = PLAIN) -> Registry:
    """`url`: memory://, etcd://[user:password@]host:port[,host:port], redis://[user:password@]host:port[/db], the same with TLS as
    etcds://... and rediss://..., whose servers `tls` says whether to believe; all but the first take `?namespace=name` (default pdlab), so
    that several clusters can share a server. Each memory:// is a registry of its own.

    Raises UsageError for a URL that is wrong, RegistrySilent for a server that doesn't answer.
    """
    scheme, _, rest = url.partition("://")
    shown = cut(without_password(url))
    if scheme == "memory":
        return Registry(MemoryStore())
    if scheme not in PACKAGES or not rest:
        near = get_close_matches(scheme, ["memory", "etcd", "etcds", "redis", "rediss"], 1)
        raise UsageError(
            f"registry {shown!r}: use one of {FORMS}" + (f" (did you mean {near[0]}://?)" if near and near[0] != scheme else "")
        )
    try:
        split = urlsplit(url)
    except ValueError as error:
        raise UsageError(f"registry {shown!r}: {error}: use one of {FORMS}") from None
    for endpoint in split.netloc.rpartition("@")[2].split(","):
        if mistake := host_mistake(endpoint.rpartition(":")[0] or endpoint):
            raise UsageError(f"registry {shown!r}: {mistake}")
    query = parse_qs(split.query)
    namespace = query.pop("namespace", ["pdlab"])[0]
    check_name(namespace, "registry namespace")
    if query:
        raise UsageError(f"registry {shown!r}: unknown option {next(iter(query))!r}; the only one is namespace")
    plain = f"{scheme}://{split.netloc}{split.path}"
    kind = {"etcds": "etcd", "rediss": "redis"}.get(scheme, scheme)
    try:
        backend = import_module(f"pdlab.real.registry.{kind}")
    except ModuleNotFoundError as missing:
        raise UsageError(f"registry {shown!r} needs the package {PACKAGES[scheme]}: pip install {PACKAGES[scheme]} ({missing})") from None
    try:
        store: Store = await backend.connect(plain, namespace, timeout_s, tls)
    except Denied as denied:
        raise UsageError(f"registry {without_password(plain)}: {denied}: correct the user or the password") from None
    except StoreAway as away:
        raise RegistrySilent(f"registry {without_password(plain)}: no {kind} server answers there ({away}): {REMEDY[kind]}") from None
    return Registry(store)
