"""The server without its network: sessions, their rules, and the engine loop. Lives on one event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from enum import Enum

from serving.admission import check_attach, check_digests, check_request
from serving.extensions import Extensions
from serving.hosted import Hosted
from serving.keys import KeyRing, Principal
from serving.memory import PageBudget
from serving.metrics import Metrics
from serving.passes import Passes
from serving.quanta import Quanta
from serving.registry import Entry, Mailbox, Registry
from serving.scheduler import Scheduler
from serving.session import Phase, Session
from serving.settings import ServerSettings
from serving.steps import Step
from serving.worker import Worker
from split_llama.config import BlockRange
from split_llama.engine.pages import PagePool
from split_llama.errors import (
    BadRequest,
    Draining,
    FlLlamaError,
    ServerFault,
    ServerUnreachable,
    UnknownSession,
)
from split_llama.wire.control import Fork, Grant, Moved, Open, error_frame
from split_llama.wire.frame import Frame, Kind

SWEEP_SECONDS = 1.0
RETRY_LOADING_MS = 500
RETRY_DRAINING_MS = 1000

log = logging.getLogger("fl_llama.server")


class Stage(Enum):
    """Life of the server."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Core:
    """What connections and REST stand on. Made before the model is there; `serve` brings it up."""

    def __init__(self, settings: ServerSettings, keys: KeyRing, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.keys = keys
        self.clock = clock
        self.metrics = Metrics()
        self.registry = Registry(settings.max_sessions, settings.idle_seconds, settings.grace_seconds)
        self.stage = Stage.LOADING
        self.started = int(time.time())
        self.closing = asyncio.Event()
        self.connections: set[object] = set()
        self._hosted: Hosted | None = None
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweepers: list[Callable[[], None]] = []
        self._broken = False
        self._register_gauges()
        self.extensions = Extensions.find(self, settings.extension)

    def _register_gauges(self) -> None:
        gauge, registry = self.metrics.gauge, self.registry
        gauge("sessions", "Sessions held", lambda: len(registry))
        gauge("connections", "WebSocket connections", lambda: len(self.connections))
        gauge("num_requests_running", "Sessions in the running pass", registry.num_running)
        gauge("num_requests_waiting", "Sessions with queued steps only", registry.num_waiting)
        gauge("background_seconds", "Time that extensions have computed", self._background_seconds)
        self._register_memory_gauges()

    def _background_seconds(self) -> float:
        return 0.0 if self._worker is None else self._worker.background.seconds

    def _register_memory_gauges(self) -> None:
        def gauge(name: str, text: str, read: Callable[[PageBudget, PagePool], float]) -> None:
            def value() -> float:
                return 0.0 if self._hosted is None else read(self._hosted.pages, self._hosted.engine.pool)

            self.metrics.gauge(name, text, value)

        gauge("kv_cache_usage_ratio", "KV pages in use, 1 is all", lambda _, pool: pool.num_used / pool.num_pages)
        gauge("kv_cache_pages", "KV pages", lambda budget, _: budget.num_pages)
        gauge("kv_cache_used_pages", "KV pages in use", lambda _, pool: pool.num_used)
        gauge("kv_cache_page_bytes", "Bytes of one KV page", lambda budget, _: budget.page_bytes)
        gauge("kv_cache_bytes", "Bytes of all KV pages", lambda budget, _: budget.num_bytes)
        gauge("kv_swap_bytes", "Host memory for swapped pages", lambda budget, _: budget.swap_pages * budget.page_bytes)
        gauge("kv_swap_used_bytes", "Of it in use", lambda budget, pool: pool.num_swapped * budget.page_bytes)

    # Life

    @property
    def hosted(self) -> Hosted:
        """The model. Raises `ServerUnreachable` (503, try again) while it is being loaded."""
        if self._hosted is None:
            raise ServerUnreachable("the server is still loading its model", retry_after_ms=RETRY_LOADING_MS)
        return self._hosted

    @property
    def worker(self) -> Worker:
        """The engine loop. Raises as `hosted` does."""
        if self._worker is None:
            raise ServerUnreachable("the server is still loading its model", retry_after_ms=RETRY_LOADING_MS)
        return self._worker

    @property
    def is_ready(self) -> bool:
        """Say whether new sessions are taken."""
        return self.stage is Stage.READY and self.is_healthy

    @property
    def is_healthy(self) -> bool:
        """Say whether the process can go on: false once the engine keeps failing."""
        return not self._broken and (self._worker is None or self._worker.is_healthy)

    def serve(self, hosted: Hosted, passes: Passes | None = None) -> None:
        """Begin to work with a loaded model, through its own passes unless others are given."""
        self._hosted = hosted
        self._scheduler = Scheduler(hosted.max_rows, hosted.max_num_seqs)
        self._worker = Worker(
            hosted.engine,
            passes or hosted.passes,
            self.registry,
            self._scheduler,
            self.metrics,
            self.clock,
            self.settings.evict_seconds,
            Quanta(self.settings.background_quantum / 1000, self.settings.background_share),
        )
        self._spawn(self._worker.run(), "worker")
        self._spawn(self._worker.background.run(), "background")
        self._spawn(self._sweep_often(), "sweep")
        self.stage = Stage.READY
        self._spawn(self.extensions.start(), "extensions")

    async def drain(self) -> None:
        """Take nothing new, finish what is queued, for `drain_seconds` at most, and name the successor, if any."""
        if self.stage is Stage.READY:
            self.stage = Stage.DRAINING
            try:
                async with asyncio.timeout(self.settings.drain_seconds):
                    await self.worker.wait_idle()
            except TimeoutError:
                log.warning("draining took too long; queued steps are dropped seconds=%g", self.settings.drain_seconds)
            if self.settings.successor is not None:
                moved = Moved(address=self.settings.successor).to_bytes()
                for entry in self.registry:
                    entry.send(Frame(Kind.MOVED, payload=moved))
        self.stage = Stage.DRAINING

    async def aclose(self) -> None:
        """Stop all tasks and free all sessions."""
        self.stage = Stage.DRAINING
        await self.extensions.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for entry in list(self.registry):
            self.remove(entry)

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # Nobody awaits these tasks, and without them steps would wait for ever.
            self._broken = True
            log.critical("a task of the server failed task=%s", task.get_name(), exc_info=task.exception())

    async def _sweep_often(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.sweep()

    def on_sweep(self, sweeper: Callable[[], None]) -> None:
        """Have something done with every sweep."""
        self._sweepers.append(sweeper)

    def sweep(self) -> None:
        """Close sessions that are idle or past their grace period, and those of revoked keys."""
        for sweeper in self._sweepers:
            sweeper()
        gone = self.registry.expired(self.clock())
        owners = {entry.owner for entry in self.registry}
        revoked = {owner for owner in owners if self.keys.current(owner) is None}
        gone += [entry for entry in self.registry if entry.owner in revoked and entry not in gone]
        for entry in gone:
            self.remove(entry)
        if gone:
            log.info(
                "sessions closed count=%d of_revoked_keys=%s left=%d", len(gone), bool(revoked), len(self.registry)
            )

    # Sessions

    def grant(self, entry: Entry) -> bytes:
        """Give the payload that answers OPEN, ATTACH and FORK."""
        terms, session = entry.session.terms, entry.session
        return Grant(
            window_steps=terms.window_steps,
            window_bytes=terms.window_bytes,
            length=session.settled.length,
            seq=session.applied,
            grace_seconds=self.settings.grace_seconds,
        ).to_bytes()

    def open(self, request: Open, principal: Principal, mailbox: Mailbox, handle: int) -> Entry:
        """Open a session. Raises the refusals of OPEN; the answer follows once the digests are checked."""
        self._refuse_while_draining()
        self.registry.admit(request.session, principal)
        entry = self._create(request, principal, mailbox, handle)
        self._verify(entry, request)
        return entry

    def attach(self, request: Open, principal: Principal, mailbox: Mailbox, handle: int) -> Entry:
        """Take a session to this connection, or make it anew from the request if it is unknown here."""
        self._refuse_while_draining()
        entry = self.registry.find(request.session, principal.owner, request.secret)
        if entry is None:
            self.registry.admit(request.session, principal)
            entry = self._create(request, principal, mailbox, handle)
            entry.session.lose()
            entry.answer = Kind.ATTACH
            self._verify(entry, request)
            return entry
        check_attach(entry, self.hosted, request)
        entry.bind(mailbox, handle)
        entry.active_at, entry.answer = self.clock(), Kind.ATTACH
        if entry.verified:
            self._welcome(entry)
        return entry

    def _welcome(self, entry: Entry) -> None:
        if entry.session.phase in (Phase.LOST, Phase.WAITING):
            entry.send(entry.session.resync())
        else:
            entry.send(Frame(entry.answer, payload=self.grant(entry)))
        self.worker.kick(entry)

    def fork(self, parent: Entry, request: Fork, principal: Principal, mailbox: Mailbox, handle: int) -> Entry:
        """Fork a session at a settled position. Raises `PositionGap` and the refusals of OPEN."""
        self._refuse_while_draining()
        if not parent.verified:
            raise BadRequest("the parent is still being checked: wait for its Grant before you fork it")
        self.registry.admit(request.session, principal)
        child = self.worker.fork(parent, request.at)
        blocks = (parent.blocks.start, parent.blocks.stop)
        opening = Open(session=request.session, secret=request.secret, blocks=blocks)
        entry = self.registry.add(opening, principal, child, self.clock())
        entry.bind(mailbox, handle)
        self.metrics.sessions_opened.inc()
        entry.answer = Kind.FORK
        self._welcome(entry)
        return entry

    def step(self, entry: Entry, frame: Frame, principal: Principal) -> None:
        """Take in a STEP. Raises its refusal."""
        self._refuse_while_draining()
        now = self.clock()

        def admit(step: Step) -> None:
            self.registry.take_tokens(principal, step.count, now)

        taken = entry.session.offer(frame, now, admit)
        entry.active_at = now
        if isinstance(taken, Frame):
            entry.send(taken)
        elif taken is not None:
            if entry.first_step_at is None:
                entry.first_step_at = now
            self.worker.kick(entry)

    def remove(self, entry: Entry) -> None:
        """Close a session for good."""
        owner_is_gone = self.registry.remove(entry)
        if self._scheduler is not None:
            self._scheduler.forget(entry)
            self.worker.forget(entry)
            if owner_is_gone:
                self._scheduler.forget_owner(entry.owner)

    def _refuse_while_draining(self) -> None:
        if self.stage is Stage.DRAINING:
            raise Draining(
                "the server is shutting down and takes nothing new; connect again in a moment",
                retry_after_ms=RETRY_DRAINING_MS,
            )

    def _create(self, request: Open, principal: Principal, mailbox: Mailbox, handle: int) -> Entry:
        hosted = self.hosted
        check_request(hosted, request)
        blocks = BlockRange(*request.blocks)
        sequence = hosted.engine.sequence(blocks, hosted.max_model_len, hosted.adapters.number(request.adapter))
        session = Session(sequence, hosted.engine.pool, hosted.terms)
        entry = self.registry.add(request, principal, session, self.clock())
        entry.bind(mailbox, handle)
        self.metrics.sessions_opened.inc()
        return entry

    # Digests: hashing takes seconds, so a session waits for it and its steps queue up meanwhile

    def _verify(self, entry: Entry, request: Open) -> None:
        if request.weights is None and request.tokenizer is None:
            self._welcome(entry)
            return
        entry.verified = False
        self._spawn(self._verify_later(entry, request), "verify")

    async def _verify_later(self, entry: Entry, request: Open) -> None:
        try:
            await check_digests(self.hosted, request)
        except FlLlamaError as error:
            self._turn_away(entry, error)
        except Exception:
            log.exception("digests could not be computed")
            self._turn_away(entry, ServerFault("the server could not compute its digests; its log says more"))
        else:
            entry.verified = True
            if entry.session.phase is not Phase.CLOSED:
                self._welcome(entry)

    def _turn_away(self, entry: Entry, error: FlLlamaError) -> None:
        self.count_refusal(error)
        entry.send(error_frame(entry.handle, 0, error))
        for step in entry.session.queued:
            entry.send(error_frame(entry.handle, step.seq, UnknownSession("the session was refused")))
        self.remove(entry)

    def count_refusal(self, error: FlLlamaError) -> None:
        """Count a refusal by its class."""
        self.metrics.refusals.labels(type(error).__name__).inc()

    def find_own(self, ident: str, principal: Principal) -> Entry:
        """Look an own session up. Raises `UnknownSession`, `NotOwner`."""
        entry = self.registry.find(ident, principal.owner)
        if entry is None:
            raise UnknownSession("no session of this id is held here")
        return entry
