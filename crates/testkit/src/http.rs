//! What is asked of ports that speak HTTP.

use std::io::{self, ErrorKind, Read, Write};

use zspire_sys::netns::Netns;

use crate::app;

/// An HTTP answer.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its content.
    pub body: String,
}

impl Answer {
    fn parse(text: &str) -> Option<Self> {
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Self { status, body: body.to_owned() })
    }
}

/// Asks a port on the loopback of a namespace, for example `GET /metrics`.
pub(crate) fn ask(netns: &Netns, port: u16, request: &str, headers: &[&str]) -> io::Result<Answer> {
    let mut socket = app::connect(netns, ([127, 0, 0, 1], port).into())?;
    let host = if headers.iter().any(|header| header.starts_with("Host:")) { "" } else { "Host: localhost\r\n" };
    let more: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    socket.write_all(format!("{request} HTTP/1.1\r\n{host}{more}Connection: close\r\n\r\n").as_bytes())?;
    let mut text = String::new();
    socket.read_to_string(&mut text)?;
    Answer::parse(&text).ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "not an HTTP answer"))
}
