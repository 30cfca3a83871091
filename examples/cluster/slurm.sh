#!/bin/bash
#SBATCH --job-name=headrace
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#
# Trains on the nodes of a SLURM job, without Ray: the first node learns, all nodes step.
#
#   sbatch examples/cluster/slurm.sh ALE/Pong-v5 runs/pong --total-frames 200000000
#
# RUN must be on a file system that outlives the job. The same command goes on with a run that is
# there; five minutes before its time is up the job saves it. For a learner on a GPU: --gpus=1.
set -euo pipefail
umask 077 # what follows is nobody else's

env="$1" run="$2"
shift 2

# On the nodes' shared file system: the token, and a certificate that lasts as long as the job.
secrets="$(mktemp -d "$PWD/.headrace-XXXXXX")"
trap 'rm -rf "$secrets"' EXIT
learner="${SLURMD_NODENAME:-$(hostname)}"
port="$((20000 + SLURM_JOB_ID % 20000))"
openssl rand -hex 32 > "$secrets/token"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 \
  -subj "/CN=$learner" -addext "subjectAltName=DNS:$learner" \
  -keyout "$secrets/key.pem" -out "$secrets/cert.pem" 2> "$secrets/openssl.txt"

# They try until the learner listens, and end with the run. One that dies is not started again, but
# the others go on.
srun --kill-on-bad-exit=0 headrace worker --connect "$learner:$port" \
  --token-file "$secrets/token" --tls-ca "$secrets/cert.pem" &
workers=$!

what=("$env" --out "$run")
if [[ -f "$run/config.toml" ]]; then
  what=(--resume "$run")
fi
headrace train "${what[@]}" --listen "$learner:$port" --token-file "$secrets/token" \
  --tls-cert "$secrets/cert.pem" --tls-key "$secrets/key.pem" "$@" &
train=$!

# The first wait ends when SLURM says that time is up; the second when the run is saved.
trap 'kill -TERM "$train"' TERM
code=0
wait "$train" || code=$?
if kill -0 "$train" 2> /dev/null; then
  code=0
  wait "$train" || code=$?
fi
# They have been sent home, but who has never reached the learner would go on trying.
kill -TERM "$workers" 2> /dev/null || true
wait "$workers" || true
exit "$code"
