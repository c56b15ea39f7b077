"""The engine's own process: `python -m pdlab.real.instance.engine_process FD`.

It speaks length-prefixed msgpack over the socket it inherits; first its options come there, since anybody may read a command line.
One thread takes messages in and one sends them off while a step computes, so
that no step waits for HTTP; between two passes the engine looks whether any have come. Where nothing runs it sleeps on the queue. When the
other end closes, it ends.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pdlab.core.types import UsageError
from pdlab.real.engine.messages import (
    TO_ENGINE,
    AnyToEngine,
    AskLease,
    Cancel,
    Compile,
    Compiled,
    EngineBroken,
    Export,
    Exported,
    FromEngine,
    Holds,
    Lend,
    Loading,
    Proceed,
    Ready,
    Receive,
    Release,
    RenewLease,
    Resume,
    StopEngine,
    StructuredOutputs,
    Submit,
    Tokens,
    Vocabulary,
)
from pdlab.real.engine.options import OPTIONS, EngineOptions
from pdlab.real.host.logs import inherited
from pdlab.real.instance.followers import Followers, RankLost
from pdlab.real.instance.rank_meeting import address_of
from pdlab.real.instance.rank_messages import endpoint_options
from pdlab.replay.log_file import LogFile

if TYPE_CHECKING:  # torch is loaded where mistakes are told to the other end
    from llguidance import LLMatcher

    from pdlab.real.engine.engine import Engine
    from pdlab.real.engine.grammar import Grammars
    from pdlab.real.engine.load import Loaded
    from pdlab.real.instance.kv_service import KvService
    from pdlab.real.models.ranks import Ranks

log = logging.getLogger(__name__)
EXCHANGES_NO_KV = "this engine exchanges no KV"
ENDS_BY_ITSELF_S = 0.5  # an engine whose rank has gone, unless it waits for it
COMPILER_STACK_BYTES = 64 << 20  # many times what a grammar was let through with


class Link:
    """The engine's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.inbox: queue.SimpleQueue[AnyToEngine | Callable[[], None]] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.encoder = msgspec.msgpack.Encoder()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()
        self.writer = threading.Thread(target=self._write, name="outbox", daemon=True)
        self.writer.start()

    def _read(self) -> None:
        file = self.sock.makefile("rb")
        try:
            while head := file.read(4):
                self.inbox.put(TO_ENGINE.decode(file.read(int.from_bytes(head, "little"))))
        except (OSError, msgspec.MsgspecError):
            pass
        self.inbox.put(StopEngine())

    def _write(self) -> None:
        try:
            while raw := self.outbox.get():
                self.sock.sendall(len(raw).to_bytes(4, "little") + raw)
        except OSError:
            self.inbox.put(StopEngine())

    def send(self, message: FromEngine) -> None:
        self.outbox.put(self.encoder.encode(message))

    def close(self) -> None:
        """Wait until what was sent is on its way."""
        self.outbox.put(b"")
        self.writer.join(5)


def main() -> int:
    """Exits with 0 when told to stop, with 1 when broken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the HTTP process decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    options = _options(sock)
    link = Link(sock)
    try:
        with inherited():
            run(link, options)
    except UsageError as error:
        link.send(EngineBroken(str(error), usage=True))
    except RankLost as error:
        link.send(EngineBroken(str(error)))
    except Exception as error:
        log.exception("the engine has failed")
        link.send(EngineBroken(f"{type(error).__name__}: {error}"))
    else:
        return 0
    finally:
        link.close()
    return 1


def _options(sock: socket.socket) -> EngineOptions:
    head = sock.recv(4, socket.MSG_WAITALL)
    return OPTIONS.decode(sock.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL))


def run(link: Link, options: EngineOptions) -> None:
    """Load, say so, and serve until told to stop."""
    started_s = time.perf_counter()
    decisions = _log(options.decisions)
    link.send(Loading("loading torch"))
    with _followers(options, link) as followers:
        _run(link, options, decisions, followers, started_s)


@contextmanager
def _followers(options: EngineOptions, link: Link) -> Iterator[Followers | None]:
    """The other ranks, where there are any. When one goes, the engine ends."""
    if options.tp == 1:
        yield None
        return

    def lost(why: str) -> None:
        """In a thread: the engine's own may wait for the rank that has gone."""

        def end() -> None:
            raise RankLost(why)

        link.inbox.put(end)
        time.sleep(ENDS_BY_ITSELF_S)
        link.send(EngineBroken(why))
        link.close()
        os._exit(1)

    followers = Followers(options, lost)
    try:
        followers.start()
        yield followers
    except Exception as error:
        if isinstance(error, UsageError | RankLost) or not (why := followers.why()):
            raise
        raise RankLost(why) from error
    finally:
        followers.close()


def _run(link: Link, options: EngineOptions, decisions: LogFile | None, followers: Followers | None, started_s: float) -> None:
    from pdlab.kernels.cpu_build import build_all, unbuilt
    from pdlab.real.engine.load import load
    from pdlab.real.engine.self_profile import SelfProfile
    from pdlab.real.models.model import ALONE

    link.send(Loading("loading weights"))
    building = threading.Thread(target=build_all, name="kernels")  # while the weights are read
    if options.device == "cpu":
        if missing := unbuilt():
            link.send(Loading(f"loading weights; building kernels, once on this machine: {', '.join(missing)}"))
        building.start()
    try:
        if options.nnodes > 1:
            link.send(Loading(f"waiting for the ranks of {options.nnodes - 1} other nodes at {options.master}"))
        ranks = _meet(options, followers) if followers is not None else ALONE
        loaded = load(options, decisions, ranks, None if followers is None else followers.tell)
        if followers is not None:
            followers.await_ready(loaded.fingerprint)
        engine, config = loaded.engine, loaded.config
        if options.device == "cpu":
            building.join()
        link.send(Loading("warming up"))
        engine.warm_up()
        if followers is not None:
            followers.settled()
        ready = Ready(
            config.name,
            engine.worker.most_tokens,
            config.vocab,
            options.block_tokens,
            engine.scheduler.pool.total,
            str(loaded.device),
            str(loaded.dtype).removeprefix("torch."),
            kv_dtype=str(loaded.kv_dtype).removeprefix("torch."),
            block_bytes=config.kv_bytes_per_token(loaded.kv_dtype.itemsize) * options.block_tokens,
            context_tokens=loaded.context_tokens,
            drafts=0 if engine.speculation is None else engine.speculation.tokens,
            tp=options.tp,
        )
        if options.self_profile:
            link.send(Loading("measuring itself"))
            profile = SelfProfile(engine)
            ready = msgspec.structs.replace(ready, prefill_profile=profile.prefill(), decode_profile=profile.decode())
            if engine.scheduler.foresight is not None:
                engine.worker.commands.profile(ready.prefill_profile, ready.decode_profile)
        with _kv_service(options, loaded, link, followers) as kv_service:
            if kv_service is not None:
                ready = msgspec.structs.replace(ready, descriptor=kv_service.endpoint.descriptor(), engine_id=kv_service.engine_id)
            link.send(msgspec.structs.replace(ready, load_s=time.perf_counter() - started_s))
            EngineLoop(link, engine, kv_service, decisions).run()
    finally:
        if decisions is not None:
            decisions.close()


def _meet(options: EngineOptions, followers: Followers) -> Ranks:
    """Rank 0, when all are there."""
    from pdlab.real.engine.load import device_of
    from pdlab.real.models.process_group import GroupExchange, meeting
    from pdlab.real.models.ranks import Ranks

    followers.meet()
    host = address_of(options.master)[0] if options.nnodes > 1 else "127.0.0.1"
    store = meeting(host, 0, at_rank_0=True)
    followers.begin(host, store.port)
    return Ranks(0, options.tp, GroupExchange.over(store, 0, options.tp, device_of(options.device_of_rank(0)), host), options.ep)


def _log(path: str) -> LogFile | None:
    """Of the scheduler's decisions. Raises UsageError where it cannot be opened."""

    def warn(why: str) -> None:
        log.warning("%s: %s: nothing more is written to it, and requests are served on", path, why)

    try:
        return LogFile(Path(path), warn) if path else None
    except OSError as error:
        raise UsageError(f"--log {path}: {error.strerror}") from None


@contextmanager
def _kv_service(options: EngineOptions, loaded: Loaded, link: Link, followers: Followers | None) -> Iterator[KvService | None]:
    """The exchange of KV with other engines; None where none is wanted."""
    if not options.kv_name:
        yield None
        return
    from pdlab.real.host.background import Background
    from pdlab.real.instance.kv_service import KvService
    from pdlab.real.transfer.endpoint import KvEndpoint
    from pdlab.real.transfer.rank_kv import RankedEndpoint

    incarnation = secrets.token_hex(4)

    endpoint = (KvEndpoint if followers is None else RankedEndpoint)(
        loaded.engine.runner.kv,
        lease_read=lambda lease, blocks: kv_service.lease_read(lease, blocks),
        leases_renewed=lambda leases, lease_s: kv_service.leases_renewed(leases, lease_s),
        **endpoint_options(options, loaded.fingerprint, 0, incarnation, loaded.config.kv_heads),
    )
    if followers is not None:
        assert isinstance(endpoint, RankedEndpoint), "as made"
        endpoint.lead([descriptor for _, descriptor in sorted(followers.descriptors.items())], followers.tell_one)
        followers.kv_answered = endpoint.came
    background = Background("kv")
    try:
        background.run(endpoint.start())
        try:
            engine_id = f"{options.kv_name}-{incarnation}"
            kv_service = KvService(loaded.engine, endpoint, background, link.inbox.put, engine_id=engine_id, lease_s=options.lease_s)
            yield kv_service
        finally:
            background.run(endpoint.close())
    finally:
        background.close()


class Compiler:
    """Compiles grammars in a thread of its own, so that no step waits for one; the engine's thread keeps what comes of it."""

    def __init__(self, link: Link, engine: Engine) -> None:
        self.link, self.engine = link, engine
        self.work: queue.SimpleQueue[Vocabulary | Compile] = queue.SimpleQueue()
        self.grammars: Grammars | None = None
        self.trouble = "the engine was not told its vocabulary"
        self.thread: threading.Thread | None = None

    def start(self, vocabulary: Vocabulary) -> None:
        if self.thread is None:
            before = threading.stack_size(COMPILER_STACK_BYTES)
            self.thread = threading.Thread(target=self._run, name="grammars", daemon=True)
            self.thread.start()
            threading.stack_size(before)
        self.work.put(vocabulary)

    def compile(self, call: int, structured: StructuredOutputs) -> None:
        if self.thread is None:
            self.link.send(Compiled(call, self.trouble))
        else:
            self.work.put(Compile(call, structured))

    def _run(self) -> None:
        from pdlab.real.engine.grammar import Grammars

        while True:
            work = self.work.get()
            try:
                if isinstance(work, Vocabulary):
                    self.grammars = Grammars(work)
                elif self.grammars is None:
                    self._answer(work.call, self.trouble)
                else:
                    self._keep(work, self.grammars, self.grammars.compile(work.structured))
            except Exception as error:  # whoever asked waits for an answer
                if isinstance(work, Vocabulary):
                    self.trouble = str(error)
                else:
                    self._answer(work.call, str(error))

    def _answer(self, call: int, reason: str) -> None:
        self.link.inbox.put(lambda: self.link.send(Compiled(call, reason)))

    def _keep(self, work: Compile, grammars: Grammars, compiled: LLMatcher) -> None:
        def keep() -> None:
            self.engine.grammars = grammars
            grammars.keep(work.structured, compiled)
            self.link.send(Compiled(work.call, ""))

        self.link.inbox.put(keep)


class EngineLoop:
    """The engine's loop: what has come is taken in between two passes; where nothing can run, it sleeps until something comes."""

    def __init__(self, link: Link, engine: Engine, kv_service: KvService | None, log: LogFile | None = None) -> None:
        self.link, self.engine, self.kv_service, self.log = link, engine, kv_service, log
        self.compiler = Compiler(link, engine)
        self.mark_s = 0.0
        self.leases = self.used_blocks = 0  # as last told

    def run(self) -> None:
        inbox, engine = self.link.inbox, self.engine
        while True:
            while not engine.runnable or not inbox.empty():
                if not self.take(self.come()):
                    return
            self.mark_s = time.monotonic()
            if not engine.step(self.mark_s, self.emit, self.interrupted) and not self.take(self.come()):
                return
            if self.left_s() == 0.0:
                self.take(self.deadlines)

    def left_s(self) -> float | None:
        """Until the worker's next deadline."""
        wake_s = self.engine.worker.wake_s()
        return None if wake_s is None else max(0.0, wake_s - time.monotonic())

    def come(self) -> AnyToEngine | Callable[[], None]:
        """What comes next, if only a deadline."""
        try:
            return self.link.inbox.get(timeout=self.left_s())
        except queue.Empty:
            return self.deadlines

    def deadlines(self) -> None:
        if self.kv_service is not None:
            self.kv_service.deadlines()

    def interrupted(self) -> bool:
        return not self.link.inbox.empty()

    def take(self, message: AnyToEngine | Callable[[], None]) -> bool:
        """False: the end."""
        match message:
            case Submit():
                self.engine.submit(message, time.monotonic())
                if self.kv_service is not None:
                    self.kv_service.submitted(message)
            case Cancel(id, candidate):
                if self.kv_service is None or not self.kv_service.cancel(message):
                    self.engine.cancel(id, candidate)
            case Vocabulary():
                self.compiler.start(message)
            case Compile(call, structured):
                self.compiler.compile(call, structured)
            case StopEngine():
                return False
            case Receive() | Resume() | Proceed() | Release() | RenewLease() | AskLease() | Export() | Lend():
                if self.kv_service is not None:
                    self.kv_service.take(message, time.monotonic())
                else:
                    self.refuse(message)
            case _ if callable(message):
                message()
        if self.kv_service is not None and (self.kv_service.news or self.changed):
            self.emit([])
        return True

    @property
    def changed(self) -> bool:
        """Since it was last told. Blocks of a read that was called off are free when it has ended, which no pass tells."""
        return len(self.engine.scheduler.held) != self.leases or self.engine.scheduler.pool.used != self.used_blocks

    def refuse(self, message: Receive | Resume | Proceed | Release | RenewLease | AskLease | Export | Lend) -> None:
        """There is nobody to exchange KV with."""
        if isinstance(message, Export | Lend):
            self.link.send(Exported(message.call, EXCHANGES_NO_KV))
        elif isinstance(message, AskLease):
            self.link.send(Holds(message.call, False))
        elif isinstance(message, Receive | Resume):
            submit = message.submit
            self.emit([Tokens(submit.id, i, 0, [], "error", error=EXCHANGES_NO_KV) for i in range(submit.sampling.best_of)])

    def emit(self, outputs: list[Tokens]) -> None:
        """Tell what a pass has made, and what else there is to tell."""
        now, kv_service, engine = time.monotonic(), self.kv_service, self.engine
        if engine.batch is not None:
            seconds = now - self.mark_s
            engine.worker.meter.took(engine.batch, engine.joined, self.mark_s, seconds, 1, seconds, engine.each)
            engine.batch = None
        self.mark_s = now
        dropped = self.log.dropped if self.log is not None else 0
        if kv_service is None:
            self.link.send(msgspec.structs.replace(engine.load(outputs, now), log_dropped=dropped))
            return
        kv_service.looked_at(outputs)
        told, more = kv_service.news.take()
        for answer in told:
            if isinstance(answer, Exported | Holds):
                self.link.send(answer)
        load = self.engine.load([*outputs, *more], now)
        self.leases, self.used_blocks = load.leases, load.report.used_blocks
        self.link.send(
            msgspec.structs.replace(
                load,
                news=[one for one in told if not isinstance(one, Exported | Holds)],
                transfer_bytes=kv_service.receiving.received_bytes,
                failed_transfers=kv_service.receiving.failed,
                expired_leases=kv_service.lending.expired,
                log_dropped=dropped,
            )
        )


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # no need to wait for torch's threads
