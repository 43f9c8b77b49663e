//! The redirection rules inside a pod's network namespace.
//!
//! They are what Istio's node agent programs there, as one `nft` table with a name of our own, so that both can be
//! told apart and ours is replaced as a whole. When to apply them is the caller's matter.
//!
//! Redirection alone is about first packets: a connection that is older than the rules, or a packet that the kernel's
//! connection tracking takes for no part of any, is not redirected. So there are chains beside it that let nothing leave
//! and nothing in but what is the proxy's: an older connection is reset on both sides at its next packet.

use std::net::IpAddr;

pub use crate::program::Error;
use crate::program::{IP, NFT, SS};
use crate::socket;

/// Upstream compares and sets only these bits of a mark and leaves the others to the network plugin.
const MASK: u32 = 0xfff;
/// The mark of connections whose source address the proxy has kept: their replies must come back to it.
const ORIGINAL_SOURCE: u32 = 0x111;
/// The routing table of those replies.
const TABLE: &str = "100";
/// Its priority among the routing rules: before the main table, and the same as upstream's.
const PRIORITY: &str = "32764";

/// Which connections of a pod go through the proxy, and through which of its ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirection {
    /// The mark of the proxy's own packets, which are left alone.
    pub mark: u32,
    /// Where the pod's outbound connections go.
    pub outbound: u16,
    /// Where plaintext inbound connections go; none leaves them alone.
    pub inbound: Option<u16>,
    /// The port of inbound tunnels, which are left alone.
    pub hbone: u16,
    /// Where the pod's DNS queries go; none leaves them alone. The socket for UDP has to be bound to the loopback
    /// address: one bound to any address answers from another than the query was sent to, and the answer is lost.
    pub dns: Option<u16>,
    /// Peers that are left alone in both directions, such as the address the node's health probes come from.
    pub exempt_sources: Vec<IpAddr>,
}

impl Default for Redirection {
    fn default() -> Self {
        Self { mark: 0x539, outbound: 15001, inbound: Some(15006), hbone: 15008, dns: None, exempt_sources: Vec::new() }
    }
}

impl Redirection {
    /// The rules as a script for `nft`, which replaces the whole table in one transaction.
    pub fn render(&self) -> String {
        let mark = self.mark;
        // A mark of more bits than upstream's is compared as a whole.
        let mask = if mark & !MASK == 0 { MASK } else { u32::MAX };
        let ours = format!("meta mark & {mask:#x} == {mark:#x}");
        // What the proxy itself sends finds its way, and a new mark would have it routed twice.
        let not_ours = format!("meta mark & {mask:#x} != {mark:#x}");
        let keep = u32::MAX ^ MASK;
        let nat = format!(
            "  chain prerouting {{\n    type nat hook prerouting priority dstnat; policy accept;\n{}  }}\n\
             \x20 chain output {{\n    type nat hook output priority -100; policy accept;\n{}  }}\n",
            lines(&self.prerouting(&ours)),
            lines(&self.output(&ours)),
        );
        let mangle = format!(
            "  chain prerouting-mark {{\n    type filter hook prerouting priority mangle; policy accept;\n\
             \x20   {ours} ct mark set ct mark & {keep:#x} | {ORIGINAL_SOURCE:#x}\n  }}\n\
             \x20 chain output-mark {{\n    type route hook output priority mangle; policy accept;\n\
             \x20   {not_ours} ct mark & {MASK:#x} == {ORIGINAL_SOURCE:#x} meta mark set ct mark\n\
             \x20   {ours} ct mark & {mask:#x} == 0 ct mark set ct mark | {mark:#x}\n  }}\n"
        );
        let refusal = self.refusal(&ours, &format!("ct mark & {mask:#x} == {mark:#x}"));
        format!("{}table inet zspire {{\n{nat}{mangle}{refusal}{}}}\n", remove_script(), self.zones(&ours))
    }

    /// Refuses what neither is the proxy's nor was given to it. `ours` matches packets that the proxy sends, `our_connection`
    /// those of connections that it has opened.
    fn refusal(&self, ours: &str, our_connection: &str) -> String {
        // Resets carry nothing, and without them a refusal would be no more than silence.
        const RESETS: &str = "tcp flags & rst == rst accept";
        let exempt = |which: &str| {
            self.exempt_sources.iter().map(|ip| format!("{} {which} {ip} accept", family(ip))).collect::<Vec<_>>()
        };
        // Where incoming connections are left alone, the application answers them itself.
        let answers = self.inbound.is_none().then(|| "ct direction reply accept".to_owned());
        let mut leaving = vec!["meta l4proto != tcp accept".to_owned(), "oifname \"lo\" accept".into()];
        leaving.extend([format!("{ours} accept"), RESETS.into()]);
        leaving.extend(exempt("daddr"));
        leaving.extend(answers);
        // Before it is routed anew, what is redirected still seems to leave.
        let mut said = leaving.clone();
        said.push(format!("meta mark & {MASK:#x} == {ORIGINAL_SOURCE:#x} accept"));
        said.extend(["ct status dnat accept".into(), "reject with tcp reset".into()]);
        leaving.push("drop".into());
        let mut text = format!(
            "  chain refuse-output {{\n    type filter hook output priority filter; policy accept;\n{}  }}\n\
             \x20 chain refuse-postrouting {{\n    type filter hook postrouting priority filter; policy accept;\n{}  }}\n",
            lines(&said),
            lines(&leaving),
        );
        if let Some(inbound) = self.inbound {
            let mut coming = vec!["meta l4proto != tcp accept".to_owned(), "iifname \"lo\" accept".into()];
            coming.push(format!("tcp dport {{ {inbound}, {} }} accept", self.hbone));
            coming.extend([format!("{our_connection} accept"), RESETS.into()]);
            coming.extend(exempt("saddr"));
            coming.push("reject with tcp reset".into());
            text += &format!(
                "  chain refuse-input {{\n    type filter hook input priority filter; policy accept;\n{}  }}\n",
                lines(&coming)
            );
        }
        text
    }

    fn prerouting(&self, ours: &str) -> Vec<String> {
        let Some(port) = self.inbound else { return Vec::new() };
        let mut rules = vec![format!("{ours} accept")];
        rules.extend(self.exempt_sources.iter().map(|ip| format!("{} saddr {ip} meta l4proto tcp accept", family(ip))));
        rules.extend(LOOPBACK.map(|local| format!("{local} accept")));
        rules.push(format!("tcp dport != {} redirect to :{port}", self.hbone));
        rules
    }

    fn output(&self, ours: &str) -> Vec<String> {
        let mut rules = vec![format!("{ours} accept")];
        rules.extend(self.exempt_sources.iter().map(|ip| format!("{} daddr {ip} meta l4proto tcp accept", family(ip))));
        if let Some(dns) = self.dns {
            // A resolver on the pod's own loopback is the pod's own matter.
            rules.push(format!("oifname != \"lo\" udp dport 53 redirect to :{dns}"));
            rules.push(format!("ip daddr != 127.0.0.0/8 tcp dport 53 redirect to :{dns}"));
            rules.push(format!("ip6 daddr != ::1 tcp dport 53 redirect to :{dns}"));
        }
        rules.push(format!("meta l4proto tcp meta mark & {MASK:#x} == {ORIGINAL_SOURCE:#x} accept"));
        // What the pod says to itself, by whichever of its addresses.
        rules.push("oifname \"lo\" accept".into());
        rules.extend(LOOPBACK.map(|local| format!("{local} accept")));
        rules.push(format!("meta l4proto tcp redirect to :{}", self.outbound));
        rules
    }

    /// What the proxy opens is tracked apart from what it was given, where both may have the same addresses and ports: its
    /// connections to the application, which have the client's address and a port that the client may have as well, and its DNS
    /// queries. Upstream has only the latter; of the former one SYN in 500 was lost at 4,000 connections a second.
    fn zones(&self, ours: &str) -> String {
        let mut output = vec![format!("{ours} oifname \"lo\" meta l4proto tcp ct original zone set 1")];
        let mut prerouting = String::new();
        if self.dns.is_some() {
            output.push(format!("{ours} udp dport 53 ct zone set 1"));
            let theirs = ours.replace("==", "!=");
            prerouting = format!(
                "  chain prerouting-zone {{\n    type filter hook prerouting priority raw; policy accept;\n\
                 \x20   {theirs} udp sport 53 ct zone set 1\n  }}\n"
            );
        }
        format!(
            "{prerouting}  chain output-zone {{\n    type filter hook output priority raw; policy accept;\n{}  }}\n",
            lines(&output)
        )
    }

    /// Puts the rules, and the route for replies to kept source addresses, into the calling thread's network
    /// namespace. What was there of ours before is replaced. Needs `CAP_NET_ADMIN`.
    pub fn apply(&self) -> Result<(), Error> {
        NFT.run(None, &["-f", "-"], &self.render())?;
        for (family, everything) in families() {
            IP.run(None, &[family, "route", "replace", "local", everything, "dev", "lo", "table", TABLE], "")?;
            if !has_rule(family)? {
                let mark = format!("{ORIGINAL_SOURCE:#x}/{MASK:#x}");
                IP.run(None, &[family, "rule", "add", "fwmark", &mark, "pref", PRIORITY, "lookup", TABLE], "")?;
            }
        }
        Ok(())
    }

    /// Takes out of the calling thread's network namespace what [`apply`](Self::apply) has put there, if anything.
    pub fn remove() -> Result<(), Error> {
        NFT.run(None, &["-f", "-"], &remove_script())?;
        for (family, everything) in families() {
            // The rule is added last, so without it there is nothing, or a route that nothing looks up.
            if has_rule(family)? {
                IP.run(None, &[family, "rule", "del", "pref", PRIORITY], "")?;
                IP.run(None, &[family, "route", "del", "local", everything, "dev", "lo", "table", TABLE], "")?;
            }
        }
        Ok(())
    }
}

/// Ends the TCP connections that there are in the calling thread's network namespace, those of its loopback apart: both ends are
/// told at once. The kernel may have been built without this (`CONFIG_INET_DIAG_DESTROY`), which is no error. Needs
/// `CAP_NET_ADMIN`.
pub fn end_connections() -> Result<(), Error> {
    let all = ["-K", "-t", "-n", "-H", "state", "connected"];
    let but = ["not", "(", "dst", "127.0.0.0/8", "or", "dst", "[::1]", ")"];
    SS.run(None, &[&all[..], &but].concat(), "").map(drop)
}

/// Matches what is addressed to the pod's own loopback.
const LOOPBACK: [&str; 2] = ["ip daddr 127.0.0.0/8", "ip6 daddr ::1"];

/// Naming the table first makes its deletion succeed whether or not it was there.
fn remove_script() -> String {
    "table inet zspire\ndelete table inet zspire\n".into()
}

fn lines(rules: &[String]) -> String {
    rules.iter().map(|rule| format!("    {rule}\n")).collect()
}

fn family(address: &IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

/// The address families of this namespace, each as `ip` names it, with its default prefix.
fn families() -> Vec<(&'static str, &'static str)> {
    let mut families = vec![("-4", "0.0.0.0/0")];
    if socket::ipv6_available() {
        families.push(("-6", "::/0"));
    }
    families
}

fn has_rule(family: &str) -> Result<bool, Error> {
    let rules = IP.run(None, &[family, "rule", "show", "pref", PRIORITY], "")?;
    Ok(rules.contains(&format!("lookup {TABLE}")))
}
