//! The error codes of HTTP/2 (RFC 9113 §7).

use std::fmt;

/// Why a stream was reset or a tunnel closed, as it is said on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Reason(u32);

macro_rules! reasons {
    ($($code:literal $name:ident $text:literal)*) => {
        #[allow(missing_docs, reason = "the names are those of RFC 9113 §7")]
        impl Reason {
            $(pub const $name: Self = Self($code);)*
        }

        impl fmt::Display for Reason {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0 {
                    $($code => f.write_str($text),)*
                    unknown => write!(f, "unknown reason {unknown}"),
                }
            }
        }
    };
}

reasons! {
    0 NO_ERROR "not a result of an error"
    1 PROTOCOL_ERROR "unspecific protocol error detected"
    2 INTERNAL_ERROR "unexpected internal error encountered"
    3 FLOW_CONTROL_ERROR "flow-control protocol violated"
    4 SETTINGS_TIMEOUT "settings ACK not received in timely manner"
    5 STREAM_CLOSED "received frame when stream half-closed"
    6 FRAME_SIZE_ERROR "frame with invalid size"
    7 REFUSED_STREAM "refused stream before processing any application logic"
    8 CANCEL "stream no longer needed"
    9 COMPRESSION_ERROR "unable to maintain the header compression context"
    10 CONNECT_ERROR "connection established in response to a CONNECT request was reset or abnormally closed"
    11 ENHANCE_YOUR_CALM "detected excessive load generating behavior"
    12 INADEQUATE_SECURITY "security properties do not meet minimum requirements"
    13 HTTP_1_1_REQUIRED "endpoint requires HTTP/1.1"
}

impl From<u32> for Reason {
    fn from(code: u32) -> Self {
        Self(code)
    }
}

impl From<Reason> for u32 {
    fn from(reason: Reason) -> Self {
        reason.0
    }
}
