//! The TLS state machine of one connection: rustls, without buffers of its own.
//!
//! Sealed bytes of the peer go in, plain bytes and sealed answers come out. It knows no socket; [`super::stream`] moves the bytes.

use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic};
use rustls::{ClientConfig, CommonState, Error, ServerConfig};

use super::buffer::{Incoming, Outgoing};

/// Either side of a connection.
pub(super) enum Session {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

/// What can be sealed.
#[derive(Clone, Copy)]
pub(super) enum Plain<'a> {
    Bytes(&'a [u8]),
    /// The announcement that nothing follows (RFC 8446 §6.1).
    CloseNotify,
}

/// What one step has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Something was opened or answered: there may be more.
    Progress,
    /// What was to be sealed is sealed.
    Sealed,
    /// Nothing more can be done until the peer has sent more.
    Starved,
    /// The peer has announced that nothing follows.
    PeerClosed,
    /// Both sides have.
    Closed,
}

impl Session {
    pub(super) fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, Error> {
        Ok(Self::Client(Box::new(UnbufferedClientConnection::new(config, name)?)))
    }

    pub(super) fn server(config: Arc<ServerConfig>) -> Result<Self, Error> {
        Ok(Self::Server(Box::new(UnbufferedServerConnection::new(config)?)))
    }

    pub(super) fn state(&self) -> &CommonState {
        match self {
            Self::Client(client) => client,
            Self::Server(server) => server,
        }
    }

    /// One step: opens a record of the peer, or answers it, or, when neither is to be done, seals `plain`.
    ///
    /// `opened` gets plain bytes of the peer. rustls keeps positions in what it was shown, so that it must always be shown
    /// all of `incoming`.
    pub(super) fn step(
        &mut self,
        incoming: &mut Incoming,
        outgoing: &mut Outgoing,
        plain: Option<Plain<'_>>,
        opened: &mut dyn FnMut(&[u8]),
    ) -> Result<Step, Error> {
        let (discard, step) = match self {
            Self::Client(client) => apply(client.process_tls_records(incoming.bytes()), outgoing, plain, opened),
            Self::Server(server) => apply(server.process_tls_records(incoming.bytes()), outgoing, plain, opened),
        };
        incoming.discard(discard);
        step
    }
}

/// Carries out what rustls asks for; also how many bytes of the peer it has used.
fn apply<Side>(
    status: UnbufferedStatus<'_, '_, Side>,
    outgoing: &mut Outgoing,
    plain: Option<Plain<'_>>,
    opened: &mut dyn FnMut(&[u8]),
) -> (usize, Result<Step, Error>) {
    let UnbufferedStatus { mut discard, state } = status;
    let step = match state {
        Err(error) => Err(error),
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => {
                        discard += record.discard;
                        opened(record.payload);
                    }
                    Err(error) => return (discard, Err(error)),
                }
            }
            Ok(Step::Progress)
        }
        Ok(ConnectionState::EncodeTlsData(mut data)) => match data.encode(outgoing.room()) {
            Ok(n) => {
                outgoing.added(n);
                Ok(Step::Progress)
            }
            Err(EncodeError::InsufficientSize(_)) => Err(no_room()),
            Err(EncodeError::AlreadyEncoded) => Ok(Step::Progress),
        },
        // It is in `outgoing`, before whatever is sealed later.
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Step::Progress)
        }
        Ok(ConnectionState::WriteTraffic(traffic)) => match plain {
            Some(plain) => seal(traffic, plain, outgoing).map(|()| Step::Sealed),
            None => Ok(Step::Starved),
        },
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Starved),
        Ok(ConnectionState::PeerClosed) => Ok(Step::PeerClosed),
        Ok(ConnectionState::Closed) => Ok(Step::Closed),
        // No configuration of ours allows early data.
        Ok(_) => Err(Error::General("unexpected state of the TLS session".into())),
    };
    (discard, step)
}

fn seal<Side>(mut traffic: WriteTraffic<'_, Side>, plain: Plain<'_>, outgoing: &mut Outgoing) -> Result<(), Error> {
    let sealed = match plain {
        Plain::Bytes(bytes) => traffic.encrypt(bytes, outgoing.room()),
        Plain::CloseNotify => traffic.queue_close_notify(outgoing.room()),
    };
    match sealed {
        Ok(n) => {
            outgoing.added(n);
            Ok(())
        }
        Err(EncryptError::EncryptExhausted) => Err(Error::EncryptError),
        Err(EncryptError::InsufficientSize(_)) => Err(no_room()),
    }
}

/// Buffers are larger than anything that is sealed into them, so that this is a mistake of ours.
fn no_room() -> Error {
    Error::General("a sealed message does not fit into its buffer".into())
}
