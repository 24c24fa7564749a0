# shellcheck shell=bash
# Starting and ending the one process per host on which everything else hangs.
#
# Outside, a host is one `unshare` (the holder) and its child, the host's PID 1. Whatever runs in the host
# lives in that PID namespace, so killing PID 1 ends all of it and no later fork can escape. The mounts
# and the veth live in namespaces that vanish with the last process. Therefore nothing has to be undone
# step by step, and a lab whose maker was killed with SIGKILL is cleaned up just the same.

# A process id alone may have been given to somebody else by the time it is used; with its start time it may not.
start_time() {
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  stat=${stat##*) } # the name, field 2, may contain blanks and parentheses
  # shellcheck disable=SC2086
  set -- $stat
  echo "${20}"
}

# mark FILE PID: remember a process by id and start time. Renamed into place, so it is there whole or not at all.
mark() {
  printf '%s %s\n' "$2" "$(start_time "$2")" >"$1.new"
  mv "$1.new" "$1"
}

# marked FILE: prints the id if that very process still runs
marked() {
  local pid started
  [[ -s $1 ]] || return 1
  read -r pid started <"$1"
  [[ $(start_time "$pid") == "$started" ]] || return 1
  # A zombie is as good as gone, but only its parent can take it away.
  [[ $(sed -n 's/^State:\t\(.\).*/\1/p' "/proc/$pid/status" 2>/dev/null) != Z ]] || return 1
  echo "$pid"
}

# start_holder HOST: detached from the caller's session, so that neither a Ctrl-C nor the end of a test reaches it.
# The holder marks itself before it makes anything, so there is no moment at which it exists unrecorded.
start_holder() {
  local host=$1
  setsid "$LAB_PROGRAM" __hold "$host" </dev/null >"$VR_LAB_DIR/host-$host.log" 2>&1 &
  disown
}

hold() { # runs as the holder itself
  mark "$VR_LAB_DIR/holder-$1" $BASHPID
  unlock
  exec unshare --mount --net --uts --ipc --pid --fork --kill-child --propagation private \
    "$LAB_PROGRAM" __root "$1"
}

# find_init HOST: the holder's only child is the host's PID 1
find_init() {
  local holder init
  holder=$(marked "$VR_LAB_DIR/holder-$1") || return 1
  init=$(cat "/proc/$holder/task/$holder/children" 2>/dev/null || pgrep -P "$holder")
  init=${init%% *}
  [[ -n $init ]] || return 1
  echo "$init"
}

# Everything `lab up` starts inherits this lock (descriptor 9), so `lab down` can wait until also the strays of a killed
# `lab up` are gone or have marked themselves. Without it a holder could appear behind the back of `lab down`.
lock() {
  exec 9>"$VR_LAB_DIR/lock"
  flock --wait 60 9 || die "somebody else is busy with the lab in $VR_LAB_DIR"
}
unlock() { exec 9>&-; }

end_host() {
  local host=$1 init holder i
  init=$(marked "$VR_LAB_DIR/init-$host") || init=$(find_init "$host") || init=
  holder=$(marked "$VR_LAB_DIR/holder-$host") || holder=
  # The kernel ends every process of the namespace before PID 1 is gone, so waiting for that one waits for all.
  [[ -z $init ]] || kill -KILL "$init" 2>/dev/null || true
  [[ -z $holder ]] || kill -KILL "$holder" 2>/dev/null || true
  for ((i = 0; i < 500; i++)); do
    { [[ -n $init ]] && running "$init"; } || { [[ -n $holder ]] && running "$holder"; } || return 0
    sleep 0.02
  done
  die "host $host did not end (process ${init:-$holder})"
}

running() { # zombies do not count
  local state
  state=$(sed -n 's/^State:\t\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null) || return 1
  [[ -n $state && $state != Z ]]
}
