#!/bin/bash
# Runs libvirtd and starts it again when it crashes, as systemd does on a real host (Restart=on-failure in Debian's unit).
# It does crash: libvirt 9.0 segfaults in its event loop by itself, about once in some hundred minutes of this lab (sources of
# glib are released from other threads than the loop's). Ended on purpose, with TERM or KILL, it stays ended: tests do that.
set -uo pipefail

readonly CRASHES=/var/log/libvirt/crashes

while :; do
  /usr/sbin/libvirtd </dev/null >/dev/null 2>&1
  code=$?
  case $code in
    132 | 134 | 135 | 136 | 139) printf '%(%FT%T)T libvirtd ended by signal %d\n' -1 $((code - 128)) >>$CRASHES ;;
    *) exit 0 ;;
  esac
done
