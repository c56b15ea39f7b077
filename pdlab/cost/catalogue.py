"""Accelerators and models by canonical lower-case name or alias, any measured profile, and any Hugging Face config.json.

The two CSV files beside this module hold public figures, each with its source; `verified` is false where a figure was recalled and
not read from a primary source.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib import resources
from os.path import isdir, isfile
from pathlib import Path
from typing import TypeVar

from pdlab.core.types import UsageError
from pdlab.cost.accelerator import AcceleratorSpec
from pdlab.cost.decoders import Decoder
from pdlab.cost.hardware import Hardware
from pdlab.cost.huggingface import Understood, parse, understand
from pdlab.cost.layers import Latent, Layer, Mlp, Moe, Outer, Softmax, assemble
from pdlab.cost.profile import load_instance_profile
from pdlab.cost.quantization import published_as
from pdlab.cost.shapes import GIB, Model

__all__ = ["Hardware", "Model", "hardware", "hardware_names", "model", "model_names", "understood"]

SIZES = (
    "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_positions", "learned_positions",
    "experts", "experts_per_token", "expert_ffn", "shared_ffn", "dense_layers",
    "kv_lora_rank", "q_lora_rank", "nope_dim", "rope_dim", "v_dim", "window_tokens", "window_layers",
)  # fmt: skip

Entry = TypeVar("Entry", Hardware, dict[str, str])


def hardware(name: str | AcceleratorSpec, base_dir: Path | None = None) -> Hardware:
    """The accelerator of that name or alias, or as the user has written it; or the measured instance of a profile, where `name` is its path
    (.json, relative to `base_dir`). Raises UsageError naming the three nearest, or what is wrong with the profile."""
    if isinstance(name, AcceleratorSpec):
        return _written(name)
    path = (base_dir or Path()) / name
    if name.endswith(".json"):
        return Hardware.measured(load_instance_profile(path))
    return _find("hardware", name, _accelerators(), path)


def _written(spec: AcceleratorSpec) -> Hardware:
    base = None if spec.like is None else _find("hardware", spec.like, _accelerators(), Path(spec.like))
    families = dict.fromkeys(known.family for known in _accelerators().values())
    if spec.family is not None and spec.family not in families:
        raise UsageError(f"family: {spec.family!r} is not one of {', '.join(families)}")
    return spec.over(base)


def model(name: str, base_dir: Path | None = None) -> Model:
    """The catalogue's model of that name or alias; or a Hugging Face config.json's, where `name` is its path or its folder's (relative to
    `base_dir`). Raises UsageError naming the three nearest, or what the config lacks."""
    return understood(name, base_dir).model


def understood(name: str, base_dir: Path | None = None) -> Understood:
    """As `model`, with what of a config was read, filled in and ignored."""
    path = (base_dir or Path()) / name
    if name.endswith(".json") or isfile(path / "config.json"):
        return understand(path / "config.json" if path.is_dir() else path)
    return _of_name(_find("model", name, _models(), path)["name"])


def hardware_names() -> list[str]:
    """Canonical names of all accelerators, sorted."""
    return sorted({h.name for h in _accelerators().values()})


def model_names() -> list[str]:
    """Canonical names of all models, sorted."""
    return sorted({row["name"] for row in _models().values()})


def _find(kind: str, name: str, known: Mapping[str, Entry], path: Path) -> Entry:
    """`path`: where it lies if it is no name."""
    found = known.get(name.lower().replace("_", "-").rsplit("/", 1)[-1])
    if found is None:
        if isdir(path):
            lacks = "no config.json" if kind == "model" else "profiles at most: name the .json itself"
            raise UsageError(f"{kind} {name!r}: the folder {path} has {lacks}")
        if isfile(path):
            wanted = "a Hugging Face config.json" if kind == "model" else "a profile of pdlab calibrate"
            raise UsageError(f"{kind} {name!r}: the file {path} is not {wanted}, whose name ends in .json")
        begun: list[str] = [entry for entry in known if entry.startswith(name.lower())] if name else []
        near = [*begun, *get_close_matches(name.lower(), [entry for entry in known if entry not in begun], n=3, cutoff=0.0)][:3]
        extra = f", or give the path of a {'profile (.json)' if kind == 'hardware' else 'Hugging Face config.json'}"
        raise UsageError(f"unknown {kind} {name!r}: nearest are {', '.join(near)}{extra}")
    return found


def _rows(file: str) -> list[dict[str, str]]:
    text = resources.files("pdlab.cost").joinpath(file).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@cache
def _accelerators() -> dict[str, Hardware]:
    known: dict[str, Hardware] = {}
    for row in _rows("accelerators.csv"):
        number = {k: float(v or 0) for k, v in row.items() if k not in ("name", "aliases", "vendor", "family", "verified", "source")}
        entry = Hardware(
            name=row["name"],
            vendor=row["vendor"],
            family=row["family"],
            bf16_flops=number["bf16_tflops"] * 1e12,
            fp8_flops=number["fp8_tflops"] * 1e12,
            hbm_bytes=int(number["hbm_gib"] * GIB),
            hbm_bytes_per_s=number["hbm_gbytes_per_s"] * 1e9,
            scaleup_bytes_per_s=number["scaleup_gbytes_per_s"] * 1e9,
            scaleup_domain=int(number["scaleup_domain"]),
            pcie_bytes_per_s=number["pcie_gbytes_per_s"] * 1e9,
            nic_bytes_per_s=number["nic_gbit_per_s"] * 1e9 / 8,
            tdp_w=number["tdp_w"],
            usd_per_h=number["usd_per_h"],
            verified=row["verified"] == "yes",
            source=row["source"],
        )
        for alias in (entry.name, *row["aliases"].split()):
            assert alias not in known, f"accelerator {alias} twice"
            known[alias] = entry
    return known


@cache
def _models() -> dict[str, dict[str, str]]:
    """The rows; a model is put together when somebody asks for it."""
    known: dict[str, dict[str, str]] = {}
    for row in _rows("models.csv"):
        for alias in (row["name"], *row["aliases"].split()):
            assert alias not in known, f"model {alias} twice"
            known[alias] = row
    return known


@cache
def _of_name(name: str) -> Understood:
    return _of_row(_models()[name])


def _of_row(row: dict[str, str]) -> Understood:
    """From the columns, or where they are empty from the config that is shipped under the model's name. Windows are those of the first
    layers: which ones they are changes no figure."""
    if not row["layers"]:
        return _of_config(row)
    sizes = {key: int(text or 0) for key, text in row.items() if key in SIZES}
    gated, mixer = row["gated"] != "no", _mixer(sizes)
    windowed = replace(mixer, top_k=sizes["window_tokens"]) if isinstance(mixer, Latent) else replace(mixer, window=sizes["window_tokens"])
    dense = Layer((mixer,), (Mlp(width=sizes["ffn"], gated=gated),))
    layers = [dense] * sizes["layers"]
    if sizes["experts"]:
        moe = Moe(
            experts=sizes["experts"],
            per_token=sizes["experts_per_token"],
            width=sizes["expert_ffn"],
            shared=sizes["shared_ffn"],
            gated=gated,
        )
        layers = layers[: sizes["dense_layers"]] + [Layer((mixer,), (moe,))] * (sizes["layers"] - sizes["dense_layers"])
    layers = [Layer((windowed,), one.feed_forwards) if i < sizes["window_layers"] else one for i, one in enumerate(layers)]
    outer = Outer(vocab=sizes["vocab"], tied=row["tied"] == "yes", positions=sizes["learned_positions"])
    known = assemble(
        name=row["name"],
        hidden=sizes["hidden"],
        layers=layers,
        outer=outer,
        quantization=published_as(row["weight_dtype"] or "bf16"),
        max_positions=sizes["max_positions"],
        verified=row["verified"] == "yes",
        source=row["source"],
    )
    quantization = "none" if known.weight_dtype == "bf16" else known.weight_dtype
    return Understood(known, Decoder(sizes["hidden"], layers, outer), quantization=quantization)


def _of_config(row: dict[str, str]) -> Understood:
    text = resources.files("pdlab.cost").joinpath("configs", f"{row['name']}.json").read_text(encoding="utf-8")
    known = parse(json.loads(text), row["name"], f"of {row['name']}, as shipped")
    return replace(known, model=replace(known.model, verified=row["verified"] == "yes", source=row["source"]))


def _mixer(sizes: dict[str, int]) -> Latent | Softmax:
    if sizes["kv_lora_rank"]:
        return Latent(
            heads=sizes["heads"],
            latent=sizes["kv_lora_rank"],
            q_rank=sizes["q_lora_rank"],
            nope_dim=sizes["nope_dim"],
            rope_dim=sizes["rope_dim"],
            v_dim=sizes["v_dim"],
        )
    return Softmax(heads=sizes["heads"], kv_heads=sizes["kv_heads"], head_dim=sizes["head_dim"])
