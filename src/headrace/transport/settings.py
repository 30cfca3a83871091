"""Settings of what goes between machines: the end that listens, and the one that connects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteConfig:
    """Where worker hosts of other machines connect, who may, and how much they may take."""

    listen: str = ""
    """Listens at HOST:PORT for worker hosts (headrace worker --connect); port 0 takes any that is
    free. Beyond loopback it needs a token and TLS. Empty steps environments on this machine."""
    token_file: str = ""
    """Names the file with the secret that every worker host must know, at least 16 characters;
    empty takes the variable HEADRACE_TOKEN."""
    tls_cert: str = ""
    """Names the file with this server's certificate chain (PEM)."""
    tls_key: str = ""
    """Names the file with the private key of tls_cert (PEM)."""
    tls_client_ca: str = ""
    """Names the file with certificates (PEM), one of which must have signed that of each worker
    host; empty asks worker hosts for none."""
    insecure: bool = False
    """Listens beyond loopback without TLS: whoever sees the network reads token and data."""
    envs_per_message: int = 0
    """Lets so many environments step together and travel in one message; 0 takes inference_batch,
    at most 64. A worker host takes several such blocks, so that some step while others travel."""
    max_hosts: int = 1024
    """Takes at most so many worker hosts at a time."""
    max_envs_per_host: int = 4096
    """Grants one worker host at most so many environments."""
    hello_timeout_s: float = 10.0
    """Closes a connection that has not said who it is after so many seconds."""
    host_timeout_s: float = 60.0
    """Gives up a worker host that owes steps after so many seconds of silence."""
    no_host_timeout_s: float = 600.0
    """Ends the run after so many seconds without any worker host."""
    message_compression: Literal["off", "lz4"] = "off"
    """Compresses observations between machines; lz4 pays where the network is slower than a core
    compresses."""

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
    """Connects to the server at HOST:PORT (its --listen)."""
    token_file: str = ""
    """Names the file with the secret that the server asks for; empty takes the variable
    HEADRACE_TOKEN."""
    tls_ca: str = ""
    """Names the file with certificates (PEM), one of which signed the server's; it is needed beyond
    loopback."""
    tls_cert: str = ""
    """Names the file with this host's own certificate chain (PEM), for servers that ask for one."""
    tls_key: str = ""
    """Names the file with the private key of tls_cert (PEM)."""
    insecure: bool = False
    """Connects beyond loopback without TLS: whoever sees the network reads token and data."""
    connect_timeout_s: float = 60.0
    """Gives one attempt to connect so many seconds, welcome included."""
    give_up_s: float = 600.0
    """Ends the worker host after so many seconds in which no server answers."""

    def __post_init__(self) -> None:
        for name in ("connect_timeout_s", "give_up_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
