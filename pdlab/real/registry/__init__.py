"""Who is there, and who leads: instances register under a lease, routers watch them, one router leads.

`open_registry(url)` finds the backend. `store.py` is what a backend has to do (compare-and-set, leases, changes in order; one file
each: `memory`, `etcd`, `redis`); all that makes a registry of it is written once: `lease` keeps a claimed key alive and knows
when it is lost, `observer` turns what a store shows into events (sans-IO), `watch` feeds it, `election` leads, `registry` is the front.
"""

from pdlab.real.registry.election import Leadership
from pdlab.real.registry.open import open_registry
from pdlab.real.registry.registry import Registration, Registry

__all__ = ["Leadership", "Registration", "Registry", "open_registry"]
