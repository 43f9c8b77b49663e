//! The rules of a pod, put there and taken away from outside.

use std::fs;
use std::io;

use anyhow::Context as _;
use zspire_sys::netns::Netns;
use zspire_sys::nft::{self, Redirection};

/// Ports at which connections of a pod meet its proxy.
const PROXY_PORTS: [u16; 3] = [15001, 15006, 15008];
/// A connection that is neither over nor only waited for, as `/proc/net/tcp` has its state: established, or half closed.
const LIVE: [&str; 6] = ["01", "02", "03", "04", "05", "08"];

/// Puts the rules into a namespace, in place of those that are there. Blocks.
pub(super) fn apply(netns: &Netns, rules: &Redirection) -> anyhow::Result<()> {
    let applied = netns.run(|| rules.apply()).context("cannot enter the network namespace (CAP_SYS_ADMIN)")?;
    applied.context("cannot put the redirection rules into the network namespace")
}

/// Ends the connections that are older than the rules, which would be reset at their next packet: who only waits to hear
/// something would wait in vain. Blocks.
pub(super) fn end_older_connections(netns: &Netns) {
    let ended = netns.run(nft::end_connections).map_err(anyhow::Error::new);
    if let Err(error) = ended.and_then(|ended| Ok(ended?)) {
        tracing::warn!(error = format!("{error:#}"), "older connections of a pod end only at their next packet");
    }
}

/// Takes them away. Blocks.
pub(super) fn remove(netns: &Netns) -> anyhow::Result<()> {
    let removed = netns.run(Redirection::remove).context("cannot enter the network namespace (CAP_SYS_ADMIN)")?;
    removed.context("cannot take the redirection rules out of the network namespace")
}

/// How many connections in a namespace still are a proxy's. Blocks for a moment.
pub(super) fn live_connections(netns: &Netns) -> io::Result<usize> {
    netns.run(|| {
        let read = |file| fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        ["tcp", "tcp6"].into_iter().map(|file| read(file).lines().filter(|line| is_live(line)).count()).sum()
    })
}

/// `sl local_address rem_address st …`, addresses as `hex:hex`.
fn is_live(line: &str) -> bool {
    let mut fields = line.split_whitespace().skip(1);
    let (Some(local), Some(_), Some(state)) = (fields.next(), fields.next(), fields.next()) else { return false };
    let port = local.rsplit(':').next().and_then(|port| u16::from_str_radix(port, 16).ok());
    LIVE.contains(&state) && port.is_some_and(|port| PROXY_PORTS.contains(&port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_connections_are_told_from_listeners_and_others() {
        // As the kernel writes them: a listener, a connection at 15001, one that waits after its end, another's.
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n\
                     0: 00000000:3A99 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n\
                     1: 0100007F:3A99 0101F40A:C350 01 00000000:00000000 00:00000000 00000000     0\n\
                     2: 0100007F:3A99 0101F40A:C351 06 00000000:00000000 00:00000000 00000000     0\n\
                     3: 0101F40A:1F90 0101F40A:C352 01 00000000:00000000 00:00000000 00000000     0\n";
        assert_eq!(table.lines().filter(|line| is_live(line)).count(), 1);
    }
}
