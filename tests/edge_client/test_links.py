"""Which server and which transport: fallbacks, moves, private authorities, proxies, and WebSockets that are blocked."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from edge_client import connector
from edge_client.addresses import MOST_MOVES, Addresses
from edge_client.connector import LOYAL_ROUNDS, Connector
from edge_client.link import ServerLink
from edge_client.rest import RestClient
from edge_client.runtime import EdgeRuntime, prepare
from edge_client.settings import EdgeSettings
from loadtest.link_proxy import LinkProxy
from split_llama import errors
from split_llama.errors import ModelMismatch, NotAServer, RemoteError, ServerUnreachable, Unauthenticated, UsageError
from split_llama.transport.address import ServerAddress
from split_llama.transport.base import Channel
from split_llama.transport.inprocess import InProcessTransport
from split_llama.wire.control import HelloReply, Moved, Open
from split_llama.wire.frame import VERSION, Frame, Kind, split_message
from tests.edge_client.certificates import make_certificates
from tests.edge_client.conftest import MakeSettings, ServeModel
from tests.edge_client.middleboxes import web_proxy, websocket_swallower

PROMPT = [1, 5, 9, 70, 33]
A, B, C = "http://a:1", "http://b:2", "https://c:3/root"


def bases(addresses: list[ServerAddress]) -> list[str]:
    return [address.base for address in addresses]


async def tokens_of(settings: EdgeSettings, count: int = 12) -> list[int]:
    async with EdgeRuntime.connect(settings) as edge:
        turn = edge.turn(PROMPT, edge.params(max_new_tokens=count, ignore_eos=True))
        async with edge.open() as session:
            async for _ in session.generate(PROMPT, turn):
                pass
    return turn.tokens


# Addresses


def test_a_round_begins_with_the_current_server_and_goes_on_in_turn() -> None:
    addresses = Addresses([A, B, C, A + "/"])
    assert bases(addresses.round()) == [A, B, C]
    addresses.use(ServerAddress.parse(B))
    assert bases(addresses.round()) == [B, C, A]
    addresses.move("http://d:4")
    assert bases(addresses.round()) == ["http://d:4", A, B, C], "whoever moved away is asked again if need be"


def test_moves_without_an_answer_in_between_come_to_an_end() -> None:
    addresses = Addresses([A])
    for _ in range(3):
        for number in range(MOST_MOVES):
            addresses.move(f"http://d:{number + 1}")
        addresses.answered()
    for number in range(MOST_MOVES):
        addresses.move(f"http://d:{number + 1}")
    with pytest.raises(RemoteError, match="in circles"):
        addresses.move(A)


def test_a_move_never_gives_up_tls_and_says_where() -> None:
    addresses = Addresses([C])
    with pytest.raises(RemoteError, match=r"http://d:4, which has no TLS: nothing is sent there"):
        addresses.move("http://d:4")
    with pytest.raises(RemoteError, match="but not where"):
        addresses.move("somewhere")
    assert addresses.current.base == C
    addresses.move("wss://d:4")
    assert addresses.current.base == "https://d:4"
    Addresses([A]).move("https://d:4")


def test_wrong_addresses_are_mistakes_of_usage() -> None:
    for urls in ([], ["a:1"], [A, "ftp://b"]):
        with pytest.raises(UsageError):
            Addresses(urls)


# The connector, over scripted servers

REPLY = HelloReply(
    protocol=VERSION,
    server="fake",
    model="tiny",
    blocks=(1, 3),
    hidden_size=8,
    geometry="0" * 64,
    codecs=("fp32",),
    max_frame_bytes=65536,
    max_message_bytes=2**20,
    max_step_rows=256,
    max_model_len=64,
)


class Scripted:
    """Transports of several servers: each name answers HELLO with a reply, raises, or swallows (None)."""

    def __init__(self, **scripts: HelloReply | Exception | None) -> None:
        self.scripts: dict[str, HelloReply | Exception | None] = dict(scripts)
        self.asked: list[str] = []

    def transports(self, address: ServerAddress) -> list[Any]:
        return [ScriptedTransport(self, f"{kind}_{address.authority[0]}") for kind in ("ws", "http")]


class ScriptedTransport:
    def __init__(self, world: Scripted, name: str) -> None:
        self._world = world
        self._name = name

    async def connect(self) -> Channel:
        self._world.asked.append(self._name)
        script = self._world.scripts[self._name]
        if isinstance(script, Exception):
            raise script

        async def accept(channel: Channel) -> None:
            await channel.receive()
            if script is not None:
                await channel.send(Frame(Kind.HELLO, payload=script.to_bytes()).encode())
            await channel.receive()

        return await InProcessTransport(accept).connect()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector, "SHORT_HELLO_SECONDS", 0.05)
    monkeypatch.setattr(connector, "HELLO_SECONDS", 0.1)


async def asked(world: Scripted, making: Connector) -> list[str]:
    world.asked.clear()
    await (await making.connect()).close()
    return list(world.asked)


@pytest.mark.usefixtures("short")
async def test_a_websocket_that_is_refused_or_swallowed_gives_way_to_http_which_is_kept() -> None:
    for blocked in (NotAServer("a portal"), ServerUnreachable("reset"), None):
        world = Scripted(ws_a=blocked, http_a=REPLY)
        making = Connector(Addresses([A]), world.transports)
        assert await asked(world, making) == ["ws_a", "http_a"]
        assert await asked(world, making) == ["http_a"]
        assert making.hello == REPLY


@pytest.mark.usefixtures("short")
async def test_a_server_that_is_down_is_asked_over_the_proven_transport_then_over_all() -> None:
    world = Scripted(ws_a=REPLY, http_a=REPLY)
    making = Connector(Addresses([A]), world.transports)
    assert await asked(world, making) == ["ws_a"]
    world.scripts = {"ws_a": ServerUnreachable("down"), "http_a": REPLY}
    for _ in range(LOYAL_ROUNDS):
        with pytest.raises(ServerUnreachable, match="down"):
            await making.connect()
    assert await asked(world, making) == ["ws_a", "http_a"], "WebSocket may be blocked since"
    world.scripts = {"ws_a": REPLY, "http_a": None}
    assert await asked(world, making) == ["http_a", "ws_a"]


@pytest.mark.usefixtures("short")
async def test_the_others_are_asked_in_turn_and_the_one_that_answers_stays() -> None:
    down = ServerUnreachable("down")
    world = Scripted(ws_a=down, http_a=down, ws_b=Unauthenticated("no key"), ws_c=REPLY)
    making = Connector(Addresses([A, B, C]), world.transports)
    assert await asked(world, making) == ["ws_a", "http_a", "ws_b", "ws_c"]
    assert making.addresses.current.base == C
    world.scripts |= {"ws_a": REPLY, "ws_c": down}
    assert await asked(world, making) == ["ws_c", "ws_a"]
    world.scripts |= {"ws_a": down}
    with pytest.raises(ServerUnreachable, match="down"):
        await making.connect()


@pytest.mark.usefixtures("short")
async def test_a_refusal_that_stays_is_told_only_when_nobody_else_might_answer() -> None:
    refusal = Unauthenticated("no key")
    world = Scripted(ws_a=refusal, ws_b=ServerUnreachable("down"), http_b=ServerUnreachable("down"))
    with pytest.raises(ServerUnreachable):
        await Connector(Addresses([A, B]), world.transports).connect()
    with pytest.raises(Unauthenticated):
        await Connector(Addresses([A]), world.transports).connect()


@pytest.mark.usefixtures("short")
async def test_silence_is_unreachable_and_another_model_is_refused() -> None:
    world = Scripted(ws_a=None, http_a=None)
    with pytest.raises(ServerUnreachable, match="did not answer HELLO"):
        await Connector(Addresses([A]), world.transports).connect()
    world = Scripted(ws_a=REPLY, ws_b=REPLY.model_copy(update={"geometry": "1" * 64}))
    making = Connector(Addresses([A, B]), world.transports)
    assert await asked(world, making) == ["ws_a"]
    world.scripts |= {"ws_a": ServerUnreachable("down"), "http_a": ServerUnreachable("down")}
    with pytest.raises(ServerUnreachable):
        await making.connect()
    making.addresses.use(ServerAddress.parse(B))
    with pytest.raises(ModelMismatch, match="another model"):
        await Connector._reach(making, ServerAddress.parse(B))


# The link: moves that lead nowhere


async def moved_everywhere(connection: ServerConnection, address: str) -> None:
    async for message in connection:
        assert isinstance(message, bytes)
        for frame in split_message(message):
            if frame.kind is Kind.HELLO:
                await connection.send(Frame(Kind.HELLO, payload=REPLY.to_bytes()).encode())
            elif frame.kind in (Kind.OPEN, Kind.ATTACH):
                moved = Frame(Kind.MOVED, handle=frame.handle, payload=Moved(address=address).to_bytes())
                await connection.send(moved.encode())


OPENING = Open(session="0" * 32, secret="0" * 64, blocks=(1, 3))


async def test_servers_that_send_us_in_circles_end_the_sessions() -> None:
    own: list[str] = []
    async with serve(lambda connection: moved_everywhere(connection, own[0]), "127.0.0.1", 0) as server:
        own.append(f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}")
        async with ServerLink(Connector.of(EdgeSettings(server=own[0]))) as link:
            first, second = link.open(OPENING), link.open(OPENING)
            for session in (first, second):
                with pytest.raises(RemoteError, match="in circles"):
                    await session.take()
            with pytest.raises(RemoteError, match="in circles"):
                link.open(OPENING)


async def test_a_move_away_from_tls_is_refused(tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made / "server.pem", made / "server.key")
    async with serve(
        lambda connection: moved_everywhere(connection, "http://127.0.0.1:9"), "127.0.0.1", 0, ssl=context
    ) as server:
        url = f"https://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
        async with ServerLink(Connector.of(EdgeSettings(server=url, ca_certs=made / "ca.pem"))) as link:
            session = link.open(OPENING)
            with pytest.raises(RemoteError, match="which has no TLS: nothing is sent there"):
                await session.take()


# Real servers


@pytest.mark.parametrize("transport", ["ws", "http"])
async def test_a_private_authority_is_trusted_for_everything_and_nothing_else_is(
    transport: str, tmp_path: Path, tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    made = make_certificates(tmp_path)
    pair = {"ssl_certfile": made / "server.pem", "ssl_keyfile": made / "server.key"}
    async with serve_model(tiny_checkpoint(), **pair) as plain:
        url = plain.replace("http://", "https://")
        known = edge_settings(url, transport=transport, ca_certs=made / "ca.pem")
        assert len(await tokens_of(known)) == 12
        source = await asyncio.to_thread(prepare, known)
        unknown = edge_settings(url, transport=transport)
        with pytest.raises(ServerUnreachable, match="certificate is not trusted"):
            await asyncio.to_thread(prepare, unknown)
        with pytest.raises(ServerUnreachable, match="certificate is not trusted"):
            async with EdgeRuntime.connect(unknown, source=source):
                pass
        with pytest.raises(UsageError, match="cannot be read"):
            async with EdgeRuntime.connect(edge_settings(url, ca_certs=made / "none.pem"), source=source):
                pass


@pytest.mark.parametrize("transport", ["ws", "http"])
async def test_the_environments_certificates_are_honoured(
    transport: str,
    tmp_path: Path,
    tiny_checkpoint: Any,
    serve_model: ServeModel,
    edge_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_certificates(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made / "ca.pem"))
    pair = {"ssl_certfile": made / "server.pem", "ssl_keyfile": made / "server.key"}
    async with serve_model(tiny_checkpoint(), **pair) as plain:
        url = plain.replace("http://", "https://")
        assert len(await tokens_of(edge_settings(url, transport=transport))) == 12


@pytest.mark.parametrize("transport", ["ws", "http"])
@pytest.mark.parametrize("secure", [False, True])
async def test_proxies_of_the_environment_are_used_unless_it_says_no(
    transport: str,
    secure: bool,
    tmp_path: Path,
    tiny_checkpoint: Any,
    serve_model: ServeModel,
    edge_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_certificates(tmp_path)
    tls = {"ssl_certfile": made / "server.pem", "ssl_keyfile": made / "server.key"} if secure else {}
    seen: list[str] = []
    async with serve_model(tiny_checkpoint(), **tls) as plain, web_proxy(seen) as proxy:
        url = plain.replace("http://", "https://") if secure else plain
        settings = edge_settings(url, transport=transport, ca_certs=made / "ca.pem")
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, proxy)
        assert len(await tokens_of(settings)) == 12
        authority = url.partition("://")[2]
        rest = f"CONNECT {authority} HTTP/1.1" if secure else f"GET {url}/v1/model HTTP/1.1"
        assert seen[0] == rest
        frames = f"CONNECT {authority} HTTP/1.1" if secure or transport == "ws" else f"GET {url}/v1/model HTTP/1.1"
        assert seen[-1] == frames
        assert len(seen) >= 2
        seen.clear()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert len(await tokens_of(settings)) == 12
        assert seen == []


async def test_a_proxy_that_swallows_websockets_is_noticed(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "SHORT_HELLO_SECONDS", 0.5)
    swallowed: list[str] = []
    async with serve_model(tiny_checkpoint()) as url, websocket_swallower(url, swallowed) as front:
        assert await tokens_of(edge_settings(front)) == await tokens_of(edge_settings(url))
    assert swallowed == ["GET /v1/stream HTTP/1.1"]


async def test_by_http_too_an_answer_survives_cuts(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    async with serve_model(tiny_checkpoint()) as url, LinkProxy("127.0.0.1", int(url.rpartition(":")[2])) as proxy:
        expected = await tokens_of(edge_settings(url), 60)
        async with EdgeRuntime.connect(edge_settings(proxy.url, transport="http")) as edge:
            turn = edge.turn(PROMPT, edge.params(max_new_tokens=60, ignore_eos=True))
            tokens = []
            async with edge.open() as session:
                async for event in session.generate(PROMPT, turn):
                    tokens.append(event.token)
                    if len(tokens) % 10 == 5:
                        proxy.cut()
        assert proxy.counters.cuts == 6
    assert tokens == expected


async def test_a_fallback_with_other_weights_gets_nothing(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    async with (
        serve_model(tiny_checkpoint(seed=1)) as other,
        serve_model(tiny_checkpoint()) as url,
        LinkProxy("127.0.0.1", int(url.rpartition(":")[2])) as proxy,
        EdgeRuntime.connect(edge_settings(proxy.url, fallback_server=(other,), reconnect_seconds=5.0)) as edge,
        edge.open() as session,
    ):
        answer = session.generate(PROMPT, edge.turn(PROMPT, edge.params(max_new_tokens=60, ignore_eos=True)))
        await anext(answer)
        proxy.refuse(600)
        proxy.cut()
        with pytest.raises(ModelMismatch, match="weights"):
            async for _ in answer:
                pass


async def test_at_the_start_whoever_is_there_will_do(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    async with serve_model(tiny_checkpoint()) as url:
        expected = await tokens_of(edge_settings(url))
        nobody = "http://127.0.0.1:9"
        assert await tokens_of(edge_settings(nobody, fallback_server=("http://127.0.0.1:10", url))) == expected
        rest = RestClient(nobody, fallbacks=("http://127.0.0.1:10",))
        with pytest.raises(ServerUnreachable, match=nobody):
            rest.model_card()
        assert rest.address.base == nobody
        rest.close()


def test_the_deadline_is_seconds_above_zero() -> None:
    from edge_client.settings import SECTION
    from split_llama.settings import load_settings

    loaded = load_settings(EdgeSettings, SECTION, {"request_timeout": "2.5", "fallback_server": [A, B]}, environ={})
    assert (loaded.settings.request_timeout, loaded.settings.fallback_server) == (2.5, (A, B))
    with pytest.raises(errors.UsageError, match="seconds above 0"):
        load_settings(EdgeSettings, SECTION, {"request_timeout": "0"}, environ={})
