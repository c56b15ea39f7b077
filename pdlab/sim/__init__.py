"""The simulated world: SimPy is the clock, a cost model is the accelerator, fair-shared links are the network."""

from pdlab.sim.run import simulate

__all__ = ["simulate"]
