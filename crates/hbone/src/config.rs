//! Limits and sizes of a tunnel.

use std::time::Duration;

/// Limits and sizes of a tunnel, the same for both ends unless a field says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Bytes that the peer may send on one stream before the application has taken any (`HTTP2_STREAM_WINDOW_SIZE`).
    pub stream_window: u32,
    /// Bytes that the peer may have under way on all streams together (`HTTP2_CONNECTION_WINDOW_SIZE`).
    pub connection_window: u32,
    /// What stalled streams hold does not count against `connection_window` up to this many bytes in a tunnel: it is the cap on the
    /// memory that a tunnel's stalled readers can take.
    pub buffered_cap: u32,
    /// Largest frame accepted, 16 KiB to 16 MiB (`HTTP2_FRAME_SIZE`).
    pub frame_size: u32,
    /// Bytes of application data that a stream gives to the tunnel at once.
    pub send_buffer: usize,
    /// Size of the header list accepted, in bytes as HTTP/2 counts them.
    pub header_list: u32,
    /// Streams that a client opens on one tunnel; the peer's limit may be lower (`POOL_MAX_STREAMS_PER_CONNECTION`).
    pub client_streams: usize,
    /// Streams that a server accepts on one tunnel.
    pub server_streams: u32,
    /// From the first byte to the peer's SETTINGS.
    pub handshake_timeout: Duration,
    /// From CONNECT to its answer; more than the peer's own time for connecting (10 s).
    pub reply_timeout: Duration,
    /// A tunnel that was silent for this long is asked for a sign of life.
    pub ping_interval: Duration,
    /// A tunnel that gives none within this time is dead.
    pub ping_timeout: Duration,
    /// Frames that carry nothing (PING, SETTINGS, PRIORITY, empty and unknown ones, and what is of no stream that is open) that a peer may send at once; 1/8 of it is restored every second.
    pub idle_frames: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            buffered_cap: 64 << 20,
            frame_size: 1 << 20,
            send_buffer: 1 << 20,
            header_list: 16 << 10,
            client_streams: 100,
            server_streams: 200,
            handshake_timeout: Duration::from_secs(10),
            reply_timeout: Duration::from_secs(20),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            idle_frames: 4096,
        }
    }
}
