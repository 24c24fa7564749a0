# shellcheck shell=bash
# Shared by the programs behind the Makefile. Sourced, never run.

ROOT=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
LAB=$ROOT/tests/lab/lab
readonly ROOT LAB
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

# run_tests ARGS...: one run, whose summary is the last thing printed
run_tests() {
  if has_nextest; then cargo nextest run "$@"; else cargo test --no-fail-fast "$@"; fi
}
