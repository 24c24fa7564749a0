.PHONY: help setup build check test test-unit test-lab torture soak bench demo docs clean
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

help: ## list the targets
	@sed -n "s/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p" $(MAKEFILE_LIST) | while IFS="	" read -r t h; do printf "  %-10s  %s\n" "$$t" "$$h"; done

setup: ## install what building, tests and demo need (Debian 12, as root)
	@tests/run/setup

build: ## build the release binary
	@cargo build --release

check: ## format, dependencies, lints, documentation, unit tests
	@tests/run/check

test: ## everything, on a fresh machine too: setup, unit and port tests, the two-host lab
	@tests/run/test all

test-unit: ## the tests that need neither root nor a lab
	@tests/run/test unit

test-lab: ## only the lab suite
	@tests/run/test lab

torture: ## what is too long for every change: the soak, and all of the suite once more by backup
	@tests/run/test torture

soak: ## a daemon, thirty domains, two targets, a quarter of an hour of trouble
	@tests/run/test soak

bench: setup ## measure on the two-host lab, write the figures into docs/benchmarks.md
	@tests/run/bench

demo: setup build ## a running guest replicated, its host lost, the replica booted elsewhere
	@tests/lab/demo

docs: ## build the API documentation
	@cargo doc --no-deps --document-private-items

clean: ## remove what was built
	@cargo clean
