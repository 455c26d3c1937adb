"""`edge-client doctor`: judgements on facts, and walks past real and fake servers."""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from transport.peers import PORTAL, REDIRECT, closed_port, http_answer, http_server, raw_server

from edge_client.cli import main
from edge_client.doctor import judgements
from edge_client.doctor.examine import NAMES, examine, not_checked
from edge_client.doctor.finding import Finding, Level, ok, problem, usable, warning
from edge_client.doctor.probes import Probes
from edge_client.doctor.report import as_json, as_text, verdict
from edge_client.runtime import prepare
from edge_client.settings import EdgeSettings
from split_llama.transport.address import ServerAddress
from tests.edge_client.certificates import make_certificates
from tests.edge_client.conftest import MakeSettings, ServeModel
from tests.edge_client.middleboxes import web_proxy, websocket_swallower

PLENTY = 2**40
NOW = 1_800_000_000.0
# A machine that is never too small or too busy, whatever the tests run on.
CALM = Probes(
    free_bytes=lambda _: PLENTY, available_memory=lambda: PLENTY, usable_cores=lambda: 8.0, load_average=lambda: 0.0
)


async def walk(settings: EdgeSettings, probes: Probes = CALM) -> dict[str, Finding]:
    findings = await asyncio.to_thread(lambda: list(examine(settings, probes, pings=3)))
    order = [NAMES.index(finding.name) for finding in findings]
    assert order == sorted(order)
    return {finding.name: finding for finding in findings}


def levels(findings: dict[str, Finding]) -> dict[str, str]:
    return {name: str(finding.level) for name, finding in findings.items() if finding.level is not Level.OK}


# Judgements


def test_an_address_without_tls_is_fine_on_this_machine_only() -> None:
    plain, secure = ServerAddress.parse("http://a:1"), ServerAddress.parse("https://a:1")
    assert judgements.judge_address(plain, loopback=True).level is Level.OK
    assert judgements.judge_address(secure, loopback=False).level is Level.OK
    finding = judgements.judge_address(plain, loopback=False)
    assert finding.level is Level.WARNING
    assert "can read the key and the states" in finding.text


def test_proxies_should_be_the_same_for_all_and_spare_this_machine() -> None:
    def judge(web: str | None, stream: str | None, *, loopback: bool = False) -> str:
        return str(judgements.judge_proxy(web, stream, loopback=loopback).level)

    proxy = "http://proxy:3128"
    assert judge(None, None) == judge(proxy, proxy) == "ok"
    assert judge(proxy, None) == judge(None, proxy) == "warning"
    assert judge(proxy, proxy, loopback=True) == "problem"


def test_a_certificate_near_its_end_is_a_warning() -> None:
    for days, level in ((30, Level.OK), (13, Level.WARNING)):
        expires = time.strftime("%b %d %H:%M:%S %Y GMT", time.gmtime(NOW + days * 86400))
        issuer = ((("organizationName", "Good CA"),), (("commonName", "R3"),))
        certificate = {"notAfter": expires, "issuer": issuer, "subject": ((("commonName", "a.example"),),)}
        finding = judgements.judge_certificate(certificate, NOW)
        assert finding.level is level
        assert "a.example, issued by Good CA" in finding.text
        assert finding.facts["expires"] in finding.text


@pytest.mark.parametrize(
    ("code", "words"), [(10, "clock"), (18, "--ca-certs"), (20, "captive portal"), (62, "made for"), (23, "ask")]
)
def test_an_untrusted_certificate_says_what_to_do(code: int, words: str) -> None:
    finding = judgements.judge_untrusted(code, "because", NOW)
    assert finding.level is Level.PROBLEM
    assert words in finding.advice


def test_the_clock_is_compared_with_the_servers() -> None:
    def judge(skew: float) -> Finding | None:
        return judgements.judge_clock(email.utils.formatdate(NOW - skew, usegmt=True), NOW)

    assert judgements.judge_clock(None, NOW) is None
    assert judgements.judge_clock("yesterday", NOW) is None
    for skew in (-100, 0, 100):
        found = judge(skew)
        assert found is not None
        assert found.level is Level.OK
    ahead, behind = judge(3600), judge(-3600)
    assert ahead is not None
    assert behind is not None
    assert "60 minutes ahead of" in ahead.text
    assert "60 minutes behind" in behind.text


def test_round_trips_disk_memory_and_processor(tmp_path: Path) -> None:
    assert judgements.judge_round_trip([10, 30, 20]).facts == {"median_ms": 20, "min_ms": 10, "max_ms": 30}
    assert judgements.judge_round_trip([200.0]).level is Level.WARNING
    for needed, free, level in ((0, 0, "ok"), (10, 9, "problem"), (10, 11, "warning"), (10, 12, "ok")):
        assert str(judgements.judge_disk(needed, free, tmp_path).level) == level
    for available, level in ((None, "ok"), (9, "problem"), (11, "warning"), (13, "ok")):
        assert str(judgements.judge_memory(10, available).level) == level
    for threads, cores, load, level in ((4, 2.0, None, "warning"), (2, 2.0, 3.0, "warning"), (2, 2.0, 1.0, "ok")):
        assert str(judgements.judge_threads(threads, cores, load).level) == level
    assert [judgements.size(count) for count in (999, 10**6, 16 * 10**9)] == ["1 kB", "1.0 MB", "16.0 GB"]


# The report


def test_the_report_has_every_line_its_advice_and_a_verdict() -> None:
    findings = [ok("name", "fine", addresses=["::1"]), warning("clock", "late", "set it"), problem("page", "no", "go")]
    assert as_text(findings[0]) == "ok       name         fine"
    assert as_text(findings[1]).splitlines() == ["warning  clock        late", " " * 22 + "-> set it"]
    assert not usable(findings)
    assert usable(findings[:2])
    missed = not_checked(findings)
    assert missed[0] == "address"
    assert "certificate" not in missed
    assert verdict(findings, ["model"]) == "not checked because of that: model\nnot usable: see the problems above"
    assert verdict(findings[:1], []) == "usable"
    report = json.loads(json.dumps(as_json(findings, ["model"])))
    assert (report["usable"], report["not_checked"]) == (False, ["model"])
    assert report["findings"][0]["facts"] == {"addresses": ["::1"]}


# Walks


async def test_a_good_server_is_good_and_nothing_is_left_behind(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    async with serve_model(tiny_checkpoint()) as url:
        settings = edge_settings(url)
        findings = await walk(settings)
        assert levels(findings) == {}
        assert not_checked(findings.values()) == []
        assert "will be pinned" in findings["weights"].text
        assert findings["disk"].facts["needed_bytes"] > 100_000
        assert not (settings.states() / "pins.json").exists()
        assert not settings.caches().exists()
        await asyncio.to_thread(prepare, settings)
        findings = await walk(settings)
        assert "the same as at first use" in findings["weights"].text
        assert findings["disk"].facts["needed_bytes"] == 0
        assert levels(await walk(dataclasses.replace(settings, partition="3,3"))) == {"model": "problem"}
        assert levels(await walk(dataclasses.replace(settings, partition="auto"))) == {}


async def test_weights_that_changed_since_the_first_use_are_a_problem(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    async with serve_model(tiny_checkpoint()) as url:
        settings = edge_settings(url)
        await asyncio.to_thread(prepare, settings)
        pins = settings.states() / "pins.json"
        changed = json.loads(pins.read_text())
        changed[url]["slices"]["1,1"] = "f" * 64
        pins.write_text(json.dumps(changed))
        findings = await walk(settings)
        assert levels(findings) == {"weights": "problem"}
        assert "--accept-new-weights" in findings["weights"].advice
        assert json.loads(pins.read_text()) == changed


async def test_a_small_machine_is_told_so(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    small = dataclasses.replace(
        CALM, free_bytes=lambda _: 1000, available_memory=lambda: 1000, usable_cores=lambda: 0.5
    )

    def denied(_: Path) -> int:
        raise PermissionError(13, "Permission denied")

    async with serve_model(tiny_checkpoint()) as url:
        expected = {"disk": "problem", "memory": "problem", "processor": "warning"}
        assert levels(await walk(edge_settings(url), small)) == expected
        findings = await walk(edge_settings(url), dataclasses.replace(CALM, free_bytes=denied))
        assert "Permission denied" in findings["disk"].text


async def test_names_and_ports_that_lead_nowhere(edge_settings: MakeSettings) -> None:
    def unknown(_: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def timed_out(host: str, port: int) -> float:
        raise TimeoutError

    url = closed_port()
    findings = await walk(edge_settings(url))
    assert "nothing listens" in findings["connection"].text
    assert levels(findings) == {"connection": "problem"}
    assert not_checked(findings.values())[:3] == ["page", "key", "model"]
    findings = await walk(edge_settings(url), dataclasses.replace(CALM, knock=timed_out))
    assert "firewall" in findings["connection"].advice
    findings = await walk(edge_settings("https://a.example"), dataclasses.replace(CALM, resolve=unknown))
    assert levels(findings) == {"name": "problem"}
    assert "connection" not in findings
    assert "processor" in findings, "what needs no server is looked at all the same"


@pytest.mark.parametrize(
    "answer", [PORTAL, REDIRECT, http_answer("200 OK", "application/json", b"[]"), b"220 smtp\r\n"]
)
async def test_a_foreign_page_is_told_apart(answer: bytes, edge_settings: MakeSettings) -> None:
    async with raw_server(answer) as url:
        findings = await walk(edge_settings(url))
    assert levels(findings) == {"page": "problem"}
    assert "log in" in findings["page"].advice
    assert "model" not in findings


def version_answer(protocol: int, *headers: str) -> bytes:
    return http_answer(
        "200 OK", "application/json", json.dumps({"version": "9", "protocol": protocol}).encode(), *headers
    )


async def test_a_wrong_key_another_protocol_and_another_time(edge_settings: MakeSettings) -> None:
    headers = [f"Date: {email.utils.formatdate(NOW - 3600, usegmt=True)}"]
    protocol = 1

    async def respond(head: str, _: bytes) -> bytes:
        if "GET /version" in head:
            return version_answer(protocol, *headers)
        assert "authorization: bearer wrong" in head.lower()
        return http_answer("401 Unauthorized", "text/plain", b"no")

    async with http_server(respond) as url:
        settings = edge_settings(url, api_key="wrong")
        findings = await walk(settings, dataclasses.replace(CALM, now=lambda: NOW))
        assert levels(findings) == {"clock": "warning", "key": "problem"}
        assert "--api-key" in findings["key"].advice
        assert "websocket" in not_checked(findings.values())
        protocol = 2
        findings = await walk(settings)
        assert "speaks version 2 of the protocol" in findings["page"].text


async def test_a_swallowed_websocket_is_a_warning_and_a_problem_for_who_insists(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    hasty = dataclasses.replace(CALM, patience=0.5)
    async with serve_model(tiny_checkpoint()) as url, websocket_swallower(url, []) as front:
        findings = await walk(edge_settings(front), hasty)
        assert levels(findings) == {"websocket": "warning"}
        assert "swallows" in findings["websocket"].text
        assert levels(await walk(edge_settings(front, transport="ws"), hasty)) == {"websocket": "problem"}


async def test_certificates_that_are_good_unknown_or_for_another_name(
    tmp_path: Path, tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "other").mkdir()
    good = make_certificates(tmp_path / "good")
    other = make_certificates(tmp_path / "other", address="DNS:another.example", days=3)
    for made in (good, other):
        pair = {"ssl_certfile": made / "server.pem", "ssl_keyfile": made / "server.key"}
        async with serve_model(tiny_checkpoint(), **pair) as plain:
            url = plain.replace("http://", "https://")
            findings = await walk(edge_settings(url))
            assert levels(findings) == {"certificate": "problem"}
            assert "--ca-certs" in findings["certificate"].advice
            findings = await walk(edge_settings(url, ca_certs=made / "ca.pem"))
            if made is good:
                assert levels(findings) == {}
                assert "issued by test CA" in findings["certificate"].text
            else:
                assert levels(findings) == {"certificate": "problem"}
                assert "the name the certificate was made for" in findings["certificate"].advice
    async with raw_server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        findings = await walk(edge_settings(url.replace("http://", "https://")))
        assert "TLS failed" in findings["certificate"].text


async def test_a_proxy_is_followed_to_the_certificate_and_warned_of_on_loopback(
    tmp_path: Path,
    tiny_checkpoint: Any,
    serve_model: ServeModel,
    edge_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_certificates(tmp_path)
    pair = {"ssl_certfile": made / "server.pem", "ssl_keyfile": made / "server.key"}
    seen: list[str] = []
    async with serve_model(tiny_checkpoint(), **pair) as plain, web_proxy(seen) as proxy:
        monkeypatch.setenv("https_proxy", proxy)
        url = plain.replace("http://", "https://")
        findings = await walk(edge_settings(url, ca_certs=made / "ca.pem"))
        assert levels(findings) == {"proxy": "problem"}, "our own machine through a proxy"
        assert "NO_PROXY" in findings["proxy"].advice
        assert findings["certificate"].level is Level.OK
        assert set(seen) == {f"CONNECT {url.removeprefix('https://')} HTTP/1.1"}
    refusing = http_answer("403 Forbidden", "text/plain", b"")
    async with raw_server(refusing) as proxy:
        monkeypatch.setenv("https_proxy", proxy)
        findings = await walk(edge_settings("https://192.0.2.1:8700"))
        assert "lets nobody through" in findings["certificate"].text


async def test_a_proxy_that_cannot_be_used_is_named(
    edge_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "gopher://127.0.0.1:9")
    findings = await walk(edge_settings("https://a.example"))
    assert levels(findings) == {"proxy": "problem"}
    assert "unset" in findings["proxy"].advice
    assert "processor" in findings


async def test_fallbacks_are_asked_too(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    async with serve_model(tiny_checkpoint()) as url, serve_model(tiny_checkpoint(hidden=64)) as larger:
        for fallback, level in ((url, None), (larger, "warning"), (closed_port(), "warning")):
            found = levels(await walk(edge_settings(url, fallback_server=(fallback,))))
            assert found.get("fallback") == level


def test_the_command_prints_lines_or_json_and_says_whether_it_will_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    url = closed_port()
    assert main(["doctor", "--server", url]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"ok       address      {url}: never leaves this machine"
    assert lines[-1] == "not usable: see the problems above"
    assert main(["doctor", "--server", url, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["usable"] is False
    assert main(["doctor"]) == 2
    assert main(["doctor", "--server", url, "--pings", "0"]) == 2
    assert main(["doctor", "--server", url, "--ca-certs", str(tmp_path / "none.pem")]) == 2


def test_the_probes_of_this_machine_give_facts(tmp_path: Path) -> None:
    probes = Probes()
    assert probes.free_bytes(tmp_path / "not" / "there" / "yet") > 0
    assert probes.usable_cores() > 0
    memory = probes.available_memory()
    assert memory is None or memory > 0
    assert probes.resolve("127.0.0.1") == ["127.0.0.1"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert probes.knock("127.0.0.1", server.getsockname()[1]) >= 0
