//! The Huffman code of HPACK (RFC 7541 Appendix B), read only: what we write is not compressed.
//!
//! The code is canonical: the codes of one length are consecutive numbers in the order of their symbols, and go on, shifted,
//! where those of the length before have ended. The lengths say everything.

/// Length of the code of each byte, and of the end of a string.
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12,
    10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6,
    5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22,
    22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20,
    22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28,
    27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28,
    27, 27, 27, 27, 27, 26, 30,
];

const SHORTEST: usize = 5;
const LONGEST: usize = 30;
/// The symbol that ends a string, which no string may contain (RFC 7541 §5.2).
const END: u16 = 256;

struct Code {
    /// Symbols, by the length of their code and then by themselves.
    symbols: [u16; 257],
    /// The first code of each length.
    first: [u32; LONGEST + 1],
    /// How many codes have each length.
    count: [u32; LONGEST + 1],
    /// Where the symbols of each length begin.
    start: [u32; LONGEST + 1],
}

static CODE: Code = Code::new();

impl Code {
    const fn new() -> Self {
        let mut code =
            Self { symbols: [0; 257], first: [0; LONGEST + 1], count: [0; LONGEST + 1], start: [0; LONGEST + 1] };
        let (mut length, mut next, mut at) = (1, 0, 0);
        while length <= LONGEST {
            next <<= 1;
            code.first[length] = next;
            code.start[length] = at;
            let mut symbol = 0;
            while symbol < LENGTHS.len() {
                if LENGTHS[symbol] as usize == length {
                    code.symbols[at as usize] = symbol as u16;
                    at += 1;
                    next += 1;
                }
                symbol += 1;
            }
            code.count[length] = at - code.start[length];
            length += 1;
        }
        code
    }
}

/// Reads a compressed string into `out`; none if it is not one.
pub(super) fn decode(bytes: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let (mut bits, mut have) = (0u64, 0usize);
    let mut bytes = bytes.iter();
    loop {
        while have <= 56
            && let Some(byte) = bytes.next()
        {
            bits = bits << 8 | u64::from(*byte);
            have += 8;
        }
        let Some((symbol, length)) = symbol(bits, have) else { break };
        if symbol == END {
            return None;
        }
        out.push(symbol as u8);
        have -= length;
        bits &= (1 << have) - 1;
    }
    // What is left is padding: less than a byte, of ones.
    (have < 8 && bits == (1 << have) - 1).then_some(())
}

/// The symbol that the last `have` bits begin with, and the length of its code; none if they end before it does.
fn symbol(bits: u64, have: usize) -> Option<(u16, usize)> {
    for length in SHORTEST..=LONGEST.min(have) {
        let code = (bits >> (have - length)) as u32;
        let at = code.wrapping_sub(CODE.first[length]);
        if at < CODE.count[length] {
            return Some((CODE.symbols[(CODE.start[length] + at) as usize], length));
        }
    }
    None
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The other direction, by the same table.
    pub(crate) fn encode(bytes: &[u8]) -> Vec<u8> {
        let mut bits = Vec::new();
        for &byte in bytes {
            let length = LENGTHS[usize::from(byte)] as usize;
            let start = CODE.start[length] as usize;
            let at = CODE.symbols[start..].iter().position(|symbol| *symbol == u16::from(byte)).unwrap();
            let code = CODE.first[length] + at as u32;
            bits.extend((0..length).rev().map(|bit| code >> bit & 1 == 1));
        }
        let byte = |bits: &[bool]| (0..8).fold(0, |byte, at| byte << 1 | u8::from(*bits.get(at).unwrap_or(&true)));
        bits.chunks(8).map(byte).collect()
    }

    fn read(bytes: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        decode(bytes, &mut out).map(|()| out)
    }

    /// RFC 7541 §C.4 and §C.6.
    #[test]
    fn the_examples_of_the_specification() {
        for (text, hex) in [
            ("www.example.com", "f1e3c2e5f23a6ba0ab90f4ff"),
            ("no-cache", "a8eb10649cbf"),
            ("custom-key", "25a849e95ba97d7f"),
            ("custom-value", "25a849e95bb8e8b4bf"),
            ("Mon, 21 Oct 2013 20:13:21 GMT", "d07abe941054d444a8200595040b8166e082a62d1bff"),
            ("https://www.example.com", "9d29ad171863c78f0b97c8e9ae82ae43d3"),
            (
                "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
                "94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
            ),
        ] {
            let bytes: Vec<u8> =
                (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
            assert_eq!(read(&bytes).as_deref(), Some(text.as_bytes()));
            assert_eq!(encode(text.as_bytes()), bytes);
        }
    }

    #[test]
    fn what_is_no_string() {
        // The end of a string in it; padding of a whole byte; padding with a zero; a code that is cut off.
        for bad in [&[0xff, 0xff, 0xff, 0xff][..], &[0x1f, 0xff], &[0x1c], &[0xff, 0xff]] {
            assert_eq!(read(bad), None, "{bad:x?}");
        }
        assert_eq!(read(&[]), Some(vec![]));
    }

    proptest! {
        #[test]
        fn every_string_is_read_as_it_was_written(bytes: Vec<u8>) {
            prop_assert_eq!(read(&encode(&bytes)), Some(bytes));
        }

        #[test]
        fn what_is_read_is_what_would_be_written(bytes: Vec<u8>) {
            if let Some(text) = read(&bytes) {
                prop_assert_eq!(encode(&text), bytes);
            }
        }
    }
}
