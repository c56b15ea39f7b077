"""Secrets come from files as from variables; what a cluster made for itself is found by its own user only."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pdlab.cli.main import main
from pdlab.core.types import UsageError
from pdlab.real.launch import serve as start
from pdlab.real.launch.asked import Asked
from pdlab.real.net import credentials

NAMES = ("PDLAB_API_KEY", "PDLAB_INTERNAL_TOKEN", "PDLAB_UPSTREAM_API_KEY")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in start.NOT_FOR_CHILDREN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def asked_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> Asked:
    """What `pdlab serve` was asked for."""
    found: list[Asked] = []
    monkeypatch.setattr(start, "start", lambda asked, say: found.append(asked))
    with pytest.raises(SystemExit):
        main(["serve", *words])
    return found[0]


def secrets_of(asked: Asked) -> list[str | None]:
    return [asked.serving.api_key, asked.serving.token, asked.upstream_api_key]


def test_each_secret_comes_from_a_file_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).write_text(f"of {name}\r\n")
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / name))
    assert secrets_of(asked_of(monkeypatch)) == [f"of {name}" for name in NAMES]
    given = asked_of(monkeypatch, "--api-key", "a", "--internal-token", "b", "--upstream-api-key", "c")
    assert secrets_of(given) == ["a", "b", "c"], "an option goes before the environment"
    for name in NAMES:
        monkeypatch.setenv(name, "x")
        with pytest.raises(UsageError, match=f"both {name} and {name}_FILE are set"):
            credentials.secret(name, "x")


def test_variables_alone_do_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, f"in {name}")
    assert secrets_of(asked_of(monkeypatch)) == [f"in {name}" for name in NAMES]


@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb\n", b"\xff", b"a" * 9000, "schlüssel".encode()])
def test_a_file_that_holds_no_secret_is_named_and_not_shown(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    monkeypatch.setenv("PDLAB_API_KEY_FILE", str(path))
    with pytest.raises(UsageError, match=f"PDLAB_API_KEY_FILE {path}: it must hold one line") as raised:
        credentials.secret("PDLAB_API_KEY", None)
    assert "schl" not in str(raised.value)
    path.unlink()
    with pytest.raises(UsageError, match="No such file"):
        credentials.secret("PDLAB_API_KEY", None)


def test_passwords_are_not_shown() -> None:
    for url in ("etcds://me:secret@a:1", "rediss://:sec/secret@a:1/2?namespace=x", "redis://me:a@secret@a:1"):
        assert "secret" not in credentials.without_password(url) and "a:1" in credentials.without_password(url)


def test_a_made_token_is_kept_for_its_user_alone_and_goes_with_the_cluster(tmp_path: Path) -> None:
    with credentials.kept(8123, "of-the-cluster"):
        (folder,) = tmp_path.iterdir()
        (file,) = folder.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE(file.stat().st_mode) == 0o600
        assert credentials.kept_token("http://127.0.0.1:8123") == credentials.kept_token("http://localhost:8123/") == "of-the-cluster"
        assert credentials.kept_token("http://127.0.0.1:8124") == credentials.kept_token("http://10.0.0.1:8123") == ""
        with credentials.kept(8123, "of-the-next"):  # after a crash
            assert credentials.kept_token("http://127.0.0.1:8123") == "of-the-next"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("what", ["open to others", "a link", "a file"])
def test_a_folder_that_others_could_have_made_is_not_used(what: str, tmp_path: Path) -> None:
    folder = tmp_path / f"pdlab-{os.geteuid()}"
    if what == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    elif what == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.write_text("")
    with pytest.raises(UsageError, match="--internal-token"), credentials.kept(1, "token"):
        pass
    assert credentials.kept_token("http://127.0.0.1:1") == ""
