"""Seconds for a batch, and the facts they rest on.

`Roofline` (from data sheets, calibrated), `Table` (from measurements), `MeasuredCost` (from `pdlab calibrate`) and `Fitted` (DistServe's
form) answer one interface, `Cost`.
`model` and `hardware` look names up in the catalogue; `CostSpec` and `build` make the cost an experiment asks for.
"""

from pdlab.cost.base import Cost
from pdlab.cost.capacity import kv_bytes_per_token, kv_capacity_tokens, kv_windows
from pdlab.cost.catalogue import hardware, hardware_names, model, model_names
from pdlab.cost.fitted import Fitted, FittedCoefficients
from pdlab.cost.hardware import Hardware
from pdlab.cost.measured import MeasuredCost
from pdlab.cost.parallel import Parallel
from pdlab.cost.profile import InstanceProfile, Interference, Overheads, load_instance_profile, save_instance_profile
from pdlab.cost.roofline import Coefficients, Drafts, Roofline
from pdlab.cost.shapes import Model
from pdlab.cost.spec import CostSpec, build, measured_profiles, profiles
from pdlab.cost.table import Profile, Table, load_profile, save_profile

__all__ = [
    "Coefficients",
    "Cost",
    "CostSpec",
    "Drafts",
    "Fitted",
    "FittedCoefficients",
    "Hardware",
    "InstanceProfile",
    "Interference",
    "MeasuredCost",
    "Model",
    "Overheads",
    "Parallel",
    "Profile",
    "Roofline",
    "Table",
    "build",
    "hardware",
    "hardware_names",
    "kv_bytes_per_token",
    "kv_capacity_tokens",
    "kv_windows",
    "load_instance_profile",
    "load_profile",
    "measured_profiles",
    "model",
    "model_names",
    "profiles",
    "save_instance_profile",
    "save_profile",
]
