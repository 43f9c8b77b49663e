"""Envoy configured for the same job: captured TCP into HTTP/2 CONNECT over mutual TLS, and out again.

Static routes, no access log, no authorization, no original source address: what zspire does beyond that
is not charged to Envoy.
"""

import json
import subprocess


def certificates(run):
    """A P-256 CA and two leaves with a SPIFFE ID, by openssl."""
    folder = run / "envoy-pki"
    folder.mkdir()

    def openssl(*command):
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)

    ca_key, ca = folder / "ca.key", folder / "ca.pem"
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/O=bench",
            "-keyout", ca_key, "-out", ca)
    for side in ("client", "server"):
        key, csr, pem, ext = (folder / f"{side}.{end}" for end in ("key", "csr", "pem", "ext"))
        ext.write_text(f"subjectAltName=critical,URI:spiffe://cluster.local/ns/default/sa/{side}\n"
                       "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n")
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/", "-keyout", key, "-out", csr)
        openssl("x509", "-req", "-in", csr, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2", "-extfile", ext,
                "-out", pem)
    return folder


def tls(pki, side, peer):
    return {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "alpn_protocols": ["h2"],
        "tls_certificates": [{"certificate_chain": {"filename": f"{pki}/{side}.pem"},
                              "private_key": {"filename": f"{pki}/{side}.key"}}],
        "validation_context": {
            "trusted_ca": {"filename": f"{pki}/ca.pem"},
            "match_typed_subject_alt_names": [
                {"san_type": "URI", "matcher": {"exact": f"spiffe://cluster.local/ns/default/sa/{peer}"}}],
        },
    }


def typed(name, fields):
    return {"@type": f"type.googleapis.com/{name}", **fields}


H2 = {"initial_stream_window_size": 4 << 20, "initial_connection_window_size": 16 << 20}


def http2_options():
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": typed(
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions", {"explicit_http_config": {"http2_protocol_options": H2}})}


# Where connections are sent that came to the server's pod in no tunnel: nobody listens, so that they are refused.
PLAIN = 16006


def endpoint(name, address, port, **more):
    target = {"endpoint": {"address": {"socket_address": {"address": address, "port_value": port}}}}
    return {"name": name, "type": "STATIC", "connect_timeout": "5s", "per_connection_buffer_limit_bytes": 1 << 20,
            "circuit_breakers": {"thresholds": [{"max_connections": 100000, "max_requests": 100000,
                                                 "max_pending_requests": 100000}]},
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [target]}]}, **more}


def client(pki, server):
    listener = {
        "name": "outbound", "address": {"socket_address": {"address": "0.0.0.0", "port_value": 16001}},
        "per_connection_buffer_limit_bytes": 1 << 20,
        "listener_filters": [{"name": "original_dst", "typed_config": typed(
            "envoy.extensions.filters.listener.original_dst.v3.OriginalDst", {})}],
        "filter_chains": [{"filters": [{"name": "tcp", "typed_config": typed(
            "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", {
                "stat_prefix": "outbound", "cluster": "tunnel", "idle_timeout": "0s",
                "tunneling_config": {"hostname": "%DOWNSTREAM_LOCAL_ADDRESS%"}})}]}],
    }
    tunnel = endpoint(
        "tunnel", server, 16008, typed_extension_protocol_options=http2_options(),
        upstream_bind_config={"source_address": {"address": "0.0.0.0", "port_value": 0},
                              "socket_options": [{"level": 1, "name": 36, "int_value": 1337, "state": "STATE_PREBIND"}]},
        transport_socket={"name": "tls", "typed_config": typed(
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            {"common_tls_context": tls(pki, "client", "server")})})
    return [listener], [tunnel]


def server(pki, address, ports):
    routes = [{"match": {"connect_matcher": {}, "headers": [{"name": ":authority", "string_match": {
        "suffix": f":{port}"}}]}, "route": {"cluster": f"app-{port}", "timeout": "0s", "idle_timeout": "0s", "upgrade_configs": [
            {"upgrade_type": "CONNECT", "connect_config": {}}]}} for port in ports]
    listener = {
        "name": "inbound", "address": {"socket_address": {"address": "0.0.0.0", "port_value": 16008}},
        "per_connection_buffer_limit_bytes": 1 << 20,
        "filter_chains": [{
            "transport_socket": {"name": "tls", "typed_config": typed(
                "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                {"require_client_certificate": True, "common_tls_context": tls(pki, "server", "client")})},
            "filters": [{"name": "http", "typed_config": typed(
                "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", {
                    "stat_prefix": "inbound", "codec_type": "HTTP2", "http2_protocol_options": {**H2, "allow_connect": True},
                    "upgrade_configs": [{"upgrade_type": "CONNECT"}], "stream_idle_timeout": "0s",
                    "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
                    "http_filters": [{"name": "router", "typed_config": typed(
                        "envoy.extensions.filters.http.router.v3.Router", {})}]})}]}],
    }
    return [listener], [endpoint(f"app-{port}", address, port) for port in ports]


def start(run, process, wait_for, get, client_address, server_address, app, bulk):
    """Both proxies, ready."""
    pki = certificates(run)
    parts = {"client": client(pki, server_address), "server": server(pki, server_address, [app, bulk])}
    started = []
    for number, (side, (listeners, clusters)) in enumerate(parts.items()):
        config = {
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 16000}}},
            "static_resources": {"listeners": listeners, "clusters": clusters},
        }
        path, log = run / f"envoy-{side}.json", run / f"envoy-{side}.log"
        path.write_text(json.dumps(config))
        started.append(process(side, ["envoy", "-c", path, "--concurrency", 2, "--base-id", 10 + number, "--log-level", "warn"],
                               log=log))
        wait_for(f"envoy {side}", lambda: (get(side, 16000, "/ready") or "").startswith("LIVE"), log=log)
    return started
