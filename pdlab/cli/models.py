"""`pdlab models`: the models known by name, and what was understood of one of them or of a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pdlab.cost import model, model_names
from pdlab.cost.catalogue import understood
from pdlab.cost.huggingface import Understood
from pdlab.cost.shapes import Attention, Model

app = typer.Typer(help="The models known by name; `show` says what was understood of one, or of a config.json.", no_args_is_help=False)
KIB = 1024
LENGTHS = (1_024, 8_192, 131_072)


@app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """The models known by name. Unverified figures were recalled, not read from a primary source."""
    if context.invoked_subcommand is not None:
        return

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(("model", "parameters", "layers", "KV per token", "formats", "")):
        table.add_column(column, justify="right" if index in (1, 2, 3) else "left", no_wrap=index == 0)
    for name in model_names():
        m = model(name)
        kv = m.kv_bytes_per_token() / KIB
        table.add_row(
            name, f"{m.total_params / 1e9:.1f} B", str(m.layers), f"{kv:,.0f} KiB", m.weight_dtype, "" if m.verified else "unverified"
        )
    Console().print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="PATH_OR_NAME", help="A config.json, its folder, or a name.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What was understood of a model: parameters, weights by part and format, KV, context, layers by kind, what was ignored."""

    read = understood(name, Path())
    if as_json:
        print(json.dumps(figures(read), indent=2))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, words in lines(read):
        table.add_row(label, escape(words))
    Console().print(table)


def lines(read: Understood) -> Iterator[tuple[str, str]]:
    """What `show` prints, a label and words at a time."""
    m = read.model
    yield "model", m.name + (f" ({read.model_type})" if read.model_type else "") + ("" if m.verified else ", figures recalled")
    yield "parameters", f"{m.total_params / 1e9:.2f} B, {m.active_params / 1e9:.2f} B active for a token"
    yield "weights", f"{m.weights_bytes() / 1e9:.2f} GB; quantisation: {read.quantization}"
    for w in m.weights:
        experts = f", {w.experts_per_token} of {w.experts} experts a token" if w.experts else ""
        yield "", f"{w.part}: {_count(w.params)}, {w.bytes / 1e9:.2f} GB in {w.format.dtype}{experts}"
    yield "KV", f"{m.kv_bytes_per_token() / KIB:,g} KiB a token in bf16, {m.kv_bytes_per_token('fp8') / KIB:,g} in fp8"
    for tokens in LENGTHS if m.window_tokens or m.recurrence else ():
        yield "", f"a sequence of {tokens:,} tokens: {m.kv_bytes_per_sequence(tokens) / 1e6:,.1f} MB"
    if m.recurrence:
        yield "state", f"{m.state_bytes / 1e6:,.1f} MB a sequence, whatever its length"
    yield "context", f"{m.max_positions:,} tokens" if m.max_positions else "not stated"
    for index, kind in enumerate(_layers(m)):
        yield f"{m.layers} layers" if index == 0 else "", kind
    if read.filled:
        yield "filled in", "the class's defaults: " + ", ".join(f"{key} {value}" for key, value in read.filled.items())
    if read.ignored:
        yield "ignored", ", ".join(read.ignored)
    for remark in read.remarks:
        yield "remark", remark


def figures(read: Understood) -> dict[str, Any]:
    """The same for programs: bytes and counts."""
    m = read.model
    return {
        "name": m.name,
        "model_type": read.model_type,
        "parameters": m.total_params,
        "active_parameters": m.active_params,
        "weights_bytes": m.weights_bytes(),
        "weight_dtype": m.weight_dtype,
        "quantization": read.quantization,
        "weights": [
            {"part": w.part, "parameters": w.params, "bytes": round(w.bytes), "dtype": w.format.dtype, "compute": w.format.compute}
            for w in m.weights
        ],
        "kv_bytes_per_token": m.kv_bytes_per_token(),
        "state_bytes_per_sequence": m.state_bytes,
        "context_tokens": m.max_positions or None,
        "layers": m.layers,
        "attention": [asdict(a) for a in m.attention],
        "recurrence": [asdict(r) for r in m.recurrence],
        "moe_layers": m.moe_layers,
        "filled_in": dict(read.filled),
        "ignored": list(read.ignored),
        "remarks": list(read.remarks),
    }


def _layers(m: Model) -> Iterator[str]:
    for a in m.attention:
        yield f"{a.layers} {_attention(a)}"
    for r in m.recurrence:
        yield f"{r.layers} {r.kind}: {r.state_bytes / r.layers / 1e6:.2f} MB of state each"
    if m.experts:
        yield f"{m.moe_layers} with experts: {m.experts_per_token} of {m.experts} a token, {m.expert_ffn} wide, shared ones {m.shared_ffn}"


def _attention(a: Attention) -> str:
    kind = f"MLA: {a.heads} heads, a vector of {a.latent} + {a.rope_dim}" if a.latent else f"attention: {a.heads} heads, {a.kv_heads} of KV"
    if not a.latent:
        kind += f", {a.head_dim} wide" if a.head_dim == a.v_dim else f", keys {a.head_dim} and values {a.v_dim} wide"
    span = f"a window of {a.window_tokens:,} tokens" if a.window_tokens else "all tokens"
    reads = f"; {a.layers - a.kv_layers} of them read another layer's KV" if a.kv_layers < a.layers else ""
    return f"{kind}, over {span}{reads}"


def _count(params: int) -> str:
    return f"{params / 1e9:.2f} B" if params >= 5e6 else f"{params / 1e6:.2f} M"
