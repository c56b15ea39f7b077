"""What is kept of files that several send at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from threading import Barrier

from pdlab.lab.lab import Lab
from pdlab.lab.settings import LabSettings
from pdlab.lab.store import Upload
from pdlab.lab.uploads import keep

SENDERS = 4


def test_of_files_that_come_at_once_under_one_name_the_one_that_is_told_is_kept(tmp_path: Path) -> None:
    lab = Lab.open(LabSettings(folder=tmp_path))
    together = Barrier(SENDERS)

    def send(name: str, sender: int) -> bool:
        content = f"of {sender}".encode()
        aside = tmp_path / f"{name}-{sender}"
        aside.write_bytes(content)
        together.wait()
        return keep(lab, aside, Upload(name, "trace", len(content), sha256(content).hexdigest(), 0.0))[1]

    with ThreadPoolExecutor(SENDERS) as senders:
        for k in range(20):
            new = list(senders.map(send, [f"{k}.csv"] * SENDERS, range(SENDERS)))
            assert new.count(True) == 1
    for told in lab.store.uploads():
        assert sha256((lab.foreman.uploads / told.name).read_bytes()).hexdigest() == told.sha256
    lab.close()
