"""`vllm serve`, run by the python of vLLM's environment, not by ours: NIXL's progress thread waits for news of its sockets, where it would
ask for them without end and so take half of the engine's core."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

WAITS_US = 100_000

bindings = import_module("nixl_cu12._bindings")
Config: Any = bindings.nixlAgentConfig


class Waiting(Config):  # type: ignore[misc]
    """NIXL's Python front writes 0 into it."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, WAITS_US if name == "pthrDelay" else value)


vars(bindings)["nixlAgentConfig"] = Waiting

if __name__ == "__main__":
    sys.exit(import_module("vllm.entrypoints.cli.main").main())
