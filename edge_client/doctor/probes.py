"""How the facts are got. Each probe is a function of its own; tests put others in their place."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from split_llama.transport.address import ServerAddress

CONNECT_SECONDS = 10.0


def resolve(host: str) -> list[str]:
    """Look a name up; gives the addresses. Raises `OSError`."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def knock(host: str, port: int) -> float:
    """Connect and hang up; gives the seconds it took. Raises `OSError`."""
    begin = time.perf_counter()
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS):
        return time.perf_counter() - begin


def certificate(address: ServerAddress, trust: ssl.SSLContext, proxy: str | None) -> dict[str, Any]:
    """Shake hands by TLS, through a proxy if one is named; gives the certificate. Raises `OSError`, `ssl.SSLError`."""
    with contextlib.ExitStack() as stack:
        line = stack.enter_context(_line(address, proxy))
        secured = stack.enter_context(trust.wrap_socket(line, server_hostname=address.host))
        return dict(secured.getpeercert() or {})


def _line(address: ServerAddress, proxy: str | None) -> socket.socket:
    if proxy is None:
        return socket.create_connection((address.host, address.port), timeout=CONNECT_SECONDS)
    via = urlsplit(proxy)
    line = socket.create_connection((via.hostname or "", via.port or 80), timeout=CONNECT_SECONDS)
    target = f"{address.host}:{address.port}"
    line.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        # One byte at a time: what follows the head belongs to TLS.
        if not (byte := line.recv(1)):
            break
        answer += byte
    if answer.split(b" ")[1:2] != [b"200"]:
        line.close()
        raise ConnectionError(f"the proxy {proxy} lets nobody through to {target}")
    return line


def proxies(address: ServerAddress) -> tuple[str | None, str | None]:
    """Give the environment's proxies for plain requests and for the WebSocket, as httpx and websockets choose them."""
    from websockets.proxy import get_proxy
    from websockets.uri import parse_uri

    named = urllib.request.getproxies()
    bypassed = urllib.request.proxy_bypass(f"{address.host}:{address.port}")
    web = None if bypassed else named.get("https" if address.secure else "http") or named.get("all")
    return web, get_proxy(parse_uri(address.stream))


def free_bytes(folder: Path) -> int:
    """Give the room left where `folder` is or will be. Raises `OSError`."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def available_memory() -> int | None:
    """Give the bytes that can be had without swapping, within the limits of a container; `None` where unknown."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(max(0, limit - int(Path("/sys/fs/cgroup/memory.current").read_text())))
    return min(found, default=None)


def usable_cores() -> float:
    """Count the cores this process may use, within the limits of a container."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return cores


def load_average() -> float | None:
    """Give how many programs wanted to run in the last minute; `None` where unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


@dataclass(frozen=True, slots=True)
class Probes:
    """All of them; `patience` is how many seconds an answer to HELLO may take."""

    resolve: Callable[[str], list[str]] = resolve
    knock: Callable[[str, int], float] = knock
    certificate: Callable[[ServerAddress, ssl.SSLContext, str | None], dict[str, Any]] = certificate
    proxies: Callable[[ServerAddress], tuple[str | None, str | None]] = proxies
    free_bytes: Callable[[Path], int] = free_bytes
    available_memory: Callable[[], int | None] = available_memory
    usable_cores: Callable[[], float] = usable_cores
    load_average: Callable[[], float | None] = load_average
    now: Callable[[], float] = time.time
    patience: float = 5.0
