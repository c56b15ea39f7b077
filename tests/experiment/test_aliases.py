"""The seeds' names for options of `pdlab serve`: taken where they mean the same, and what is said where they do not."""

from __future__ import annotations

import pytest

from pdlab.cli.main import command, main
from pdlab.core.types import UsageError
from pdlab.experiment.aliases import ALIASES, OWN, VALUES, translated
from pdlab.experiment.imports.programs import LeftOut


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--instance_role PREFILL", "--role prefill"),
        ("--instance-role=MIX", "--role mixed"),
        ("--splitwise-role decode", "--role decode"),
        ("--etcd_addr=127.0.0.1:12389", "--registry etcd://127.0.0.1:12389"),
        ("--scheduler-name splitwise --scheduler-host h --scheduler-port 6380", "--registry redis://h:6380"),
        ("--scheduler-ttl 9000", "--request-timeout-s 9000.0"),
        ("--tokenizer_path x", "--tokenizer-path x"),
        ("--transfer_listen_port=26000", "--kv-port 26000"),
        ("--metrics-port 8181", "--metrics-port 8181"),
        ("--http_server_port 28888", "--port 28888"),
        ("--devices npu:0", "--device npu:0"),
        ("--nnodes=1 --enable_disagg_pd=true", "--nnodes=1"),
        ("--enable_prefix_cache=false", "--no-prefix-cache"),
        ("--enable_prefix_cache --port 1", "--prefix-cache --port 1"),
        ("--enable_prefix_cache false --port 1", "--no-prefix-cache --port 1"),
        ("--no-enable-prefix-caching --disable-radix-cache", "--no-prefix-cache --no-prefix-cache"),
        ("--enable_chunked_prefill=false", "--batching prefill_first"),
        ("--ep_size 4 --port 1", "--enable-expert-parallel --port 1"),
        ("--ep_size=1", ""),
        ("--cache-transfer-protocol rdma,ipc", "--kv-transport auto"),
        ("--rdma-comm-ports 7671", "--kv-port 7671"),
        ("--max_memory_utilization=0.8 --max-seqs-per-batch 200", "--hbm-utilization 0.8 --max-seqs 200"),
        ("exp_1.yaml --max_model_len 5 --name_x", "exp_1.yaml --max-model-len 5 --name-x"),
    ],
)
def test_names_that_mean_the_same(given: str, expected: str) -> None:
    assert translated(["serve", *given.split()]) == ["serve", *expected.split()]


def test_other_commands_are_left_alone() -> None:
    assert translated(["bench", "--etcd_addr", "x"]) == ["bench", "--etcd_addr", "x"] and translated([]) == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--disagg_pd_port=7777", "speak to each other over their --port"),
        ("--device_ip=10.0.0.1", "reads /etc/hccn.conf itself"),
        ("--rdma-comm-ports 7671,7672", "give --kv-port"),
        ("--load_balance_policy=CAR", "write it into the experiment file: policy"),
        ("--scheduler-db 3 --scheduler-host h", "give --registry redis://host:6379/3"),
        ("--instance_role=ALL", "--instance-role 'ALL' is not one of prefill, decode, mix, default"),
        ("--enable_disagg_pd=false", "give --role mixed"),
        ("--etcd_addr", "--etcd-addr needs a value"),
        ("--scheduler-ttl 5 --role prefill", "--request-timeout-s is a router's"),
        ("--batching fast", "--batching 'fast' is not one of chunked, decode_first, delayed, online_first, prefill_first"),
    ],
)
def test_those_that_do_not_are_told_in_a_line(given: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", *given.split()])
    said = capsys.readouterr().err
    assert end.value.code == 2 and says in said and said.count("\n") == 1


def test_no_alias_hides_an_option_and_all_of_them_lead_to_one() -> None:
    options = {flag for one in command("serve").params for flag in (*one.opts, *one.secondary_opts)}
    assert not ALIASES.keys() & options
    assert set(VALUES.values()) <= options and {"--prefix-cache", "--no-prefix-cache", "--batching", "--kv-port"} <= options
    assert OWN - {"--num-gpu-blocks-override", "--data-parallel-size"} <= options


@pytest.mark.parametrize("flag", [flag for flag, meaning in ALIASES.items() if isinstance(meaning, LeftOut)])
def test_what_has_no_meaning_here_says_why(flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag}: .*pdlab import"):
        translated(["serve", flag, "1"])
