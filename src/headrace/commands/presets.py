"""`headrace presets`: named settings, and where their numbers come from."""

from __future__ import annotations

import argparse
from typing import Any

from headrace import presets


def presets_command(argv: list[str]) -> None:
    """Lists presets."""
    argparse.ArgumentParser(
        "headrace presets",
        description="Lists named settings, and where their numbers come from.",
    ).parse_args(argv)
    for name, preset in presets.PRESETS.items():
        print(f"{name}\n  {preset.summary}\n  source: {preset.source}")
        for what, text in (("score", preset.score), ("command", preset.command)):
            if text:
                print(f"  {what}: {text}")
        for line in _flat(preset.values):
            print(f"    {line}")


def _flat(values: dict[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in values.items():
        lines += (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else [f"{prefix}{key} = {value}"]
        )
    return lines
