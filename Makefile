# zspire: what can be done here. Each target installs what it needs and is missing.

SHELL := /bin/bash
CACHE := $(or $(ZSPIRE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/zspire)
export PATH := $(PATH):/usr/sbin:/sbin:$(CACHE)/tools-1/bin

.PHONY: help demo test test-spire test-istio test-systemd test-peers soak check bench profile fuzz docs clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n",$$1,$$2}' $(MAKEFILE_LIST)

demo: ## bring up a mesh on this machine and send traffic through it (ARGS="--once --json", "--identity spire")
	@scripts/install demo
	@case "$(ARGS)" in *"identity spire"* | *identity=spire*) scripts/install spire ;; esac
	@cargo build --quiet --release --locked -p zspire
	@PATH="$$PATH:$$(scripts/peers/build spire --folder)" target/release/zspire demo $(ARGS)

test: ## run every test that a change must pass
	@scripts/install test
	cargo build --locked -p zspire
	cargo nextest run --locked --workspace $(ARGS)

test-spire: ## run the tests against a real SPIRE, which is built first, once (Go or Python, and as root)
	@scripts/install spire
	cargo build --locked -p zspire
	cargo nextest run --locked --workspace --profile spire $(ARGS)

test-istio: ## run the tests under a real istiod and Kubernetes API server, which are built first, once (Go or Python, and as root)
	@scripts/install istio
	cargo build --locked -p zspire
	cargo nextest run --locked --workspace --profile istio $(ARGS)

test-systemd: ## run the units of deploy/systemd under a real systemd, in namespaces (as root)
	@scripts/install systemd
	cargo build --locked -p zspire
	cargo nextest run --locked --workspace --profile systemd $(ARGS)

test-peers: test-spire test-istio test-systemd ## all three of these

soak: ## the long forms of tests: 100 handovers under load, pods that come and go, tunnels with 1 GiB and with single bytes
	@scripts/install test
	cargo build --locked -p zspire
	ZSPIRE_SOAK_HANDOVERS=100 ZSPIRE_SOAK_CHURN=120 ZSPIRE_SOAK_MEBIBYTES=1024 cargo nextest run --locked -p zspire-scenarios --profile soak handover foreign $(ARGS)
	ZSPIRE_SOAK_MEBIBYTES=1024 ZSPIRE_SOAK_SINGLE_BYTES=60 cargo nextest run --locked -p zspire-hbone --profile soak --success-output immediate crowd:: single_bytes_on_many $(ARGS)

check: ## formatting, lints, licences and sources of dependencies, the crate graph, generated documents, units, the image
	@scripts/install check
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo deny --log-level error check bans licenses sources
	scripts/check-crate-graph
	scripts/check-docs
	scripts/check-units
	scripts/check-image

bench: ## measure speed and memory beside Envoy, interleaved, and print the tables
	@scripts/install bench
	cargo build --quiet --release --locked -p zspire -p zspire-testkit
	bench/run $(ARGS)

profile: ## print where the time goes in each kind of work of `make bench`, by perf
	@scripts/install profile
	cargo build --quiet --release --locked -p zspire -p zspire-testkit
	bench/run --profile $(ARGS)

fuzz: ## feed random input to each parser of what others send, a minute each (SECONDS_EACH=60)
	@scripts/install fuzz
	scripts/fuzz

docs: ## write the generated documents anew
	cargo run --quiet --locked -p zspire -- docs configuration > docs/configuration.md

clean: ## remove what was built
	cargo clean
