"""Settings of worker processes, and of what a cluster places."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """How environments are spread over worker processes, and when a worker is given up."""

    num_workers: int = 0
    """Worker processes; 0 for one per core. Never more than there are environments."""
    groups_per_worker: int = 2
    """Groups of environments in a worker: it steps one while the others wait for actions."""
    batch_wait_ms: float = 2.0
    """Longest that a row waits for others before a batch smaller than wanted is answered."""
    step_timeout_s: float = 60.0
    """Seconds that one step of a group may take before its worker is killed as hanging."""
    start_timeout_s: float = 120.0
    """Seconds that a worker may take to start and to reset its environments."""
    max_worker_deaths: int = 5
    """Deaths in a row, none of them after a long healthy life, at which the run ends."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ConfigError(
                f"num_workers must be 0 (one per core) or more, not {self.num_workers}"
            )
        for name in ("groups_per_worker", "max_worker_deaths"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("batch_wait_ms", "step_timeout_s", "start_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """What Ray places and watches, if it does."""

    cluster: str = ""
    """Ray cluster to train on: auto for the one that this machine belongs to, HOST:PORT for another
    one, local for one that is started here for the run. Empty: no Ray."""
    cluster_hosts: int = 0
    """Worker hosts; 0 for one on every node, also those that join later."""
    host_cpus: int = 0
    """Processors of each worker host; 0 for all that its node has free."""
    host_tls_ca: str = ""
    """File on every node with certificates (PEM), one of which has signed tls_cert; empty: tls_cert
    itself, which then has signed itself."""
    host_tls_cert: str = ""
    """File on every node with the worker hosts' own certificate chain (PEM), for tls_client_ca."""
    host_tls_key: str = ""
    """File on every node with the private key of host_tls_cert (PEM)."""

    def __post_init__(self) -> None:
        if self.cluster_hosts < 0 or self.host_cpus < 0:
            raise ConfigError("cluster_hosts and host_cpus must not be negative")
        if self.cluster not in ("", "auto", "local") and ":" not in self.cluster:
            raise ConfigError(f"cluster must be auto, local or HOST:PORT, not {self.cluster!r}")
