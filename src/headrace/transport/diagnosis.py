"""Why a connection could not be made, in the words of the standard library: gRPC's say little."""

from __future__ import annotations

import errno
import socket
import ssl
from typing import NamedTuple

from headrace.transport.auth import Address

_TIMEOUT_S = 3.0


class Diagnosis(NamedTuple):
    """What a second connection, made only to learn why the first failed, came upon."""

    reason: str  # empty: nothing that explains it
    retry: bool  # whether it may pass


def diagnose(address: Address, *, ca: str = "", cert: str = "", key: str = "") -> Diagnosis:
    """Connects as a link would, and says what fails.

    Args:
        address: Of the server.
        ca: File with the certificates that may have signed the server's; empty without TLS.
        cert: File with the host's own; empty for none.
        key: File with its key.
    """
    try:
        plain = socket.create_connection(address, timeout=_TIMEOUT_S)
    except socket.gaierror as error:
        return Diagnosis(f"no machine is called {address.host!r}: {error.strerror}", retry=True)
    except TimeoutError:
        return Diagnosis("nothing answers there", retry=True)
    except OSError as error:
        return Diagnosis(f"nobody listens there: {error.strerror or error}", retry=True)
    with plain:
        return _over_tls(plain, address, ca, cert, key) if ca else _over_plain(plain)


def _over_tls(plain: socket.socket, address: Address, ca: str, cert: str, key: str) -> Diagnosis:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    if cert:
        context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(plain, server_hostname=address.host) as secure:
            heard = _says_something(secure)
    except ssl.SSLError as error:
        return _tls_fault(error, ca)
    except OSError:
        heard = True  # nothing that we know of
    if heard or not _hangs_up_in_handshake(context, address):
        return Diagnosis("", retry=True)
    return Diagnosis(
        "it does not accept this host's certificate (--tls-cert)"
        if cert
        else "it does not accept a host without a certificate: give --tls-cert and --tls-key",
        retry=False,
    )


def _tls_fault(error: ssl.SSLError, ca: str) -> Diagnosis:
    if isinstance(error, ssl.SSLCertVerificationError):
        return Diagnosis(
            f"its certificate is not accepted here: {error.verify_message} (--tls-ca {ca})",
            retry=False,
        )
    reason = error.reason or str(error)
    if "ALERT" in reason:
        said = reason.partition("ALERT_")[2].replace("_", " ").lower()
        return Diagnosis(f"it does not accept this host's certificate: {said}", retry=False)
    if isinstance(error, ssl.SSLEOFError):
        return Diagnosis("it hung up in the TLS handshake", retry=True)
    return Diagnosis(
        "it speaks plain text, not TLS: leave --tls-ca out, or give the server --tls-cert",
        retry=False,
    )


def _says_something(secure: ssl.SSLSocket) -> bool:
    try:
        return bool(secure.recv(1))
    except ssl.SSLEOFError:
        return False
    except ssl.SSLError:  # says what is wrong
        raise
    except OSError:
        return False


def _hangs_up_in_handshake(context: ssl.SSLContext, address: Address) -> bool:
    """Returns whether it is our certificate for which the server hangs up.

    In TLS 1.3 a server looks at it when for us all is done; in TLS 1.2 before that. One that hangs
    up for another reason does so later.
    """
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        with (
            socket.create_connection(address, timeout=_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=address.host),
        ):
            return False
    except (ssl.SSLError, ConnectionResetError):
        return True
    except OSError:
        return False


def _over_plain(plain: socket.socket) -> Diagnosis:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Only to learn whether it is TLS: nothing is said over this connection.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    speaks_tls = True
    try:
        context.wrap_socket(plain).close()
    except ssl.SSLError as error:
        speaks_tls = "ALERT" in (error.reason or "")
    except OSError:
        speaks_tls = False
    if speaks_tls:
        return Diagnosis("it speaks TLS: give --tls-ca", retry=False)
    return Diagnosis("", retry=True)


def bind_fault(address: Address) -> str:
    """Returns why nobody can listen there now, which gRPC does not say; empty if one can."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does: connections of a run before that have not quite ended do not matter.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen(1)  # with the option, only this finds another listener everywhere
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "another program listens there; choose another port, or 0 for any free one"
        if error.errno == errno.EADDRNOTAVAIL:
            return "this machine has no such address"
        return str(error.strerror or error)
    return ""
