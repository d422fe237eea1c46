#!/usr/bin/env bash
# Starts a real SLURM on this machine, of one node or of two, to try job scripts. Needs root and Debian's or Ubuntu's
# packages: tests/install_debian.sh installs them. Two nodes are the hosts of two_hosts.sh, which must be up.
# Usage:
#   eval "$(tests/cluster/local_slurm.sh up)"     starts it and sets SLURM_CONF, with which sbatch and the other commands find it
#   eval "$(tests/cluster/local_slurm.sh up 2)"   with two nodes, node1 and node2
#   tests/cluster/local_slurm.sh kill node2       kills the node's daemon, as a crash would; its ranks live on
#   tests/cluster/local_slurm.sh start node2      starts it again
#   tests/cluster/local_slurm.sh down             stops it
# Its files are in SLURM_DIR (default /tmp/local-slurm). No system configuration is changed.
set -euo pipefail

DIR=${SLURM_DIR:-/tmp/local-slurm}
HERE=$(cd "$(dirname "$0")" && pwd)
export SLURM_CONF="$DIR/slurm.conf"
CPUS=$(getconf _NPROCESSORS_ONLN)  # not nproc, which follows OMP_NUM_THREADS
CPUS=$((CPUS < 2 ? 2 : CPUS))      # two ranks can run even on one core

die() { echo "local_slurm.sh: $*" >&2; exit 1; }

start_munge() { # munged signs SLURM's messages; one that is already running is used
  munge -n >/dev/null 2>&1 && return
  mkdir -p /run/munge && chown munge:munge /run/munge
  su -s /bin/sh munge -c munged
  touch "$DIR/started_munge"
}

write_config() { # NODE_COUNT
  local address=127.0.0.1 last=$((CPUS - 1))
  [ "$1" = 1 ] || address=10.77.0.254  # the bridge of two_hosts.sh
  sed -e "s#@HOST@#$(hostname -s)#g" -e "s#@ADDRESS@#$address#g" -e "s#@DIR@#$DIR#g" "$HERE/slurm.conf.in" >"$SLURM_CONF"
  if [ "$1" = 1 ]; then
    echo "NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$CPUS Gres=gpu:$CPUS State=UNKNOWN" >>"$SLURM_CONF"
  else
    for i in 1 2; do echo "NodeName=node$i NodeAddr=10.77.0.$i CPUs=$CPUS Gres=gpu:$CPUS State=UNKNOWN" >>"$SLURM_CONF"; done
  fi
  echo "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$SLURM_CONF"
  for gpu in $(seq 0 "$last"); do ln -sfn /dev/null "$DIR/gpu$gpu"; done
  echo "Name=gpu File=$DIR/gpu[0-$last]" >"$DIR/gres.conf"
}

start_node() { # NAME: its daemon, on the machine itself or on a host of two_hosts.sh
  mkdir -p "$DIR/spool/$1"
  if [ "$1" = "$(hostname -s)" ]; then
    slurmd -f "$SLURM_CONF" -N "$1" >&2
    return
  fi
  # Not `ip netns exec`: it mounts another /sys, where slurmd finds no cgroups.
  # shellcheck disable=SC2016  # the inner shell expands these
  nsenter --net="/run/netns/vlsi-$1" unshare --uts --mount bash -c \
    'hostname "$0"; mount --bind "/etc/netns/vlsi-$0/hosts" /etc/hosts; exec slurmd -f "$1" -N "$0"' "$1" "$SLURM_CONF" >&2
}

wait_until_idle() { # NODE_COUNT
  for _ in $(seq 120); do
    [ "$(sinfo --noheader --Node --format=%T 2>/dev/null | grep -c '^idle$')" = "$1" ] && return
    sleep 0.5
  done
  die "the nodes did not become idle within 60 s; see $DIR/slurmctld.log and $DIR/slurmd-*.log"
}

stop() { # end process $1 and wait for it
  kill "$1" 2>/dev/null || return 0
  for _ in $(seq 60); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.5
  done
}

up() { # NODE_COUNT
  [ "$(id -u)" = 0 ] || die "SLURM's daemons need root here"
  for program in slurmctld slurmd sbatch munged; do
    command -v "$program" >/dev/null || die "no $program; run: tests/install_debian.sh"
  done
  mkdir -p "$DIR/state" "$DIR/spool"
  if ! sinfo --noheader >/dev/null 2>&1; then
    write_config "$1"
    start_munge
    slurmctld -f "$SLURM_CONF" >&2
    for node in $(nodes); do start_node "$node"; done
  fi
  wait_until_idle "$1"
  echo "export SLURM_CONF=$SLURM_CONF"
}

nodes() { sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$SLURM_CONF"; }

down() { # removes all state, so that the next start knows no old jobs and no drained node
  for pid in "$DIR"/slurmd-*.pid "$DIR/slurmctld.pid"; do
    if [ -f "$pid" ]; then stop "$(cat "$pid")"; fi
  done
  if [ -f "$DIR/started_munge" ]; then stop "$(cat /run/munge/munged.pid)"; fi
  rm -rf "$DIR/started_munge" "$DIR/state" "$DIR/spool" "$DIR"/*.pid
}

case "${1:-}" in
  up) up "${2:-1}" ;;
  kill) kill -KILL "$(cat "$DIR/slurmd-${2:?expected a node}.pid")" ;;
  start) start_node "${2:?expected a node}" ;;
  down) down ;;
  *) die "expected up, kill NODE, start NODE or down" ;;
esac
