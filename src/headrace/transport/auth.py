"""Who may connect: addresses, the token, certificates; and why a connection could not be made.

Beyond loopback a token is needed, and TLS unless `insecure` was typed out. The token comes from a
file or from HEADRACE_TOKEN, is compared in constant time, and is never logged.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Container
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import ConfigError
from headrace.transport.settings import RemoteConfig

MIN_TOKEN = 16
"""Characters of a token, at least."""
TOKEN_VARIABLE = "HEADRACE_TOKEN"
TOKEN_KEY = "authorization"


class Address(NamedTuple):
    """A HOST:PORT, taken apart."""

    host: str  # without the brackets of IPv6
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, *, flag: str) -> Address:
    """Returns host and port of HOST:PORT or [IPv6]:PORT.

    Raises:
        ConfigError: it is neither; names the flag.
    """
    host, colon, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or (":" in host and not bracketed) or "/" in host:
        raise ConfigError(f"{flag} must be HOST:PORT or [IPv6]:PORT, not {text!r}")
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ConfigError(f"{flag} must end in a port below 65536, not {text!r}")
    return Address(host, int(port))


def is_loopback(host: str) -> bool:
    """Returns whether the host is this machine alone, whatever its name stands for.

    A name that stands for nothing is not.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    # A zone may follow an IPv6 address: fe80::1%eth0.
    addresses = {str(info[4][0]).partition("%")[0] for info in found}
    return bool(addresses) and all(ipaddress.ip_address(each).is_loopback for each in addresses)


def read_token(token_file: str) -> bytes:
    """Returns the token of the file, or else of HEADRACE_TOKEN; empty if there is none.

    Raises:
        ConfigError: the file cannot be read, or what is in it is no good token.
    """
    if token_file:
        try:
            token = Path(token_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the token file {token_file} cannot be read: {error}") from error
        where = f"the token in {token_file}"
        if not token:
            raise ConfigError(f"{where} is empty")
    else:
        token, where = os.environ.get(TOKEN_VARIABLE, "").strip(), f"the token in {TOKEN_VARIABLE}"
        if not token:
            return b""
    if len(token) < MIN_TOKEN:
        raise ConfigError(f"{where} is too short: use at least {MIN_TOKEN} characters")
    if not all("!" <= character <= "~" for character in token):
        raise ConfigError(f"{where} must be one line of printable ASCII characters without spaces")
    return token.encode()


def token_metadata(token: bytes) -> tuple[tuple[str, str], ...]:
    """Returns the metadata with which a host shows its token."""
    return ((TOKEN_KEY, f"Bearer {token.decode()}"),) if token else ()


def token_fault(token: bytes, metadata: Any) -> str:
    """Returns what is wrong with the token in the metadata of a call; empty if nothing is.

    Args:
        token: What it must be; empty if any will do.
        metadata: Pairs of name and value.
    """
    if not token:
        return ""
    shown = b""
    for key, value in metadata or ():
        if key == TOKEN_KEY:
            shown = value if isinstance(value, bytes) else str(value).encode()
    # Compared even if there is none, in constant time.
    if hmac.compare_digest(shown, b"Bearer " + token):
        return ""
    if not shown:
        return "no token: this server asks for one, from --token-file or HEADRACE_TOKEN"
    return "wrong token: it is not the one of this server"


def token_interceptor(
    token: bytes, refuse: Callable[[Any, str], Awaitable[None]], *, open_to_all: Container[str]
) -> Any:
    """Returns what stands before every method of an asynchronous server and asks for the token.

    Args:
        token: What it must be; empty if any will do.
        refuse: Ends a call, given its context, with a sentence.
        open_to_all: Methods that ask for no token, with their services.
    """
    import grpc.aio  # noqa: PLC0415 - an extra

    class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
        async def intercept_service(self, continuation: Any, call: Any) -> Any:
            fault = token_fault(token, call.invocation_metadata)
            if not fault or call.method in open_to_all:
                return await continuation(call)

            async def refused(_requests: Any, context: Any) -> None:
                await refuse(context, fault)

            # Whatever kind the method is of: nothing is read, and the answer is its end.
            return grpc.stream_stream_rpc_method_handler(refused)

    return TokenInterceptor()


def check_exposure(
    address: Address, *, token: bytes, tls: bool, insecure: bool, tls_flags: str
) -> None:
    """Checks that what others than this machine can reach asks for a token, and hides it.

    Args:
        address: Where one listens, or connects to.
        token: Empty if there is none.
        tls: Whether there is TLS.
        insecure: Whether the user has typed that there need not be.
        tls_flags: What the user gives for TLS.

    Raises:
        ConfigError: it does not.
    """
    if is_loopback(address.host):
        return
    if not token:
        raise ConfigError(
            f"{address} is not this machine alone, so it needs a token: give --token-file or set "
            f"{TOKEN_VARIABLE}"
        )
    if not tls and not insecure:
        raise ConfigError(
            f"{address} is not this machine alone, so it needs TLS: give {tls_flags}, or type "
            "--insecure if nobody else can see the network"
        )


class ServerTls(NamedTuple):
    """What a listener shows and asks for, as PEM."""

    key: bytes
    cert: bytes
    client_ca: bytes  # empty: hosts need no certificate


class ClientTls(NamedTuple):
    """What a link asks for and shows, as PEM."""

    ca: bytes
    cert: bytes  # empty: none
    key: bytes


def server_tls(cert: str, key: str, client_ca: str) -> ServerTls | None:
    """Reads and checks a server's files; None if there are none.

    Raises:
        ConfigError: one is missing, or is no PEM, or has expired, or they do not fit.
    """
    if not cert and not key:
        if client_ca:
            raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key too")
        return None
    pem_cert, pem_key = _read_pair(cert, key)
    return ServerTls(pem_key, pem_cert, _read_ca(client_ca) if client_ca else b"")


class ServerAccess(NamedTuple):
    """Where a listener listens, and who may come."""

    address: Address
    token: bytes  # empty: nobody is asked for one
    tls: ServerTls | None


def server_access(config: RemoteConfig, address: str = "") -> ServerAccess:
    """Reads and checks what the settings of a listener name.

    Args:
        config: The settings.
        address: HOST:PORT; empty for that of the settings, or if there is none, 127.0.0.1:0.

    Raises:
        ConfigError: it is open to others without token and TLS, or a file is no good.
    """
    wanted = parse_address(address or config.listen or "127.0.0.1:0", flag="--listen")
    token = read_token(config.token_file)
    tls = server_tls(config.tls_cert, config.tls_key, config.tls_client_ca)
    check_exposure(
        wanted,
        token=token,
        tls=tls is not None,
        insecure=config.insecure,
        tls_flags="--tls-cert and --tls-key",
    )
    return ServerAccess(wanted, token, tls)


def client_tls(ca: str, cert: str, key: str) -> ClientTls | None:
    """Reads and checks a worker host's files; None if there are none.

    Raises:
        ConfigError: one is missing, or is no PEM, or has expired, or they do not fit.
    """
    if not ca:
        if cert or key:
            raise ConfigError("--tls-cert and --tls-key need --tls-ca too")
        return None
    pem_cert, pem_key = _read_pair(cert, key) if cert or key else (b"", b"")
    return ClientTls(_read_ca(ca), pem_cert, pem_key)


def _read_pair(cert: str, key: str) -> tuple[bytes, bytes]:
    if not cert or not key:
        raise ConfigError("--tls-cert and --tls-key go together")
    pem_cert, pem_key = _read(cert, "certificate"), _read(key, "private key")
    own = _certificates(pem_cert, cert)[0]
    try:
        # The callback: a key with a passphrase would else ask the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{key} is not the private key of {cert}, or is no PEM without a passphrase: {error}"
        ) from error
    fault = _time_fault(own, cert)
    if fault:
        raise ConfigError(fault)
    return pem_cert, pem_key


def _read_ca(path: str) -> bytes:
    pem = _read(path, "certificate authority")
    faults = [_time_fault(each, path) for each in _certificates(pem, path)]
    if all(faults):  # a file with old ones beside new ones is how they are renewed
        raise ConfigError(faults[0])
    return pem


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"the {what} {path} cannot be read: {error.strerror}") from error


def _certificates(pem: bytes, path: str) -> list[Any]:
    """Returns every certificate of a PEM file, as `cryptography` reads it."""
    try:
        from cryptography import x509  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError("TLS needs an extra: pip install 'headrace[cluster]'") from error
    try:
        return list(x509.load_pem_x509_certificates(pem))
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path} holds no certificate in PEM: {reason}") from error


def _time_fault(certificate: Any, path: str) -> str:
    """Returns why a certificate is not valid now, by this machine's clock; empty if it is."""
    now = datetime.now(UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > ends:
        return f"the certificate in {path} expired on {ends:%Y-%m-%d %H:%M} UTC"
    if now < begins:
        return f"the certificate in {path} is valid only from {begins:%Y-%m-%d %H:%M} UTC on"
    return ""
