"""Metadata is in pyproject.toml. With PDLAB_COMPILE=1 the hot modules are compiled by mypyc, from the same source: see `make compile`."""

import os

from setuptools import setup

HOT = (
    "pdlab/core/staging.py",
    "pdlab/core/worker.py",
    "pdlab/core/kv.py",
    "pdlab/core/sequence.py",
    "pdlab/core/scheduler.py",
    "pdlab/core/report.py",
    "pdlab/replay/scheduler_log.py",
    "pdlab/results/gaps.py",
    "pdlab/core/predict.py",
    "pdlab/core/reach.py",
    "pdlab/core/view.py",
    "pdlab/core/teller.py",
    "pdlab/results/timeline.py",
    "pdlab/core/router_limits.py",
    "pdlab/core/reply.py",
    "pdlab/core/ledger.py",
    "pdlab/core/membership.py",
    "pdlab/core/candidates.py",
    "pdlab/core/attempts.py",
    "pdlab/core/transfers.py",
    "pdlab/core/requests.py",
    "pdlab/core/instance_news.py",
    "pdlab/core/rebalance.py",
    "pdlab/core/router.py",
    "pdlab/batching/chunked.py",
    "pdlab/sim/calls.py",
    "pdlab/sim/worker.py",
    "pdlab/sim/job.py",
    "pdlab/sim/link.py",
    "pdlab/sim/moves.py",
    "pdlab/sim/path.py",
    "pdlab/sim/scene.py",
    "pdlab/sim/source.py",
    "pdlab/sim/periodic.py",
    "pdlab/sim/world.py",
)

if os.environ.get("PDLAB_COMPILE") == "1":
    from mypyc.build import mypycify

    setup(ext_modules=mypycify([*HOT, "--ignore-missing-imports"], opt_level=os.environ.get("MYPYC_OPT_LEVEL", "3")))
else:
    setup()
