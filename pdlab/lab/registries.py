"""Clusters that were named by their registry: who is registered there, and where the router that leads answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from pdlab.core.types import UsageError
from pdlab.lab.lab import ClusterAway
from pdlab.real.net.credentials import with_password
from pdlab.real.registry import Registry, open_registry
from pdlab.real.router import status


class ClusterRegistries:
    """Each is opened when it is first asked, and stays open. `urls` are by the names of the clusters."""

    def __init__(self, urls: Mapping[str, str]) -> None:
        self.urls = urls
        self._open: dict[str, Registry] = {}
        self._opening = asyncio.Lock()

    async def view(self, name: str) -> status.View:
        """Raises ClusterAway."""
        try:
            return await status.of_registry(await self._registry(name))
        except UsageError as error:
            raise ClusterAway(str(error)) from None

    async def router_url(self, name: str) -> str:
        """Raises ClusterAway."""
        view = await self.view(name)
        if view.leader_url:
            return view.leader_url
        if not view.leader:
            raise ClusterAway(f"cluster {name}: no router leads, and only a router tells of requests")
        raise ClusterAway(
            f"cluster {name}: the registry does not say where {view.leader}, which leads, answers: start it with --advertise HOST, "
            f"or the lab with --router {name}=URL"
        )

    async def close(self) -> None:
        for registry in self._open.values():
            await registry.close()
        self._open.clear()

    async def _registry(self, name: str) -> Registry:
        async with self._opening:
            if name not in self._open:
                self._open[name] = await open_registry(with_password(self.urls[name]))
            return self._open[name]
