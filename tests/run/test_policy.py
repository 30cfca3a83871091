"""Trained agents: loading, playing, and whose code is imported."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from headrace import ConfigError, Policy, evaluate, load, make_config, train, tree
from headrace.cli import main
from headrace.config import from_dict, merged
from headrace.learner import checkpoint
from headrace.presets import find
from headrace.run.film import film

# A module that leaves a mark as soon as it is imported.
STRANGER = """
    from pathlib import Path

    from headrace.algorithms.impala import Impala
    from headrace.envs.catch import CatchFamily
    from headrace.networks.models import mlp

    Path(__file__).with_name("imported").write_text("")

    class Family(CatchFamily):
        def spec(self, name, config):
            return super().spec("catch", config)

        def make(self, name, config, **settings):
            return super().make("catch", config, **settings)

    FAMILY = Family()
"""


def small(out: Path, env: str = "catch", **settings: object) -> Path:
    base = {
        "env": env,
        "out": str(out),
        "device": "cpu",
        "lockstep": True,
        "tensorboard": False,
        "total_frames": 600,
        "server": {"num_envs": 8},
        "learning": {"unroll_steps": 5, "batch_unrolls": 4},
    }
    preset = find(env).values if env in ("catch", "recall") else {}
    config = from_dict(merged(merged(preset, base), settings))
    return train(config).run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small(tmp_path / "run")


def test_a_loaded_policy_has_the_weights_of_the_newest_checkpoint(run: Path) -> None:
    policy = load(run)
    saved, _ = checkpoint.newest_whole(run / "checkpoints")
    assert saved is not None
    assert policy.agent_steps == saved.meta["agent_steps"] >= 600
    model = policy.actor("greedy", 0.0).model
    assert isinstance(model, torch.nn.Module)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved.tensors["weights"][name])


def test_a_damaged_checkpoint_is_passed_over(run: Path) -> None:
    first = load(run).agent_steps
    train(resume=run, changes={"total_frames": 1200})
    second = load(run).agent_steps
    assert second > first
    (run / "checkpoints" / f"agent_steps_{second:012d}" / "weights.safetensors").write_bytes(b"x")
    assert load(run).agent_steps == first


def test_evaluation_plays_what_it_was_asked_for(run: Path) -> None:
    policy = load(run)
    result = evaluate(policy, episodes=37, seed=4)
    assert result.returns.shape == result.lengths.shape == (37,)
    assert set(result.returns.tolist()) <= {-1.0, 1.0}
    assert (result.lengths == 9).all()
    assert result.human_normalised is None
    again = evaluate(policy, episodes=37, seed=4)
    np.testing.assert_array_equal(result.returns, again.returns)
    summary = json.loads(json.dumps(result.summary()))
    assert summary["mean_return"] == pytest.approx(result.returns.mean())
    assert summary["episodes"] == 37


@pytest.mark.parametrize("mode", ["greedy", "sample", "epsilon"])
def test_every_mode_plays(run: Path, mode: str) -> None:
    result = evaluate(load(run), episodes=3, mode=mode, epsilon=0.5)  # type: ignore[arg-type]
    assert len(result.returns) == 3


def test_no_episodes_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="episodes must be at least 1"):
        evaluate(load(run), episodes=0)


def test_whole_episodes_are_judged_though_training_cuts_them(tmp_path: Path) -> None:
    run = small(tmp_path / "cut", environment={"truncate_after": 3})
    assert (evaluate(load(run), episodes=5).lengths == 9).all()


def test_a_film_is_made(run: Path, tmp_path: Path) -> None:
    assert film(load(run), tmp_path / "catch.mp4") in (-1.0, 1.0)
    assert (tmp_path / "catch.mp4").stat().st_size > 100


def test_a_recurrent_policy_is_loaded_and_played(tmp_path: Path) -> None:
    run = small(tmp_path / "recall", "recall", network={"lstm_size": 8})
    policy = load(run)
    assert len(policy.initial_state(3).recurrent) == 2
    assert len(evaluate(policy, episodes=4).returns) == 4


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none is not a run: it has no config\.toml"):
        load(tmp_path / "none")


def test_a_run_without_a_checkpoint_is_refused(run: Path) -> None:
    for path in (run / "checkpoints").glob("*/meta.json"):
        path.write_text("{")
    with pytest.raises(ConfigError, match=r"no whole checkpoint.*skipped the damaged"):
        load(run)
    with pytest.raises(ConfigError, match="no whole checkpoint to go on from"):
        train(resume=run, changes={"total_frames": 9000})


def test_weights_of_another_network_are_refused(run: Path) -> None:
    config = run / "config.toml"
    text = config.read_text()
    assert "[network]\n" in text
    config.write_text(text.replace("[network]\n", "[network]\nlstm_size = 8\n"))
    with pytest.raises(ConfigError, match="holds another network: core"):
        load(run)


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """A recurrent policy for nested observations; forbidden actions raise."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    run = small(tmp_path / "run", "nested_env:Guarded", total_frames=160, network={"lstm_size": 8})
    return load(run, trust_code=True)


def own_loop(policy: Policy, env: gym.Env[Any, Any], seed: int | None) -> tuple[float, list[int]]:
    """One episode as the README plays it, in an environment that reset seeds, or is seeded."""
    observation, info = env.reset(seed=seed)
    state, actions = policy.initial_state(1), []
    reward, reset, total = 0.0, True, 0.0
    while True:
        action, state = policy.act(
            observation, state, reward=reward, reset=reset, action_mask=info["action_mask"]
        )
        assert isinstance(action, int)
        actions.append(action)
        observation, earned, terminated, truncated, info = env.step(action)
        reward, reset = float(earned), False
        total += reward
        if terminated or truncated:
            return total, actions


def test_a_users_own_loop_plays_as_evaluation_does(guarded: Policy) -> None:
    """With `make_env`, and with the environment itself, which `make_env` seeds in this way."""
    own = importlib.import_module("nested_env").Guarded
    returns, played = [], []
    for seed in range(5):
        judged = evaluate(guarded, episodes=1, seed=seed, mode="greedy").returns[0]
        made, actions = own_loop(guarded, guarded.make_env(seed), None)
        first_seed = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
        itself, its_actions = own_loop(guarded, own(), first_seed)
        assert made == judged
        assert (itself, its_actions) == (made, actions)
        returns.append(made)
        played.append(tuple(actions))
    assert len(set(returns)) == len(set(played)) == 5, "equal games would prove nothing"


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("mode", ["greedy", "sample"])
def test_actions_are_the_environments_own(
    kind: int, mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In `make_env`, in the environment itself, and for several at once."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    environment = {"env_kwargs": json.dumps({"kind": kind})}
    run = small(tmp_path / "run", "nested_env:Owned", environment=environment, total_frames=160)
    policy = load(run, trust_code=True)
    own = importlib.import_module("nested_env").Owned(kind)
    made = policy.make_env(3)
    assert made.action_space == own.action_space
    for env in (made, own):
        observation, _ = env.reset(seed=4)
        state, over = policy.initial_state(1), False
        while not over:
            action, state = policy.act(observation, state, mode=mode)
            assert own.action_space.contains(action)
            observation, _, over, _, _ = env.step(action)
    several, _ = policy.act(np.zeros((3, 1), np.float32), policy.initial_state(3), mode=mode)
    assert isinstance(several, np.ndarray)
    assert all(own.action_space.contains(action) for action in several)


def test_an_environment_that_was_changed_is_asked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, where the module lives on while its class is written again."""
    module = types.ModuleType("written_again")
    monkeypatch.setitem(sys.modules, "written_again", module)
    owned = importlib.import_module("tests.run.nested_env").Owned
    seen = []
    for kind in (0, 3):
        module.Env = functools.partial(owned, kind)  # type: ignore[attr-defined]
        config = make_config("written_again:Env", lockstep=True, total_frames=600, num_envs=4)
        out = tmp_path / str(kind)
        policy = load(train(dataclasses.replace(config, out=str(out))).run, trust_code=True)
        seen.append(type(policy.spec.action_space).__name__)
    assert seen == ["Discrete", "Box"]


def test_reset_takes_a_seed_and_leaves_an_episode(guarded: Policy) -> None:
    env, other = guarded.make_env(7), guarded.make_env(8)
    first = env.reset(seed=5)[0]
    same, again = other.reset(seed=5)[0], env.reset(seed=5)[0]
    for observation in (same, again):
        np.testing.assert_array_equal(observation["camera"], first["camera"])
    env.step(0 if env.reset(seed=5)[1]["action_mask"][0] else 1)
    left = env.reset()[0]  # in the middle
    assert not np.array_equal(left["camera"], first["camera"])
    assert not np.array_equal(env.reset()[0]["camera"], left["camera"])


def test_an_observation_with_nan_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    policy = load(small(tmp_path / "run", "nested_env:Owned", total_frames=160), trust_code=True)
    with pytest.raises(ValueError, match="the observation has NaN"):
        policy.act(np.float32([np.nan]), policy.initial_state(1))


def test_a_loop_without_the_mask_is_caught(guarded: Policy) -> None:
    class Unmasked(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            *step, info = self.env.step(action)
            return *step, info | {"action_mask": np.ones(5, np.bool_)}

    own = importlib.import_module("nested_env").Guarded
    # After the first step nothing is masked: 2 of 5 actions five times in a row, ten times over.
    with pytest.raises(ValueError, match="is forbidden"):
        sum(own_loop(guarded, Unmasked(own()), seed)[0] for seed in range(10))


def test_several_nested_observations_are_acted_for_at_once(guarded: Policy) -> None:
    own = importlib.import_module("nested_env").Guarded
    shown = [own().reset(seed=seed) for seed in range(6)]
    observations = [observation for observation, _ in shown]
    masks = np.stack([info["action_mask"] for _, info in shown])
    many, after = guarded.act(observations, guarded.initial_state(6), action_mask=masks, reset=True)
    assert isinstance(many, np.ndarray)
    singly = [
        guarded.act(observation, guarded.initial_state(1), action_mask=mask, reset=True)[0]
        for observation, mask in zip(observations, masks, strict=True)
    ]
    assert many.tolist() == singly
    assert len(set(singly)) > 1
    leaves = tree.leaves(guarded.spec.structure)
    rows = np.zeros((6, *guarded.spec.observation_space.shape), np.uint8)
    for row, observation in zip(rows, observations, strict=True):
        tree.pack(leaves, observation, row)
    packed, packed_after = guarded.act(
        rows, guarded.initial_state(6), action_mask=masks, reset=True
    )
    np.testing.assert_array_equal(packed, many)
    assert torch.equal(packed_after.stack, after.stack)
    one_row, _ = guarded.act(rows[0], guarded.initial_state(1), action_mask=masks[0], reset=True)
    assert one_row == singly[0]
    of_one, _ = guarded.act(
        observations[:1], guarded.initial_state(1), action_mask=masks[:1], reset=True
    )
    assert isinstance(of_one, np.ndarray)
    assert of_one.tolist() == singly[:1]


def test_nested_observations_that_do_not_fit_are_refused(guarded: Policy) -> None:
    observation, _ = guarded.make_env(0).reset()
    with pytest.raises(ValueError, match="1 observations for a state of 2"):
        guarded.act(observation, guarded.initial_state(2))
    with pytest.raises(ValueError, match="3 observations for a state of 2"):
        guarded.act([observation] * 3, guarded.initial_state(2))
    with pytest.raises(ValueError, match="part 'camera' of the observation is missing"):
        guarded.act({"place": 0, "inner": observation["inner"]}, guarded.initial_state(1))
    with pytest.raises(ValueError, match=r"part 'camera' .* of shape \(4, 6\), not \(6, 4\)"):
        guarded.act(observation | {"camera": np.zeros((6, 4))}, guarded.initial_state(1))


NESTED_OTHERWISE = """
    import gymnasium as gym
    import numpy as np

    class Shows(gym.Env):
        def __init__(self, space):
            self.observation_space = space
            self.action_space = gym.spaces.Discrete(3, start=-1)

        def reset(self, *, seed=None, options=None):
            self.observation_space.seed(seed)
            self.steps = 0
            return self.observation_space.sample(), {}

        def step(self, action):
            assert action in self.action_space
            self.steps += 1
            return self.observation_space.sample(), 1.0, self.steps == 3, False, {}

    def pair():
        return Shows(gym.spaces.Tuple((gym.spaces.Discrete(4), gym.spaces.MultiBinary(2))))

    def number():
        return Shows(gym.spaces.Discrete(6, start=2))

    def numbers():
        return Shows(gym.spaces.MultiDiscrete([3, 4], start=[1, 5]))

    def flags():
        return Shows(gym.spaces.MultiBinary(8))
"""


@pytest.mark.parametrize("kind", ["pair", "number", "numbers", "flags"])
def test_what_is_no_dict_is_acted_for_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"shows_{kind}"
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(NESTED_OTHERWISE))
    monkeypatch.syspath_prepend(tmp_path)
    run = small(tmp_path / "run", f"{module}:{kind}", total_frames=160)
    policy = load(run, trust_code=True)
    env = policy.make_env(3)
    space = getattr(sys.modules[module], kind)().observation_space
    assert env.observation_space == space
    observation, _ = env.reset()
    state, shown, chosen = policy.initial_state(1), [], []
    for step in range(3):
        assert space.contains(observation)
        shown.append(observation)
        action, _ = policy.act(observation, state, reset=True)
        assert isinstance(action, int)
        chosen.append(action)
        observation, _, terminated, _, _ = env.step(action)
        assert terminated == (step == 2)
    many, _ = policy.act(shown, policy.initial_state(3), reset=True)
    assert isinstance(many, np.ndarray)
    assert many.tolist() == chosen


NAMED = {
    "env": {"env": "stranger_of_{part}:FAMILY"},
    "network": {"network": {"network": "stranger_of_{part}:mlp"}},
    "algorithm": {"algorithm": "stranger_of_{part}:Impala"},
}


@pytest.fixture(params=["env", "network", "algorithm"])
def strange_run(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run that somebody made elsewhere, whose config names a module that lies on the path."""
    part = request.param
    module = f"stranger_of_{part}"
    sys.modules.pop(module, None)  # of the test before
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(STRANGER))
    monkeypatch.syspath_prepend(tmp_path)
    named = json.loads(json.dumps(NAMED[part]).replace("{part}", part))
    env = named.pop("env", "catch")
    run = small(tmp_path / "run", env, **named)
    assert (tmp_path / "imported").exists()
    (tmp_path / "imported").unlink()
    sys.modules.pop(module)
    return run


def loading(run: Path) -> None:
    load(run)


def resuming(run: Path) -> None:
    train(resume=run, changes={"total_frames": 5000}, trust_code=False)


@pytest.mark.parametrize("use", [loading, resuming])
def test_code_of_a_strangers_run_is_not_imported(
    strange_run: Path, use: Callable[[Path], None]
) -> None:
    with pytest.raises(ConfigError, match="is code outside headrace: read it, then say"):
        use(strange_run)
    assert not strange_run.with_name("imported").exists()


def test_code_of_a_strangers_run_is_imported_when_trusted(strange_run: Path) -> None:
    policy = load(strange_run, trust_code=True)
    assert strange_run.with_name("imported").exists()
    assert len(evaluate(policy, episodes=2).returns) == 2


@pytest.mark.parametrize("command", [["eval"], ["train", "--total-frames", "5000", "--resume"]])
def test_the_command_line_does_not_trust_either(
    strange_run: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, str(strange_run)])
    assert ended.value.code == 2
    assert "--trust-code" in capsys.readouterr().err
    assert not strange_run.with_name("imported").exists()


def test_the_command_line_trusts_when_told(strange_run: Path) -> None:
    main(["eval", str(strange_run), "--episodes", "2", "--trust-code"])
    assert strange_run.with_name("imported").exists()


def test_what_may_be_done_must_be_said_and_is_looked_at(guarded: Policy) -> None:
    own = importlib.import_module("nested_env").Guarded
    observation, info = own().reset(seed=1)
    state = guarded.initial_state(1)
    with pytest.raises(ValueError, match=r'hand on info\["action_mask"\]'):
        guarded.act(observation, state, reset=True)
    flags = info["action_mask"].astype(np.float64)
    for wrong in (
        np.where(flags > 0, 0.0, -1e9),
        flags * 0.5,
        flags * np.nan,
        flags * 0,
        flags[:3],
    ):
        with pytest.raises(ValueError, match="action_mask"):
            guarded.act(observation, state, reset=True, action_mask=wrong)
    with pytest.raises(ValueError, match="1 action masks for a state of 3"):
        guarded.act([observation] * 3, guarded.initial_state(3), action_mask=[flags], reset=True)
    for wrong in ({"reward": np.nan}, {"reward": np.inf}, {"mode": "best"}):
        with pytest.raises(ValueError, match=r"reward|mode must be"):
            guarded.act(observation, state, action_mask=flags, **wrong)


def test_a_seed_of_reset_says_how_later_episodes_go(guarded: Policy) -> None:
    env = guarded.make_env(7)
    played = []
    for _ in range(2):
        info = env.reset(seed=5)[1]
        env.step(int(info["action_mask"].argmax()))
        played.append(env.reset()[0]["camera"])
    np.testing.assert_array_equal(*played)
    with pytest.raises(ValueError, match="options of reset do not reach"):
        env.reset(options={"level": 3})
    for action in (1.7, "1"):
        with pytest.raises(ValueError, match="the action"):
            env.step(action)


def test_an_environment_that_has_changed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a class with other bounds than when it was trained."""
    module = types.ModuleType("grown")
    monkeypatch.setitem(sys.modules, "grown", module)
    owned = importlib.import_module("tests.run.nested_env").Owned
    module.Env = functools.partial(owned, 3)  # type: ignore[attr-defined]
    config = make_config("grown:Env", lockstep=True, total_frames=600, num_envs=4)
    run = train(dataclasses.replace(config, out=str(tmp_path / "run"))).run
    load(run, trust_code=True)
    assert "learned in" not in caplog.text

    class Wider(owned):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(3)
            space = self.observation_space
            self.observation_space = gym.spaces.Box(
                space.low - 1, space.high + 1, dtype=space.dtype
            )

    module.Env = Wider  # type: ignore[attr-defined]
    load(run, trust_code=True)
    assert "is not what" in caplog.text
    assert "has learned in: " in caplog.text
