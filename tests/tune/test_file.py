"""The file that is written: what `train --config` makes of it, and when it is not written."""

from __future__ import annotations

import tomllib
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from headrace.commands.settings import (
    Request,
    difference,
    first_pass,
    read_request,
    values_for_file,
)
from headrace.config import from_dict, read_toml
from headrace.errors import ConfigError
from headrace.presets import PRESETS, find
from headrace.run.complete import complete
from headrace.tune import file, report
from headrace.tune.estimates import Estimates
from headrace.tune.machine import Machine
from headrace.tune.search_space import Facts, SearchSpace, laid_over
from headrace.tune.tuner import Tuned
from headrace.tune.types import Choice, Outcome, Result, Trial

CHOSEN: dict[str, Any] = {
    "compile": "on",
    "server": {"num_envs": 64, "inference_batch": 16},
    "workers": {"num_workers": 3},
}


def request_of(*argv: str) -> Request:
    chosen, rest = first_pass(argv)
    return read_request(chosen, rest, prog="headrace tune", description="")


def trained_with(values: dict[str, Any], tmp_path: Path) -> Any:
    """What `headrace train --config` makes of `values`."""
    path = tmp_path / "tuned.toml"
    path.write_text(file.tomli_w.dumps(values))
    return request_of("--config", str(path)).config


@pytest.mark.parametrize(
    "argv",
    [
        ("catch",),
        ("catch", "--num-envs", "8", "--learning-rate", "0.5", "--no-tensorboard"),
        ("catch", "--algorithm", "ppo"),
        ("pointmass", "--algorithm", "sac", "--hidden-sizes", "16", "16"),
        ("pointmass", "--algorithm", "sac", "--preset", "sac-mujoco", "--inference", "server"),
        ("catch", "--preset", "r2d2-control"),
        ("catch", "--preset", "control"),
    ],
)
def test_train_takes_what_was_written(argv: tuple[str, ...], tmp_path: Path) -> None:
    request = request_of(*argv)
    wanted = laid_over(request.config, CHOSEN)
    assert trained_with(values_for_file(request, CHOSEN), tmp_path) == wanted
    assert trained_with(values_for_file(request, {}), tmp_path) == request.config


def test_only_what_was_asked_for_and_chosen_is_written() -> None:
    values = values_for_file(request_of("catch", "--seed", "7", "--discount", "0.5"), CHOSEN)
    assert values == {
        "env": "catch",
        "algorithm": "impala",
        "preset": "catch",
        "seed": 7,
        "learning": {"discount": 0.5},
        **CHOSEN,
    }


def test_a_file_is_part_of_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('env = "catch"\n[server]\nnum_envs = 8\n[learning]\ndiscount = 0.5\n')
    request = request_of("--config", str(path), "--compile", "off")
    assert request.pinned >= {"num_envs", "discount", "compile"}
    values = values_for_file(request, {"server": {"inference_batch": 8}})
    assert values["server"] == {"num_envs": 8, "inference_batch": 8}
    assert values["learning"] == {"discount": 0.5}


def test_flags_are_pinned_however_they_are_written() -> None:
    request = request_of("catch", "--num-envs=8", "--inference_batch", "4", "--no-tensorboard")
    assert request.pinned >= {"num_envs", "inference_batch"}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_can_be_written(name: str, tmp_path: Path) -> None:
    own = find(name).values
    algorithm = own.get("algorithm", "impala")
    envs = ["pointmass" if algorithm == "sac" else "catch"]
    if "environment" in own:  # its settings are of no other environment
        envs = ["ALE/Pong-v5"] if "noop_max" in own["environment"] else []
    for env in envs:
        config = complete({"env": env, "preset": name})
        values = values_for_file(Request(config, dict(own), frozenset()), {})
        assert trained_with(values, tmp_path) == config


def test_what_toml_cannot_say_is_refused_at_once() -> None:
    # The preset has an LSTM of some width, and a user wants the one that is usual.
    request = request_of("recall", "--algorithm", "r2d2", "--lstm-size", "None")
    with pytest.raises(ConfigError, match=r"lstm_size is None, .* give --lstm-size a value"):
        values_for_file(request, {})


def test_difference() -> None:
    before = {"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 4}}
    after = {"a": 1, "b": {"c": 2, "d": 5}, "e": {"f": 4}, "g": {"h": 6}}
    assert difference(before, after) == {"b": {"d": 5}, "g": {"h": 6}}


FACTS = Facts(
    cores=2,
    pool="inline",
    turns=False,
    bfloat16=True,
    half_precision=True,
    compiled=False,
    compute_threads=1,
)


def figures(steps: float, bottleneck: str) -> dict[str, Any]:
    return {
        "agent_steps_per_s": steps,
        "updates_per_s": steps / 640,
        "samples_per_s": steps,
        "samples_per_agent_step": 1.0,
        "bottleneck": bottleneck,
    }


def tuned(*, beaten: bool = True, stopped: bool = False) -> Tuned:
    config = from_dict({"env": "catch", "device": "cpu"})
    space = SearchSpace(config, FACTS, pinned=(), tune_batch=False)
    default: Choice = {one.name: one.values[one.default] for one in space.parameters}
    best = {**default, "num_envs": 128}
    crash = Outcome(0.0, "killed by SIGSEGV", {})
    trials = (
        Trial(default, Outcome(1000.0, None, figures(1000.0, "server")), 5.0, "search"),
        Trial({**default, "compile": "on"}, crash, 1.0, "search"),
        Trial(best, Outcome(1500.0, None, figures(1500.0, "learner")), 5.0, "search"),
        Trial(default, Outcome(1010.0, None, figures(1010.0, "server")), 9.0, "final"),
        Trial(best, Outcome(1520.0, None, figures(1520.0, "learner")), 9.0, "final"),
    )
    result = Result(
        trials=trials,
        default=default,
        best=best,
        gains=(1.5, 1.6),
        gain=1.55,
        noise=0.02,
        beaten=beaten,
        stopped=stopped,
    )
    machine = Machine(cores=2, cpu="Some Processor", gpu=None, bfloat16=True)
    estimates = Estimates(bound=2000.0, one_more_core=1824.0, one_more_gpu_at_most=3040.0)
    return Tuned(config, machine, result, space, estimates, 4.0, 61.0)


def test_the_report_says_what_won_and_what_limits() -> None:
    said = "\n".join(report.sentences(tuned()))
    for words in (
        "2 cores of Some Processor, no GPU: 5 trials in 61 s, 1 of which failed",
        "num_envs=128: 1.55 times the defaults (1.50 to 1.60 in 2 pairs of trials",
        "1,520 agent steps/s",
        "against 1,010 agent steps/s",
        "what limits now: the learner",
        "estimate, from each stage alone: one more core would bring about 1,824 agent steps/s "
        "(1.20 times)",
        "a GPU at most 3,040 (2.00 times)",
        "mind: num_envs 128: more environments",
    ):
        assert words in said


def test_the_report_says_that_the_defaults_stay() -> None:
    unbeaten = tuned(beaten=False)
    said = "\n".join(report.sentences(unbeaten))
    assert "the defaults stay: num_envs=128 came to 1.55 times" in said
    assert "a quieter machine or longer trials would tell better" in said
    assert "what limits now: the server" in said
    assert "mind" not in said
    assert unbeaten.settings == {}
    assert unbeaten.winner == unbeaten.config


def test_what_was_not_measured_is_not_said() -> None:
    once = tuned()
    once = once._replace(result=once.result._replace(gains=(1.5,), noise=0.0), estimates=None)
    said = report.sentences(once)
    assert "1.55 times the defaults (in 1 pair of trials); " in said[1]
    assert "what one more core or GPU would bring was not measured: give a larger budget" in said


def test_the_report_of_a_search_that_was_stopped_at_once() -> None:
    stopped = tuned(beaten=False, stopped=True)
    result = stopped.result
    result = result._replace(trials=(), best=result.default, gains=(), gain=1.0)
    assert report.sentences(stopped._replace(result=result, estimates=None)) == [
        "tuned on 2 cores of Some Processor, no GPU: 0 trials in 61 s, then stopped",
        "the defaults stay: there was no time to try anything else",
    ]


def test_the_text_has_its_history_and_is_toml() -> None:
    text = file.text_of(
        {"env": "catch", "server": {"num_envs": 128}},
        tuned(),
        command="headrace tune catch",
        now=datetime(2030, 1, 2, 3, 4),
    )
    assert tomllib.loads(text) == {"env": "catch", "server": {"num_envs": 128}}
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    assert comments[0] == "# 2030-01-02 03:04: headrace tune catch"
    assert "torch" in comments[1]
    assert any("1.55 times the defaults" in line for line in comments)


def test_everything_is_plain_for_json() -> None:
    result = report.as_dict(tuned())
    assert result["settings"] == {"server": {"num_envs": 128}}
    assert [trial["failure"] for trial in result["trials"]].count(None) == 4
    assert result["estimates"]["one_more_core"] == 1824.0


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ("ALE/Pong-v5", "tuned-Pong-v5-sac.toml"),
        ("envpool:gfootball/x-v1", "tuned-envpool-gfootball-x-v1-sac.toml"),
        ("my_module:make", "tuned-my_module-make-sac.toml"),
    ],
)
def test_default_names(env: str, name: str) -> None:
    assert file.default_name(env, "sac") == name


def test_a_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "tuned.toml"
    file.write(path, "seed = 1\n", force=False)
    with pytest.raises(ConfigError, match="is there already: name another file with --out, or say"):
        file.write(path, "seed = 2\n", force=False)
    assert read_toml(path) == {"seed": 1}
    file.write(path, "seed = 3\n", force=True)
    assert read_toml(path) == {"seed": 3}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["nowhere/tuned.toml", "folder"])
def test_where_nothing_can_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for force in (False, True):
        with pytest.raises(ConfigError, match=r"cannot write .*--out"):
            file.ensure_free(tmp_path / name, force=force)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_what_could_not_be_written(
    error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises((KeyboardInterrupt, ConfigError)):
        file.write(tmp_path / "tuned.toml", "seed = 1\n", force=False)
    assert list(tmp_path.iterdir()) == []
