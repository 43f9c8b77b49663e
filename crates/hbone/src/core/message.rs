//! Requests and answers as header fields (RFC 9113 §8): which are well-formed, and what they say.

use std::fmt::{self, Write};

use http::StatusCode;
use smallvec::SmallVec;

use super::hpack::{self, FIELD, Name};
use crate::headers::{Reader, VALUE_LIMIT};
use crate::request::{Malformed, Request, RequestHead, ResponseHead, Target};

/// The static table's `:status: 200`.
const STATUS_200: u8 = 8;

/// A header block, on the stack unless it is unusually long.
pub(super) type Block = SmallVec<[u8; 512]>;

/// A message that is not HTTP, which its stream does not survive (RFC 9113 §8.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotHttp;

/// The fields of one header block, while they come.
#[derive(Debug)]
pub(super) struct Fields {
    limit: usize,
    size: usize,
    broken: bool,
    /// A regular field has come: pseudo-headers may not follow it.
    regular: bool,
    method: Option<Method>,
    authority: Option<Result<Target, Malformed>>,
    scheme: bool,
    path: bool,
    protocol: bool,
    status: Option<StatusCode>,
    headers: Reader,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Connect,
    Other,
}

impl Fields {
    /// For a header list of at most `limit` bytes, as HTTP/2 counts them.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            size: 0,
            broken: false,
            regular: false,
            method: None,
            authority: None,
            scheme: false,
            path: false,
            protocol: false,
            status: None,
            headers: Reader::default(),
        }
    }

    pub(super) fn field(&mut self, name: &[u8], value: &[u8]) {
        self.size += name.len() + value.len() + FIELD;
        self.broken |= !is_value(value);
        if self.broken || self.size > self.limit {
            return;
        }
        match name.strip_prefix(b":") {
            Some(name) => self.broken |= self.regular || self.pseudo(name, value).is_none(),
            None => {
                self.regular = true;
                self.broken |= !is_name(name) || is_of_connection(name, value);
                self.headers.field(name, value);
            }
        }
    }

    /// None: nobody knows it, or it has been there.
    fn pseudo(&mut self, name: &[u8], value: &[u8]) -> Option<()> {
        fn once<T>(slot: &mut Option<T>, value: T) -> Option<()> {
            slot.replace(value).is_none().then_some(())
        }
        let once_seen = |seen: &mut bool| (!std::mem::replace(seen, true)).then_some(());
        match name {
            b"method" => once(&mut self.method, if value == b"CONNECT" { Method::Connect } else { Method::Other }),
            b"authority" => {
                let target = std::str::from_utf8(value).map_err(|_| Malformed::Authority).and_then(str::parse);
                once(&mut self.authority, target)
            }
            b"scheme" => once_seen(&mut self.scheme),
            b"path" => once_seen(&mut self.path),
            b"protocol" => once_seen(&mut self.protocol),
            b"status" => once(&mut self.status, StatusCode::from_bytes(value).ok()?),
            _ => None,
        }
    }

    /// The request that they are.
    pub(super) fn request(self) -> Result<Result<RequestHead, Malformed>, NotHttp> {
        if self.size > self.limit {
            return Ok(Err(Malformed::TooLarge));
        }
        // CONNECT has neither scheme nor path, and everything else has both (RFC 9113 §8.3.1, §8.5; RFC 8441 §4).
        let plain_connect = self.method == Some(Method::Connect) && !self.protocol;
        let fits = if plain_connect { !self.scheme && !self.path } else { self.scheme && self.path };
        if self.broken || self.method.is_none() || self.status.is_some() || !fits {
            return Err(NotHttp);
        }
        if self.method != Some(Method::Connect) {
            return Ok(Err(Malformed::Method));
        }
        if self.protocol {
            return Ok(Err(Malformed::Protocol));
        }
        let headers = self.headers.finish();
        let target = self.authority.unwrap_or(Err(Malformed::NoAuthority));
        Ok(target.map(|target| RequestHead { target, headers }))
    }

    /// The answer that they are.
    pub(super) fn answer(self) -> Result<(StatusCode, ResponseHead), NotHttp> {
        let asks = self.method.is_some() || self.authority.is_some() || self.scheme || self.path || self.protocol;
        match self.status {
            Some(status) if !self.broken && !asks && self.size <= self.limit => {
                Ok((status, ResponseHead { baggage: self.headers.finish().baggage }))
            }
            _ => Err(NotHttp),
        }
    }

    /// Fields after the data: nobody looks at them, but they must be fields.
    pub(super) fn trailers(self) -> Result<(), NotHttp> {
        let pseudo = self.method.is_some()
            || self.authority.is_some()
            || self.status.is_some()
            || self.scheme
            || self.path
            || self.protocol;
        if self.broken || pseudo { Err(NotHttp) } else { Ok(()) }
    }
}

/// A name is a token in lower case (RFC 9113 §8.2).
fn is_name(name: &[u8]) -> bool {
    let token = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9') || b"!#$%&'*+-.^_`|~".contains(byte);
    !name.is_empty() && name.iter().all(token)
}

fn is_value(value: &[u8]) -> bool {
    !value.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n'))
}

/// Fields of HTTP/1's connections (RFC 9113 §8.2.2).
fn is_of_connection(name: &[u8], value: &[u8]) -> bool {
    match name {
        b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" | b"upgrade" => true,
        b"te" => value != b"trailers",
        _ => false,
    }
}

/// The header block of a request; none if it cannot be written.
pub(super) fn write_request(request: &Request) -> Option<Block> {
    let mut block = Block::new();
    hpack::literal(Name::METHOD, b"CONNECT", &mut block);
    put(Name::AUTHORITY, &request.target, &mut block)?;
    request.headers.write(&mut |name, value| {
        // A value of ours that HTTP cannot carry is left out.
        let _ = put(Name::Literal(name), value, &mut block);
    });
    Some(block)
}

/// The header block of a positive answer.
pub(super) fn write_accept(head: &ResponseHead) -> Block {
    let mut block = Block::new();
    hpack::indexed(STATUS_200, &mut block);
    if let Some(baggage) = &head.baggage {
        let _ = put(Name::Literal("baggage"), baggage, &mut block);
    }
    block
}

/// The header block of a refusal.
pub(super) fn write_refusal(status: StatusCode) -> Block {
    let mut block = Block::new();
    hpack::literal(Name::STATUS, status.as_str().as_bytes(), &mut block);
    block
}

/// Writes a field; none if HTTP cannot carry it.
fn put(name: Name, value: &dyn fmt::Display, block: &mut Block) -> Option<()> {
    struct Value(SmallVec<[u8; 512]>);
    impl Write for Value {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.0.extend_from_slice(text.as_bytes());
            Ok(())
        }
    }
    let mut text = Value(SmallVec::new());
    write!(text, "{value}").ok()?;
    let carried = |byte: &u8| (*byte >= b' ' && *byte != 0x7f) || *byte == b'\t';
    if text.0.len() > VALUE_LIMIT || !text.0.iter().all(carried) {
        return None;
    }
    hpack::literal(name, &text.0, block);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(list: &[(&str, &str)]) -> Fields {
        let mut fields = Fields::new(1000);
        for (name, value) in list {
            fields.field(name.as_bytes(), value.as_bytes());
        }
        fields
    }

    const CONNECT: (&str, &str) = (":method", "CONNECT");
    const GET: (&str, &str) = (":method", "GET");
    const AUTHORITY: (&str, &str) = (":authority", "10.0.0.1:80");
    const SCHEME: (&str, &str) = (":scheme", "https");
    const PATH: (&str, &str) = (":path", "/");

    /// Every combination of pseudo-headers has one meaning.
    #[test]
    fn requests() {
        let protocol = (":protocol", "websocket");
        for (list, expected) in [
            (&[CONNECT, AUTHORITY][..], Ok(Ok(()))),
            (&[AUTHORITY, CONNECT, ("x", "y")], Ok(Ok(()))),
            (&[CONNECT], Ok(Err(Malformed::NoAuthority))),
            (&[CONNECT, (":authority", "10.0.0.1")], Ok(Err(Malformed::Authority))),
            (&[CONNECT, AUTHORITY, SCHEME, PATH, protocol], Ok(Err(Malformed::Protocol))),
            (&[GET, AUTHORITY, SCHEME, PATH], Ok(Err(Malformed::Method))),
            (&[CONNECT, AUTHORITY, SCHEME], Err(NotHttp)),
            (&[CONNECT, AUTHORITY, PATH], Err(NotHttp)),
            (&[CONNECT, AUTHORITY, protocol], Err(NotHttp)),
            (&[GET, AUTHORITY], Err(NotHttp)),
            (&[GET, AUTHORITY, SCHEME], Err(NotHttp)),
            (&[AUTHORITY], Err(NotHttp)),
            (&[], Err(NotHttp)),
            (&[CONNECT, CONNECT, AUTHORITY], Err(NotHttp)),
            (&[CONNECT, AUTHORITY, AUTHORITY], Err(NotHttp)),
            (&[CONNECT, ("x", "y"), AUTHORITY], Err(NotHttp)),
            (&[CONNECT, AUTHORITY, (":status", "200")], Err(NotHttp)),
            (&[CONNECT, AUTHORITY, (":unknown", "")], Err(NotHttp)),
            (&[CONNECT, AUTHORITY, ("X-Upper", "y")], Err(NotHttp)),
            (&[CONNECT, AUTHORITY, ("", "y")], Err(NotHttp)),
            (&[CONNECT, AUTHORITY, ("x", "a\0b")], Err(NotHttp)),
            (&[CONNECT, AUTHORITY, ("x", "a\r\nb: c")], Err(NotHttp)),
            (&[CONNECT, AUTHORITY, ("connection", "close")], Err(NotHttp)),
            (&[CONNECT, AUTHORITY, ("te", "gzip")], Err(NotHttp)),
            (&[CONNECT, AUTHORITY, ("te", "trailers")], Ok(Ok(()))),
            (&[CONNECT, AUTHORITY, ("x", &"y".repeat(1000))], Ok(Err(Malformed::TooLarge))),
        ] {
            let got = fields(list).request().map(|request| request.map(|_| ()));
            assert_eq!(got, expected, "{list:?}");
        }
    }

    #[test]
    fn answers_and_trailers() {
        let status = (":status", "200");
        assert_eq!(fields(&[status, ("x", "y")]).answer().unwrap().0, StatusCode::OK);
        for bad in [&[][..], &[("x", "y")], &[status, status], &[status, PATH], &[("x", "y"), status]] {
            assert_eq!(fields(bad).answer().unwrap_err(), NotHttp, "{bad:?}");
        }
        assert_eq!(fields(&[(":status", "2000")]).answer().unwrap_err(), NotHttp);
        assert_eq!(fields(&[("x", "y")]).trailers(), Ok(()));
        assert_eq!(fields(&[status]).trailers(), Err(NotHttp));
    }
}
