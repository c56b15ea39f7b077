"""How one instance's accelerators share a model.

`tp` accelerators hold each layer. `dp_attention` of 1 splits attention's heads over all of them; of d, d groups of tp / d accelerators
have attention whole, and each group serves its own sequences, so that KV is not replicated. `ep` groups share the experts out, each group
of tp / ep accelerators splitting an expert's matrices. `pp` such stages follow each other, each with a part of the layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pdlab.core.types import UsageError
from pdlab.cost.shapes import Model


@dataclass(frozen=True, slots=True)
class Parallel:
    """Of one instance. Raises UsageError where dp_attention or ep does not divide tp."""

    tp: int = 1
    dp_attention: int = 1
    ep: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "dp_attention", "ep", "pp"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("dp_attention", "ep"):
            if self.tp % getattr(self, name):
                divisors = [n for n in range(1, self.tp + 1) if self.tp % n == 0]
                raise UsageError(
                    f"{name} {getattr(self, name)} does not divide tp {self.tp}: choose one of {', '.join(map(str, divisors))}"
                )

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    @property
    def attention_tp(self) -> int:
        """Accelerators that split one sequence's heads."""
        return self.tp // self.dp_attention

    def __str__(self) -> str:
        more = [f"{name} {getattr(self, name)}" for name in ("dp_attention", "ep", "pp") if getattr(self, name) > 1]
        return ", ".join([f"tp {self.tp}", *more])


def fitting(model: Model, parallel: Parallel | int) -> Parallel:
    """How the ranks share this model; a number is a tp. MLA whose heads do not divide among them has attention whole on each: it keeps one
    vector a token, which splitting would copy to every rank anyway. Raises UsageError unless other heads divide,
    and each stage has a layer."""
    asked = parallel if isinstance(parallel, Parallel) else Parallel(tp=parallel)
    if asked.pp > model.layers:
        raise UsageError(f"pp {asked.pp} is more than the {model.layers} layers of {model.name}: each stage needs one")
    if model.heads % asked.attention_tp == 0:
        return asked
    if model.main.latent and asked.dp_attention == 1:
        return replace(asked, dp_attention=asked.tp)
    near = [n for n in range(1, 65) if model.heads % n == 0]
    what = f"tp {asked.tp}" if asked.dp_attention == 1 else f"tp {asked.tp} / dp_attention {asked.dp_attention}"
    raise UsageError(f"{what} does not divide the {model.heads} attention heads of {model.name}: choose one of {', '.join(map(str, near))}")
