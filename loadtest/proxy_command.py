"""The command `split-loadtest proxy`: an emulated link on loopback, for as long as it runs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from loadtest.link_proxy import Link, LinkProxy
from loadtest.settings import is_loopback
from split_llama.errors import UsageError
from split_llama.transport.address import ServerAddress

PRIORITY = -10
DESCRIPTION = (
    "Forward a port of this machine to a server over an emulated link: delay, jitter, bandwidth, and faults that come "
    "again and again. The address to use is printed on stdout; counters come on stderr at the end. Runs until "
    "--duration is over or Ctrl-C."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--target", required=True, metavar="URL", help="the server, such as http://127.0.0.1:8700")
    parser.add_argument("--allow-remote", action="store_true", help="allow a target on another machine")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: any free one)")
    delays = parser.add_mutually_exclusive_group()
    delays.add_argument("--delay", type=float, metavar="MS", help="delay one way (default: 0)")
    delays.add_argument("--rtt", type=float, metavar="MS", help="the same as a round trip: twice the delay")
    parser.add_argument("--jitter", type=float, default=0.0, metavar="MS", help="delay varies by so much, up and down")
    parser.add_argument("--bandwidth", type=float, metavar="MBIT", help="Mbit/s each way (default: unbounded)")
    parser.add_argument("--up", type=float, metavar="MBIT", help="Mbit/s towards the target, instead of --bandwidth")
    parser.add_argument("--down", type=float, metavar="MBIT", help="Mbit/s from the target, instead of --bandwidth")
    parser.add_argument("--seed", type=int, default=0, help="seed of the jitter (default: 0)")
    parser.add_argument("--cut-every", type=float, metavar="S", help="reset all connections every S seconds")
    parser.add_argument(
        "--stall-every", type=float, metavar="S", help="let nothing arrive for a while, every S seconds"
    )
    parser.add_argument("--stall-for", type=float, default=1.0, metavar="S", help="how long that while is (default: 1)")
    parser.add_argument("--duration", type=float, metavar="S", help="end after S seconds")


def run(arguments: argparse.Namespace) -> int:
    """Run the proxy; give the exit code. Raises `UsageError`."""
    address = ServerAddress.parse(arguments.target)
    if not arguments.allow_remote and not is_loopback(address):
        raise UsageError(
            f"{address.base} is not on this machine: say --allow-remote if the server is yours, or its owner agreed"
        )
    for name in ("cut_every", "stall_every", "stall_for", "duration"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected seconds above 0")
    if not 0 <= arguments.port < 65536:
        raise UsageError(f"--port {arguments.port}: expected a port between 0 and 65535 (0 takes any free one)")
    link = _link(arguments)
    # The clock should not wait for the programs that are measured with it; most users may not ask for that.
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    asyncio.run(_run(arguments, address, link))
    return 0


def _link(arguments: argparse.Namespace) -> Link:
    delay = arguments.rtt / 2 if arguments.rtt is not None else arguments.delay or 0.0
    return Link(
        delay_ms=delay,
        jitter_ms=arguments.jitter,
        up_mbit=arguments.up if arguments.up is not None else arguments.bandwidth,
        down_mbit=arguments.down if arguments.down is not None else arguments.bandwidth,
        seed=arguments.seed,
    )


async def _run(arguments: argparse.Namespace, address: ServerAddress, link: Link) -> None:
    ended = asyncio.Event()
    async with LinkProxy(address.host, address.port, link, port=arguments.port) as proxy:
        with _sets_on_signals(ended):
            scheme = "https" if address.secure else "http"
            sys.stdout.write(f"{scheme}://127.0.0.1:{proxy.port}{address.root}\n")
            sys.stdout.flush()
            faults = [asyncio.create_task(fault) for fault in _faults(arguments, proxy)]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(arguments.duration):
                    await ended.wait()
            for task in faults:
                task.cancel()
            await asyncio.gather(*faults, return_exceptions=True)
    counters = proxy.counters
    sys.stderr.write(
        f"{counters.connections} connections, {counters.cuts} cuts, "
        f"{counters.bytes_up} bytes up, {counters.bytes_down} bytes down\n"
    )


def _faults(arguments: argparse.Namespace, proxy: LinkProxy) -> list[Coroutine[Any, Any, None]]:
    faults: list[Coroutine[Any, Any, None]] = []
    if arguments.cut_every is not None:
        faults.append(_again_and_again(arguments.cut_every, proxy.cut))
    if arguments.stall_every is not None:
        faults.append(_again_and_again(arguments.stall_every, lambda: proxy.stall(arguments.stall_for)))
    return faults


async def _again_and_again(seconds: float, act: Callable[[], object]) -> None:
    while True:
        await asyncio.sleep(seconds)
        act()


@contextlib.contextmanager
def _sets_on_signals(ended: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    caught = (signal.SIGINT, signal.SIGTERM)
    # Windows has no such handlers: Ctrl-C raises KeyboardInterrupt there.
    with contextlib.suppress(NotImplementedError):
        for number in caught:
            loop.add_signal_handler(number, ended.set)
    try:
        yield
    finally:
        with contextlib.suppress(NotImplementedError):
            for number in caught:
                loop.remove_signal_handler(number)
