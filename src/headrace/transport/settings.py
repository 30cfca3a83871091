"""Settings of what goes between machines: the end that listens, and the one that connects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteConfig:
    """Where worker hosts of other machines connect, who may, and how much they may take."""

    listen: str = ""
    """HOST:PORT at which worker hosts connect (headrace worker --connect), port 0 for any free one.
    Beyond loopback it needs a token and TLS. Empty: environments step on this machine."""
    token_file: str = ""
    """File with the secret that every worker host must know, at least 16 characters; empty for the
    variable HEADRACE_TOKEN."""
    tls_cert: str = ""
    """File with this server's certificate chain (PEM)."""
    tls_key: str = ""
    """File with the private key of tls_cert (PEM)."""
    tls_client_ca: str = ""
    """File with certificates (PEM), one of which must have signed that of each worker host; empty:
    worker hosts need none."""
    insecure: bool = False
    """Listen beyond loopback without TLS: whoever sees the network reads token and data."""
    envs_per_message: int = 0
    """Environments that travel in one message, and step together; 0 for inference_batch, at most
    64. A worker host takes several such blocks, so that some step while others travel."""
    max_hosts: int = 1024
    """Worker hosts at a time."""
    max_envs_per_host: int = 4096
    """Environments that one worker host may take."""
    hello_timeout_s: float = 10.0
    """Seconds that a connection may take to say who it is."""
    host_timeout_s: float = 60.0
    """Seconds of silence after which a worker host that owes steps is given up."""
    no_host_timeout_s: float = 600.0
    """Seconds without any worker host after which the run ends."""
    message_compression: Literal["off", "lz4"] = "off"
    """Of observations between machines; lz4 where the network is slower than a core compresses."""

    def __post_init__(self) -> None:
        for name in ("hello_timeout_s", "host_timeout_s", "no_host_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        if self.envs_per_message < 0:
            raise ConfigError("envs_per_message must not be negative")
        if self.max_hosts < 1 or self.max_envs_per_host < 1:
            raise ConfigError("max_hosts and max_envs_per_host must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkConfig:
    """The server to which a worker host connects, and how it proves who it is."""

    connect: str
    """HOST:PORT of the server (its listen)."""
    token_file: str = ""
    """File with the secret that the server asks for; empty for the variable HEADRACE_TOKEN."""
    tls_ca: str = ""
    """File with certificates (PEM), one of which signed the server's. Needed beyond loopback."""
    tls_cert: str = ""
    """File with this host's own certificate chain (PEM), for servers that ask for one."""
    tls_key: str = ""
    """File with the private key of tls_cert (PEM)."""
    insecure: bool = False
    """Connect beyond loopback without TLS: whoever sees the network reads token and data."""
    connect_timeout_s: float = 60.0
    """Seconds that one attempt to connect may take, welcome included."""
    give_up_s: float = 600.0
    """Seconds for which nothing answers there after which the worker host ends."""

    def __post_init__(self) -> None:
        for name in ("connect_timeout_s", "give_up_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
