"""An instance as a router sees it: a real socket that speaks docs/reference/protocol.md, as pdlab's engines or as a vLLM server,
without a model.

Token i of an answer is `first + i % 26` (letters, under a byte tokenizer). `python -m tests.support.fake_instance --interval-s 0.02`
serves until killed and prints its URL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, cast

import httptools


@dataclass
class Leg:
    """A decode leg under way. `times` are when its tokens were sent, on the machine's monotonic clock; `key` begins its prompt."""

    name: str
    connection: _Connection
    tokens: list[int]
    candidates: int
    key: str
    text: bool
    sent: int = 0
    times: list[float] = field(default_factory=list)


@dataclass
class Fake:
    """What it does, and what it has seen. `interval_s` 0 sends a whole answer at once; else all legs get one token a step, as from an
    engine. `refuse` (status, code) answers every leg so; `stream` replaces the events of decode legs; `hang_up` closes the connection
    after them without an end; `silent` never answers; `stop` ends an answer with that token and "stop"."""

    vllm: bool = False
    interval_s: float = 0.0
    refuse: tuple[int, str] | None = None
    whole: bytes | None = None
    stream: list[bytes] | None = None
    hang_up: bool = False
    silent: bool = False
    close_idle: bool = False
    stop: int | None = None
    first: int = 97
    metrics: str = ""
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    connections: set[_Connection] = field(default_factory=set)
    opened: int = 0
    legs: dict[str, Leg] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    keep: bool = True  # remember what was asked
    url: str = ""

    async def __aenter__(self) -> Fake:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=4096)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        self.ticking = loop.call_later(self.interval_s, self._step) if self.interval_s else None
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.ticking is not None:
            self.ticking.cancel()
        self.server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        await self.server.wait_closed()
        await asyncio.sleep(0)

    def answer(self, on: _Connection, method: str, path: str, headers: dict[str, str], raw: bytes) -> None:
        body = json.loads(raw) if raw else None
        if self.keep:
            self.asked.append((path, headers, body))
        if self.silent:
            return
        if path == "/v1/completions":
            self._completion(on, headers, body)
        elif path in ("/health", "/pdlab/v1/release", "/pdlab/v1/renew", "/pdlab/v1/continue"):
            on.whole(*self._small(b"{}"))
        elif path in ("/pdlab/v1/role", "/pdlab/v1/drain"):
            on.whole(202, b"{}")
        elif path == "/v1/models":
            model = {"id": "fake", "object": "model", "max_model_len": 4096}
            on.whole(*self._small(json.dumps({"object": "list", "data": [model]}).encode()))
        elif path == "/metrics":
            on.whole(200, self.metrics.encode())
        elif path == "/times":
            on.whole(200, json.dumps(self.times).encode())
        else:
            on.whole(404, b'{"error": {"message": "no such path", "code": null}}')

    def _small(self, body: bytes) -> tuple[int, bytes]:
        return (200, body) if self.refuse is None else self._refusal()

    def _refusal(self) -> tuple[int, bytes]:
        assert self.refuse is not None
        status, code = self.refuse
        error: dict[str, Any] = {"message": f"refused: {code}", "type": "server_error", "param": None, "code": code}
        return status, json.dumps({"error": error}).encode()

    def _completion(self, on: _Connection, headers: dict[str, str], body: dict[str, Any]) -> None:
        name = headers.get("x-request-id", "")
        if self.refuse is not None:
            on.whole(*self._refusal())
            return
        params = body.get("kv_transfer_params") or {}
        if not body.get("stream"):
            on.whole(200, self._prefilled(name, body) if self.whole is None else self.whole)
            return
        on.begin(self.vllm)
        if self.stream is not None:
            on.parts(self.stream)
            on.close() if self.hang_up else on.end()
            return
        extra = params.get("pdlab") or {}
        tokens = [self.first + i % 26 for i in range(len(extra.get("made", [])), body["max_tokens"])]
        if self.stop is not None:
            tokens[-1] = self.stop
        if extra.get("events") and not params.get("do_remote_prefill"):
            on.parts([_event({"choices": [], "pdlab": {"event": "prefilled", "queue_s": 0.001, "cached_tokens": 1}})])
        elif extra.get("events"):
            event = {"event": "transferred", "bytes": 4096, "seconds": 0.001, "transport": "tcp", "made": len(extra.get("made", []))}
            on.parts([_event({"choices": [], "pdlab": event})])
        leg = self.legs[name] = Leg(name, on, tokens, body.get("n", 1), key_of(body["prompt"]), body.get("detokenize") is not False)
        on.leg = leg
        if not self.interval_s:
            while leg.name in self.legs:
                self._token(leg, body)

    def _prefilled(self, name: str, body: dict[str, Any]) -> bytes:
        token = self.first if self.stop is None else self.stop
        choice: dict[str, Any] = {"index": 0, "text": "", "token_ids": [token], "finish_reason": "length" if self.stop is None else "stop"}
        choice["logprobs"] = self._logprobs([token], body)
        answer = {"id": f"cmpl-{name}", "object": "text_completion", "created": 1, "model": body["model"], "choices": [choice]}
        prompt = len(body["prompt"])
        answer["usage"] = {"prompt_tokens": prompt, "completion_tokens": 1, "total_tokens": prompt + 1}
        params: dict[str, Any] = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[1, 2, 3]] if self.vllm else [1, 2, 3],
            "remote_engine_id": "fake",
            "remote_request_id": f"cmpl-{name}",
            "remote_host": "127.0.0.1",
            "remote_port": 5600,
            "tp_size": 1,
            "remote_num_tokens": prompt,
        }
        if self.vllm:
            choice |= {"stop_reason": None, "prompt_token_ids": body["prompt"], "prompt_logprobs": None}
            answer |= {"service_tier": None, "system_fingerprint": None}
            params |= {"dcp_size": 1, "pp_size": 1, "remote_blocks_expiry_time": None, "transfer_mode": "pull"}
        else:
            answer["usage"]["prompt_tokens_details"] = {"cached_tokens": 2}
            params["pdlab"] = {"descriptor": "fake", "kv_tokens": prompt}
        answer["kv_transfer_params"] = params if self.stop is None else None
        return json.dumps(answer).encode()

    def _logprobs(self, tokens: list[int], body: dict[str, Any]) -> dict[str, Any] | None:
        if body.get("logprobs") is None:
            return None
        assert body["return_tokens_as_token_ids"] is True
        top = [{f"token_id:{token}": -0.5} | {f"token_id:{i}": -0.25 - i for i in range(body["logprobs"])} for token in tokens]
        return {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": [-0.5] * len(tokens), "top_logprobs": top}

    def _token(self, leg: Leg, body: dict[str, Any] | None = None) -> None:
        """The next token of every candidate."""
        token = leg.tokens[leg.sent]
        text = chr(token) if leg.text else ""
        leg.sent += 1
        finish = None if leg.sent < len(leg.tokens) else "length" if self.stop is None else "stop"
        if finish is None and not body and not self.vllm and leg.candidates == 1:
            on_wire = [b'data: {"id":"cmpl-fake","object":"text_completion","created":1,"model":"fake","choices":[{"index":0,"text":"%b",'
                       b'"logprobs":null,"finish_reason":null,"token_ids":[%d]}]}\n\n' % (text.encode(), token)]  # fmt: skip
        else:
            on_wire = []
            for index in range(leg.candidates):
                choice = {"index": index, "text": text, "logprobs": self._logprobs([token], body or {}), "finish_reason": finish}
                choice["token_ids"] = [token]
                if self.vllm:
                    choice["stop_reason"] = None
                    if leg.sent == 1:
                        choice["prompt_token_ids"] = [1, 2, 3]
                on_wire.append(_event({"id": "cmpl-fake", "object": "text_completion", "created": 1, "model": "fake", "choices": [choice]}))
        if self.interval_s:
            leg.times.append(time.monotonic())
        leg.connection.parts(on_wire)
        if finish is not None:
            if leg.times:
                self.times[leg.key] = leg.times
            del self.legs[leg.name]
            leg.connection.leg = None
            leg.connection.end()

    def _step(self) -> None:
        due = asyncio.get_running_loop().time() + self.interval_s
        for leg in list(self.legs.values()):
            self._token(leg)
        self.ticking = asyncio.get_running_loop().call_at(due, self._step)


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, fake: Fake) -> None:
        self.fake, self.leg = fake, None
        self._reset()

    def _reset(self) -> None:
        self.path, self.headers, self.body = "", {}, []
        self.parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        self.fake.connections.add(self)
        self.fake.opened += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.fake.connections.discard(self)
        if self.leg is not None:
            self.fake.dropped.append(self.leg.name)
            self.fake.legs.pop(self.leg.name, None)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.path = url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        method, path, headers, body = self.parser.get_method().decode(), self.path, self.headers, b"".join(self.body)
        self.path, self.headers, self.body = "", {}, []
        self.fake.answer(self, method, path, headers, body)

    def whole(self, status: int, body: bytes) -> None:
        head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
        self.transport.write(head + body)
        if self.fake.close_idle:
            self.transport.close()

    def begin(self, vllm: bool) -> None:
        kind = b"text/event-stream; charset=utf-8" if vllm else b"text/event-stream"
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n" % kind)

    def parts(self, events: list[bytes]) -> None:
        self.transport.write(b"".join([b"%x\r\n%b\r\n" % (len(event), event) for event in events]))

    def end(self) -> None:
        self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def close(self) -> None:
        self.transport.close()


def key_of(prompt: list[int]) -> str:
    return "-".join(map(str, prompt[:8]))


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


async def serve(interval_s: float, vllm: bool) -> None:
    async with Fake(vllm=vllm, interval_s=interval_s, keep=False) as fake:
        print(fake.url, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--interval-s", type=float, default=0.0)
    parser.add_argument("--vllm", action="store_true")
    given = parser.parse_args()
    import uvloop

    uvloop.run(serve(given.interval_s, given.vllm))


if __name__ == "__main__":
    main()
