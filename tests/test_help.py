"""Help: every setting says in a sentence what it does, and stands in one group."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from headrace import catalog
from headrace.bench import end_to_end, inference, learner, pools, replay, wire
from headrace.cli import main
from headrace.commands.evaluate import EvalArguments
from headrace.commands.help import COMMON, GROUPS, field_docs, settings_of
from headrace.commands.plan import Arguments as PlanArguments
from headrace.commands.tune import TuneArguments
from headrace.commands.worker import WorkerArguments
from headrace.config import RunConfig, completed, section_types, to_dict

ENVIRONMENTS = ["ALE/Pong-v5", "catch", "recall", "pointmass", "envpool:Pong-v5", "CartPole-v1"]
BENCHMARKS = (end_to_end, inference, learner, pools, replay, wire)
COMMANDS = [EvalArguments, PlanArguments, TuneArguments, WorkerArguments]
COMMANDS += [module.Arguments for module in BENCHMARKS]


def every_run() -> Iterator[RunConfig]:
    """Yields a complete config of each algorithm in each kind of environment."""
    assert len(ENVIRONMENTS) == len(catalog.ENVIRONMENTS) + 1
    for env in ENVIRONMENTS:
        for algorithm in catalog.ALGORITHMS:
            sections = {name: kind() for name, kind in section_types(env, algorithm).items()}
            yield completed(RunConfig(env=env, algorithm=algorithm, **sections))


def texts_of(kind: type[Any]) -> dict[str, str]:
    """Returns the help of each option of a command."""
    texts = field_docs(kind)
    found: dict[str, str] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= texts_of(typing.cast(type[Any], hint))
        else:
            found[f"{kind.__name__}.{name}"] = texts.get(name, "")
    return found


def is_sentence(text: str) -> bool:
    """Whether a help text may be one: it begins and ends as one, and has room for a verb."""
    return bool(re.fullmatch(r"[A-Z].*\.", text)) and len(text.split()) >= 3


def test_every_setting_says_what_it_does_in_a_sentence() -> None:
    settings = {(one.name, one.text) for run in every_run() for one in settings_of(run)}
    assert len(settings) > 120
    assert [one for one in sorted(settings) if not is_sentence(one[1])] == []


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_so_does_every_option_of_other_commands(kind: type[Any]) -> None:
    texts = texts_of(kind)
    assert texts
    assert [name for name, text in texts.items() if not is_sentence(text)] == []


def test_the_checks_can_fail() -> None:
    assert not is_sentence("")
    assert not is_sentence("gamma, per agent step.")
    assert not is_sentence("Ends the run")
    assert not is_sentence("Of those.")


def test_every_setting_stands_in_one_group() -> None:
    placed = Counter(name for names in GROUPS.values() for name in names)
    assert [name for name, times in placed.items() if times > 1] == []
    known = {one.name for run in every_run() for one in settings_of(run)}
    assert set(placed) == known
    assert known >= COMMON


def flags_of(page: str) -> list[str]:
    """Returns the settings that a page shows, by the names of their flags."""
    start = re.search(r"^(╭─)? (positional arguments|options)", page, re.MULTILINE)
    assert start is not None
    boxes = page[start.start() :]
    shown = re.findall(r"^[│ ] (--[a-z0-9-]+|ENV)\b", boxes, re.MULTILINE)
    return ["env" if flag == "ENV" else flag[2:].replace("-", "_") for flag in shown]


def help_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Returns what a command prints for help."""
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("env", "algorithm"),
    [("catch", "impala"), ("recall", "r2d2"), ("pointmass", "sac"), ("CartPole-v1", "r2d2")],
)
def test_help_shows_what_people_change_and_help_all_everything(
    env: str, algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = help_of(capsys, "train", env, "--algorithm", algorithm, "--help")
    some = flags_of(page)
    assert 18 <= len(some) <= 25
    assert len(set(some)) == len(some)
    everything = flags_of(help_of(capsys, "train", env, "--algorithm", algorithm, "--help-all"))
    config = completed(RunConfig(env=env, algorithm=algorithm))
    assert sorted(everything) == sorted(one.name for one in settings_of(config))
    assert set(some) <= set(everything)
    left = len(everything) - len(some)
    assert page.splitlines()[-1] == f"--help-all shows the other {left} settings."


def test_atari_has_no_more() -> None:
    for run in every_run():
        assert sum(one.is_common for one in settings_of(run)) <= 25


def test_the_groups_follow_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    page = help_of(capsys, "train", "catch", "--algorithm", "r2d2", "--help-all")
    titles = re.findall(r"^(?:╭─)? ([a-z ]+) options\b", page, re.MULTILINE)
    assert titles == list(GROUPS)


def test_defaults_are_those_that_the_run_would_get(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text("[server]\nnum_envs = 33\n")
    argv = ["train", "catch", "--config", str(tmp_path / "mine.toml")]
    page = " ".join(help_of(capsys, *argv, "--help").replace("│", "").split())
    assert re.search(r"--num-envs INT [^(]+\(default: 33\)", page)
    assert re.search(r"--total-frames INT .+? \(default: 150000\)", page)
    assert "(default: catch)" in page


def test_tune_shows_its_own_options_and_then_those_of_train(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = flags_of(help_of(capsys, "tune", "catch", "--help-all"))
    assert [name for name, times in Counter(shown).items() if times > 1] == []
    assert {"budget_s", "tune_batch", "out", "num_envs", "discount"} <= set(shown)
    some = flags_of(help_of(capsys, "tune", "catch", "--help"))
    assert sorted(some) == sorted(entry.name for entry in dataclasses.fields(TuneArguments))


def test_own_settings_are_shown_without_being_in_a_list() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OwnConfig:
        wind: float = 0.5
        """Blows with so many pixels
        per step."""
        rain: bool = False

    config = dataclasses.replace(completed(RunConfig(env="catch")), environment=OwnConfig())
    own = {one.name: one for one in settings_of(config) if one.section == "environment"}
    assert own["wind"].text == "Blows with so many pixels per step."
    assert own["rain"].text == ""
    assert {(one.group, one.is_common) for one in own.values()} == {("environment", True)}


def test_help_of_a_run_shows_its_own_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = completed(RunConfig(env="catch", seed=77))
    (tmp_path / "config.toml").write_text(tomli_w.dumps(to_dict(config)))
    page = help_of(capsys, "train", "--resume", str(tmp_path), "--help")
    assert "(default: 77)" in page
    assert "env" not in flags_of(page)
