# shellcheck shell=bash
# Shared by the programs of the lab. Sourced, never run.

readonly LAB_HOSTS=(a b)
readonly LAB_PARENT=/var/tmp
readonly LAB_PREFIX=virt-replica-lab.

say() { printf '%s\n' "$*"; }
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

need() { # need COMMAND...: one message for all that is missing, with the way out
  local c missing=()
  for c; do command -v "$c" >/dev/null || missing+=("$c"); done
  [[ ${#missing[@]} -eq 0 ]] || die "missing: ${missing[*]} (run 'make setup' as root)"
}

address() { # address HOST: TEST-NET-1, only ever seen inside the lab's own network namespaces
  case $1 in
    a) echo 192.0.2.1 ;;
    b) echo 192.0.2.2 ;;
    *) die "no such host: $1 (a or b)" ;;
  esac
}

peer() { if [[ $1 == a ]]; then echo b; else echo a; fi; }

# The guest's kernel and initrd; shared by all labs, and mounted at /lab/guest inside the hosts.
cache_dir() {
  if [[ -n ${VR_LAB_CACHE:-} ]]; then
    echo "$VR_LAB_CACHE"
  elif [[ -n ${HOME:-} && -w $HOME ]]; then
    echo "${XDG_CACHE_HOME:-$HOME/.cache}/virt-replica-lab"
  else
    echo /var/cache/virt-replica-lab
  fi
}

# The unnamed labs of this checkout, and only those: somebody else's lab is not ours to guess at.
own_labs() {
  local maker
  for maker in "$LAB_PARENT/$LAB_PREFIX"*/maker; do
    [[ ! -e $maker || $(<"$maker") != "$LAB_PROGRAM" ]] || say "${maker%/maker}"
  done
}

# Which lab a command means: the one named, else the only one there is.
find_lab() {
  local found
  if [[ -z ${VR_LAB_DIR:-} ]]; then
    mapfile -t found < <(own_labs)
    case ${#found[@]} in
      0) die "no lab is up (start one with 'lab up')" ;;
      1) VR_LAB_DIR=${found[0]} ;;
      *) die "several labs are up, set VR_LAB_DIR to one of: ${found[*]}" ;;
    esac
  fi
  [[ -d $VR_LAB_DIR ]] || die "no lab in $VR_LAB_DIR"
}
