"""What experiments may name: policies with their parameters, models, accelerators, workloads. For forms."""

from __future__ import annotations

import dataclasses
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from pdlab.core.policy import HOOKS, Policy
from pdlab.cost import hardware, hardware_names, model, model_names
from pdlab.policies import load as load_policy
from pdlab.policies.parameters import Parameter, parameters
from pdlab.workload import builtin
from pdlab.workload.spec import SYNTHETIC


class ParameterView(BaseModel):
    """`type` is number, integer, boolean, choice or other; `null` may stand for it where it is optional."""

    name: str
    type: Literal["number", "integer", "boolean", "choice", "other"]
    optional: bool
    default: Any
    bounds: str
    choices: list[Any]


class PolicyView(BaseModel):
    name: str
    decides: list[str]
    how: str
    parameters: list[ParameterView]


class ModelView(BaseModel):
    name: str
    parameters: int
    layers: int
    kv_bytes_per_token: float
    weight_dtype: str
    context_tokens: int | None
    verified: bool


class HardwareView(BaseModel):
    name: str
    vendor: str
    hbm_bytes: float
    hbm_bytes_per_s: float
    bf16_flops: float
    nic_bytes_per_s: float
    verified: bool


class WorkloadView(BaseModel):
    name: str
    about: str


@cache
def policies() -> list[PolicyView]:
    found = []
    for name in load_policy.names():
        cls = load_policy.policy_class(name, Path())
        hooks = [hook for hook in HOOKS if getattr(cls, hook) is not getattr(Policy, hook)]
        about = " ".join((sys.modules[cls.__module__].__doc__ or "").split()).partition(". ")
        own = [_parameter(one) for one in parameters(cls).values()]
        found.append(PolicyView(name=name, decides=hooks, how=about[0] + about[1].strip(), parameters=own))
    return found


@cache
def models() -> list[ModelView]:
    return [
        ModelView(
            name=name,
            parameters=m.total_params,
            layers=m.layers,
            kv_bytes_per_token=m.kv_bytes_per_token(),
            weight_dtype=m.weight_dtype,
            context_tokens=m.max_positions or None,
            verified=m.verified,
        )
        for name in model_names()
        for m in [model(name)]
    ]


@cache
def accelerators() -> list[HardwareView]:
    names = ("name", "vendor", "hbm_bytes", "hbm_bytes_per_s", "bf16_flops", "nic_bytes_per_s", "verified")
    return [HardwareView(**{name: getattr(chip, name) for name in names}) for chip in map(hardware, hardware_names())]


@cache
def workloads() -> list[WorkloadView]:
    drawn = [WorkloadView(name=name, about="drawn anew from figures fitted to the trace of that name") for name in builtin.NAMES]
    return [*drawn, WorkloadView(name=SYNTHETIC, about="lengths and arrivals as the file says")]


def catalogue() -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["catalogue"])
    router.add_api_route("/policies", policies, methods=["GET"], response_model=list[PolicyView], summary="The policies")
    router.add_api_route("/models", models, methods=["GET"], response_model=list[ModelView], summary="The models")
    router.add_api_route("/hardware", accelerators, methods=["GET"], response_model=list[HardwareView], summary="The accelerators")
    router.add_api_route("/workloads", workloads, methods=["GET"], response_model=list[WorkloadView], summary="The workloads")
    return router


def _parameter(one: Parameter) -> ParameterView:
    default = one.default if isinstance(one.default, bool | int | float | str | None) else None
    if one.default is dataclasses.MISSING:
        default = None
    return ParameterView(
        name=one.name,
        type=_type(one),
        optional=one.optional,
        default=default,
        bounds="" if one.bounds is None else str(one.bounds),
        choices=list(one.choices or ()),
    )


def _type(one: Parameter) -> Literal["number", "integer", "boolean", "choice", "other"]:
    if one.kind is bool:
        return "boolean"
    if one.choices is not None:
        return "choice"
    return "integer" if one.kind is int else "number" if one.kind is float else "other"
