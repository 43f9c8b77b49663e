//! Watches the frames that a peer sends, for what `h2` does not limit: floods of frames that carry nothing.
//!
//! Sees the bytes as they are read, before `h2` does, and knows of HTTP/2 only the frame header (RFC 9113 §4.1).

use std::time::Duration;

use tokio::time::Instant;

use crate::error::Flood;

/// Length of the client's connection preface (RFC 9113 §3.4).
const PREFACE: usize = 24;
const HEADER: usize = 9;

const PRIORITY: u8 = 2;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const LAST_KNOWN: u8 = 9;
const ACK: u8 = 1;

/// Frames that carry nothing, counted against a budget that is restored with time.
#[derive(Debug)]
pub(crate) struct Guard {
    /// Bytes to pass over before the next frame header.
    skip: usize,
    header: [u8; HEADER],
    have: usize,
    budget: u32,
    left: u32,
    restored: Instant,
    /// The peer has sent SETTINGS: the handshake is complete.
    pub(crate) settings: bool,
    /// The peer takes no new streams.
    pub(crate) goaway: bool,
}

impl Guard {
    /// For the bytes that a server (`preface`: a client) sends.
    pub(crate) fn new(preface: bool, budget: u32) -> Self {
        Self {
            skip: if preface { PREFACE } else { 0 },
            header: [0; HEADER],
            have: 0,
            budget,
            left: budget,
            restored: Instant::now(),
            settings: false,
            goaway: false,
        }
    }

    /// Looks at the next bytes.
    pub(crate) fn inspect(&mut self, mut bytes: &[u8]) -> Result<(), Flood> {
        while !bytes.is_empty() {
            if self.skip > 0 {
                let step = self.skip.min(bytes.len());
                self.skip -= step;
                bytes = &bytes[step..];
                continue;
            }
            let step = (HEADER - self.have).min(bytes.len());
            self.header[self.have..self.have + step].copy_from_slice(&bytes[..step]);
            self.have += step;
            bytes = &bytes[step..];
            if self.have == HEADER {
                self.have = 0;
                self.frame()?;
            }
        }
        Ok(())
    }

    fn frame(&mut self) -> Result<(), Flood> {
        let [a, b, c, kind, flags, ..] = self.header;
        self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
        let name = match kind {
            SETTINGS if flags & ACK == 0 && !self.settings => {
                self.settings = true;
                return Ok(());
            }
            GOAWAY => {
                self.goaway = true;
                return Ok(());
            }
            SETTINGS => "SETTINGS",
            PING => "PING",
            PRIORITY => "PRIORITY",
            unknown if unknown > LAST_KNOWN => "unknown",
            _ => return Ok(()),
        };
        self.spend().then_some(()).ok_or(Flood(name))
    }

    fn spend(&mut self) -> bool {
        if self.left == 0 {
            // An eighth of the budget comes back every second; the clock is asked only when it is used up.
            let eighths = self.restored.elapsed().div_duration_f64(Duration::from_secs(1));
            self.left = (eighths * f64::from(self.budget) / 8.0).min(f64::from(self.budget)) as u32;
            self.restored = Instant::now();
        }
        let spent = self.left > 0;
        self.left = self.left.saturating_sub(1);
        spent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let mut bytes = (payload as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags, 0, 0, 0, 0]);
        bytes.resize(HEADER + payload, 0xaa);
        bytes
    }

    #[tokio::test(start_paused = true)]
    async fn frames_without_content_are_counted_however_they_are_cut() {
        for step in [1, 7, 9, 1000] {
            let mut guard = Guard::new(true, 3);
            let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
            bytes.extend(frame(SETTINGS, 0, 12));
            bytes.extend(frame(SETTINGS, ACK, 0));
            bytes.extend(frame(0, 0, 5000));
            bytes.extend(frame(PING, 0, 8));
            bytes.extend(frame(99, 0, 3));
            for chunk in bytes.chunks(step) {
                guard.inspect(chunk).unwrap();
            }
            assert!(guard.settings && !guard.goaway);
            assert_eq!(guard.inspect(&frame(PRIORITY, 0, 5)), Err(Flood("PRIORITY")), "step {step}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_budget_is_restored_with_time() {
        let mut guard = Guard::new(false, 8);
        for _ in 0..8 {
            guard.inspect(&frame(PING, 0, 8)).unwrap();
        }
        // Without a payload: a guard that has refused is not asked about what follows.
        assert!(guard.inspect(&frame(PING, 0, 0)).is_err());
        tokio::time::advance(Duration::from_secs(2)).await;
        for _ in 0..2 {
            guard.inspect(&frame(PING, 0, 8)).unwrap();
        }
        assert!(guard.inspect(&frame(PING, 0, 8)).is_err());
    }

    #[tokio::test]
    async fn goaway_is_seen() {
        let mut guard = Guard::new(false, 8);
        guard.inspect(&frame(GOAWAY, 0, 8)).unwrap();
        assert!(guard.goaway);
    }
}
