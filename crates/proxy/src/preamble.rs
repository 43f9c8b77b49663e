//! The PROXY protocol, version 2: what an application behind a node proxy is told about a connection before its first byte.

use std::net::{IpAddr, SocketAddr};

use zspire_model::SpiffeId;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_COMMAND: u8 = 0x21;
/// The peer's SPIFFE ID, in a type that the specification leaves to applications.
const PEER: u8 = 0xd0;

/// The header of a connection.
pub fn proxy_v2(source: SocketAddr, destination: SocketAddr, peer: Option<&SpiffeId>) -> Vec<u8> {
    let mut body = Vec::with_capacity(64);
    let family = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            body.extend_from_slice(&source.octets());
            body.extend_from_slice(&destination.octets());
            0x11
        }
        // Both must be of one family, and every address can be written as IPv6.
        (source, destination) => {
            for ip in [source, destination] {
                let v6 = match ip {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    IpAddr::V6(v6) => v6,
                };
                body.extend_from_slice(&v6.octets());
            }
            0x21
        }
    };
    body.extend_from_slice(&source.port().to_be_bytes());
    body.extend_from_slice(&destination.port().to_be_bytes());
    if let Some(id) = peer {
        let id = id.as_str().as_bytes();
        // A SPIFFE ID has at most 2048 bytes.
        body.push(PEER);
        body.extend_from_slice(&(id.len() as u16).to_be_bytes());
        body.extend_from_slice(id);
    }
    let mut header = Vec::with_capacity(16 + body.len());
    header.extend_from_slice(&SIGNATURE);
    header.extend_from_slice(&[VERSION_COMMAND, family]);
    header.extend_from_slice(&(body.len() as u16).to_be_bytes());
    header.extend_from_slice(&body);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers() {
        let id: SpiffeId = "spiffe://a/b".parse().unwrap();
        let header = proxy_v2("1.2.3.4:5".parse().unwrap(), "6.7.8.9:258".parse().unwrap(), Some(&id));
        assert_eq!(header[..16], *b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x1b");
        assert_eq!(header[16..28], [1, 2, 3, 4, 6, 7, 8, 9, 0, 5, 1, 2]);
        assert_eq!(header[28..], *b"\xd0\0\x0cspiffe://a/b");
        let mixed = proxy_v2("1.2.3.4:5".parse().unwrap(), "[::1]:6".parse().unwrap(), None);
        assert_eq!((mixed[13], mixed.len()), (0x21, 16 + 36));
    }
}
