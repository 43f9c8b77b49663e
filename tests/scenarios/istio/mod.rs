//! Under a real istiod and a real Kubernetes API server, of the versions in `scripts/peers/istio/go.mod`, run by `make test-istio`.

mod chart;
mod traffic;
