#!/usr/bin/env bash
# Two hosts on this machine, node1 and node2: network namespaces with their own addresses and names, an sshd in each.
# They share the file system, processors and memory. Needs root, iproute2, openssh-server and openssh-client.
#   tests/cluster/two_hosts.sh up                 starts them
#   tests/cluster/two_hosts.sh on node1 COMMAND   runs a command on one; `ssh node2` works from there, without a password
#   tests/cluster/two_hosts.sh down               removes everything, also what a killed test left
# Files are in HOSTS_DIR (default /tmp/two-hosts): hostfile, keys, bin/ssh. No system configuration is changed but
# /etc/netns/vlsi-node*, which `down` removes.
set -euo pipefail

DIR=${HOSTS_DIR:-/tmp/two-hosts}
BRIDGE=vlsi-hosts
NETWORK=10.77.0

write_ssh() { # keys and settings of its own: the user's are not touched
  mkdir -p "$DIR/bin" /run/sshd
  for key in user host; do
    [ -f "$DIR/$key" ] || ssh-keygen -q -t ed25519 -N '' -f "$DIR/$key"
  done
  cp "$DIR/user.pub" "$DIR/authorized_keys"
  chmod 600 "$DIR/authorized_keys"
  printf '%s\n' "HostKey $DIR/host" "AuthorizedKeysFile $DIR/authorized_keys" 'StrictModes no' 'PermitRootLogin yes' \
    'PasswordAuthentication no' 'UsePAM no' 'PidFile none' >"$DIR/sshd_config"
  printf '%s\n' "IdentityFile $DIR/user" 'StrictHostKeyChecking no' 'UserKnownHostsFile /dev/null' 'LogLevel ERROR' \
    'ConnectTimeout 5' >"$DIR/ssh_config"
  # DeepSpeed's own check, pdsh and mpirun all call `ssh`.
  printf '#!/bin/sh\nexec /usr/bin/ssh -F %s/ssh_config "$@"\n' "$DIR" >"$DIR/bin/ssh"
  chmod +x "$DIR/bin/ssh"
  printf 'node1 slots=1\nnode2 slots=1\n' >"$DIR/hostfile"
}

up() {
  down
  write_ssh
  ip link add "$BRIDGE" type bridge
  ip addr add "$NETWORK.254/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  for i in 1 2; do
    ip netns add "vlsi-node$i"
    ip link add "vlsi-ve$i" type veth peer name eth0 netns "vlsi-node$i"
    ip link set "vlsi-ve$i" master "$BRIDGE" up
    ip -n "vlsi-node$i" addr add "$NETWORK.$i/24" dev eth0
    ip -n "vlsi-node$i" link set eth0 up
    ip -n "vlsi-node$i" link set lo up
    mkdir -p "/etc/netns/vlsi-node$i"
    printf '%s\n' '127.0.0.1 localhost' "$NETWORK.1 node1" "$NETWORK.2 node2" >"/etc/netns/vlsi-node$i/hosts"
    on "node$i" /usr/sbin/sshd -D -e -f "$DIR/sshd_config" >"$DIR/sshd$i.log" 2>&1 &
    echo $! >"$DIR/sshd$i.pid"
  done
}

on() { # NODE COMMAND...
  local node=$1
  shift
  # shellcheck disable=SC2016  # the inner shell expands these
  exec ip netns exec "vlsi-$node" unshare --uts bash -c 'hostname "$0"; exec "$@"' "$node" "$@"
}

down() {
  for i in 1 2; do
    # Everything that still runs there: ranks and launchers of a test that was killed, too.
    for pid in $(ip netns pids "vlsi-node$i" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null || true; done
    ip netns del "vlsi-node$i" 2>/dev/null || true
    ip link del "vlsi-ve$i" 2>/dev/null || true
    rm -rf "/etc/netns/vlsi-node$i"
  done
  ip link del "$BRIDGE" 2>/dev/null || true
  rm -f "$DIR"/sshd?.pid
}

case "${1:-}" in
  up) up ;;
  on) shift; on "$@" ;;
  down) down ;;
  *) echo "two_hosts.sh: expected up, on NODE COMMAND, or down" >&2; exit 1 ;;
esac
