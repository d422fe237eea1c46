#!/usr/bin/env bash
# Debian or Ubuntu packages that some tests want (they are skipped without): a SLURM for tests/cluster.
set -euo pipefail

if command -v slurmctld slurmd sbatch munged >/dev/null; then
  echo "packages for tests/cluster: there already"
elif [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "packages for tests/cluster: not installed (needs root and apt-get); those tests will be skipped"
else
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
fi
