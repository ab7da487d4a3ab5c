"""Connections to untrusted hosts: only http and https, and never into a private network (SSRF protection).

A host name is resolved once, all its addresses are checked, and the connection is made to a checked address.
"""

from __future__ import annotations

import functools
import http.client
import ipaddress
import socket
import ssl
import time
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit


class FetchError(Exception):
    """A URL could not be fetched.

    Attributes:
        reason: the cause, without details of the URL, so that failures can be counted by reason.
        transient: whether a retry may succeed.
        pause: seconds that the server asks the client to wait (Retry-After).
        attempts: number of attempts made.
    """

    def __init__(self, reason: str, *, transient: bool = False, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.transient, self.pause, self.attempts = reason, transient, pause, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """Limits of the download of one URL.

    Attributes:
        max_bytes: largest size of the body.
        max_seconds: deadline of one attempt, from name resolution to the last byte.
        stall: seconds without a byte after which an attempt is aborted.
        attempts: number of attempts.
        first_pause: seconds before the second attempt; doubles with every attempt, with jitter.
        longest_pause: largest pause in seconds; if a server asks for a longer one, the URL fails.
        allow_private: allow URLs of private networks and of this machine. For tests.
    """

    max_bytes: int = 64 << 20
    max_seconds: float = 60.0
    stall: float = 20.0
    attempts: int = 3
    first_pause: float = 1.0
    longest_pause: float = 60.0
    allow_private: bool = False


def host_of(url: str) -> str:
    """Host of a URL with its port, in lower case; "" if it has none."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""


def public_addresses(host: str, port: int, allow_private: bool) -> list[str]:
    """Resolve and check the addresses of a host.

    Raises:
        FetchError: the name cannot be resolved, or an address is not a public unicast address.
    """
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        transient = getattr(error, "errno", None) == socket.EAI_AGAIN
        raise FetchError("the host's name is not known", transient=transient) from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        inner = _embedded(address)
        if not allow_private and not all(map(_is_public, (address, inner))):
            raise FetchError("private address")
    return addresses


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local  # fec0::/10 counts as global
    return address.is_global and not (address.is_multicast or address.is_reserved or local)


def _embedded(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that is embedded in an IPv6 address (mapped, 6to4, NAT64), else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped or address.sixtofour:
            return address.ipv4_mapped or address.sixtofour or address
        if address in ipaddress.ip_network("64:ff9b::/96"):
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def connect(url: str, limits: FetchLimits, ends: float) -> http.client.HTTPConnection:
    """Connect to a checked address of the URL's host; `ends` is the deadline (monotonic time).

    Raises:
        FetchError: the URL is not http(s), an address is forbidden, or no connection could be made.
    """
    parts = _parts(url)
    secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    error: Exception | None = None
    for address in public_addresses(host, port, limits.allow_private):
        try:
            timeout = max(min(limits.stall, ends - time.monotonic()), 0.001)
            plain = socket.create_connection((address, port), timeout)
            try:
                plain.settimeout(timeout)
                stream = _tls().wrap_socket(plain, server_hostname=host) if secure else plain
            except BaseException:
                plain.close()
                raise
            connection = http.client.HTTPConnection(host, None if port == (443 if secure else 80) else port)
            connection.sock = stream
            return connection
        except OSError as failure:
            error = failure
    transient = not isinstance(error, ssl.SSLCertVerificationError)
    raise FetchError(reason_of(error), transient=transient)


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise FetchError("not a URL") from None
    if parts.scheme not in {"http", "https"}:
        raise FetchError(f"scheme {parts.scheme!r} is not followed")
    if not parts.hostname:
        raise FetchError("not a URL")
    return parts


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def reason_of(error: Exception | None) -> str:
    """A short reason for an error, without details that differ between URLs, so that failures can be counted."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLError):
        return f"tls: {error.reason or 'broken off'}".lower()
    if isinstance(error, http.client.IncompleteRead | ConnectionResetError | http.client.RemoteDisconnected):
        return "the connection broke"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return type(error).__name__
