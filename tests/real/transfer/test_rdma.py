"""NICs read from a sysfs tree as a machine with two GPUs and four NICs shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdlab.real.transfer import rdma

GPU = "0000:1b:00.0"


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
    switch = "pci0000:15/0000:15:01.0/0000:16:00.0"  # the GPU and mlx5_2 hang on one PCIe switch
    pci_device(tmp_path, f"{switch}/0000:17:01.0/{GPU}", 0)
    pci_device(tmp_path, "pci0000:97/0000:97:01.0/0000:9a:00.0", 1)
    nic(tmp_path, "mlx5_0", "pci0000:00/0000:00:03.0/0000:05:00.0", rate="100 Gb/sec (4X EDR)", link="Ethernet")
    nic(tmp_path, "mlx5_1", f"{switch}/0000:17:00.0/0000:18:00.0", state="1: DOWN")
    nic(tmp_path, "mlx5_2", f"{switch}/0000:17:02.0/0000:1c:00.0")
    nic(tmp_path, "mlx5_3", "pci0000:b7/0000:b7:01.0/0000:b8:00.0", numa=1)
    return tmp_path


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
    near = rdma.nearest(GPU, sysfs)
    assert near is not None and near.name == "mlx5_2"  # mlx5_1 would be as near, and is down
    far = rdma.nearest("0000:9A:00.0", sysfs)
    assert far is not None and far.name == "mlx5_3"
    unknown = rdma.nearest("0000:ff:00.0", sysfs)
    assert unknown is not None and unknown.name == "mlx5_2"  # the fastest, then the first


def test_a_machine_without_any(tmp_path: Path) -> None:
    assert rdma.nics(tmp_path) == [] and rdma.nearest(GPU, tmp_path) is None
    virtual = tmp_path / "class" / "infiniband" / "rxe0" / "ports" / "1"
    virtual.mkdir(parents=True)
    (virtual / "state").write_text("4: ACTIVE\n")
    assert rdma.nics(tmp_path) == [rdma.Nic("rxe0", 1, True, "unknown", 0.0, -1, ())]
    (tmp_path / "class" / "infiniband" / "odd").mkdir()
    assert [n.name for n in rdma.nics(tmp_path)] == ["rxe0"]


def test_the_addresses_of_npus_come_from_hccn_conf(tmp_path: Path) -> None:
    hccn = tmp_path / "hccn.conf"
    assert rdma.npu_addresses(hccn) == {}
    hccn.write_text(
        "address_0=192.168.100.101\nnetmask_0=255.255.255.0\nnetdetect_0=192.168.100.1\n\n"
        "address_1 = 192.168.101.101\naddress_2=not an address\n#address_3=192.168.103.101\nsend_arp_status_0=1\naddress_7=fe80::7\n"
    )
    assert rdma.npu_addresses(hccn) == {0: "192.168.100.101", 1: "192.168.101.101", 7: "fe80::7"}
