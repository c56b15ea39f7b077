"""Launch commands of six systems: the experiment that is written, the serve commands, what is left out, and what was wrong."""

from __future__ import annotations

import contextlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlab import UsageError
from pdlab.cli.main import main
from pdlab.experiment.deployment import Deployment
from pdlab.experiment.experiment import Experiment
from pdlab.experiment.imports import checks, experiment_file, launches, serve_commands, shell
from pdlab.experiment.imports.experiment_file import Instead
from pdlab.experiment.imports.importing import Imported, imported
from pdlab.experiment.imports.launches import PROGRAMS
from pdlab.experiment.imports.programs import Program, Sets
from tests.experiment.imports.scripts import DYNAMO, FASTDEPLOY, LLUMNIX, SGLANG, VLLM, XLLM


def read(text: str, **instead: str) -> Imported:
    return imported(shell.read(text), "run.sh", "exp.yaml", Instead(**instead))


def told(found: Imported) -> dict[int, list[str]]:
    lines: dict[int, list[str]] = {}
    for one in found.mistakes:
        lines.setdefault(one.line, []).append(one.text)
    return lines


def rows(found: Imported) -> list[dict[str, Any]]:
    return list(found.mapping["cluster"]["instances"])


def test_xllms_engines_and_their_service() -> None:
    found = read(XLLM)
    assert found.mapping["model"] == "Qwen2-7B-Instruct" and found.mapping["registry"] == "etcd://127.0.0.1:12389"
    assert [(row["role"], row["device"]) for row in rows(found)] == [("prefill", "npu:0"), ("decode", "npu:1")]
    assert found.mapping["engine"] == {
        "block_tokens": 128,
        "max_batch_tokens": 10240,
        "max_seqs": 200,
        "prefix_cache": False,
        "hbm_utilization": 0.8,
        "batching": "prefill_first",
    }
    assert found.mapping["transfer"] == {"mode": "push", "granularity": "layer", "response_path": "direct"}
    assert found.mapping["policy"] == "round_robin"
    assert list(map(str, found.commands)) == [
        "etcd --listen-client-urls http://127.0.0.1:12389 --advertise-client-urls http://127.0.0.1:12389",
        "pdlab serve exp.yaml --role prefill --instance-name prefill-0 --port 8010 --kv-port 26000",
        "pdlab serve exp.yaml --role decode --instance-name decode-0 --port 8020 --kv-port 26100",
        "pdlab serve exp.yaml --role router --port 28888 --tokenizer /models/qwen2",
    ]
    left = {one.flag: one.why for one in found.dropped}
    assert set(left) == {"--device-ip", "--disagg-pd-port", "--master-node-addr", "--rpc-server-port"}
    assert "/etc/hccn.conf" in left["--device-ip"]


PREFILL_RANK = (
    "xllm --model /models/big --port 8010 --instance_role PREFILL --etcd_addr 10.0.0.9:2379 --nnodes 2 --master_node_addr 10.0.0.1:9748"
)
NODES = f"""
etcd --listen-client-urls http://10.0.0.9:2379 --advertise-client-urls http://10.0.0.9:2379
{PREFILL_RANK} --node_rank 0
{PREFILL_RANK} --node_rank 1
xllm --model /models/big --port 8010 --instance_role DECODE --etcd_addr 10.0.0.9:2379
"""


def test_ranks_on_other_nodes_are_one_instance_and_each_gets_its_command() -> None:
    found = read(NODES)
    assert [(row["role"], row["count"]) for row in rows(found)] == [("prefill", 1), ("decode", 1)]
    serve = [line for line in map(str, found.commands) if line.startswith("pdlab serve")]
    meet = "--nnodes 2 --node-rank {} --master 10.0.0.1:9748"
    assert serve[0] == f"pdlab serve exp.yaml --role prefill --instance-name prefill-0 --port 8010 {meet.format(0)}"
    assert serve[1] == f"pdlab serve exp.yaml --role prefill --instance-name prefill-0 {meet.format(1)}"
    assert serve[2].startswith("pdlab serve exp.yaml --role decode --instance-name decode-0 --port 8010")
    assert not {"--nnodes", "--node-rank", "--master-node-addr"} & {one.flag for one in found.dropped}
    on_a_cpu = read(NODES, device="cpu")
    assert "--nnodes" not in " ".join(map(str, on_a_cpu.commands))
    assert [one.why for one in on_a_cpu.dropped if one.flag == "--nnodes"] == ["on a CPU there is one rank, on one node"]


def test_vllms_and_sglangs_nodes_are_read_likewise() -> None:
    vllm = read(
        "vllm serve /m -tp 4 --nnodes 2 --node-rank 0 --master-addr h1\nvllm serve /m -tp 4 --nnodes 2 --node-rank 1 --master-addr h1"
    )
    sglang = read(
        "python -m sglang.launch_server --model-path /m --tp 4 --nnodes 2 --node-rank 0 --dist-init-addr h1:5\n"
        "python -m sglang.launch_server --model-path /m --tp 4 --nnodes 2 --node-rank 1 --dist-init-addr h1:5"
    )
    for found, port in ((vllm, 29501), (sglang, 5)):
        assert len(rows(found)) == 1
        assert [line.split("--nnodes ")[1] for line in map(str, found.commands)] == [
            f"2 --node-rank {rank} --master h1:{port}" for rank in (0, 1)
        ]


def test_xllms_mistakes_have_their_lines() -> None:
    lines = told(read(XLLM))
    assert "asks 12389 (so do lines 11, 25), but etcd (line 1) listens at 2379" in lines[2][0]
    assert "a comment after the backslash" in lines[12][0]
    assert "--device-ip xx.xx.xx.xx stands for a value of yours" in lines[12][1]
    assert "blanks after the backslash" in lines[25][0]
    for line, flag in ((7, "--enable-prefix-cache"), (8, "--enable-chunked-prefill")):
        assert f"{flag} switches" in lines[line][0] and "newer versions" in lines[line][0]


def test_etcds_addresses_have_to_fit() -> None:
    head = "etcd --listen-client-urls http://localhost:2389 --advertise-client-urls http://localhost:2391\n"
    lines = told(read(head + XLLM.partition("\n")[2]))
    assert "--advertise-client-urls is 2391, but clients are listened to at 2389" in lines[1][0]
    assert "asks 12389 (so do lines 11, 25), but etcd (line 1) listens at 2389" in lines[2][0]
    other = told(read(XLLM.replace("12389", "2379", 1)))
    assert any("etcd://127.0.0.1:12389 is not etcd://127.0.0.1:2379 of line 2" in text for text in other[11])


def test_best_of_without_the_decode_instances_cache_is_told() -> None:
    curl = """curl http://127.0.0.1:{}/v1/completions -d '{{"prompt": "a", "best_of": {}, "n": 1}}'\n"""
    assert any(
        "best_of 3 needs the decode instance's prefix cache, which line 21 switches off" in t
        for t in told(read(XLLM + curl.format(28888, 3)))[30]
    )
    assert 30 not in told(read(XLLM + curl.format(28888, 1)))
    assert 30 not in told(read(XLLM.replace("enable_prefix_cache=false", "enable_prefix_cache=true") + curl.format(28888, 3)))
    assert "this asks port 8010, but the router answers at 28888" in told(read(XLLM + curl.format(8010, 1)))[30][0]


def test_answers_through_the_prefill_instance() -> None:
    asked = {word: read(XLLM.replace("SERVICE=true", f"SERVICE={word}")).mapping["transfer"]["response_path"] for word in ("true", "false")}
    assert asked == {"true": "direct", "false": "via_prefill"}


def test_fastdeploys_servers() -> None:
    found = read(FASTDEPLOY)
    assert found.mapping["registry"] == "redis://127.0.0.1:6379" and found.mapping["quantization"] == "wint4"
    assert [(row["role"], row["tp"]) for row in rows(found)] == [("prefill", 4), ("decode", 4)]
    assert found.mapping["limits"] == {"request_timeout_s": 9000.0} and found.mapping["policy"] == "fastdeploy_splitwise"
    assert list(map(str, found.commands)) == [
        "redis-server --port 6379 --appendonly yes",
        "env $(pdlab nics gpu) CUDA_VISIBLE_DEVICES=0,1,2,3 pdlab serve exp.yaml --role prefill --instance-name prefill-0 --port 8180 "
        "--metrics-port 8181 --kv-port 7671",
        "env $(pdlab nics gpu) CUDA_VISIBLE_DEVICES=4,5,6,7 pdlab serve exp.yaml --role decode --instance-name decode-0 --port 8184 "
        "--metrics-port 8185",
        "pdlab serve exp.yaml --role router --port 8000",
    ]
    assert {one.flag for one in found.dropped} >= {"--engine-worker-queue-port", "--cache-queue-port", "--pd-comm-port", "FD_LOG_DIR"}


def test_fastdeploys_mistakes_have_their_lines() -> None:
    lines = told(read(FASTDEPLOY))
    assert "a backslash is missing here, so a shell leaves --splitwise-role out" in lines[32][0]
    assert "--rdma-comm-ports 7671, 7672, 7673, 7674 is taken on this machine by --rdma-comm-ports of line 13" in lines[29][0]
    assert "--pd-comm-port 2334 is taken" in lines[30][0]
    fewer = told(read(FASTDEPLOY.replace('"7671,7672,7673,7674"', '"7671,7672"', 1)))
    assert any("has 2 ports for 4 accelerators" in text for text in fewer[13])
    assert any("CUDA_VISIBLE_DEVICES has 3 accelerators" in t for t in told(read(FASTDEPLOY.replace("=0,1,2,3", "=0,1,2")))[3])
    no_role = told(read(re.sub(r".*--splitwise-role \"decode\"\n", "", FASTDEPLOY)))
    assert any("--splitwise-role is missing, so this instance is mixed" in text for texts in no_role.values() for text in texts)


def test_on_a_cpu_one_process_has_all_threads() -> None:
    found = read(FASTDEPLOY, device="cpu", model="tiny")
    assert all("tp" not in row and row["device"] == "cpu" for row in rows(found))
    assert not any("CUDA_VISIBLE" in str(one) for one in found.commands)
    assert all("--served-model-name ERNIE-4.5-300B-A47B-BF16" in str(one) for one in found.commands[1:])


def test_llumnix_is_one_command_for_all() -> None:
    found = read(LLUMNIX)
    assert rows(found) == [{"role": "auto", "count": 4, "device": "cuda", "prefill": 1}]
    assert found.mapping["policy"] == {"name": "llumnix", "migrate_out_threshold": 3.0, "pairing": "defrag"}
    assert list(map(str, found.commands)) == ["pdlab serve exp.yaml --role all --port 8000"]
    assert Deployment.parse(found.mapping).placements()[0].name == "prefill-0"


@pytest.mark.parametrize("prefill", [4, 5])
def test_llumnix_needs_somebody_who_decodes(prefill: int) -> None:
    with pytest.raises(UsageError, match=rf"line 2: --num-available-dispatch-instances {prefill} leaves none of 4 instances to decode"):
        read(LLUMNIX.replace("instances 1", f"instances {prefill}"))


@pytest.mark.parametrize(("ratio", "prefill"), [("1:3", 1), ("1:1", 2), ("9:1", 3)])
def test_llumnix_ratio_of_prefill_to_decode(ratio: str, prefill: int) -> None:
    found = read(LLUMNIX.replace("--num-available-dispatch-instances 1", f"--pd-ratio {ratio}"))
    assert rows(found)[0]["prefill"] == prefill


def test_vllms_drafts_and_spread_experts_are_carried_over() -> None:
    found = read("""vllm serve m -tp 4 --enable-expert-parallel --speculative-config '{"method": "mtp", "num_speculative_tokens": 2}'""")
    assert [(row["tp"], row["ep"]) for row in rows(found)] == [(4, 4)]
    assert found.mapping["engine"]["speculation"] == {"method": "mtp", "tokens": 2}
    with pytest.raises(UsageError, match=r"line 1: --speculative-config .* cannot be carried over: method 'eagle' is not one of"):
        read("""vllm serve m --speculative-config '{"method": "eagle", "num_speculative_tokens": 2}'""")


@pytest.mark.parametrize("server", ["vllm serve m", "python3 -m sglang.launch_server --model m"])
def test_the_format_of_the_kv_cache_is_carried_over(server: str) -> None:
    assert read(f"{server} --kv-cache-dtype fp8_e4m3").mapping["engine"]["kv_cache_dtype"] == "fp8"
    with pytest.raises(UsageError, match=r"line 1: --kv-cache-dtype .* is not one of auto, fp8, fp8_e4m3, bfloat16"):
        read(f"{server} --kv-cache-dtype fp8_e5m2")


def test_vllms_roles_come_from_the_proxy() -> None:
    found = read(VLLM)
    assert [(row["role"], row["device"], row["engine"]) for row in rows(found)] == [
        ("prefill", "cuda:0", {"max_seqs": 64}),
        ("decode", "cuda:1", {"max_seqs": 128}),
    ]
    assert found.mapping["transfer"] == {"mode": "pull", "first_token": "decode"}
    assert list(map(str, found.commands)) == ["pdlab serve exp.yaml --role all --port 8192"]
    proxyless = read("\n".join(VLLM.replace("kv_both", "kv_consumer").splitlines()[:-2]).replace("kv_consumer", "kv_producer", 1))
    assert [row["role"] for row in rows(proxyless)] == ["prefill", "decode"]


def test_what_one_command_for_all_cannot_give_to_one_is_told() -> None:
    found = read(VLLM.replace("VISIBLE_DEVICES=0 ", "VISIBLE_DEVICES=0,1 UCX_NET_DEVICES=mlx5_0:1 "))
    left = {one.flag: one.value for one in found.dropped}
    assert left["CUDA_VISIBLE_DEVICES"] == "0,1" and left["UCX_NET_DEVICES"] == "mlx5_0:1" and left["--port"]
    assert str(read("CUDA_VISIBLE_DEVICES=0,1 " + LLUMNIX).commands[0]).startswith("env CUDA_VISIBLE_DEVICES=0,1 pdlab serve")


def test_sglang_looks_for_new_prompts_at_every_nth_step_as_delayed_batching_does() -> None:
    server = "python -m sglang.launch_server --model-path /m --port 30000 --chunked-prefill-size 4096 --scheduler-recv-interval"
    written = read(f"{server} 30").mapping
    assert written["engine"]["batching"] == {"name": "delayed", "polled": True, "prompts_first": True, "steps": 30}
    assert written["engine"]["max_batch_tokens"] == 4096
    assert "batching" not in read(f"{server} 1").mapping["engine"], "at every step, as ever"
    parted = read(f"{server} 30 --disaggregation-mode prefill")
    assert "batching" not in parted.mapping.get("engine", {})
    (dropped,) = [one for one in parted.dropped if one.flag == "--scheduler-recv-interval"]
    assert dropped.value == "30" and "nobody does both here" in dropped.why


def test_sglangs_modes_and_its_router() -> None:
    found = read(SGLANG)
    assert [(row["role"], row["device"]) for row in rows(found)] == [("prefill", "cuda"), ("decode", "cuda:1")]
    assert found.mapping["policy"] == {"dispatch": "prefix_aware", "handoff": "power_of_two"}
    assert found.mapping["transfer"]["granularity"] == "chunk"
    assert "set PDLAB_API_KEY" in found.notes[0].text
    unchunked = read(SGLANG.replace("--disable-radix-cache", "--chunked-prefill-size -1"))
    assert rows(unchunked)[1]["engine"] == {"batching": "prefill_first"}


def test_dynamos_workers() -> None:
    found = read(DYNAMO)
    assert [row["role"] for row in rows(found)] == ["decode", "prefill"]
    assert found.mapping["registry"] == "etcd://10.0.0.1:2379" and found.mapping["policy"] == "prefix_aware"
    assert str(found.commands[-1]) == "pdlab serve exp.yaml --role router --port 8000"
    assert "several machines" in found.notes[0].text, "since etcd is on another one"
    alone = read("\n".join(line for line in DYNAMO.splitlines() if "prefill-worker" not in line))
    assert [row["role"] for row in rows(alone)] == ["mixed"]


@pytest.mark.parametrize("text", [XLLM, FASTDEPLOY, LLUMNIX, VLLM, SGLANG, DYNAMO])
def test_with_hardware_the_file_can_be_simulated(text: str) -> None:
    found = read(text, hardware="h100-sxm", model="llama-3.1-8b")
    assert Experiment.parse({"name": "x", **found.mapping}).workload.requests == 2000
    assert Deployment.parse({"name": "x", **read(text).mapping}).placements()


def test_one_command_of_a_cluster_is_no_cluster() -> None:
    found = read("./xllm --model=m --port=8010 --enable_disagg_pd=true --instance_role=PREFILL --etcd_addr=127.0.0.1:2379")
    assert "cluster" not in found.mapping and "no whole cluster" in found.notes[0].text
    assert str(found.commands[0]).startswith("pdlab serve exp.yaml --role prefill --instance-name prefill-0 --port 8010")


def test_fastdeploys_own_router_needs_no_redis() -> None:
    server = "python -m fastdeploy.entrypoints.openai.api_server --model m --router 127.0.0.1:9000 --port {} --splitwise-role {}\n"
    found = read("python -m fastdeploy.router.launch --port 9000 --splitwise\n" + server.format(1, "prefill") + server.format(2, "decode"))
    assert list(map(str, found.commands)) == ["pdlab serve exp.yaml --role all --port 9000"] and found.mapping["policy"] == "random"


@pytest.mark.parametrize("wrapper", ["docker run --gpus all image", "numactl -N 0", "srun -n 1", "timeout 60"])
def test_what_another_program_starts_is_read(wrapper: str) -> None:
    assert str(read(f"{wrapper} vllm serve m --port 9000").commands[0]) == "pdlab serve exp.yaml --role mixed --port 9000"


def test_pythons_own_flags_are_passed_over() -> None:
    assert [row["role"] for row in rows(read(VLLM.replace("python3 tests", "python3 -u tests")))] == ["prefill", "decode"]


def test_the_environment_is_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ENABLE_DECODE_RESPONSE_TO_SERVICE", "false")
    status, out, _ = ended(capsys, "import", "--", "./xllm_master_serving", "--etcd_addr=127.0.0.1:2379")
    assert status == 0 and "response_path: via_prefill" in out


def test_a_server_alone() -> None:
    found = read("vllm serve ./m --port 9000 --max-model-len 512")
    assert list(map(str, found.commands)) == ["pdlab serve exp.yaml --role mixed --port 9000"]
    assert found.mapping["engine"] == {"max_model_len": 512} and found.mapping["model"] == "./m"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ls", "there is no launch command here"),
        ("./xllm --model=m --port=http", "line 1: --port 'http' is no whole number"),
        ("./xllm --model=m \\\n --instance_role=BOTH", "line 2: --instance-role 'BOTH' is not one of prefill"),
        ("./xllm --model", "line 1: --model needs a value"),
        ("vllm serve m --kv-transfer-config {}", "line 1: --kv-transfer-config '{}' is no JSON that has \"kv_role\""),
        ("./xllm --model=m --devices=npu:0,npu:1", "names several devices"),
        ("./xllm --model=m --enable_prefix_cache=maybe", "is neither true nor false"),
    ],
)
def test_what_cannot_be_is_told_with_its_line(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        read(text)


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("--enable_prefix_cache=false", False),
        ("--noenable_prefix_cache", False),
        ("--enable-prefix-cache true", True),
        ("--enable_prefix_cache", True),
    ],
)
def test_flags_as_they_are_spelled(spelled: str, expected: bool) -> None:
    assert read(f"./xllm --model=m {spelled}").mapping["engine"]["prefix_cache"] is expected


def test_a_later_flag_replaces_an_earlier_one_and_that_is_told() -> None:
    found = read("./xllm --model=m --port=1 --port=2")
    assert "--port 2" in str(found.commands[0])
    assert [str(one) for one in found.dropped] == ["--port 1: a later one replaces it"]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.names[0])
def test_no_flag_is_taken_and_forgotten(program: Program) -> None:
    """What a flag sets, somebody reads."""
    used = "".join(inspect.getsource(module) for module in (checks, experiment_file, launches, serve_commands))
    settings = {one.setting for one in (*program.flags.values(), *program.variables.values()) if isinstance(one, Sets)}
    forgotten = {name for name in settings if f'"{name}"' not in used and f'"{name.removeprefix("slo_")}"' not in used}
    assert forgotten <= ({"configuration"} if program.names[0] == "redis-server" else set())


# ---------------------------------------------------------------- the command


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_the_command_writes_a_file_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, to = tmp_path / "run.sh", tmp_path / "exp.yaml"
    script.write_text(XLLM)
    status, out, _ = ended(capsys, "import", "--from-file", str(script), "--to", str(to))
    assert status == 0 and f"pdlab serve {to} --role router --port 28888" in out and f"{script}:25: blanks after" in out
    assert Deployment.load(to).registry == "etcd://127.0.0.1:12389"
    status, _, err = ended(capsys, "import", "--from-file", str(script), "--to", str(to))
    assert status == 2 and "it is there already" in err


def test_a_command_after_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = ended(capsys, "import", "--device", "cpu", "--", "vllm", "serve", "m", "--port", "9000")
    assert status == 0 and "device: cpu" in out and "pdlab serve exp.yaml --role mixed --port 9000" in out


def test_strict_ends_at_mistakes_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, to = tmp_path / "run.sh", tmp_path / "exp.yaml"
    script.write_text(FASTDEPLOY)
    status, out, err = ended(capsys, "import", "--strict", "--from-file", str(script), "--to", str(to))
    assert (status, out) == (2, "") and f"error: {script}:32: a backslash is missing" in err and not to.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["import"], "give either --from-file SCRIPT, or -- and a command"),
        (["import", "--from-file", "/nowhere/run.sh"], "--from-file /nowhere/run.sh: No such file"),
        (["import", "--to", "/nowhere/x.yaml", "--", "vllm", "serve", "m"], "--to /nowhere/x.yaml: No such file"),
        (["import", "--", "ls"], "a command: there is no launch command here"),
    ],
)
def test_mistakes_of_the_command_itself(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = ended(capsys, *arguments)
    assert status == 2 and says in err and err.count("\n") == 1


def test_a_models_path_is_relative_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for to, expected in (("out/exp.yaml", "../models/m"), ("exp.yaml", "models/m")):
        assert ended(capsys, "import", "--to", to, "--", "vllm", "serve", "models/m/")[0] == 0
        assert Deployment.load(to).model == expected


TEXT = st.text(alphabet="-ax= \\\n'\"#;&|<>${}()`1", max_size=60)


@given(TEXT)
def test_whatever_stands_in_a_script_is_read_or_refused_in_a_line(text: str) -> None:
    for script in (text, f"vllm serve m {text}", f"./xllm --model=m {text}"):
        with contextlib.suppress(UsageError):
            assert read(script).yaml
