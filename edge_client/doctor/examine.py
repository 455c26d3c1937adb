"""Walks from the server's name to this machine's memory; what fails on the way ends only what needs it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import ssl as ssl_module
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from edge_client.doctor import judgements, server
from edge_client.doctor.finding import Finding, Level, ok, problem, warning
from edge_client.doctor.probes import Probes
from edge_client.rest import ModelCard, RestClient
from edge_client.settings import EdgeSettings
from split_llama.config import Partition
from split_llama.errors import (
    CacheError,
    FlLlamaError,
    PinMismatch,
    ServerUnreachable,
    Unauthenticated,
    UsageError,
)
from split_llama.transport import failures
from split_llama.transport.address import ServerAddress
from split_llama.transport.base import Transport
from split_llama.transport.http import HttpTransport
from split_llama.transport.trust import tls_context
from split_llama.transport.websocket import WebSocketTransport

if TYPE_CHECKING:
    from edge_client.weights import Offer

# All lines there can be, in their order; `clock` and `fallback` are left out where there is nothing to say.
NAMES = (
    *("address", "proxy", "name", "connection", "certificate", "page", "clock", "key"),
    *("model", "websocket", "http", "round trip", "weights", "fallback", "disk", "memory", "processor"),
)
OPTIONAL = frozenset({"certificate", "clock", "fallback"})
LOCK_ADVICE = "see what the message says; the folder must be readable and writable by you"

Walk = Generator[Finding, None, bool]


def examine(settings: EdgeSettings, probes: Probes | None = None, *, pings: int = 10) -> Generator[Finding, None, None]:
    """Yield the findings as they come. Blocking; nothing is changed and no state is sent. Raises `UsageError`."""
    yield from Examination(settings, probes or Probes(), pings).walk()


def not_checked(findings: Iterable[Finding]) -> list[str]:
    """Name what could not be looked at because something before it failed."""
    seen = {finding.name for finding in findings}
    return [name for name in NAMES if name not in seen and name not in OPTIONAL]


class Examination:
    """One walk, and what was learned on it."""

    def __init__(self, settings: EdgeSettings, probes: Probes, pings: int) -> None:
        self._settings = settings
        self._probes = probes
        self._pings = pings
        self._address = ServerAddress.parse(settings.server_url())
        self._trust = tls_context(settings.ca_certs)
        self._card: ModelCard | None = None
        self._partition: Partition | None = None
        self._offer: Offer | None = None

    def walk(self) -> Generator[Finding, None, None]:
        """Look at everything that can be looked at."""
        try:
            web = server.Web(self._address, self._settings.api_key, self._trust)
        except UsageError as error:
            yield problem("proxy", error.message, "set HTTP_PROXY and HTTPS_PROXY to http://HOST:PORT, or unset them")
        else:
            with contextlib.closing(web):
                yield from self._server(web)
        yield from self._machine()

    def _server(self, web: server.Web) -> Generator[Finding, None, None]:
        rest = RestClient(self._address.base, self._settings.api_key, ssl=self._trust)
        with contextlib.closing(rest):
            if (yield from self._way()) and (yield from self._page(web)) and (yield from self._model(rest)):
                yield from self._transports()
                yield self._round_trip(web)
                yield from self._weights(rest)
            yield from self._fallbacks()

    def _way(self) -> Walk:
        """Look at the way there; says whether it can be gone."""
        address, loopback = self._address, _is_loopback(self._address.host)
        yield judgements.judge_address(address, loopback=loopback)
        web, stream = self._probes.proxies(address)
        yield judgements.judge_proxy(web, stream, loopback=loopback)
        proxy = web or stream
        via = urlsplit(proxy) if proxy is not None else None
        host, port = ((via.hostname or "", via.port or 80)) if via is not None else (address.host, address.port)
        whose = "the proxy" if via is not None else "the server"
        looks: list[Callable[[], Finding]] = [
            lambda: self._name(host, whose),
            lambda: self._connection(host, port, whose),
        ]
        if address.secure:
            looks.append(lambda: self._certificate(web))
        for look in looks:
            finding = look()
            yield finding
            if finding.level is Level.PROBLEM:
                return False
        return True

    def _name(self, host: str, whose: str) -> Finding:
        try:
            found = self._probes.resolve(host)
        except OSError as error:
            return problem(
                "name",
                f"{host} ({whose}) cannot be looked up: {error.strerror or error}",
                "check the spelling, then whether this machine is online and its DNS works (VPN?)",
            )
        if found == [host]:
            return ok("name", f"{host} is an address, there is nothing to look up")
        return ok("name", f"{host} ({whose}) is {', '.join(found)}", addresses=found)

    def _connection(self, host: str, port: int, whose: str) -> Finding:
        try:
            seconds = self._probes.knock(host, port)
        except ConnectionRefusedError:
            return problem(
                "connection",
                f"nothing listens on {host} port {port}",
                f"is {whose} running, and is the port right? split-server listens on 8700 unless told otherwise",
            )
        except TimeoutError:
            return problem(
                "connection",
                f"{host} port {port} does not answer at all",
                "a firewall on the way, or a machine that is off: ask whoever runs the network or the server",
            )
        except OSError as error:
            return problem(
                "connection",
                f"{host} port {port} cannot be reached: {error.strerror or error}",
                "check that this machine is online",
            )
        return ok("connection", f"{whose} takes connections on port {port} ({seconds * 1000:.1f} ms)")

    def _certificate(self, proxy: str | None) -> Finding:
        now = self._probes.now()
        try:
            return judgements.judge_certificate(self._probes.certificate(self._address, self._trust, proxy), now)
        except ssl_module.SSLCertVerificationError as error:
            return judgements.judge_untrusted(error.verify_code, error.verify_message, now)
        except (OSError, UsageError) as error:
            failure = failures.unreachable(self._address.base, error)
            return problem("certificate", failure.message, "compare the address with what the server says at its start")

    def _page(self, web: server.Web) -> Walk:
        """See what answers; says whether it is a split-server."""
        try:
            answer, date = web.version()
            server.check_protocol(answer)
        except FlLlamaError as error:
            advice = "open any page in a browser on this network and log in, if it asks; check address and port"
            if isinstance(error, ServerUnreachable):
                advice = "the way is there, the server is not: try again, or ask whoever runs it"
            yield problem("page", error.message, advice)
            return False
        yield ok("page", f"a split-server answers, version {answer.get('version', 'unknown')}")
        clock = judgements.judge_clock(date, self._probes.now())
        if clock is not None:
            yield clock
        return True

    def _model(self, rest: RestClient) -> Walk:
        """Ask what is served; says whether the server talks to us."""
        key = "your key is accepted" if self._settings.api_key is not None else "the server asks for none"
        try:
            self._card = rest.model_card()
        except Unauthenticated as error:
            advice = "ask whoever runs the server for a key, and give it with --api-key"
            yield problem("key", error.message, advice)
            return False
        except FlLlamaError as error:
            yield problem("model", error.message, "if it does not pass, ask whoever runs the server")
            return True
        yield ok("key", key)
        card = self._card
        try:
            partition = server.partition_of(self._settings, card)
            card.check_partition(partition)
        except UsageError as error:
            yield problem("model", error.message, "choose another --partition, or auto")
            return True
        self._partition = partition
        text = f"{card.id}, {card.num_hidden_layers} blocks, {card.max_model_len} tokens of context"
        yield ok("model", f"{text}; partition {partition} is allowed", model=card.id)
        return True

    def _transports(self) -> Generator[Finding, None, None]:
        """Try both transports; one is enough, unless the settings insist."""
        url, key, wanted = self._address.base, self._settings.api_key, self._settings.transport
        socket = self._try(WebSocketTransport(url, key, ssl=self._trust))
        posts = self._try(HttpTransport(url, key, ssl=self._trust))
        if socket is None:
            yield ok("websocket", "it opens, and the server answers HELLO")
        elif posts is None and wanted != "ws":
            yield warning(
                "websocket",
                f"it does not work here: {socket.message}",
                f"frames go by HTTP instead, which is slower; the network should let {self._address.stream} pass",
            )
        else:
            yield problem("websocket", socket.message, "allow WebSocket on the way, or say --transport auto")
        if posts is None:
            yield ok("http", "frames by POST work too")
        elif socket is None and wanted != "http":
            yield warning("http", f"there is no way round by POST: {posts.message}", "not needed while WebSocket works")
        else:
            yield problem("http", posts.message, "see what the message says")

    def _try(self, transport: Transport) -> FlLlamaError | None:
        try:
            server.greet(transport, self._probes.patience)
        except FlLlamaError as error:
            return error
        return None

    def _round_trip(self, web: server.Web) -> Finding:
        try:
            return judgements.judge_round_trip(web.round_trips(self._pings))
        except FlLlamaError as error:
            return problem("round trip", error.message, "the line breaks now and then: try again")

    def _weights(self, rest: RestClient) -> Generator[Finding, None, None]:
        """Compare the offered weights with the pins; nothing is pinned."""
        if self._card is None or self._partition is None:
            return
        from edge_client.weights import ask_offer, check_pin

        try:
            self._offer = ask_offer(rest, self._partition, self._card.geometry)
            if self._settings.model is not None:
                yield ok("weights", f"your own copy is used ({self._settings.model}); it is compared at the start")
                return
            state = server.PeekingState(self._settings.states())
            first = check_pin(state, self._address.base, self._offer, accept_new=False)
        except PinMismatch as error:
            advice = "if whoever runs the server says that the model was changed, run once with --accept-new-weights"
            yield problem("weights", error.message, advice)
        except CacheError as error:
            yield problem("weights", error.message, LOCK_ADVICE)
        except FlLlamaError as error:
            yield problem("weights", error.message, "see what the message says")
        else:
            known = "not used before: they will be pinned" if first else "the same as at first use"
            yield ok("weights", f"{self._offer.identity[:12]}, {known}", identity=self._offer.identity)

    def _fallbacks(self) -> Generator[Finding, None, None]:
        for url in self._settings.fallback_server:
            rest = RestClient(url, self._settings.api_key, ssl=self._trust)
            try:
                card = rest.model_card()
            except FlLlamaError as error:
                yield warning("fallback", f"{url}: {error.message}", "it will be of no help when the first is lost")
            else:
                if self._card is not None and card.geometry != self._card.geometry:
                    yield warning("fallback", f"{url} serves another model ({card.id})", "name a server of the same")
                else:
                    yield ok("fallback", f"{url} answers, and serves {card.id}")
            finally:
                rest.close()

    def _machine(self) -> Generator[Finding, None, None]:
        """Look at this machine; disk and memory need to know what the server offers."""
        settings = self._settings
        if self._offer is not None and self._card is not None:
            folder = settings.caches()
            needed = 0 if settings.model is not None else server.still_to_fetch(self._offer, folder)
            try:
                yield judgements.judge_disk(needed, self._probes.free_bytes(folder), folder)
            except OSError as error:
                yield problem("disk", f"{folder} cannot be looked at: {error.strerror or error}", LOCK_ADVICE)
            weights = server.weights_in_memory(self._offer, self._card.dtype, settings)
            yield judgements.judge_memory(weights, self._probes.available_memory())
        threads = settings.threads or max(1, (os.cpu_count() or 1) // 2)
        yield judgements.judge_threads(threads, self._probes.usable_cores(), self._probes.load_average())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
