#!/usr/bin/env bash
# Debian or Ubuntu packages that tests/cluster wants (it is skipped without): a SLURM, and two hosts with ssh and pdsh.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"

missing=()
for program in slurmctld slurmd sbatch munged sshd ssh pdsh ip nsenter; do
  command -v "$program" >/dev/null || missing+=("$program")
done

if [ "${#missing[@]}" = 0 ]; then
  echo "packages for tests/cluster: there already"
elif [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "packages for tests/cluster: ${missing[*]} not installed (needs root and apt-get); those tests will be skipped"
else
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge \
    openssh-server openssh-client pdsh iproute2 util-linux >/dev/null
fi
