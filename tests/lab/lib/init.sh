#!/bin/bash
# PID 1 of a lab host: starts its daemons, then takes in the orphans until somebody kills it.
set -euo pipefail

mkdir -p /run/sshd /run/lock
ip link set lo up
/usr/sbin/sshd -E /var/log/sshd.log
/usr/sbin/virtlogd -d
setsid --fork /bin/bash /lab/tools/lib/keep-libvirtd.sh </dev/null >/dev/null 2>&1
touch /run/ready

# bash reaps every child that ends while it waits; PID 1 must, or killed QEMUs would stay as zombies.
while :; do
  sleep infinity &
  wait $! || true
done
