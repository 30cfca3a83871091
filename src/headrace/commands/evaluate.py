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
    """Run directory."""
    episodes: int = 20
    """Full episodes to play."""
    mode: Literal["greedy", "sample", "epsilon"] = "greedy"
    """The likeliest action, a draw from the policy, or greedy but for a share of random actions."""
    epsilon: float = 0.001
    """That share, for --mode epsilon; where Q-values act, sample is the same."""
    seed: int | None = None
    """Of the environments; None for one derived from the run's."""
    video: str | None = None
    """Film one more episode into this .mp4 file."""
    json: bool = False
    """Print one JSON object and nothing else."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    trust_code: bool = False
    """Import code that the run names from outside headrace. Read it first."""


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
