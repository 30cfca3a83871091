"""The gRPC health service, on the port of the listener.

`Check` answers everybody, also without a token, because the probes of Kubernetes have none: that
the port answers is all it says. `Watch`, which has no end, and `List` want the token.
"""

from __future__ import annotations

from typing import Any

from headrace.errors import ConfigError

SERVICES = ("", "headrace.Hosts")
CHECK = "/grpc.health.v1.Health/Check"


def add_health(server: Any) -> Any:
    """Adds the service to an asynchronous server, which is not yet started, and returns it.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from grpc_health.v1 import health, health_pb2_grpc  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            "the health service needs an extra: pip install 'headrace[cluster]'"
        ) from error
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return servicer


async def set_health(servicer: Any, *, serving: bool) -> None:
    """Says whether hosts may come."""
    from grpc_health.v1 import health_pb2  # noqa: PLC0415 - an extra

    states = health_pb2.HealthCheckResponse
    for service in SERVICES:
        await servicer.set(service, states.SERVING if serving else states.NOT_SERVING)
