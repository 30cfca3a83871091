"""Trains catch in half a minute, then plays an episode in a loop of its own."""

import tempfile
from pathlib import Path

import headrace


def main() -> None:
    """Trains, evaluates, plays."""
    with tempfile.TemporaryDirectory() as folder:
        config = headrace.preset("catch", env="catch", out=str(Path(folder) / "catch"))
        result = headrace.train(config)
        print(f"trained for {result.metrics['agent_steps']} agent steps")
        policy = headrace.load(result.run)
        print(headrace.evaluate(policy, episodes=100).summary())
        env, state = policy.make_env(), policy.initial_state(1)
        observation, _ = env.reset()
        reward, reset, ended = 0.0, True, False
        while not ended:
            action, state = policy.act(observation, state, reward=reward, reset=reset)
            observation, earned, terminated, truncated, _ = env.step(action)
            reward, reset, ended = float(earned), False, terminated or truncated
        print(f"the last reward of an episode: {reward}")


if __name__ == "__main__":
    main()
