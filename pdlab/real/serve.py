"""`pdlab serve`: from the command line and an experiment to a server that answers."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from pdlab.cost import model_names
from pdlab.real.api.app import create_app
from pdlab.real.api.serve import bind, serve
from pdlab.real.api.service import Service
from pdlab.real.engine.client import EngineClient
from pdlab.real.engine.gguf_file import default_model
from pdlab.real.engine.options import EngineOptions
from pdlab.real.engine.tokenizer import Tokenizer
from pdlab.spec import Experiment
from pdlab.types import UsageError

EMBEDDED = ("smollm2-135m", "smollm2-135m-instruct")
Say = Callable[[str], None]


def engine_options(experiment: Experiment | None, given: Mapping[str, object]) -> EngineOptions:
    """The experiment's `model` and `engine`, replaced by what the command line gives. Raises UsageError where there are no weights."""
    found: dict[str, object] = {}
    if experiment is not None:
        engine = experiment.engine
        found = {
            "block_tokens": engine.block_tokens,
            "max_batch_tokens": engine.max_batch_tokens,
            "max_seqs": engine.max_seqs,
            "batching": engine.batching,
            "prefix_cache": engine.prefix_cache,
            "watermark": engine.watermark,
            "hbm_utilization": engine.hbm_utilization,
            "kv_blocks": engine.kv_blocks or 0,
            "seed": experiment.seed,
        }
    found |= {key: value for key, value in given.items() if value is not None}
    if given.get("kv_gib") is not None:
        found["kv_blocks"] = 0
    dummy = found.get("load_format") == "dummy"
    name = given.get("model") or (experiment.model if experiment is not None else "")
    base = experiment.base_dir if experiment is not None and not given.get("model") else Path()
    return msgspec.convert({**found, "model": str(model_path(str(name), base, dummy))}, EngineOptions)


def model_path(name: str, base_dir: Path, dummy: bool = False) -> str:
    """Where a model's files are: a folder, a .gguf, or for no name (or its own) the embedded SmolLM2. With `dummy` weights the name of the
    catalogue alone will do."""
    if not name or name.lower() in EMBEDDED:
        return str(default_model())
    path = base_dir / name
    if path.name == "config.json":
        path = path.parent
    if path.exists():
        return str(path)
    if name.lower() in model_names():
        if dummy:
            return name.lower()
        raise UsageError(
            f"model {name} is known by its shape only: give its Hugging Face folder with --model DIR, "
            "or --load-format dummy for random weights"
        )
    raise UsageError(
        f"--model {path}: no such folder or file; give a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a .gguf"
    )


def tokenizer_of(options: EngineOptions, path: Path | None) -> Tokenizer:
    """The model's own; for random weights without one, the embedded model's."""
    if path is None:
        path = Path(options.model)
        if options.load_format == "dummy" and not (path / "tokenizer.json").is_file() and path.suffix != ".gguf":
            path = default_model()
    return Tokenizer.load(path)


def run_until_stopped(options: EngineOptions, **how: Any) -> None:
    """`run`, until SIGTERM or Ctrl-C. While the model still loads these exit with 130."""
    try:
        asyncio.run(run(options, **how))
    except KeyboardInterrupt:
        sys.exit(130)


async def run(
    options: EngineOptions,
    *,
    host: str,
    port: int,
    served_name: str = "",
    tokenizer: Path | None = None,
    api_key: str | None = None,
    max_requests: int = 1024,
    drain_s: float = 30.0,
    say: Say = print,
) -> None:
    """Bind, load, serve, drain. Raises UsageError on mistakes; Ctrl-C while loading ends it at once."""
    started_s = time.monotonic()
    with contextlib.closing(bind(host, port)) as sock:
        text = tokenizer_of(options, tokenizer)
        options = msgspec.structs.replace(options, eos_ids=tuple(sorted(text.eos_ids)))
        app = create_app()  # answers "loading" until it has a service
        starting = asyncio.create_task(EngineClient.start(options))
        serving = asyncio.create_task(serve(app, sock, drain_s=drain_s))
        try:
            await asyncio.wait((starting, serving), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                raise KeyboardInterrupt
            engine = starting.result()
            name = served_name or ("smollm2-135m-instruct" if Path(options.model) == _embedded() else Path(options.model).stem)
            app.state.service = Service(engine, text, name, max_requests=max_requests, api_key=api_key)
            where = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
            ready = engine.ready
            say(
                f"{name} on {ready.device} in {ready.dtype}: {ready.kv_blocks:,} KV blocks of {ready.block_tokens} tokens, "
                f"up to {ready.max_tokens:,} tokens a request\nready after {time.monotonic() - started_s:.1f} s: {where}/v1"
            )
            if left := await serving:
                say(f"stopped with {left} requests unfinished")
        finally:
            for task in (starting, serving):
                task.cancel()
            await asyncio.gather(starting, serving, return_exceptions=True)
            if not starting.cancelled() and starting.exception() is None:
                await starting.result().close()


def _embedded() -> Path | None:
    try:
        return default_model()
    except UsageError:
        return None
