"""What measured facts mean, in plain words. Pure functions: facts in, findings out."""

from __future__ import annotations

import datetime
import email.utils
import ssl
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_client.doctor.finding import Finding, ok, problem, warning
from split_llama.transport.address import ServerAddress

MOST_SKEW_SECONDS = 120
FEW_DAYS = 14
LONG_ROUND_TRIP_MS = 150.0
# OpenSSL's codes for a certificate that was refused (X509_V_ERR_...).
_OUT_OF_DATE = frozenset({9, 10})
_UNKNOWN_AUTHORITY = frozenset({18, 19, 20, 21})
_OTHER_NAME = frozenset({62, 63, 64})


def judge_address(address: ServerAddress, *, loopback: bool) -> Finding:
    """Is it encrypted where it must be?"""
    if address.secure or loopback:
        return ok("address", f"{address.base}: {'encrypted' if address.secure else 'never leaves this machine'}")
    return warning(
        "address",
        f"{address.base} is not encrypted: whoever is on the way can read the key and the states",
        "use https://, unless something else encrypts the way (a VPN, an SSH tunnel)",
    )


def judge_proxy(web: str | None, stream: str | None, *, loopback: bool) -> Finding:
    """Which proxies of the environment take part? `web` is that of plain requests, `stream` the WebSocket's."""
    if web is None and stream is None:
        return ok("proxy", "the environment names no proxy for this server")
    names = sorted({proxy for proxy in (web, stream) if proxy is not None})
    if loopback:
        return problem(
            "proxy",
            f"the environment sends even this machine's own server through a proxy ({', '.join(names)})",
            "set NO_PROXY=127.0.0.1,localhost",
            proxies=names,
        )
    if web is None or stream is None:
        which = "WebSocket" if web is None else "plain requests"
        text = f"only {which} would go through the proxy {names[0]}: the two ways may fare differently"
        return warning("proxy", text, "set HTTP_PROXY and HTTPS_PROXY alike, or NO_PROXY for this host", proxies=names)
    return ok("proxy", f"everything goes through the proxy {', '.join(names)}", proxies=names)


def judge_certificate(certificate: Mapping[str, Any], now: float) -> Finding:
    """How long is the trusted certificate good for? `certificate` is what `SSLSocket.getpeercert` gives."""
    issuer = _name(certificate.get("issuer", ()))
    subject = _name(certificate.get("subject", ()))
    expires = ssl.cert_time_to_seconds(certificate["notAfter"])
    day = datetime.datetime.fromtimestamp(expires, datetime.UTC).date().isoformat()
    facts = {"issuer": issuer, "subject": subject, "expires": day}
    if expires - now < FEW_DAYS * 86400:
        text = f"the certificate of {subject}, issued by {issuer}, is trusted but expires on {day}"
        return warning("certificate", text, "tell whoever runs the server to renew it", **facts)
    return ok("certificate", f"{subject}, issued by {issuer}, trusted until {day}", **facts)


def judge_untrusted(code: int, message: str, now: float) -> Finding:
    """Why is the certificate refused? `code` is OpenSSL's."""
    text = f"the server's certificate is not trusted: {message}"
    today = datetime.datetime.fromtimestamp(now, datetime.UTC).date().isoformat()
    if code in _OUT_OF_DATE:
        advice = f"if today is not {today}, set this machine's clock; else the server's certificate must be renewed"
    elif code in _UNKNOWN_AUTHORITY:
        advice = (
            "if your organisation has its own authority, give its file with --ca-certs; "
            "on a public network this may be a captive portal: open any page in a browser first"
        )
    elif code in _OTHER_NAME:
        advice = "use the name the certificate was made for; another program or a portal may answer at this address"
    else:
        advice = "ask whoever runs the server; do not go on without"
    return problem("certificate", text, advice, openssl_code=code)


def judge_clock(date: str | None, now: float) -> Finding | None:
    """Does this machine's clock agree with the server's `Date` header? `None` when there is nothing to compare."""
    if date is None:
        return None
    try:
        theirs = email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
    skew = now - theirs
    if abs(skew) <= MOST_SKEW_SECONDS:
        return ok("clock", "this machine's clock agrees with the server's", skew_seconds=round(skew))
    return warning(
        "clock",
        f"this machine's clock is {abs(skew) / 60:.0f} minutes {'ahead of' if skew > 0 else 'behind'} the server's",
        "set the clock (or the server's): certificates are judged by it",
        skew_seconds=round(skew),
    )


def judge_round_trip(milliseconds: Sequence[float]) -> Finding:
    """How long does one token wait for the line?"""
    middle, least, most = statistics.median(milliseconds), min(milliseconds), max(milliseconds)
    facts = {"median_ms": round(middle, 2), "min_ms": round(least, 2), "max_ms": round(most, 2)}
    text = f"{middle:.1f} ms, the median of {len(milliseconds)} between {least:.1f} and {most:.1f} ms"
    if middle > LONG_ROUND_TRIP_MS:
        advice = "each draft or token waits as long: choose a nearer server, and leave --speculate on"
        return warning("round trip", text, advice, **facts)
    return ok("round trip", text, **facts)


def judge_disk(needed: int, free: int, folder: Path) -> Finding:
    """Do the weights that are still to be fetched fit?"""
    facts = {"needed_bytes": needed, "free_bytes": free, "folder": str(folder)}
    if needed == 0:
        return ok("disk", f"the edge's part of the model is in {folder} already", **facts)
    text = f"{size(needed)} are to be fetched into {folder}, {size(free)} are free"
    if free < needed:
        return problem("disk", text, "make room, or choose another folder with --cache-dir", **facts)
    if free < needed + needed // 5:
        return warning("disk", text, "that is tight: make room, or choose another folder with --cache-dir", **facts)
    return ok("disk", text, **facts)


def judge_memory(needed: int, available: int | None) -> Finding:
    """Do the weights fit into memory?"""
    facts = {"needed_bytes": needed, "available_bytes": available}
    if available is None:
        return ok("memory", f"the weights take about {size(needed)}; what is available is not known here", **facts)
    text = f"the weights take about {size(needed)}, {size(available)} are available"
    advice = "close other programs, keep fewer blocks here (--partition), or say --quantization int8"
    if needed > available:
        return problem("memory", text, advice, **facts)
    if needed > available * 0.8:
        return warning("memory", text, f"that is tight: {advice}", **facts)
    return ok("memory", text, **facts)


def judge_threads(threads: int, cores: float, load: float | None) -> Finding:
    """Has the processor time for that many threads?"""
    facts = {"threads": threads, "cores": cores, "load": load}
    text = f"{threads} {'thread' if threads == 1 else 'threads'} on {cores:g} usable cores"
    if threads > cores:
        advice = f"threads that wait for each other cost more than they bring: --threads {max(1, int(cores))} or less"
        return warning("processor", text, advice, **facts)
    if load is not None and load > cores:
        text += f", where {load:.1f} programs want to run"
        return warning("processor", text, "tokens will come slowly while other programs work", **facts)
    return ok("processor", text, **facts)


def size(count: int) -> str:
    """Write a number of bytes for people."""
    for unit, step in (("GB", 1e9), ("MB", 1e6)):
        if count >= step:
            return f"{count / step:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _name(parts: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Give the name in a certificate's subject or issuer."""
    fields = {key: value for part in parts for key, value in part}
    for key in ("organizationName", "commonName"):
        if key in fields:
            return fields[key]
    return "an unnamed one"
