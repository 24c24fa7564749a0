# shellcheck shell=bash
# Shared by the programs behind the Makefile. Sourced, never run.

ROOT=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
LAB=$ROOT/tests/lab/lab
readonly ROOT LAB
# The same for whatever is built to be tested, so that nothing is built twice.
FEATURES=lab,failpoints
# How many of the slowest tests a run names at its end.
readonly SLOWEST=20
shopt -s extglob
cd "$ROOT"
# Tests write configurations and hooks, which are obeyed only if nobody else may write them.
umask 022

say() { printf '%s\n' "$*"; }
die() {
  printf '%s\n' "$*" >&2
  exit 1
}

# Tools of our own, which `make setup` puts beside what is built.
TOOLS=$ROOT/target/tools
readonly TOOLS
PATH=$PATH:$TOOLS/bin

has_cargo_deny() { command -v cargo-deny >/dev/null; }
has_nextest() { cargo nextest --version >/dev/null 2>&1; }

target_directory() {
  cargo metadata --format-version 1 --no-deps --offline | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p'
}

# Cargo says nothing for minutes while it compiles one large crate: a line each minute says that it goes on.
tell_minutes() {
  local since=$SECONDS nap
  trap 'kill $nap 2>/dev/null; exit 0' TERM
  while kill -0 $$ 2>/dev/null; do
    sleep 60 &
    nap=$!
    wait $nap
    say "still $1, $(((SECONDS - since) / 60)) min"
  done
}

# patiently WHAT COMMAND...: runs it, and says meanwhile that it runs
patiently() {
  local what=$1 since=$SECONDS teller code=0
  shift
  say "$what: some minutes where nothing is built yet"
  tell_minutes "$what" &
  teller=$!
  "$@" || code=$?
  kill $teller 2>/dev/null || true
  wait $teller || true
  [[ $code == 0 ]] || return $code
  say "$what took $((SECONDS - since)) s"
}

# run_nextest ARGS...: one run. Its slowest tests stand in front of its summary, which is the last thing printed.
run_nextest() {
  cargo nextest run "$@" 2>&1 | name_the_slowest
}

name_the_slowest() {
  local line plain all='' summary='^ +Summary \['
  local ran='^ +(PASS|FAIL|TIMEOUT|SIG[A-Z]+) \[ *([0-9.]+)s\] \( *[0-9]+/[0-9]+\) (.*)$'
  while IFS= read -r line || [[ -n $line ]]; do
    plain=${line//$'\e['*([0-9;])m/}
    if [[ $plain =~ $ran ]]; then
      all+="${BASH_REMATCH[2]} s  ${BASH_REMATCH[3]}"$'\n'
    elif [[ $plain =~ $summary ]]; then
      say "     Slowest:"
      # Not `head`, which would stop reading: under pipefail the other end's SIGPIPE is a failure.
      LC_ALL=C sort -rn <<<"$all" | sed -n "/^\$/d; 1,${SLOWEST}s/^/    /p"
    fi
    say "$line"
  done
}

# Unit tests and house rules: neither root nor a lab.
unit_tests() {
  local rules='tidy:: docs:: failpoints:: no_file_of_tests what_the_configuration'
  patiently "building the tests" cargo test --no-run --features $FEATURES --lib --bins --test it
  if has_nextest; then
    run_nextest --features $FEATURES --lib --bins --test it -E "not binary(it) or test(/^(${rules// /|})/)"
  else
    cargo test --no-fail-fast --features $FEATURES --lib --bins
    # shellcheck disable=SC2086 # several words
    cargo test --features $FEATURES --test it -- $rules
  fi
}
