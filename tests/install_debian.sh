#!/usr/bin/env bash
# Debian or Ubuntu packages that tests want, and are skipped without: for tests/cluster a SLURM, and two hosts with ssh and
# pdsh; for tests/pages a Chromium.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"

missing=()
for program in slurmctld slurmd sbatch munged sshd ssh pdsh ip nsenter chromium; do
  command -v "$program" >/dev/null || missing+=("$program")
done

if [ "${#missing[@]}" = 0 ]; then
  echo "packages for tests: there already"
elif [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "packages for tests: ${missing[*]} not installed (needs root and apt-get); those tests will be skipped"
else
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge \
    openssh-server openssh-client pdsh iproute2 util-linux chromium >/dev/null
fi
