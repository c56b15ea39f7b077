"""What a plan tells to run, read by vLLM's own parser."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pdlab import Experiment
from pdlab.search.plan_commands import started, vllm_arguments

pytestmark = pytest.mark.interop
FILE = Path(__file__).resolve().parents[2] / "experiments" / "which_ratio.yaml"
PARSE = """
import json, sys
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
for words in json.load(sys.stdin):
    found = parser.parse_args(words)
    transfer = found.kv_transfer_config
    print(json.dumps([
        found.model_tag, found.port, found.tensor_parallel_size, found.max_num_batched_tokens, found.max_num_seqs, found.block_size,
        found.enable_prefix_caching, transfer and transfer.kv_connector,
    ]))
"""


def test_vllm_understands_every_role_s_command(vllm_python: Path) -> None:
    apart = "{role: prefill, hardware: h100-sxm, tp: 2, host: a}, {role: decode, hardware: h100-sxm, tp: 4, host: a}"
    rows = f"[{apart}, {{role: mixed, hardware: h100-sxm, tp: 8}}]"
    engine = "engine={max_batch_tokens: 2048, max_seqs: 64, prefix_cache: false, max_model_len: 8192}"
    best = Experiment.load(FILE, [f"cluster.instances={rows}", engine])
    words = [vllm_arguments(best, one)[1:] for one in started(best)]
    done = subprocess.run(
        [str(vllm_python), "-c", PARSE], input=json.dumps(words), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert found == [
        ["MODEL", 8200, 2, 2048, 64, 16, False, "NixlConnector"],
        ["MODEL", 8202, 4, 2048, 64, 16, False, "NixlConnector"],
        ["MODEL", 8200, 8, 2048, 64, 16, False, None],
    ]
