#!/bin/sh
# PID 1 of the test guest (busybox ash). It makes promises a test can check afterwards:
#  - `ack N` is printed on the console only after line N has reached the disk (fsync), on every disk it has;
#  - /data2/lines never holds a line that /data/lines does not, and is at most one behind, at every instant.
# What it does is chosen on the kernel's command line: vr.mode=writer|reader, vr.delay=SECONDS, vr.agent=yes|hang.

mode=writer
delay=0.05
agent=

say() { echo "$*" >/dev/console; }

start() {
  mount -t proc proc /proc
  mount -t sysfs sysfs /sys
  mount -t devtmpfs devtmpfs /dev
  while read -r module; do insmod "$module" || say "insmod $module failed"; done </modules
  local word
  # shellcheck disable=SC2013 # words are what it consists of
  for word in $(cat /proc/cmdline); do
    case $word in
      vr.mode=*) mode=${word#*=} ;;
      vr.delay=*) delay=${word#*=} ;;
      vr.agent=*) agent=${word#*=} ;;
    esac
  done
  acpid -l /dev/null # `virsh shutdown` presses the power button; /etc/acpi says what that means
}

wait_for() { # wait_for DEVICE: probing is asynchronous
  local i=0
  while [ ! -b "$1" ] && [ $i -lt 50 ]; do
    sleep 0.1
    i=$((i + 1))
  done
  [ -b "$1" ]
}

# With a network device it is 192.0.2.10, and accepts connections on port 22; nobody else is there to be asked for an address.
start_network() {
  [ -e /sys/class/net/eth0 ] || return 0
  ip address add 192.0.2.10/24 dev eth0
  ip link set eth0 up
  while :; do nc -l -p 22 </dev/null >/dev/null 2>&1; done &
}

mount_disks() {
  wait_for /dev/vda || stop "no disk"
  mount -t ext4 /dev/vda /data || stop "cannot mount /dev/vda"
  # Counting the disks among the virtio devices (type 2) keeps a second one from being overlooked because it is slow.
  [ "$(grep -lx 0x0002 /sys/bus/virtio/devices/virtio*/device | wc -l)" -ge 2 ] || return 0
  wait_for /dev/vdb || stop "no /dev/vdb"
  mount -t ext4 /dev/vdb /data2 || stop "cannot mount /dev/vdb"
}

# The guest agent holds what is mounted by then. It is found by the name of its channel: there is no udev here.
start_agent() {
  [ -n "$agent" ] || return 0
  local module port i=0
  while read -r module; do insmod "$module" 2>/dev/null; done </modules.agent
  while [ $i -lt 50 ]; do
    port=$(grep -lx org.qemu.guest_agent.0 /sys/class/virtio-ports/*/name 2>/dev/null) && break
    sleep 0.1
    i=$((i + 1))
  done
  port=${port%/name}
  qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t /run >/dev/null 2>&1 &
  local pid=$!
  say agent
  [ "$agent" != hang ] || (sleep 2 && kill -STOP $pid && say "agent hangs") &
}

stop() {
  say "$*"
  sync
  poweroff -f
}

# The number in the last complete line. A line without its newline was never acknowledged.
last_line() {
  [ -e "$1" ] || { echo 0; return; }
  head -c "$(whole_bytes "$1")" "$1" | tail -n 1 | grep . || echo 0
}

whole_bytes() {
  local size tail
  size=$(stat -c %s "$1")
  tail=$(tail -c 32 "$1" | tr '\n' '|')
  case $tail in
    *'|') echo "$size" ;;
    *) tail=${tail##*|} && echo $((size - ${#tail})) ;;
  esac
}

two_disks() { grep -q ' /data2 ' /proc/mounts; }

# Lines are 1, 2, 3 ... and nothing else: anything missing or out of order shows.
check_lines() {
  [ -e "$1" ] || { echo yes; return; }
  awk '$0 != NR { bad = 1; exit } END { print bad ? "no" : "yes" }' "$1"
}

append() { # append FILE N
  echo "$2" >>"$1"
  sync "$1" # fsync of this one file
}

write_forever() {
  local n
  for file in /data/lines /data2/lines; do
    [ ! -e $file ] || truncate -s "$(whole_bytes $file)" $file
  done
  n=$(last_line /data/lines)
  if two_disks; then
    # Stopped between the two writes: finish that one, it was not acknowledged but it was written.
    [ "$(last_line /data2/lines)" -ge "$n" ] || append /data2/lines "$n"
  fi
  sync /data # the directory entry, before the first acknowledgement relies on it
  say "resume $n"
  while :; do
    n=$((n + 1))
    append /data/lines $n || stop "write failed"
    if two_disks; then append /data2/lines $n || stop "write failed"; fi
    say "ack $n"
    sleep "$delay"
  done
}

report() {
  say "last $(last_line /data/lines)"
  say "whole $(check_lines /data/lines)"
  if two_disks; then
    say "last2 $(last_line /data2/lines)"
    say "whole2 $(check_lines /data2/lines)"
  fi
  umount /data /data2 2>/dev/null
  stop "done"
}

start
start_network
mount_disks
start_agent
case $mode in
  writer) write_forever ;;
  reader) report ;;
  *) stop "unknown mode $mode" ;;
esac
