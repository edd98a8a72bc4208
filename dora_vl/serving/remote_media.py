"""Pictures and videos from the web, without a way into the server's own network.

A name is resolved once, every address of it must be a public one, and the connection goes to the address that was
checked: a name that changes its mind in between gains nothing. Each redirect is a new address, checked likewise.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from dora_vl.errors import UserError, shown

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MOST_REDIRECTS = 3
CHUNK = 1 << 16
PORTS = {"http": 80, "https": 443}
NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.88.99.0/24", "3fff::/20", "5f00::/16")))
"""Of the registries of special addresses what Python's own tables lack: 6to4 relays, documentation, segment routing."""


class NotFetched(UserError):
    """What is at an address cannot be had, or may not."""


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """How much one address may cost."""

    bytes: int
    seconds: float


def fetch(url: str, limits: FetchLimits) -> bytes:
    """What is at an address.

    Raises:
        NotFetched: no http(s) address, one that leads to a private, loopback, link-local or other special address,
            too many redirects, too large, too slow, or no answer.
    """
    deadline = time.monotonic() + limits.seconds
    for _ in range(MOST_REDIRECTS + 1):
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise NotFetched(f"{shown(url)} is no address: {error}") from None
        if parts.scheme not in PORTS or not parts.hostname or port == 0:
            raise NotFetched(f"{shown(url)}: only http:// and https:// addresses are fetched")
        if parts.username is not None or not url.isascii() or not url.isprintable() or " " in url:
            raise NotFetched(
                f"{shown(url)}: an address holds no user name, and ASCII without spaces alone; escape the rest"
            )
        content = _get(parts, limits.bytes, deadline)
        if isinstance(content, bytes):
            return content
        url = urljoin(url, content)
    raise NotFetched(f"{shown(url)}: more than {MOST_REDIRECTS} redirects")


def public_addresses(host: str, port: int, seconds: float) -> list[str]:
    """The IP addresses of a host, where they are known within so many seconds."""
    answer: Future[list[Any]] = Future()

    def resolve() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.set_exception(error)

    # The system's resolver knows no limit: whoever waits for it leaves it behind.
    threading.Thread(target=resolve, name="dora-vl resolver", daemon=True).start()
    try:
        entries = answer.result(seconds)
    except FutureTimeoutError:
        raise _too_slow(host) from None
    except (OSError, UnicodeError) as error:
        raise NotFetched(f"{shown(host)} cannot be resolved ({error})") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    for address in addresses:
        if not is_public(address):
            raise NotFetched(f"{shown(host)} is at {address}, which is no public address, and those are not fetched")
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet, also where IPv6 only wraps an IPv4 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inside is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inside is not None:
            return is_public(str(inside))
        if ip.is_reserved or ip.is_site_local:  # outside of 2000::/3 Python calls most of both global
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in NOT_PUBLIC)


class _Pinned(http.client.HTTPConnection):
    """A connection to an address that was checked, whatever the name says by now."""

    def __init__(self, parts: SplitResult, address: str, timeout: float) -> None:
        port = parts.port or PORTS[parts.scheme]
        super().__init__(str(parts.hostname), port, timeout=timeout)
        self._address = address
        self._tls = parts.scheme == "https"
        self._open: socket.socket | None = None
        """Stays when `sock` is None, as it is while an answer with `Connection: close` is read."""
        self.aborted = False

    def abort(self) -> None:
        """Ends it from another thread: whatever waits for the other side gets an error, or the content's end."""
        self.aborted = True
        if self._open is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._open, socket.SHUT_RDWR)  # TLS's own would change what is being read

    def connect(self) -> None:
        """Connects, and proves with TLS that it is the named host. Raises TimeoutError: it was aborted meanwhile."""
        self.sock = self._open = socket.create_connection((self._address, self.port), self.timeout)
        if self._tls:
            context, name = ssl.create_default_context(), self.host
            wrapped = context.wrap_socket(self.sock, server_hostname=name, do_handshake_on_connect=False)
            self.sock = self._open = wrapped  # before the handshake, which may be what takes too long
            self._go_on()
            wrapped.do_handshake()
        self._go_on()

    def _go_on(self) -> None:
        if self.aborted:
            raise TimeoutError("aborted while it connected")


def _get(parts: SplitResult, most: int, deadline: float) -> bytes | str:
    """The content, or where it has moved to."""
    host, port = str(parts.hostname), parts.port or PORTS[parts.scheme]
    connection = _Pinned(parts, public_addresses(host, port, _left(host, deadline))[0], _left(host, deadline))
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    watch = threading.Timer(_left(host, deadline), connection.abort)  # a timeout alone begins anew at every byte
    watch.daemon = True
    watch.start()
    try:
        connection.request("GET", target, headers={"User-Agent": "dora-vl", "Accept-Encoding": "identity"})
        with connection.getresponse() as answer:
            moved = answer.getheader("Location")
            if answer.status in REDIRECTS and moved:
                return moved
            if answer.status != http.client.OK:
                raise NotFetched(f"{shown(host)} answered with status {answer.status}")
            content = bytearray()
            while chunk := answer.read1(CHUNK):
                content += chunk
                if len(content) > most:
                    raise NotFetched(f"what {shown(host)} sends is larger than the {most:,} bytes allowed")
                _left(host, deadline)
            if answer.length:
                raise NotFetched(f"{shown(host)} sent less than it said")
        if connection.aborted:  # what was cut off may look whole
            raise _too_slow(host)
        return bytes(content)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if connection.aborted or isinstance(error, TimeoutError):  # the socket's own timeout, just before the watch
            raise _too_slow(host) from None
        raise NotFetched(f"{shown(host)} cannot be read: {type(error).__name__} {shown(str(error))}") from None
    finally:
        watch.cancel()
        connection.close()


def _left(host: str, deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise _too_slow(host)
    return left


def _too_slow(host: str) -> NotFetched:
    return NotFetched(f"{shown(host)} was too slow")
