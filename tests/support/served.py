"""A served tiny model: `pdlab serve` as a process of its own on a free port, with a vocabulary of single bytes."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.support import tiny_models

EOS, START, END = 256, 257, 258
READY_S = 180.0
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "<start>{{ m.role }}\n{{ m.content }}<end>{% endfor %}{% if tools %}tools:{{ tools | length }}{% endif %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def make(folder: Path, family: str = "llama", **changes: object) -> Path:
    """A random model whose tokens 0 to 255 are bytes, 256 the end of a sequence, and no other ends one."""
    tiny_models.make(family, folder, **changes)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = {byte: chr(byte) for byte in printable}
    order |= {byte: chr(256 + at) for at, byte in enumerate(b for b in range(256) if b not in printable)}
    assert sorted(order.values()) == sorted(alphabet)
    backend = Tokenizer(models.BPE(vocab={order[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<eos>", "<start>", "<end>")])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": TEMPLATE}))
    return folder


@contextmanager
def still(pid: int) -> Iterator[None]:
    """The process stands still meanwhile: what it runs can't end. In the end it goes on, if it is there."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def server(model: Path, *options: str, inside: Sequence[str] = ()) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(its URL without /v1, the process). Killed at the end if it still runs. `inside`: what the command begins with, if not itself."""
    command = [*inside, sys.executable, "-m", "pdlab", "serve", "--model", str(model), "--port", "0", "--threads", "1", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        yield _url(process), process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _url(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    said, deadline_s = b"", time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        if select.select([process.stdout], [], [], 1)[0]:
            part = os.read(process.stdout.fileno(), 4096)
            said += part
            if found := re.search(rb"ready after .*: (http://\S+)/v1", said):
                return found[1].decode()
            assert part, f"ended with {process.wait()}: {said.decode()}"
    raise AssertionError(f"not ready after {READY_S} s: {said.decode()}")
