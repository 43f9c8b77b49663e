"""Where measurements are made: pairs of namespaces, the programs in them, and how one is asked something."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ZSPIRE = ROOT / "target/release/zspire"
CLIENT, SERVER = "10.99.0.1", "10.99.0.2"
APP, BULK = 8080, 5201
MARK = "0x539"
TICKS = os.sysconf("SC_CLK_TCK")


def sh(*command, check=True, **kw):
    done = subprocess.run(command, capture_output=True, text=True, **kw)
    if check and done.returncode:
        raise SystemExit(f"bench: {' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def inside(namespace, *command):
    """The command in a namespace; none: in the one that the benchmark itself is in."""
    return [*(("ip", "netns", "exec", namespace) if namespace else ()), *map(str, command)]


def wait_for(what, ready, seconds=20, log=None):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if ready():
            return
        time.sleep(0.02)
    said = f"; it said:\n{Path(log).read_text()[-1500:]}" if log else ""
    raise SystemExit(f"bench: {what}: not ready after {seconds} s{said}")


def listening(namespace, port):
    return bool(sh(*inside(namespace, "ss", "-Hltn", f"sport = :{port}")).strip())


def get(namespace, port, path):
    """GET on loopback of a namespace; None when nobody answers 200."""
    done = subprocess.run(
        inside(namespace, "curl", "-sf", "-m", "5", f"http://127.0.0.1:{port}{path}"), capture_output=True, text=True
    )
    return done.stdout if done.returncode == 0 else None


class Process:
    """A program in a namespace, ended with the benchmark."""

    def __init__(self, namespace, command, env=None, log=None):
        out = open(log, "wb") if log else subprocess.DEVNULL
        self.popen = subprocess.Popen(
            inside(namespace, *command), env={**os.environ, **(env or {})}, stdout=out, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        self.pid = self.popen.pid

    def cpu(self):
        """User and system seconds so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory(self):
        """Resident KiB now and at its highest."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return tuple(int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "VmHWM"))

    def alive(self):
        return self.popen.poll() is None

    def stop(self):
        if self.alive():
            self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()


def own_names():
    """Lets names of namespaces live on a file system of our own."""
    Path("/run/netns").mkdir(parents=True, exist_ok=True)
    sh("mount", "-t", "tmpfs", "tmpfs", "/run/netns")


class Network:
    """Two namespaces, and which program's redirection rules are in force in them."""

    def __init__(self, congestion=None, client="client", server="server"):
        """`congestion`: the congestion control of every connection, applications' as well; none: this machine's default."""
        self.client, self.server = client, server
        for name in (client, server):
            sh("ip", "netns", "add", name)
            sh(*inside(name, "ip", "link", "set", "lo", "up"))
            settings = {
                "net.ipv4.ip_local_port_range": "1024 65535", "net.ipv4.tcp_tw_reuse": "1",
                "net.ipv4.conf.all.route_localnet": "1", "net.core.somaxconn": "4096",
            }
            if congestion:
                settings["net.ipv4.tcp_congestion_control"] = congestion
            for key, value in settings.items():
                path = "/proc/sys/" + key.replace(".", "/")
                sh(*inside(name, "sh", "-c", f"echo '{value}' > {path} || true"))
        sh("ip", "link", "add", "veth0", "netns", client, "type", "veth", "peer", "name", "veth0", "netns", server)
        for name, address in ((client, CLIENT), (server, SERVER)):
            sh(*inside(name, "ip", "addr", "add", f"{address}/24", "dev", "veth0"))
            sh(*inside(name, "ip", "link", "set", "veth0", "up"))
            sh(*inside(name, "ip", "rule", "add", "fwmark", "0x111/0xfff", "pref", "32764", "lookup", "100"))
            sh(*inside(name, "ip", "route", "add", "local", "0.0.0.0/0", "dev", "lo", "table", "100"))

    def rules(self, outbound=None, inbound=None):
        """Redirects captured connections to these ports; none: no rules."""
        for name in (self.client, self.server):
            script = "table inet bench {}\ndelete table inet bench\n"
            if outbound:
                script += f"""
table inet bench {{
  chain raw_out {{
    type filter hook output priority -300
    meta mark & 0xfff == {MARK} oifname "lo" meta l4proto tcp ct original zone set 1
  }}
  chain mangle_pre {{
    type filter hook prerouting priority -150
    meta mark & 0xfff == {MARK} ct mark set 0x111
  }}
  chain mangle_out {{
    type route hook output priority -150
    meta mark & 0xfff != {MARK} ct mark & 0xfff == 0x111 meta mark set ct mark
  }}
  chain nat_pre {{
    type nat hook prerouting priority -100
    ip daddr != 127.0.0.1 tcp dport != {{ 15008, 16008 }} meta mark & 0xfff != {MARK} redirect to :{inbound or 15006}
  }}
  chain nat_out {{
    type nat hook output priority -100
    meta l4proto tcp meta mark & 0xfff == 0x111 accept
    ip daddr != 127.0.0.1 oifname "lo" accept
    ip daddr != 127.0.0.1 meta l4proto tcp meta mark & 0xfff != {MARK} redirect to :{outbound}
  }}
}}"""
            if outbound and not inbound and name == self.server:
                script = "table inet bench {}\ndelete table inet bench\n"
            sh(*inside(name, "nft", "-f", "-"), input=script)

    def remove(self):
        for name in (self.client, self.server):
            sh("ip", "netns", "del", name)


def zspire_env(run, side, mesh):
    return {
        "PROXY_MODE": "dedicated", "PROXY_WORKLOAD_INFO": f"default/{side}/{side}", "NODE_NAME": side,
        "LOCAL_XDS_PATH": str(mesh), "FAKE_CA": "true", "PACKET_MARK": "1337", "XDG_RUNTIME_DIR": str(run),
        "ZTUNNEL_WORKER_THREADS": "2", "IPV6_ENABLED": "false", "ZSPIRE_STATE_DIR": str(run / side),
        "MALLOC_CONF": "",
    }


def mesh_file(path, nodes=("client", "server"), protocol="HBONE"):
    """Two workloads and a policy; where they speak plain TCP nobody has an identity that a policy could ask for, and there is none."""
    policies = f"""
policies:
- {{action: Allow, name: allow-client, namespace: default, scope: Namespace, dryRun: false,
   rules: [[[{{principals: [!Exact cluster.local/ns/default/sa/client]}}]]]}}
"""
    path.write_text(f"""
workloads:
- {{uid: bench/client, name: client, namespace: default, serviceAccount: client, workloadIps: ["{CLIENT}"],
   protocol: {protocol}, trustDomain: cluster.local, node: {nodes[0]}, network: ""}}
- {{uid: bench/server, name: server, namespace: default, serviceAccount: server, workloadIps: ["{SERVER}"],
   protocol: {protocol}, trustDomain: cluster.local, node: {nodes[1]}, network: ""}}
{policies if protocol == "HBONE" else ""}""")
    return path


def start_zspire(run, side, mesh, **more):
    log = run / f"zspire-{side}.log"
    process = Process(side, [ZSPIRE, "proxy"], {**zspire_env(run, side, mesh), **more}, log)
    wait_for(f"zspire {side}", lambda: get(side, 15021, "/healthz/ready") is not None, log=log)
    return process


def start_nginx(run, namespace="server"):
    (run / "nginx").mkdir()
    (run / "nginx/16k").write_text("y" * 16384)
    body = "x" * 64
    (run / "nginx.conf").write_text(f"""
daemon off; master_process off; user root root; error_log stderr crit; pid {run}/nginx/pid;
events {{ worker_connections 18000; }}
http {{
  access_log off; keepalive_requests 100000000; keepalive_timeout 3600s;
  client_body_temp_path {run}/nginx/b; proxy_temp_path {run}/nginx/p; fastcgi_temp_path {run}/nginx/f;
  uwsgi_temp_path {run}/nginx/u; scgi_temp_path {run}/nginx/s;
  server {{ listen {APP} backlog=4096; location / {{ return 200 "{body}"; }}
    location = /16k {{ root {run}/nginx; }} }}
}}""")
    nginx = Process(namespace, ["nginx", "-c", run / "nginx.conf", "-p", run / "nginx"], log=run / "nginx.log")
    wait_for("nginx", lambda: listening(namespace, APP), log=run / "nginx.log")
    return nginx
