"""Trains SAC on a MuJoCo task, judged beside training, and says how well the machine was used.

python examples/mujoco_sac.py                                   # InvertedPendulum-v5, a minute
python examples/mujoco_sac.py --env HalfCheetah-v5 --preset sac-mujoco --agent-steps 300000
"""

import argparse
import tempfile

import headrace


def main() -> None:
    """Trains in a temporary folder and prints a line at every report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", default="InvertedPendulum-v5")
    parser.add_argument("--preset", default="sac-control")
    parser.add_argument("--agent-steps", type=int, default=8_000)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = headrace.preset(
            chosen.preset,
            chosen.env,
            total_frames=chosen.agent_steps,
            out=f"{folder}/run",
            evaluator={"evaluator": True, "eval_interval_s": 5.0},
        )
        headrace.train(config, on_row=show)
        played = headrace.evaluate(headrace.load(config.out), episodes=10)
        print(f"{chosen.env}: mean return of 10 greedy episodes {played.returns.mean():.0f}")


def show(row: dict[str, float | int | str]) -> None:
    """Prints Spreeze's figures, and what the evaluator has found."""
    figures = {
        "agent steps": row["agent_steps"],
        "sampling Hz": row["sampling_hz"],
        "updates/s": row["updates_per_s"],
        "update frame rate, Hz": row["update_frame_rate_hz"],
        "greedy return": row.get("eval_return_mean", float("nan")),
    }
    print("  ".join(f"{name} {value:,.0f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
