"""`headrace envs`: what can be trained here, and what is missing."""

from __future__ import annotations

import argparse

from rich.console import Console

from headrace.envs import atari, packages
from headrace.errors import ConfigError

OWN_ENVIRONMENTS = {
    "catch": "a ball falls, a paddle catches it; best return 1",
    "recall": "act on a cue seen steps ago, which needs a recurrent policy; best return 1",
    "pointmass": "push a point to the middle of a plane, continuous actions; best return known",
}


def envs_command(argv: list[str]) -> None:
    """Lists environments."""
    argparse.ArgumentParser(
        "headrace envs", description="Lists what can be trained here, and what is missing."
    ).parse_args(argv)
    for name, what in OWN_ENVIRONMENTS.items():
        print(f"{name:<18}{what}")
    rows = packages.available()
    width = max(len(example) for _, example, _ in rows)
    print("\nPackages of environments, each with an example of what to train:")
    for name, example, state in rows:
        print(f"  {name:<18}{example:<{width}}  {state}")
    print("Any other Gymnasium environment: its id, or my_module:factory.")
    try:
        games = atari.games()
    except ConfigError:
        return
    print(f"\n{len(games)} Atari games:")
    Console().print("  ".join(games), highlight=False)
