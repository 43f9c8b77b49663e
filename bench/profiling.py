"""Where the time goes: both proxies sampled by perf while they work, by what the samples are about."""

import re
import shutil
import subprocess

import report
from lab import sh

# What a symbol or its file is about; the first that matches counts.
GROUPS = [
    ("kernel: netfilter", r"\[k\].*(nf_|nft_|conntrack|netfilter|ipt_|xt_|nat_)"),
    ("kernel: copies", r"\[k\].*(copy|memcpy|memset|rep_movs|skb_splice|iov_iter|clear_page)"),
    ("kernel: TCP, IP, veth", r"\[k\].*(tcp|ip_|ipv4|inet|skb|sock|sk_|veth|netif|net_|dev_|fib_|neigh|csum|dst_|napi|rt_|loopback|backlog)"),
    ("kernel: waking and scheduling", r"\[k\].*(sched|wake|epoll|ep_|futex|switch|rq|load_avg|enqueue|dequeue|select_task|pick_|update_|idle|timer|ktime)"),
    ("kernel: system calls and files", r"\[k\].*(syscall|entry|fget|fput|file|fd|inode|dentry|d_|alloc_empty|close)"),
    ("kernel: memory", r"\[k\].*(slab|kmem|kmalloc|kfree|page|alloc|free|mm|vma|rcu)"),
    ("kernel: other", r"\[k\]"),
    ("TLS: sealing and opening", r"(aes|gcm|ghash|chacha|poly1305|sha256|sha512|ecp_|p256|x25519|aws_lc|mlkem)"),
    ("TLS: rustls", r"rustls"),
    ("allocator", r"(je_|malloc|sdallocx|rallocx|calloc|free|tcache|arena)"),
    ("hbone", r"zspire_hbone"),
    ("identity", r"zspire_identity"),
    ("proxy", r"zspire_(proxy|model|sys|node)"),
    ("log and metrics", r"(tracing|prometheus|serde|fmt::)"),
    ("tokio", r"(tokio|mio::)"),
]
SHOWN = 12


def record(run, pids, work, seconds):
    """Samples of processes during some work: (percent, what) by symbol."""
    if not shutil.which("perf"):
        raise SystemExit("bench: perf is missing: run it by make profile, which installs it")
    data = run / "perf.data"
    perf = subprocess.Popen(
        ["perf", "record", "-q", "-F", "999", "-o", str(data), "-p", ",".join(map(str, pids))],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )
    work(seconds)
    perf.send_signal(2)
    said = perf.communicate(timeout=60)[1].decode()
    if not data.exists() or not data.stat().st_size:
        raise SystemExit(f"bench: perf recorded nothing: {said.strip()}")
    out = sh("perf", "report", "-i", str(data), "--stdio", "--no-children", "-s", "sym,dso", "-t", "|", "-g", "none")
    samples = []
    for line in out.splitlines():
        found = re.match(r"^\s*([\d.]+)%\s*\|(.*)$", line)
        if found:
            samples.append((float(found[1]), re.sub(r"\s+", " ", found[2]).strip()))
    if not samples:
        raise SystemExit(f"bench: perf reported nothing: {out[-500:]}")
    return samples


def show(name, samples):
    groups = {}
    for percent, what in samples:
        group = next((group for group, pattern in GROUPS if re.search(pattern, what, re.I)), "other")
        groups[group] = groups.get(group, 0) + percent
    print(f"{name}\n")
    ordered = sorted(groups.items(), key=lambda item: -item[1])
    report.table(["about", "% of the proxies' CPU"], [[group, f"{percent:.1f}"] for group, percent in ordered])
    report.table(["function", "%"], [[what[:110], f"{percent:.1f}"] for percent, what in samples[:SHOWN]])
