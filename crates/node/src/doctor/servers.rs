//! The CA and the discovery server: whether they can be reached, and whether what they are verified against and what they are
//! shown is there. It makes no call: a connection is opened and closed.

use std::io;
use std::path::Path;

use tokio::net::{TcpSocket, lookup_host};
use tokio::time::timeout;
use zspire_identity::Bundle;

use super::{Finding, PATIENCE};
use crate::config::{Config, RootCert, Server, Token};

pub(super) async fn ca(config: &Config) -> Vec<Finding> {
    let Some(server) = &config.ca else { return vec![Finding::skip("CA", "CA_ADDRESS is empty")] };
    let mut all = vec![reach("CA", "CA_ADDRESS", config, server).await];
    all.extend(roots("root of the CA", "CA_ROOT_CA", config, server));
    all.extend(token(config));
    all
}

pub(super) async fn discovery(config: &Config) -> Vec<Finding> {
    let Some(server) = &config.xds else { return vec![Finding::skip("discovery", "XDS_ADDRESS is empty")] };
    let mut all = vec![reach("discovery", "XDS_ADDRESS", config, server).await];
    all.extend(roots("root of discovery", "XDS_ROOT_CA", config, server));
    all
}

async fn reach(check: &'static str, variable: &str, config: &Config, server: &Server) -> Finding {
    let address = &server.address;
    let Ok(uri) = address.parse::<http::Uri>() else { return Finding::fail(check, format!("{address} is no URL")) };
    let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("http") { 80 } else { 443 });
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let failed = |why: String| {
        Finding::fail(check, format!("{address}: {why}"))
            .next(format!("Is the server there, and may this machine reach it? {variable} names it."))
    };
    match timeout(PATIENCE, connect(&host, port, config.packet_mark)).await {
        Ok(Ok(())) => Finding::ok(check, format!("{address} takes connections")),
        Ok(Err(error)) => failed(error.to_string()),
        Err(_) => failed(format!("no connection within {} s", PATIENCE.as_secs())),
    }
}

/// Marked like the proxy's own connections: in the proxy's pod others would be captured, and succeed at the proxy.
async fn connect(host: &str, port: u16, mark: Option<u32>) -> io::Result<()> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in lookup_host((host, port)).await? {
        let socket = if address.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() }?;
        if let Some(mark) = mark
            && let Err(error) = zspire_sys::socket::set_mark(&socket, mark)
        {
            tracing::debug!(%error, "cannot mark a connection (CAP_NET_ADMIN)");
        }
        match socket.connect(address).await {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn roots(check: &'static str, variable: &str, config: &Config, server: &Server) -> Option<Finding> {
    if config.join_token.is_some() {
        return Some(Finding::ok(check, "the join token's"));
    }
    if server.address.starts_with("http://") {
        return None;
    }
    let found = match &server.root {
        RootCert::System => return Some(Finding::ok(check, "the system's")),
        RootCert::Pem(text) => ("the text".to_owned(), Bundle::from_pem(text.as_bytes()).map_err(|e| e.to_string())),
        RootCert::File(path) => (path.display().to_string(), roots_in(path)),
    };
    Some(match found {
        (name, Ok(bundle)) => Finding::ok(check, format!("{} in {name}", bundle.roots().len())),
        (name, Err(why)) => Finding::fail(check, format!("{name}: {why}")).next(format!(
            "Without it the server's certificate is refused. {variable} names the file, or SYSTEM, or is the PEM text."
        )),
    })
}

fn roots_in(path: &Path) -> Result<Bundle, String> {
    let text = std::fs::read(path).map_err(|e| e.to_string())?;
    Bundle::from_pem(&text).map_err(|e| e.to_string())
}

fn token(config: &Config) -> Option<Finding> {
    const CHECK: &str = "token";
    if config.join_token.is_some() {
        return Some(Finding::ok(
            CHECK,
            "none: the node joins by ZSPIRE_JOIN_TOKEN and has a certificate of its own then",
        ));
    }
    Some(match &config.token {
        None => Finding::warn(CHECK, "there is none: the CA cannot know who asks").next("AUTH_TOKEN names a file."),
        Some(Token::Literal(_)) => Finding::ok(CHECK, "given by AUTH_TOKEN"),
        Some(Token::File(path)) => match std::fs::read_to_string(path) {
            Ok(text) if text.trim().is_empty() => Finding::fail(CHECK, format!("{} is empty", path.display())),
            Ok(_) => Finding::ok(CHECK, path.display().to_string()),
            Err(error) => Finding::fail(CHECK, format!("{}: {error}", path.display()))
                .next("AUTH_TOKEN names the file; in Kubernetes it is a projected volume for the audience istio-ca."),
        },
    })
}
