"""The Ray that a run is on: connects to it or starts it, and refuses one that is open to others.

Ray's ports run whatever code they are sent. A Ray that is started here listens on loopback alone
and asks for a token that is made for it; one that others can reach is refused unless it asks for
a token, which is tried.

One that is started here is this file as a program, in a process group of its own. Signals of a
terminal or a scheduler go to the driver's whole group: were Ray in it, they would take it from
under a run that is about to save. And whatever kills the driver ends that group
(pools/processes.py), before Ray itself has noticed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError, PeerLost
from headrace.pools.processes import WorkerEnd, WorkerProcess
from headrace.resources import usable_cores
from headrace.run.cluster_actor import Site, one_line
from headrace.run.cluster_plan import Node
from headrace.transport.auth import is_loopback, parse_address

_MODE = "RAY_AUTH_MODE"
_OBJECT_STORE_NBYTES = 80 << 20  # about the least that Ray takes: nothing of ours lies there
_LONGEST_FOLDER = 20  # characters; the path of a Unix socket may have 107, and others add 87
_PROBE_S = 10.0
_START_S, _END_S, _POLL_S = 120.0, 15.0, 0.05
_EXTRA = "--cluster needs an extra: pip install 'headrace[cluster]'"
_FIX = (
    "start every node with RAY_AUTH_MODE=token and one token (`ray get-auth-token --generate`), "
    "and set both here too"
)


def living_nodes(ray: Any) -> list[Node]:
    """Returns the nodes that live.

    Raises:
        PeerLost: the cluster does not answer.
    """
    try:
        entries = [entry for entry in ray.nodes() if entry["Alive"]]
    except ray.exceptions.RayError as error:
        raise PeerLost(f"the Ray cluster does not answer: {one_line(error)}") from error
    return sorted(
        Node(
            id=entry["NodeID"],
            name=entry["NodeManagerHostname"],
            address=entry["NodeManagerAddress"],
            cpus=entry["Resources"].get("CPU", 0.0),
            gpus=entry["Resources"].get("GPU", 0.0),
        )
        for entry in entries
    )


@contextlib.contextmanager
def connected(cluster: str, variables: Mapping[str, str]) -> Iterator[Site]:
    """Connects to Ray for as long as the block runs; a Ray that was started here ends with it.

    Args:
        cluster: auto, HOST:PORT, or local; see `ClusterConfig`.
        variables: For the environment of each process that is placed.

    Raises:
        ConfigError: there is no Ray, or anybody could use it.
    """
    with contextlib.ExitStack() as stack:
        ensure_allowed(cluster)
        if cluster == "local":
            _keep_to_loopback(stack)
        ray = _module()
        if ray.is_initialized():
            raise ConfigError(
                "this process is connected to Ray already: call ray.shutdown() first, and say "
                "cluster='auto' if it should be the same one"
            )
        address = _own_ray(stack) if cluster == "local" else cluster
        try:
            ray.init(
                address=address,
                job_config=job_config(),
                namespace=f"headrace-{secrets.token_hex(4)}",
                log_to_driver=False,
                configure_logging=False,
                logging_level="error",
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            why = one_line(error.__cause__ or error)
            raise ConfigError(f"no Ray cluster at --cluster {cluster}: {why}") from error
        stack.callback(ray.shutdown)
        _ensure_closed(ray, [entry["NodeManagerAddress"] for entry in ray.nodes()], cluster)
        yield Site(ray, variables)


def ensure_allowed(cluster: str) -> None:
    """Finds what can be wrong before anything is started or connected.

    Raises:
        ConfigError: there is no Ray here, or it would do what anybody says.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(_EXTRA)
    if cluster == "local":
        return
    exposed = cluster == "auto" or not is_loopback(parse_address(cluster, flag="--cluster").host)
    if exposed and os.environ.get(_MODE) != "token":
        raise ConfigError(f"whoever reaches Ray's ports can run code on all nodes: {_FIX}")


class _NoPaths(list[str]):
    """What Ray adds nothing to."""

    def extend(self, paths: Iterable[str]) -> None:
        """Leaves out the driver's folder, and that of its script."""


def job_config() -> Any:
    """Returns what has Ray's workers look for modules where Python does: see `import_named`.

    Ray would have them look into the driver's working folder first, before the standard library.
    """
    config = importlib.import_module("ray.job_config").JobConfig()
    config._py_driver_sys_path = _NoPaths()
    return config


def _module() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when a cluster starts
    return importlib.import_module("ray")


@functools.cache
def _own_token() -> str:
    """The token of every Ray that this process starts: Ray reads it once a process."""
    return secrets.token_hex(32)


def _keep_to_loopback(stack: contextlib.ExitStack) -> None:
    """Has the Ray of this process and its children use loopback and a token, until `stack` ends.

    Raises:
        ConfigError: it is too late.
    """
    variables = {
        _MODE: "token",
        "RAY_AUTH_TOKEN": _own_token(),
        # The only way to have Ray listen on loopback alone; on Linux it means just that.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    for name, value in variables.items():
        stack.callback(_put_back, name, os.environ.get(name))
        os.environ[name] = value
    ray, util = _module(), importlib.import_module("ray.util")
    if not ray.is_initialized() and not is_loopback(util.get_node_ip_address()):
        raise ConfigError(
            "this process had imported ray before, which now listens on the network: leave that "
            "out, or start Ray yourself and say --cluster auto"
        )


def _own_ray(stack: contextlib.ExitStack) -> str:
    """Starts a Ray of one node on loopback, which `stack` ends; returns its address.

    Raises:
        ConfigError: it does not start.
    """
    base = tempfile.gettempdir()
    folder = tempfile.mkdtemp(
        prefix="headrace-", dir=base if len(base) <= _LONGEST_FOLDER else "/tmp"
    )
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    settings = {
        "folder": str(Path(folder) / "ray"),  # in a folder of ours: Ray opens its own to all users
        "cpus": usable_cores(),
        "object_store_nbytes": _OBJECT_STORE_NBYTES,
    }
    process = WorkerProcess("headrace.run.cluster_ray", settings, name="headrace ray")
    stack.callback(process.close, _END_S)
    until_s = time.monotonic() + _START_S
    while True:
        for message in process.messages():
            if "address" in message:
                return str(message["address"])
        death = process.death()
        if death is not None or time.monotonic() > until_s:
            raise ConfigError(f"Ray does not start: {death or f'no answer in {_START_S:g} s'}")
        time.sleep(_POLL_S)


def _put_back(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _ensure_closed(ray: Any, addresses: Sequence[str], cluster: str) -> None:
    """Refuses a Ray that others can reach and that does what anybody says.

    Raises:
        ConfigError: says what is open.
    """
    open_to_others = [address for address in addresses if not is_loopback(address)]
    if not open_to_others:
        return
    if os.environ.get(_MODE) != "token" or answers_anybody(ray.get_runtime_context().gcs_address):
        raise ConfigError(
            f"the Ray cluster at {cluster} lets anybody run code on all nodes: {_FIX}"
        )


def answers_anybody(address: str) -> bool:
    """Whether Ray answers who shows no token; who has one is not told that it is not needed."""
    grpc = importlib.import_module("grpc")
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            ask(b"", timeout=_PROBE_S)
        except grpc.RpcError as error:
            # The second is TLS, to which we speak plainly. Anything else proves nothing.
            closed = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE
            return error.code() not in closed
        return True


def main() -> None:
    """Starts Ray with the parent's settings, tells its address, and ends it when asked to."""
    end = WorkerEnd.open()
    ray = _module()
    ray.init(
        address="local",
        job_config=job_config(),
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        logging_level="error",
        _temp_dir=end.settings["folder"],
        num_cpus=end.settings["cpus"],
        object_store_memory=end.settings["object_store_nbytes"],
    )
    end.status({"address": ray.get_runtime_context().gcs_address})
    try:
        while True:
            end.receive()
    except PeerLost:
        ray.shutdown()
        shutil.rmtree(end.settings["folder"], ignore_errors=True)


if __name__ == "__main__":
    main()
