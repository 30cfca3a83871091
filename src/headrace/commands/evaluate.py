"""`headrace eval RUN`: full episodes with a trained agent."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from headrace.errors import ConfigError
from headrace.run.evaluate import evaluate
from headrace.run.film import film
from headrace.run.policy import load


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Plays full episodes with a trained agent, on the same code that trained it."""

    run: Annotated[str, tyro.conf.Positional]
    """Names the run directory."""
    episodes: int = 20
    """Plays so many full episodes."""
    mode: Literal["greedy", "sample", "epsilon"] = "greedy"
    """Takes the likeliest action (greedy), a draw from the policy (sample), or the likeliest but
    for a share of random actions (epsilon)."""
    epsilon: float = 0.001
    """Sets the share of random actions of --mode epsilon; where Q-values act, sample is the
    same."""
    seed: int | None = None
    """Seeds the environments; None derives it from the run's seed."""
    video: str | None = None
    """Films one more episode into this .mp4 file."""
    json: bool = False
    """Prints one JSON object and nothing else."""
    device: str = "auto"
    """Says where the network acts: cpu, cuda, cuda:N, or auto, which takes a GPU if there is
    one."""
    trust_code: bool = False
    """Imports code that the run names from outside headrace; read it first."""


def eval_command(argv: list[str]) -> None:
    """Evaluates an agent."""
    arguments = tyro.cli(EvalArguments, args=argv, prog="headrace eval")

    if not 0 <= arguments.epsilon <= 1:
        raise ConfigError(f"epsilon must be in [0, 1], not {arguments.epsilon}")
    if arguments.video and not arguments.video.endswith(".mp4"):
        raise ConfigError(f"--video must name an .mp4 file, not {arguments.video!r}")
    policy = load(arguments.run, trust_code=arguments.trust_code, device=arguments.device)
    filmed: dict[str, Any] = {}
    if arguments.video:  # first, so that a path that cannot be written costs no episodes
        path = Path(arguments.video)
        value = film(policy, path, mode=arguments.mode, epsilon=arguments.epsilon)
        filmed = {"video": arguments.video, "video_return": value}
    result = evaluate(
        policy,
        episodes=arguments.episodes,
        mode=arguments.mode,
        epsilon=arguments.epsilon,
        seed=arguments.seed,
    )
    summary = {
        "run": arguments.run,
        "env": policy.spec.name,
        "agent_steps": policy.agent_steps,
        "mode": arguments.mode,
        **result.summary(),
        **filmed,
    }
    if arguments.json:
        print(json.dumps(summary))
        return
    table = Table(title=f"{policy.spec.name}, {arguments.mode}, {policy.agent_steps:,} agent steps")
    table.add_column("")
    table.add_column("", justify="right")
    for key, value in summary.items():
        if key not in ("run", "env", "agent_steps", "mode"):
            table.add_row(key.replace("_", " "), _cell(value))
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_cell(item) for item in value)
    return (
        f"{value:,.2f}" if isinstance(value, float) else str("unknown" if value is None else value)
    )
