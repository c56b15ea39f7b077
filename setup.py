"""Metadata is in pyproject.toml. With PDLAB_COMPILE=1 the hot modules are compiled by mypyc, from the same source: see `make compile`."""

import os
import tempfile
from pathlib import Path

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

# Libraries of which no hot module has a value. Without their types mypyc writes the same C, byte for byte; with them, reading them takes
# most of its time.
SKIPPED = (
    "IPython",
    "PIL",
    "fastapi",
    "httpx",
    "jinja2",
    "matplotlib",
    "optuna",
    "pyarrow",
    "ray",
    "rich",
    "scipy",
    "sqlalchemy",
    "starlette",
    "torch",
    "typer",
    "yaml",
)
MYPY = f"""[mypy]
ignore_missing_imports = True
[mypy-{",".join(f"{name}.*" for name in SKIPPED)}]
follow_imports = skip
follow_imports_for_stubs = True
"""

if os.environ.get("PDLAB_COMPILE") == "1":
    from mypyc.build import mypycify

    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "mypy.ini")
        settings.write_text(MYPY)
        modules = mypycify([*HOT, "--config-file", str(settings)], opt_level=os.environ.get("MYPYC_OPT_LEVEL", "3"))
    setup(ext_modules=modules)
else:
    setup()
