"""The benchmark of pools with a worker host; how fast it was is not tested."""

import json

import pytest

from headrace.bench import command


@pytest.mark.net
def test_a_worker_host_has_the_rows_of_all_pools_and_what_travels(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ("--pool", "grpc", "inline", "--frame-shape", "12", "12", "--num-workers", "1")
    command.run(["pools", "--smoke", "--json", *argv])
    there, here = json.loads(capsys.readouterr().out)["rows"]
    assert there.keys() == here.keys()
    assert (there["pool"], here["pool"]) == ("grpc", "inline")
    assert here["bytes_per_s"] is None
    assert there["agent_steps_per_s"] > 0
    # A row is a frame of bytes, and little else.
    assert there["bytes_per_s"] > 12 * 12 * there["agent_steps_per_s"]
