"""`headrace bench NAME`: finds the benchmark and runs it."""

from __future__ import annotations

from headrace import catalog

BENCHMARKS = {
    "end-to-end": "headrace.bench.end_to_end:run",
    "pools": "headrace.bench.pools:run",
    "inference": "headrace.bench.inference:run",
    "learner": "headrace.bench.learner:run",
    "replay": "headrace.bench.replay:run",
    "wire": "headrace.bench.wire:run",
}

USAGE = """\
usage: headrace bench NAME …

  end-to-end   trains for real, then measures each stage alone: frames/s, ceilings, share reached
  pools        environments without a policy: steps/s, and how long an action takes to come back
  inference    the server without environments, over batch sizes and precisions
  learner      the learner without a server, over batch sizes
  replay       sequences in and out of the replay, beside those of others and a plain copy
  wire         frames from process to process: pools/grpc beside bare gRPC streams and Ray

All take --json, --seconds, and --smoke (seconds in all; numbers that mean nothing).
`headrace bench NAME --help` explains one."""


def run(argv: list[str]) -> None:
    """Runs the benchmark that `argv[0]` names with the other arguments.

    Raises:
        ConfigError: there is none of that name, or its arguments do not fit.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    catalog.resolve("benchmark", BENCHMARKS, argv[0])(argv[1:])
