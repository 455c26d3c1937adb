"""Bytes that were given to a socket and have not left this machine yet."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys

MOST_UNSENT_BYTES = 128 * 1024


def backlog(transport: asyncio.Transport) -> int:
    """Count what waits in the transport's buffer and, on Linux, in the kernel's, unacknowledged bytes included."""
    waiting = transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    if sys.platform != "linux" or connection is None or connection.fileno() < 0:
        return waiting
    import fcntl
    import termios

    with contextlib.suppress(OSError):
        (queued,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
        waiting += queued
    return waiting


def keep_unsent_short(transport: asyncio.Transport) -> None:
    """Let the kernel take little more than it can send now: what it has taken, nothing can overtake.

    Without this, megabytes of a prompt lie before the next token and before every ping on a slow line.
    """
    connection = transport.get_extra_info("socket")
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if connection is None or option is None:
        return
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, option, MOST_UNSENT_BYTES)
