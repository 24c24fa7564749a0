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

has_nextest() { cargo nextest --version >/dev/null 2>&1; }

# run_tests ARGS...: one run, whose summary is the last thing printed
run_tests() {
  if has_nextest; then cargo nextest run "$@"; else cargo test --no-fail-fast "$@"; fi
}

# Unit tests and house rules: neither root nor a lab.
unit_tests() {
  if has_nextest; then
    cargo nextest run --lib --bins --test it -E 'not binary(it) or test(/^(tidy|docs|no_file_of_tests_is_forgotten)/)'
  else
    cargo test --no-fail-fast --lib --bins
    cargo test --test it -- tidy:: docs:: no_file_of_tests_is_forgotten
  fi
}
