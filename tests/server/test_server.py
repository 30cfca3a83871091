"""A seat against a plain model of what is kept for each environment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.errors import PeerLost
from headrace.experience.fifo import SlotQueue
from headrace.records import PolicyInput, PolicyState, PolicyStep
from headrace.server.acting import Actor, initial_state
from headrace.server.server import Seat, batch_sizes, run_server
from headrace.specs import EnvSpec
from headrace.steps import EnvStep
from headrace.telemetry.metrics import Waits
from headrace.weights import Weights

CPU = torch.device("cpu")
NUM_ENVS, MAX_BATCH, STACK = 5, 4, 3
SPEC = EnvSpec(
    name="numbers",
    observation_space=gym.spaces.Box(-1e6, 1e6, (1,), np.float32),
    action_space=gym.spaces.Discrete(7),
    frame_stack=STACK,
)


class Sums:
    """Value: a weighted sum of all that it sees, in whole numbers, so exact.

    The recurrent state becomes twice itself plus the newest frame, modulo 101.
    """

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.zeros(batch, 1),)

    def annealed(self, model: Any, epsilon: Tensor) -> Tensor:
        return epsilon

    def act(
        self, model: Any, inputs: PolicyInput, recurrent: tuple[Tensor, ...], **_: Any
    ) -> tuple[PolicyStep, tuple[Tensor, ...]]:
        weights = torch.tensor([1.0, 2.0, 4.0])
        stack = inputs.observation[0, :, :, 0]
        value = (stack * weights).sum(1) + 100 * recurrent[0][:, 0]
        value = value + 1000 * inputs.reward[0] + 10000 * inputs.previous_action[0].float()
        action = (value.long() % 7).abs()
        return PolicyStep(action, -value, value), ((2 * recurrent[0] + stack[:, 2:]) % 101,)


class Plain:
    """The same for one environment, in Python numbers."""

    def __init__(self) -> None:
        self.clear()
        self.total, self.length = 0.0, 0
        self.ended: list[tuple[float, int]] = []

    def clear(self) -> None:
        self.stack, self.recurrent, self.previous = [0.0] * STACK, 0.0, -1

    def value(self, frame: float, reward: float) -> float:
        a, b, c = [*self.stack[1:], frame]
        return a + 2 * b + 4 * c + 100 * self.recurrent + 1000 * reward + 10000 * self.previous

    def act(self, frame: float, reward: float) -> tuple[float, int]:
        value = self.value(frame, reward)
        self.stack = [*self.stack[1:], frame]
        self.recurrent = (2 * self.recurrent + frame) % 101
        self.previous = abs(int(value) % 7)
        return value, self.previous

    def log(self, reward: float, reset: bool, ended: bool) -> None:
        if self.length:
            self.total += reward
            if ended:
                self.ended.append((self.total, self.length))
        if reset:
            self.total, self.length = 0.0, 0
        self.length += 1


class Script:
    """A pool that plays prepared steps, and spoils their arrays once it was replied to."""

    def __init__(self, steps: list[EnvStep], *, num_envs: int = NUM_ENVS) -> None:
        self.spec, self.num_envs, self.max_batch = SPEC, num_envs, MAX_BATCH
        self.actions: list[list[int]] = []
        self._steps = iter(steps)
        self._lent: EnvStep | None = None

    def receive(self, timeout_s: float) -> EnvStep | None:
        step = next(self._steps, None)
        # Copies: the test looks at the script again.
        self._lent = step and EnvStep(*(None if x is None else x.copy() for x in step))
        return self._lent

    def reply(self, action: np.ndarray) -> None:
        assert self._lent is not None
        assert len(action) == len(self._lent.env_id)
        self.actions.append(action.tolist())
        for name, array in self._lent._asdict().items():
            if array is not None:
                array[:] = 0 if name == "env_id" else 1

    def close(self) -> None:
        pass


class Notes:
    """In the place of an unroll table: keeps what it was given."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def append(self, step: EnvStep, frames: Tensor, done: PolicyStep, **rest: Any) -> None:
        recurrent = rest.pop("recurrent")[0]
        # As the table does: what lies in the pool's arrays is the pool's again after the reply.
        row = {"frames": frames.clone(), "recurrent": recurrent, **done._asdict(), **rest}
        self.rows.append(row)


def a_step(env_ids: list[int], frames: list[float], **fields: Any) -> EnvStep:
    count = len(env_ids)
    never = np.zeros(count, np.bool_)
    step = EnvStep(
        env_id=np.array(env_ids, np.int32),
        run_id=np.zeros(count, np.int64),
        observation=np.array(frames, np.float32)[:, None],
        reward=np.zeros(count, np.float32),
        reset=never,
        terminated=never,
        truncated=never,
        final_observation=None,
    )
    return step._replace(**{name: np.array(value) for name, value in fields.items()})


def random_steps(count: int, seed: int) -> Iterator[EnvStep]:
    """Resets, truncations and life losses, in batches of all sizes."""
    rng = np.random.default_rng(seed)
    seen: set[int] = set()
    for _ in range(count):
        size = int(rng.integers(1, MAX_BATCH + 1))
        ids = rng.choice(NUM_ENVS, size, replace=False)
        first = np.array([env not in seen for env in ids])
        seen |= set(ids.tolist())
        kind = np.where(first, 1, rng.choice(5, size, p=[0.5, 0.05, 0.15, 0.15, 0.15]))
        truncated, ended = kind == 2, kind == 3
        reset = (kind == 1) | truncated | ended
        yield a_step(
            ids.tolist(),
            rng.integers(1, 9, size).tolist(),
            reward=rng.integers(-3, 4, size).astype(np.float32),
            reset=reset,
            terminated=ended | (kind == 4),
            truncated=truncated,
            final_observation=rng.integers(10, 19, (size, 1)).astype(np.float32),
        )


def make_seat(script: Script, unrolls: Any, ended: list[tuple[int, float, int]]) -> Seat:
    def on_episodes(
        env: np.ndarray, returns: np.ndarray, lengths: np.ndarray, _: list[Any]
    ) -> None:
        rows = zip(env.tolist(), returns.tolist(), lengths.tolist(), strict=True)
        ended.extend(rows)

    sums = Sums()
    return Seat(
        script,
        Actor(algorithm=sums, model=sums),
        initial_state(SPEC, sums, 1, CPU),
        unrolls=unrolls,
        on_episodes=on_episodes,
        device=CPU,
    )


def assert_row(model: Plain, step: EnvStep, i: int, row: dict[str, Any], action: int) -> None:
    frame, reward = float(step.observation[i, 0]), float(step.reward[i])
    if step.truncated[i]:
        assert step.final_observation is not None
        # With the old episode's stack, recurrent state, action and reward.
        wanted = model.value(float(step.final_observation[i, 0]), reward)
        assert row["bootstrap"][i].item() == wanted
    if step.reset[i]:
        model.clear()
    assert row["previous_action"][i].item() == model.previous
    assert row["recurrent"][i].item() == model.recurrent
    assert row["frames"][i].item() == frame
    value, wanted_action = model.act(frame, 0.0 if step.reset[i] else reward)
    assert row["value"][i].item() == value
    assert row["log_prob"][i].item() == -value
    assert row["action"][i].item() == action == wanted_action
    ended = step.reset[i] and (step.terminated[i] or step.truncated[i])  # a reset alone: anew
    model.log(reward, bool(step.reset[i]), bool(ended))


@pytest.mark.parametrize("seed", range(3))
def test_any_stream_equals_the_model(seed: int) -> None:
    steps = list(random_steps(150, seed))
    script, notes, ended = Script(steps), Notes(), []
    seat = make_seat(script, notes, ended)
    models = [Plain() for _ in range(NUM_ENVS)]
    waits = Waits()
    for number, step in enumerate(steps):
        assert seat.serve(lambda number=number: number, 0.0, waits) == len(step.env_id)
        row = notes.rows[-1]
        assert row["version"] == number
        assert len(row["frames"]) == len(step.env_id), "padding must not be stored"
        assert (row["bootstrap"] is None) == (not step.truncated.any())
        for i, env in enumerate(step.env_id):
            assert_row(models[env], step, i, row, script.actions[-1][i])
    assert seat.serve(lambda: 0, 0.0, waits) == 0
    assert seat.agent_steps == sum(len(step.env_id) for step in steps)
    for env, model in enumerate(models):
        assert [row[1:] for row in ended if row[0] == env] == model.ended
        assert len(model.ended) > 3


def test_a_first_observation_ends_nothing_whatever_it_brings() -> None:
    ended: list[tuple[int, float, int]] = []
    step = a_step([0, 1], [1, 1], reset=[True, True], reward=np.array([5, 5], np.float32))
    over = {"reset": [True, False], "terminated": [True, False]}
    after = a_step([0, 1], [2, 2], reward=np.array([1, 2], np.float32), **over)
    seat = make_seat(Script([step, after]), Notes(), ended)
    seat.serve(lambda: 0, 0.0, Waits())
    assert ended == []
    seat.serve(lambda: 0, 0.0, Waits())
    assert ended == [(0, 1.0, 1)]


def test_a_lost_life_clears_nothing_and_ends_no_return() -> None:
    ended: list[tuple[int, float, int]] = []
    one = np.ones(1, np.float32)
    steps = [
        a_step([0], [1], reset=[True]),
        a_step([0], [2], reward=one, terminated=[True]),
        a_step([0], [3], reward=one),
        a_step([0], [4], reward=one, terminated=[True], reset=[True]),
    ]
    notes = Notes()
    seat = make_seat(Script(steps), notes, ended)
    for _ in steps:
        seat.serve(lambda: 0, 0.0, Waits())
    assert [row["recurrent"].item() for row in notes.rows] == [0, 1, 4, 0]
    assert [row["previous_action"].item() >= 0 for row in notes.rows] == [False, True, True, False]
    assert ended == [(0, 3.0, 3)]


def test_an_environment_started_anew_logs_no_episode() -> None:
    ended: list[tuple[int, float, int]] = []
    one = np.ones(1, np.float32)
    steps = [
        a_step([0], [1], reset=[True]),
        a_step([0], [2], reward=one),
        a_step([0], [3], reset=[True]),  # its worker died; the return of 1 belongs to nobody
        a_step([0], [4], reward=one),
        a_step([0], [5], reward=one, terminated=[True], reset=[True]),
    ]
    seat = make_seat(Script(steps), Notes(), ended)
    for _ in steps:
        seat.serve(lambda: 0, 0.0, Waits())
    assert ended == [(0, 2.0, 2)]


def test_numbers_of_the_last_info_come_with_their_episode() -> None:
    told: list[Any] = []
    steps = [
        a_step([0, 1, 2], [1, 1, 1], reset=[True, True, True]),
        a_step(
            [2, 0, 1], [2, 2, 2], reset=[True, False, True], terminated=[True, False, True]
        )._replace(episode_info={0: {"score": 7.0}}),
    ]
    sums = Sums()
    seat = Seat(
        InfoScript(steps),
        Actor(algorithm=sums, model=sums),
        initial_state(SPEC, sums, 1, CPU),
        unrolls=None,
        on_episodes=lambda env, _, __, infos: told.append((env.tolist(), infos)),
        device=CPU,
    )
    for _ in steps:
        seat.serve(lambda: 0, 0.0, Waits())
    assert told == [([2, 1], [{"score": 7.0}, {}])]


class InfoScript(Script):
    """Plays steps as they are."""

    def receive(self, timeout_s: float) -> EnvStep | None:
        return next(self._steps, None)

    def reply(self, action: np.ndarray) -> None:
        pass


def test_a_truncation_needs_its_final_observation() -> None:
    steps = [a_step([0], [1], reset=[True], truncated=[True])]
    with pytest.raises(RuntimeError, match="without its final observation"):
        make_seat(Script(steps), Notes(), []).serve(lambda: 0, 0.0, Waits())


def test_evaluation_asks_for_no_bootstrap() -> None:
    steps = [a_step([0], [1], reset=[True], truncated=[True])]
    assert make_seat(Script(steps), None, []).serve(lambda: 0, 0.0, Waits()) == 1


def test_padding_sizes_hold_every_batch() -> None:
    for most in range(1, 70):
        sizes = batch_sizes(most)
        assert sizes[-1] == most
        assert len(sizes) <= 3
        assert sizes[0] >= 1


def test_a_saved_seat_goes_on_as_it_would_have() -> None:
    steps = list(random_steps(80, 9))
    whole, notes, ended = Script(steps), Notes(), []
    seat = make_seat(whole, notes, ended)
    notes.state_dict = dict  # type: ignore[attr-defined]
    notes.load_state_dict = lambda _: None  # type: ignore[attr-defined]
    for _ in range(40):
        seat.serve(lambda: 0, 0.0, Waits())
    before = len(ended)
    twin_ended: list[tuple[int, float, int]] = []
    rest = Script(steps[40:])
    twin = make_seat(rest, notes, twin_ended)
    twin.load_state_dict(seat.state_dict())
    for _ in range(40):
        twin.serve(lambda: 0, 0.0, Waits())
    for _ in range(40):
        seat.serve(lambda: 0, 0.0, Waits())
    assert rest.actions == whole.actions[40:]
    assert twin_ended == ended[before:]


class Endless(Script):
    """One environment that goes on until it was asked for `most` steps, then is lost."""

    def __init__(self, most: int) -> None:
        super().__init__([a_step([0], [1], reset=[True]) for _ in range(most)])
        self.asked = 0

    def receive(self, timeout_s: float) -> EnvStep | None:
        self.asked += 1
        step = super().receive(timeout_s)
        if step is None:
            raise PeerLost("the script is over")
        return step


def test_seats_are_served_in_turn_until_one_fails() -> None:
    weights = Weights(torch.nn.Linear(1, 1))
    pools = [Endless(3), Endless(10)]
    seats = [make_seat(pool, None, []) for pool in pools]
    queue = SlotQueue(2, capacity=1)
    with pytest.raises(PeerLost, match="is over"):
        run_server(seats, weights, queue, threading.Event(), waits=Waits())
    assert [pool.asked for pool in pools] == [4, 3]


def test_a_server_stops_where_there_are_enough_steps() -> None:
    weights, stop = Weights(torch.nn.Linear(1, 1)), threading.Event()
    pool = Endless(100)
    seat = make_seat(pool, None, [])

    def enough() -> bool:
        if seat.agent_steps == 7:
            stop.set()
        return seat.agent_steps == 7

    run_server([seat], weights, SlotQueue(2, capacity=1), stop, waits=Waits(), enough=enough)
    assert pool.asked == 7


def test_a_server_that_waits_for_the_learner_still_ends() -> None:
    weights, stop, waits = Weights(torch.nn.Linear(1, 1)), threading.Event(), Waits()
    pool = Endless(100)
    queue = SlotQueue(2, capacity=1)
    queue.put(queue.acquire(1))
    server = threading.Thread(
        target=run_server,
        args=([make_seat(pool, None, [])], weights, queue, stop),
        kwargs={"waits": waits},
    )
    server.start()
    stop.set()
    server.join(30.0)
    assert not server.is_alive()
    assert pool.asked <= 1


def test_the_state_of_no_other_environment_is_touched() -> None:
    steps = [a_step([1], [5], reset=[True])]
    seat = make_seat(Script(steps), Notes(), [])
    seat.serve(lambda: 0, 0.0, Waits())
    table = seat._table.gather(torch.arange(NUM_ENVS))
    start: PolicyState = initial_state(SPEC, Sums(), NUM_ENVS, CPU)
    others = [0, 2, 3, 4]
    assert torch.equal(table.stack[others], start.stack[others])
    assert torch.equal(table.recurrent[0][others], start.recurrent[0][others])
    assert torch.equal(table.previous_action[others], start.previous_action[others])
    assert table.stack[1, -1].item() == 5


class Shares(Sums):
    """Acts by its epsilon: the action is ten times that."""

    def act(
        self, model: Any, inputs: PolicyInput, recurrent: tuple[Tensor, ...], **given: Any
    ) -> tuple[PolicyStep, tuple[Tensor, ...]]:
        step, after = super().act(model, inputs, recurrent)
        return step._replace(action=(10 * given["epsilon"]).round().long()), after


def test_every_environment_has_its_own_epsilon_in_every_batch() -> None:
    steps = list(random_steps(30, seed=3))
    script = Script(steps)
    rule: Any = Shares()
    seat = Seat(
        script,
        Actor(algorithm=rule, model=rule),
        initial_state(SPEC, rule, 1, CPU),
        unrolls=None,
        on_episodes=lambda *_: None,
        device=CPU,
        exploration=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]),
    )
    assert seat.explores
    for _ in steps:
        seat.serve(lambda: 0, 0.0, Waits())
    assert script.actions == [[int(env) + 1 for env in step.env_id] for step in steps]
