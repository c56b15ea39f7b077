"""NICs read from a sysfs tree as a machine with two GPUs and four NICs shows it."""

from __future__ import annotations

import asyncio
import os
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from rich.console import Console

from pdlab.cli.main import main
from pdlab.real.router.status import InstanceRow, View, nics, table
from pdlab.real.transfer import nixl, rdma
from pdlab.real.transfer.descriptor import Descriptor, decode
from tests.real.transfer import gpu
from tests.real.transfer.peer import endpoint, memory
from tests.support.registry_worlds import spec

GPU = "0000:1b:00.0"
SWITCH = "pci0000:15/0000:15:01.0/0000:16:00.0"  # the GPU and mlx5_2 hang on it


def nic(
    sysfs: Path,
    name: str,
    pci: str,
    *,
    numa: int = 0,
    state: str = "4: ACTIVE",
    link: str = "InfiniBand",
    rate: str = "400 Gb/sec (4X NDR)",
) -> None:
    device = pci_device(sysfs, pci, numa)
    made = device / "infiniband" / name
    port = made / "ports" / "1"
    port.mkdir(parents=True)
    for field, text in (("state", state), ("link_layer", link), ("rate", rate)):
        (port / field).write_text(text + "\n")
    (made / "device").symlink_to(device)
    (sysfs / "class" / "infiniband").mkdir(parents=True, exist_ok=True)
    (sysfs / "class" / "infiniband" / name).symlink_to(made)


def pci_device(sysfs: Path, path: str, numa: int) -> Path:
    device = sysfs / "devices" / path
    device.mkdir(parents=True, exist_ok=True)
    (device / "numa_node").write_text(f"{numa}\n")
    (sysfs / "bus" / "pci" / "devices").mkdir(parents=True, exist_ok=True)
    (sysfs / "bus" / "pci" / "devices" / device.name).symlink_to(device)
    return device


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    pci_device(tmp_path, f"{SWITCH}/0000:17:01.0/{GPU}", 0)
    pci_device(tmp_path, "pci0000:97/0000:97:01.0/0000:9a:00.0", 1)
    nic(tmp_path, "mlx5_0", "pci0000:00/0000:00:03.0/0000:05:00.0", rate="100 Gb/sec (4X EDR)", link="Ethernet")
    nic(tmp_path, "mlx5_1", f"{SWITCH}/0000:17:00.0/0000:18:00.0", state="1: DOWN")
    nic(tmp_path, "mlx5_2", f"{SWITCH}/0000:17:02.0/0000:1c:00.0")
    nic(tmp_path, "mlx5_3", "pci0000:b7/0000:b7:01.0/0000:b8:00.0", numa=1)
    return tmp_path


def test_nixl_starts_with_the_nics_near_the_gpu(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def agent(*_: object) -> None:
        seen.append(os.environ.get("UCX_NET_DEVICES"))
        raise RuntimeError("no such NIC")

    monkeypatch.setattr(rdma, "SYSFS", sysfs)
    monkeypatch.setattr(nixl, "api", lambda: SimpleNamespace(nixl_agent=agent, nixl_agent_config=lambda **_: None))

    async def start(on_gpu: bool) -> None:
        with pytest.raises(RuntimeError, match="no such NIC"):
            await endpoint(memory(4, seed=1), "auto", on_gpu=on_gpu).start()

    for on_gpu in (False, True) if gpu.fake() is not None else (False,):
        monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
        asyncio.run(start(on_gpu))
    assert seen == [None, "mlx5_2:1"][: len(seen)]


def text(view: View) -> str:
    written = StringIO()
    Console(width=200, file=written).print(table(view, 100.0))
    return written.getvalue()


def nearest(pci: str, sysfs: Path) -> list[str]:
    return [nic.name for nic in rdma.nearest(pci, sysfs)]


def test_all_nics_with_their_ports(sysfs: Path) -> None:
    found = rdma.nics(sysfs)
    assert [(n.ucx_name, n.active, n.link, n.bits_per_s, n.numa) for n in found] == [
        ("mlx5_0:1", True, "Ethernet", 100e9, 0),
        ("mlx5_1:1", False, "InfiniBand", 400e9, 0),
        ("mlx5_2:1", True, "InfiniBand", 400e9, 0),
        ("mlx5_3:1", True, "InfiniBand", 400e9, 1),
    ]
    assert found[0].pci == ("pci0000:00", "0000:00:03.0", "0000:05:00.0")


def test_the_nearest_is_on_the_same_switch_else_the_same_numa_node(sysfs: Path) -> None:
    assert nearest(GPU, sysfs) == ["mlx5_2"]  # mlx5_1 would be as near, and is down
    assert nearest("0000:9A:00.0", sysfs) == ["mlx5_3"]
    assert nearest("0000:ff:00.0", sysfs) == ["mlx5_2", "mlx5_3"]  # unknown: the fastest


def test_two_on_the_same_switch_are_both_nearest(sysfs: Path) -> None:
    nic(sysfs, "mlx5_4", f"{SWITCH}/0000:17:03.0/0000:1d:00.0")
    nic(sysfs, "mlx5_5", f"{SWITCH}/0000:17:04.0/0000:1e:00.0", rate="100 Gb/sec (4X EDR)")
    assert nearest(GPU, sysfs) == ["mlx5_2", "mlx5_4"]


def test_ucx_is_told_the_nearest_unless_the_user_has_said(sysfs: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pdlab")
    environ: dict[str, str] = {}
    nixl.use_nics([], environ)
    assert not environ
    nixl.use_nics(rdma.nearest("0000:ff:00.0", sysfs), environ)
    assert environ == {"UCX_NET_DEVICES": "mlx5_2:1,mlx5_3:1"}
    nixl.use_nics(rdma.nearest(GPU, sysfs), environ)
    assert environ == {"UCX_NET_DEVICES": "mlx5_2:1,mlx5_3:1"}
    assert caplog.messages == ["NIXL uses the RDMA NICs nearest to the GPU: UCX_NET_DEVICES=mlx5_2:1,mlx5_3:1"]


def test_an_endpoint_tells_of_its_nics(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdma, "SYSFS", sysfs)

    async def nics(on_gpu: bool) -> tuple[str, ...]:
        async with endpoint(memory(4, seed=1), "tcp", on_gpu=on_gpu) as one:
            return decode(one.descriptor()).nics

    assert asyncio.run(nics(False)) == ("mlx5_0:1", "mlx5_2:1", "mlx5_3:1")
    if gpu.fake() is not None:
        assert asyncio.run(nics(True)) == ("mlx5_2:1",)


def test_a_machine_without_any(tmp_path: Path) -> None:
    assert rdma.nics(tmp_path) == [] and rdma.nearest(GPU, tmp_path) == []
    virtual = tmp_path / "class" / "infiniband" / "rxe0" / "ports" / "1"
    virtual.mkdir(parents=True)
    (virtual / "state").write_text("4: ACTIVE\n")
    assert rdma.nics(tmp_path) == [rdma.Nic("rxe0", 1, True, "unknown", 0.0, -1, ())]
    (tmp_path / "class" / "infiniband" / "odd").mkdir()
    assert [n.name for n in rdma.nics(tmp_path)] == ["rxe0"]


def test_operators_see_nics_and_addresses_where_there_are_any(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdma, "SYSFS", sysfs)

    async def told() -> Descriptor:
        async with endpoint(memory(4, seed=1), "tcp") as one:
            return decode(one.descriptor())

    found = asyncio.run(told())
    on_npu = msgspec.structs.replace(found, nics=(), npu_address="192.168.100.101")
    none = msgspec.structs.replace(found, nics=())
    rows = {
        name: InstanceRow(spec(name, descriptor=one.encode().decode()), "ready") for name, one in (("a", found), ("b", on_npu), ("c", none))
    }
    assert {name: nics(row.spec) for name, row in rows.items()} == {
        "a": ["mlx5_0:1", "mlx5_2:1", "mlx5_3:1"],
        "b": ["192.168.100.101"],
        "c": [],
    }
    shown = text(View(list(rows.values())))
    assert "mlx5_0:1 mlx5_2:1 mlx5_3:1" in shown and "192.168.100.101" in shown and "NICs" in shown
    assert "NICs" not in text(View([rows["c"], InstanceRow(spec("d"), "ready")]))


def test_the_addresses_of_npus_come_from_hccn_conf(tmp_path: Path) -> None:
    hccn = tmp_path / "hccn.conf"
    assert rdma.npu_addresses(hccn) == {}
    hccn.write_text(
        "address_0=192.168.100.101\nnetmask_0=255.255.255.0\nnetdetect_0=192.168.100.1\n\n"
        "address_1 = 192.168.101.101\naddress_2=not an address\n#address_3=192.168.103.101\nsend_arp_status_0=1\naddress_7=fe80::7\n"
    )
    assert rdma.npu_addresses(hccn) == {0: "192.168.100.101", 1: "192.168.101.101", 7: "fe80::7"}
    assert rdma.npu_address(1, {}, hccn) == "192.168.101.101"
    assert rdma.npu_address(0, {"ASCEND_RT_VISIBLE_DEVICES": "7,0"}, hccn) == "fe80::7"
    for index, visible in ((2, ""), (2, "7,0"), (0, "none")):
        assert rdma.npu_address(index, {"ASCEND_RT_VISIBLE_DEVICES": visible}, hccn) == ""


def graphics(sysfs: Path, path: str, kind: str = "0x030200", vendor: str = "0x10de", numa: int = 0) -> None:
    device = pci_device(sysfs, path, numa) if not (sysfs / "devices" / path).exists() else sysfs / "devices" / path
    (device / "class").write_text(kind + "\n")
    (device / "vendor").write_text(vendor + "\n")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    with pytest.raises(SystemExit) as end:
        main(["nics", *arguments])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out.splitlines(), said.err


def test_the_command_prints_what_launch_scripts_export(
    sysfs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphics(sysfs, f"{SWITCH}/0000:17:01.0/{GPU}")
    graphics(sysfs, "pci0000:97/0000:97:01.0/0000:9a:00.0", "0x030000", "0x1002")
    graphics(sysfs, "pci0000:00/0000:00:02.0", "0x030000", "0x8086")  # the board's own graphics
    hccn = tmp_path / "hccn.conf"
    hccn.write_text("address_0=192.168.100.101\nnetmask_0=255.255.255.0\n")
    where = ("--sysfs", str(sysfs), "--hccn", str(hccn))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    near = [rdma.nearest(pci, sysfs)[0] for pci in (GPU, "0000:9a:00.0")]
    assert near[0].name == "mlx5_2"
    expected = [
        f"KVCACHE_RDMA_NICS={near[0].name},{near[1].name}",
        f"UCX_NET_DEVICES={near[0].ucx_name},{near[1].ucx_name}",
        "address_0=192.168.100.101",
    ]
    assert printed(capsys, "gpu", *where) == (0, expected, "")
    assert printed(capsys, *where)[1] == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert printed(capsys, "gpu", *where)[1][0] == f"KVCACHE_RDMA_NICS={near[1].name}"
    on_cpus = printed(capsys, "cpu", *where)[1]
    names = on_cpus[0].removeprefix("KVCACHE_RDMA_NICS=").split(",")
    best = {nic.numa: nic for nic in sorted((x for x in rdma.nics(sysfs) if x.active), key=lambda x: x.bits_per_s)}
    assert {nic.name for nic in best.values()} == set(names)


def test_the_command_says_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = printed(capsys, "gpu", "--sysfs", str(tmp_path), "--hccn", str(tmp_path / "hccn.conf"))
    assert (status, out) == (1, []) and "no RDMA NIC" in err and err.count("\n") == 1
    status, out, err = printed(capsys, "npu")
    assert (status, out) == (2, []) and "'npu' is not one of gpu, cpu" in err
