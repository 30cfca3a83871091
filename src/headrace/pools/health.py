"""The gRPC health service, on the port of the listener.

`Check` answers everybody, also without a token, because the probes of Kubernetes have none: that
the port answers is all it says. `Watch`, which has no end, and `List` want the token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.errors import ConfigError

SERVICES = ("", "headrace.Hosts")


def add_health(server: Any, check: Callable[[Any], str]) -> Any:
    """Adds the service to an asynchronous server and returns it.

    Args:
        server: Of grpc.aio, not yet started.
        check: Returns why the caller of a context may not watch; empty if it may.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        import grpc  # noqa: PLC0415 - an extra
        from grpc_health.v1 import health, health_pb2_grpc  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "the health service needs an extra: pip install 'headrace[cluster]'"
        ) from error

    async def guard(context: Any) -> None:
        fault = check(context)
        if fault:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, fault)

    class Guarded(health.aio.HealthServicer):  # type: ignore[misc]
        """Answers `Check` to all, the rest to those who may."""

        async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
            await guard(context)
            await super().Watch(request, context)

        async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
            await guard(context)
            return await super().List(request, context)

    servicer = Guarded()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return servicer


async def set_health(servicer: Any, *, serving: bool) -> None:
    """Says whether hosts may come."""
    from grpc_health.v1 import health_pb2  # noqa: PLC0415 - an extra

    states = health_pb2.HealthCheckResponse
    for service in SERVICES:
        await servicer.set(service, states.SERVING if serving else states.NOT_SERVING)
