#!/usr/bin/env bash
# Starts a real one-node SLURM on this machine, to try job scripts. Needs root and Debian's or Ubuntu's packages:
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
# Usage:
#   eval "$(tests/cluster/one_node_slurm.sh up)"     starts it and sets SLURM_CONF, with which sbatch and the other commands find it
#   tests/cluster/one_node_slurm.sh down             stops it
# Its files are in SLURM_DIR (default /tmp/one-node-slurm). No system configuration is changed.
set -euo pipefail

DIR=${SLURM_DIR:-/tmp/one-node-slurm}
HERE=$(cd "$(dirname "$0")" && pwd)
CPUS=$(getconf _NPROCESSORS_ONLN)  # not nproc, which follows OMP_NUM_THREADS
CPUS=$((CPUS < 2 ? 2 : CPUS))      # two ranks can run even on one core

die() { echo "one_node_slurm.sh: $*" >&2; exit 1; }

start_munge() { # munged signs SLURM's messages; one that is already running is used
  munge -n >/dev/null 2>&1 && return
  mkdir -p /run/munge && chown munge:munge /run/munge
  su -s /bin/sh munge -c munged
  touch "$DIR/started_munge"
}

wait_until_idle() {
  for _ in $(seq 60); do
    [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && return
    sleep 0.5
  done
  die "the node did not become idle within 30 s; see $DIR/slurmctld.log and $DIR/slurmd.log"
}

stop() { # end process $1 and wait for it
  kill "$1" 2>/dev/null || return 0
  for _ in $(seq 60); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.5
  done
}

up() {
  [ "$(id -u)" = 0 ] || die "SLURM's daemons need root here"
  for program in slurmctld slurmd sbatch munged; do
    command -v "$program" >/dev/null || die "no $program; run: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
  done
  mkdir -p "$DIR/state" "$DIR/spool"
  export SLURM_CONF="$DIR/slurm.conf"
  if ! sinfo --noheader >/dev/null 2>&1; then
    sed -e "s#@HOST@#$(hostname -s)#g" -e "s#@DIR@#$DIR#g" -e "s#@CPUS@#$CPUS#g" "$HERE/slurm.conf.in" >"$SLURM_CONF"
    local last=$((CPUS - 1))
    for gpu in $(seq 0 "$last"); do ln -sfn /dev/null "$DIR/gpu$gpu"; done
    echo "Name=gpu File=$DIR/gpu[0-$last]" >"$DIR/gres.conf"
    start_munge
    slurmctld -f "$SLURM_CONF" >&2
    slurmd -f "$SLURM_CONF" >&2
  fi
  wait_until_idle
  echo "export SLURM_CONF=$SLURM_CONF"
}

down() { # removes all state, so that the next start knows no old jobs and no drained node
  for daemon in slurmd slurmctld; do
    if [ -f "$DIR/$daemon.pid" ]; then stop "$(cat "$DIR/$daemon.pid")"; fi
  done
  if [ -f "$DIR/started_munge" ]; then stop "$(cat /run/munge/munged.pid)"; fi
  rm -rf "$DIR/started_munge" "$DIR/state" "$DIR/spool"
}

case "${1:-}" in
  up) up ;;
  down) down ;;
  *) die "expected up or down" ;;
esac
