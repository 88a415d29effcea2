#!/usr/bin/env bash
# Tests xpyd on a Slurm of two nodes on this machine: sudo tests/slurm/run.sh [PROGRAM [CASE ...]]
#
# Needs Debian's slurmctld, slurmd, slurm-client, munge, iproute2, and Python 3.11. About four minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
program=${1:-target/debug/xpyd}
shift || true
folder=$(mktemp -d /tmp/xpyd-slurm.XXXXXX)
trap 'rm -rf "$folder"' EXIT
tests/slurm/cluster.sh "$folder" python3 tests/slurm/check.py "$(realpath "$program")" "$folder" "$@"
