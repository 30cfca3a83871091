"""The one file that speaks Ray: connects or starts it, and places keepers on its nodes.

Ray's ports run whatever code they are sent. A Ray that is started here listens on loopback alone
and asks for a token that is made for it; one that others can reach is refused unless it asks for
a token, which is tried. Step data never goes this way.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError, PeerLost
from headrace.pools.credentials import is_loopback, parse_address
from headrace.pools.processes import WorkerProcess
from headrace.resources import usable_cores
from headrace.run.cluster_keeper import Heard, Keeper
from headrace.run.cluster_member import Order
from headrace.run.cluster_plan import Node

LOOK_S = 0.5
"""Longest that a keeper waits for news of its process before it says that there is none."""

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


class RayCluster:
    """A Ray that this process is connected to. For one thread."""

    def __init__(self, ray: Any, variables: Mapping[str, str]) -> None:
        """Speaks through the module `ray`; `variables` go into each process's environment."""
        self._ray = ray
        self._variables = dict(variables)
        self._placed: list[RayPlaced] = []

    def nodes(self) -> list[Node]:
        """Returns the nodes that live.

        Raises:
            PeerLost: the cluster does not answer.
        """
        # Public Ray knows what is free only in all.
        state = importlib.import_module("ray._private.state")
        try:
            free, entries = state.available_resources_per_node(), self._ray.nodes()
        except self._ray.exceptions.RayError as error:
            raise PeerLost(f"the Ray cluster does not answer: {one_line(error)}") from error
        nodes = []
        for entry in entries:
            key, total = entry["NodeID"], entry["Resources"]
            if not entry["Alive"]:
                continue
            nodes.append(
                Node(
                    id=key,
                    name=entry["NodeManagerHostname"],
                    address=entry["NodeManagerAddress"],
                    cpus=total.get("CPU", 0.0),
                    gpus=total.get("GPU", 0.0),
                    free_cpus=free.get(key, {}).get("CPU", 0.0),
                    free_gpus=free.get(key, {}).get("GPU", 0.0),
                )
            )
        return sorted(nodes)

    def place(self, order: Order) -> RayPlaced:
        """Begins to place a process; never waits."""
        self._placed = [placed for placed in self._placed if placed.answer is not None]
        self._placed.append(RayPlaced(self._ray, order, self._variables))
        return self._placed[-1]

    def wait(self, timeout_s: float) -> None:
        """Waits until a process has news, or `timeout_s` is over."""
        answers = [placed.answer for placed in self._placed if placed.answer is not None]
        if answers:
            self._ray.wait(answers, num_returns=1, timeout=timeout_s, fetch_local=False)
        else:
            time.sleep(timeout_s)


class RayPlaced:
    """A process on its way to a node, or there. For one thread; nothing but `kill` waits."""

    def __init__(self, ray: Any, order: Order, variables: Mapping[str, str]) -> None:
        """Asks Ray for room on the order's node, and for a keeper there."""
        groups = importlib.import_module("ray.util.placement_group")
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        self._ray, self._remove = ray, groups.remove_placement_group
        bundle = {"CPU": order.cpus, **({"GPU": order.gpus} if order.gpus else {})}
        self._group = groups.placement_group(
            [bundle], bundle_label_selector=[{"ray.io/node-id": order.node}]
        )
        self._keeper = (
            ray.remote(Keeper)
            .options(
                num_cpus=order.cpus,
                num_gpus=order.gpus,
                max_restarts=0,
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(self._group),
            )
            .remote()
        )
        self.machine = ""
        """Name of the machine where it runs; empty while it waits for room."""
        self.answer: Any = self._keeper.start.remote(
            order.module,
            order.settings,
            order.name,
            variables,
            paths=[str(Path(path or ".").resolve()) for path in sys.path],
            folder=str(Path.cwd()),
        )

    def hear(self) -> Heard | None:
        """Returns what has come since the last call; None if nothing has, not even a sign of life.

        A process that has died on its node, and one that has died with it, look the same.
        """
        if self.answer is None:
            return None
        if not self._ray.wait([self.answer], timeout=0)[0]:
            return None
        try:
            answer = self._ray.get(self.answer)
        except self._ray.exceptions.RayError as error:
            self.answer = None
            return Heard(death=one_line(error))
        if isinstance(answer, str):
            self.machine, answer = answer, Heard()
        heard: Heard = answer
        self.answer = None if heard.death is not None else self._keeper.look.remote(LOOK_S)
        return heard

    def say(self, data: bytes) -> None:
        """Sends the process something."""
        self._keeper.say.remote(data)

    def hang_up(self) -> None:
        """Asks the process to end."""
        self._keeper.hang_up.remote()

    def kill(self) -> None:
        """Ends the process, its keeper, and the claim to their room; may come twice."""
        self.answer = None
        with contextlib.suppress(self._ray.exceptions.RayError):  # a cluster that is gone
            self._ray.kill(self._keeper)
            self._remove(self._group)


@contextlib.contextmanager
def connected(cluster: str, variables: Mapping[str, str]) -> Iterator[RayCluster]:
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
        yield RayCluster(ray, variables)


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


def one_line(error: BaseException) -> str:
    """Returns what matters of one of Ray's many-lined errors."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [
        line for line in lines if line.startswith("The actor ") and "unexpectedly" not in line
    ]
    named = [line for line in lines if "Error: " in line]
    return (telling or named[-1:] or lines or [type(error).__name__])[0][:300]


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
    _module()
    if importlib.import_module("ray._private.ray_constants").ENABLE_RAY_CLUSTER:
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
    process = WorkerProcess("headrace.run.ray_process", settings, name="headrace ray")
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
