"""Settings of worker processes, and of what a cluster places."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """How environments are spread over worker processes, and when a worker is given up."""

    num_workers: int = 0
    """Starts so many worker processes; 0 starts one per core. There are never more than
    environments."""
    groups_per_worker: int = 2
    """Divides the environments of a worker into so many groups: it steps one while the others wait
    for actions."""
    batch_wait_ms: float = 2.0
    """Lets a row wait for others at most so many milliseconds before a batch smaller than wanted is
    answered."""
    step_timeout_s: float = 60.0
    """Kills a worker as hanging when one step of a group takes more than so many seconds."""
    start_timeout_s: float = 120.0
    """Gives a worker so many seconds to start and to reset its environments."""
    max_worker_deaths: int = 5
    """Ends the run at so many deaths of workers in a row, none of them after a long healthy
    life."""

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
    """Trains on a Ray cluster: auto takes the one that this machine belongs to, HOST:PORT another
    one, local starts one here for the run. Empty uses no Ray."""
    cluster_hosts: int = 0
    """Places so many worker hosts; 0 places one on every node, also on those that join later."""
    host_cpus: int = 0
    """Gives each worker host so many processors; 0 gives all that its node has free."""
    host_tls_ca: str = ""
    """Names the file on every node with certificates (PEM), one of which has signed tls_cert; empty
    takes tls_cert itself, which then has signed itself."""
    host_tls_cert: str = ""
    """Names the file on every node with the worker hosts' own certificate chain (PEM), for
    tls_client_ca."""
    host_tls_key: str = ""
    """Names the file on every node with the private key of host_tls_cert (PEM)."""

    def __post_init__(self) -> None:
        if self.cluster_hosts < 0 or self.host_cpus < 0:
            raise ConfigError("cluster_hosts and host_cpus must not be negative")
        if self.cluster not in ("", "auto", "local") and ":" not in self.cluster:
            raise ConfigError(f"cluster must be auto, local or HOST:PORT, not {self.cluster!r}")
