"""`headrace plan`: files, flags, mistakes, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.cli import main

ON_GPU: dict[str, Any] = {
    "env": "ALE/Pong-v5",
    "algorithm": "impala",
    "network": "nature",
    "cores": 16,
    "env_frames_per_s": 40_000.0,
    "agent_steps_per_s": 10_000.0,
    "samples_per_agent_step": 1.0,
    "share_of_ceiling": 0.8,
    "ceiling": {
        "model": "accelerator",
        "environment": 16_000.0,
        "inference": 40_000.0,
        "learner": 40_000.0,
        "combined": 16_000.0,
    },
}
ON_CPU: dict[str, Any] = {
    **ON_GPU,
    "cores": 2,
    "ceiling": {
        "model": "core-time",
        "environment": 900.0,
        "inference": 500.0,
        "learner": 250.0,
        "combined": 280.0,
    },
}
POOLS = {
    "rows": [
        {"pool": "grpc", "agent_steps_per_s": 1e5, "bytes_per_s": 8e8},
        {"pool": "shm", "agent_steps_per_s": 2e5, "bytes_per_s": None},
    ]
}
WIRE = {
    "rows": [
        {
            "name": "headrace",
            "agent_steps_per_s": 1e5,
            "bytes_per_s": 8e8,
            "server_cores": 1.25,
            "host_cores": 0.75,
        },
        {"name": "grpc-asyncio", "agent_steps_per_s": 2e5, "bytes_per_s": 16e8},
    ]
}
PRICES = ("--price-per-core-hour", "0.05", "--price-per-accelerator-hour", "2")
STAGES = ("--environment-per-core", "1e3", "--inference", "4e4", "--learner", "4e4")


def written(path: Path, value: Any) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    main(["plan", *argv, "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *argv])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_files_of_a_gpu_and_of_cores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [written(tmp_path / "gpu.json", ON_GPU), written(tmp_path / "cpu.json", ON_CPU)]
    plan = planned(capsys, "--rates", *files, *PRICES)
    assert plan["rates"] == {
        "environment_per_core": 1000.0,  # of the first file: 16 000 on 16 cores
        "inference": 40_000.0,
        "learner": 40_000.0,
        "inference_per_core": 500.0,
        "learner_per_core": 250.0,
        "samples_per_agent_step": 1.0,
        "frames_per_agent_step": 4.0,
        "efficiency": 0.8,
    }
    assert list(plan["arrangements"]) == ["central", "workers", "processors"]
    central = plan["arrangements"]["central"]
    assert central["balanced_cores_per_accelerator"] == pytest.approx(20.0)
    # 20 cores and an accelerator cost 3 an hour and make 0.8 x 20 000 x 4 frames/s.
    assert central["cheapest"]["cost"] == pytest.approx(3.0 * 1e9 / 64_000 / 3600)
    assert [point["cores"] for point in plan["present"]] == [16, 16, 16]
    assert plan["present"][0]["limits"] == "environment"
    assert 0 < plan["saving_of_central"] < 1
    assert plan["notes"] == ["what travels between machines is not counted: say --transport"]


def test_flags_go_over_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [written(tmp_path / "gpu.json", ON_GPU)]
    asked = ("--inference", "5e4", "--action-repeat", "2", "--efficiency", "1", "--cores", "40")
    plan = planned(capsys, "--rates", *files, *PRICES, *asked, "--accelerators", "2")
    assert plan["rates"]["inference"] == 50_000.0
    assert (plan["rates"]["frames_per_agent_step"], plan["rates"]["efficiency"]) == (2.0, 1.0)
    (present,) = plan["present"]
    assert (present["cores"], present["accelerators"]) == (40, 2)
    assert any("inference on workers is not known" in note for note in plan["notes"])


def test_transport_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "pools.json", POOLS)
    pools = planned(capsys, *STAGES, *PRICES, "--transport", file, "--transport-cores", "2")
    assert "lacks --transport-cores" in mistake(capsys, *STAGES, *PRICES, "--transport", file)
    file = written(tmp_path / "wire.json", WIRE)
    plan = planned(capsys, *STAGES, *PRICES, "--transport", file, "--network-gbit-per-s", "1")
    assert plan["transport"] == {
        "nbytes_per_agent_step": 8000.0,
        "agent_steps_per_s": 1e5,
        "cores": 2.0,
        "gbit_per_s": 1.0,
    }
    assert pools["transport"] == {**plan["transport"], "gbit_per_s": None}
    most = plan["arrangements"]["central"]["rows"][-1]
    assert most["limits"] == "network"
    assert most["agent_steps_per_s"] == pytest.approx(1e9 / 8 / 8000)


def test_tables_and_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", *STAGES, *PRICES, "--inference-per-core", "500", "--cores", "10"])
    out = capsys.readouterr().out
    for words in ("best at 20.0 cores per accelerator", "with 10 cores", "central inference costs"):
        assert words in out
    assert "yours" in out


def test_no_number_is_cut_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    argv = ("--inference-per-core", "200", "--accelerators", "4", "--cores", "100", "--apart")
    main(["plan", *STAGES, *PRICES, *argv])
    out = capsys.readouterr().out
    assert "…" not in out
    assert "frames/s" in out


def test_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--smoke", "--device", "cpu", "--price-per-core-hour", "1")
    (alone,) = plan["arrangements"].values()
    assert alone["cheapest"]["cost"] > 0
    assert any("no accelerator was measured" in note for note in plan["notes"])


def test_a_price_is_missed_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.bench.end_to_end.measure", lambda _: pytest.fail("measured"))
    argv = ("catch", "--device", "cpu", "--learner", "5", "--price-per-core-hour", "1")
    assert "say what an accelerator costs" in mistake(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (STAGES, "say what a core costs"),
        ((*STAGES, *PRICES[:2]), "say what an accelerator costs"),
        ((*STAGES, "--price-per-core-hour", "-1"), "--price-per-core-hour must be 0 or more"),
        (PRICES, "no rates: name an environment to measure"),
        ((*PRICES, "--environment-per-core", "5"), "two stages are not known"),
        ((*PRICES, *STAGES, "--inference", "0"), "--inference must be a positive number, not 0"),
        ((*PRICES, *STAGES, "--learner", "nan"), "--learner must be a positive number, not nan"),
        ((*PRICES, *STAGES, "--frames", "0"), "--frames must be a positive number"),
        ((*PRICES, *STAGES, "--efficiency", "2"), "efficiency must be at most 1"),
        ((*PRICES, *STAGES, "--transport-nbytes", "9"), "--transport-per-s and --transport-cores"),
        ((*PRICES, *STAGES, "--network-gbit-per-s", "9"), "matters only with what travels"),
        ((*PRICES, *STAGES, "--apart", "--accelerators", "3"), "leaves one over"),
        ((*PRICES, "--rates", "none.json"), "cannot read none.json"),
        ((*PRICES, *STAGES, "--transport", "none.json"), "cannot read none.json"),
        ((*PRICES, "catch", "--rates", "a.json"), "not both"),
    ],
)
def test_a_mistake_is_one_sentence(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in mistake(capsys, *argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POOLS, "is not what `headrace bench end-to-end --json` prints"),
        ([1], "is not what a benchmark prints"),
        ("{", "is not JSON"),
        ({**ON_GPU, "cores": 0}, "cores must be a positive number, not 0"),
        ({**ON_GPU, "ceiling": {**ON_GPU["ceiling"], "model": "tpu"}}, "is not what"),
        ({**ON_GPU, "pool": "device"}, "the accelerator stepped the environments"),
    ],
)
def test_a_file_of_something_else(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "file.json", content)
    assert message in mistake(capsys, *PRICES, "--rates", file)


@pytest.mark.parametrize("content", [ON_GPU, {"rows": [1]}, {"rows": []}, {"rows": [{"pool": 1}]}])
def test_a_transport_file_of_something_else(
    content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "file.json", content)
    said = mistake(capsys, *PRICES, *STAGES, "--transport", file)
    assert "is not what `headrace bench wire --json` or" in said


def test_files_of_two_tasks_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        written(tmp_path / "gpu.json", ON_GPU),
        written(tmp_path / "cpu.json", {**ON_CPU, "env": "catch"}),
    ]
    assert "is of catch" in mistake(capsys, *PRICES, "--rates", *files)
