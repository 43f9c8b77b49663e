# The image of zspire: one program on a base without a shell.
#
#   docker build --build-arg REVISION="$(git rev-parse HEAD)" -t REGISTRY/zspire:0.1.0 .
#   docker build --target sbom --output . .                      # what is in it: zspire.cdx.json, CycloneDX
#
# The bases can be pinned: --build-arg RUST=docker.io/library/rust@sha256:… --build-arg BASE=gcr.io/distroless/cc-debian12@sha256:…
# Both are Debian 12, so that the program finds the C library that it was linked with.
ARG RUST=docker.io/library/rust:1-bookworm
ARG BASE=gcr.io/distroless/cc-debian12:nonroot

FROM ${RUST} AS build
# The list of what is in the program is made by a script.
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
ARG REVISION=unknown
# Symbols stay, for profiles; lines of source do not.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    ZSPIRE_REVISION="$REVISION" CARGO_PROFILE_RELEASE_STRIP=debuginfo cargo build --release --locked -p zspire && \
    install -D target/release/zspire /out/usr/bin/zspire && \
    install -d /out/usr/share/sbom && scripts/sbom >/out/usr/share/sbom/zspire.cdx.json && \
    install -D -m 644 LICENSE /out/usr/share/doc/zspire/copyright

FROM scratch AS sbom
COPY --from=build /out/usr/share/sbom/zspire.cdx.json /

FROM ${BASE}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="zspire" \
      org.opencontainers.image.description="Ambient-mesh node proxy" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="$REVISION"
COPY --from=build /out /
# Default paths are relative (docs/configuration.md).
WORKDIR /
# A control plane needs no more than this user. The proxy of a node needs root and two capabilities, which the Helm chart asks for.
ENTRYPOINT ["/usr/bin/zspire"]
CMD ["proxy"]
