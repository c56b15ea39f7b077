"""`pdlab validate --vllm PYTHON`: the engines are two vLLM servers, one that prefills and one that decodes, under pdlab's router.

PYTHON is that of an environment with vLLM for CPUs and NIXL; the model lies beside its folder (experiments/interop_env.sh makes both).
The servers are as large as the experiment's `engine` says, have a core each, and stay up from calibration to the last run;
every plan gets a registry (a redis), members and a router of its own. These and the client share the cores that are left, or where none
is, that of the decode server.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pdlab.core.types import UsageError
from pdlab.cost.profile import save_instance_profile
from pdlab.experiment.experiment import Experiment
from pdlab.proof.calibrate.machine import this_machine
from pdlab.proof.calibrate.pair import behind, of_pair
from pdlab.proof.calibrate.run import CalibrationPlan
from pdlab.proof.local_cluster import STOP_S
from pdlab.proof.validate import EnginesUnderTest, Say, TwoWorlds
from pdlab.real.host import processes
from pdlab.real.host.core_probe import watched
from pdlab.real.host.processes import MODULE

SERVE = Path(__file__).with_name("vllm_serve.py")
NAME = "validated"
MODEL_TOKENS = 512  # of a prompt and its output, at most: calibration takes the longer the longer they may be
DTYPE, KV_DTYPE = "float32", "fp32"
ROLES = ("prefill", "decode")
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
READY_S, JOINED_S, LOOK_S = 900.0, 180.0, 0.1


@contextmanager
def vllm_pair(python: Path, asked: TwoWorlds, plans: Sequence[Path], say: Say) -> Iterator[EnginesUnderTest]:
    """Two servers that are ready, until they are left. Raises UsageError where they cannot be started."""
    experiments = [Experiment.load(plan) for plan in plans]
    for experiment in experiments:
        if tuple(placed.role.value for placed in experiment.placements()) != ROLES:
            raise UsageError(f"{experiment.name}: with --vllm a layout is one prefill instance, then one decode instance")
    python = python.absolute()
    model = python.parents[2] / "model"
    for path, what in ((python.parent / "vllm", "no vLLM beside that python"), (model / "config.json", f"no model in {model}")):
        if not path.is_file():
            raise UsageError(f"--vllm {python}: {what}: experiments/interop_env.sh makes both")
    if shutil.which("redis-server") is None:
        raise UsageError("--vllm needs redis-server on the PATH, in which members and router meet")
    folder = plans[0].parent
    cores = sorted(os.sched_getaffinity(0))
    with _terminated(), ExitStack() as stack:
        servers = []
        for number, role in enumerate(ROLES):
            say(f"starting a vLLM server that is to {role}")
            pinned = {cores[number]} if len(cores) >= len(ROLES) else set(cores)
            servers.append(_VllmServer(_command(python, model, experiments[0]), _environment(python), folder / f"vllm-{role}.log", pinned))
            stack.callback(servers[-1].stop)
        for server in servers:
            server.wait()
        beside = set(cores[len(ROLES) :] or cores[-1:])
        yield _Pair(folder, servers[0].url, servers[1].url, experiments[0], cores[:1], beside)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Raises UsageError where anything does not start. `cores`: of the first server; `beside`: of all that is no server."""

    folder: Path
    prefill_url: str
    decode_url: str
    experiment: Experiment
    cores: Sequence[int]
    beside: set[int]

    def calibrate(self, plan: Path, profile: Path, seconds: float) -> None:
        engine, machine = self.experiment.engine, this_machine(1)
        how = CalibrationPlan(seconds=seconds)
        with watched(sorted(os.sched_getaffinity(0))) as pace, self._beside():
            made = of_pair(
                self.prefill_url,
                self.decode_url,
                self.experiment.model,
                how,
                lambda what, share: None,
                max_batch_tokens=engine.max_batch_tokens,
                max_seqs=engine.max_seqs,
                max_tokens=MODEL_TOKENS,
                kv_dtype=KV_DTYPE,
                pace=pace,
                cores=self.cores,
            )
            with self.cluster(plan) as router:
                routed = behind(router, made, self.prefill_url, self.decode_url, how, pace=pace, cores=sorted(self.beside))
        save_instance_profile(routed.model_copy(update={"machine": machine}), profile)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """This process, and what it starts meanwhile, is kept off the servers' cores as far as can be."""
        everywhere = os.sched_getaffinity(0)
        processes.run_on(os.getpid(), self.beside)
        try:
            yield
        finally:
            processes.run_on(os.getpid(), everywhere)

    @contextmanager
    def cluster(self, plan: Path) -> Iterator[str]:
        with self._beside(), ExitStack() as stack:
            port = free_port()
            log = stack.enter_context((self.folder / f"{plan.stem}.log").open("ab"))

            def start(*command: str) -> None:
                process = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)
                stack.callback(_end, process, signal.SIGTERM)

            start("redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder))
            _until(lambda: _listens(port), 30.0, f"redis-server does not answer: see {log.name}")
            serve = (*MODULE, "pdlab", "serve", str(plan), "--registry", f"redis://127.0.0.1:{port}")
            for role, url in zip(ROLES, (self.prefill_url, self.decode_url), strict=True):
                named = ("--role", role, "--instance-name", f"{role}-0", "--served-model-name", NAME)
                start(*serve, *named, "--engine", "vllm", "--upstream", url)
            router = f"http://127.0.0.1:{(front := free_port())}"
            start(*serve, "--role", "router", "--instance-name", "router", "--served-model-name", NAME, "--port", str(front))
            _until(lambda: _joined(router) == len(ROLES), JOINED_S, f"the members did not join: see {log.name}")
            yield router


# ---------------------------------------------------------------- a server


def _command(python: Path, model: Path, experiment: Experiment) -> list[str]:
    """But for its port. Engine and worker are one process: apart, the one that waits takes half of the core from the one that computes."""
    engine = experiment.engine
    command = [str(python), str(SERVE), "serve", str(model), "--served-model-name", NAME, "--host", "127.0.0.1"]
    command += ["--dtype", DTYPE, "--enforce-eager", "--distributed-executor-backend", "uni", "--max-model-len", str(MODEL_TOKENS)]
    command += ["--block-size", str(engine.block_tokens), "--max-num-batched-tokens", str(engine.max_batch_tokens)]
    command += ["--max-num-seqs", str(engine.max_seqs), "--seed", str(experiment.seed)]
    command += ["--enable-prefix-caching" if engine.prefix_cache else "--no-enable-prefix-caching"]
    command += ["--num-gpu-blocks-override", str(engine.kv_blocks)] if engine.kv_blocks is not None else []
    return [*command, "--kv-transfer-config", json.dumps(NIXL)]


def _environment(python: Path) -> dict[str, str]:
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the uni executor is not to be had on CPUs
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        "UCX_TLS": "tcp,sm,self",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }


class _VllmServer:
    """All its processes on `cores`, in a process group of their own."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, cores: set[int]) -> None:
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*command, "--port", str(port)], stdout=file, stderr=file, env=os.environ | environment, process_group=0
            )
        self.cores = cores
        os.sched_setaffinity(self.process.pid, cores)

    def wait(self) -> None:
        """Until it serves. Then all its threads are put on its cores again: vLLM's connector moves the one that computes to the machine's
        last core, of every server the same."""

        def ready() -> bool:
            if self.process.poll() is not None:
                raise UsageError(f"vLLM has ended: see {self.log}")
            return _answer(f"{self.url}/health") is not None

        _until(ready, READY_S, f"vLLM is not ready: see {self.log}")
        for pid in [self.process.pid, *processes.descendants(self.process.pid)]:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread), self.cores)

    def stop(self) -> None:
        """It leaves its engine behind where only its front is ended."""
        _end(self.process, signal.SIGTERM)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    process.send_signal(number)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _answer(url: str) -> bytes | None:
    """None while nobody answers, or not with 200."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            found: bytes = answer.read()
            return found
    except (urllib.error.URLError, OSError):
        return None


def _joined(router: str) -> int:
    """Members that it knows to be ready."""
    rows = json.loads(_answer(f"{router}/pdlab/v1/cluster") or b"{}").get("rows", [])
    return sum(row["state"] == "ready" for row in rows)


def _until(true: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Raises UsageError."""
    deadline_s = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline_s:
            raise UsageError(f"{otherwise} ({seconds:g} s)")
        time.sleep(LOOK_S)


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM is Ctrl-C here: servers in sessions of their own would outlive it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
