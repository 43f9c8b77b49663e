//! Blocks of the specification, blocks that are none, and blocks that unfold to much.

use proptest::prelude::*;

use super::huffman::tests::encode as compress;
use super::*;

type Fields = Vec<(String, String)>;

fn read(decoder: &mut Decoder, block: &[u8]) -> Result<Fields, Unreadable> {
    let mut fields = Vec::new();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    decoder.decode(block, 1 << 16, &mut |name, value| fields.push((text(name), text(value))))?;
    Ok(fields)
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn fields(expected: &[(&str, &str)]) -> Fields {
    expected.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// RFC 7541 §C.3 and §C.4: three requests on a connection, plain and compressed.
#[test]
fn requests_of_the_specification() {
    let plain = [
        "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
        "8286 84be 5808 6e6f 2d63 6163 6865",
        "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
    ];
    let compressed = [
        "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
        "8286 84be 5886 a8eb 1064 9cbf",
        "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
    ];
    let get = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")];
    for blocks in [plain, compressed] {
        let mut decoder = Decoder::default();
        assert_eq!(read(&mut decoder, &bytes(blocks[0])), Ok(fields(&get)));
        let mut second = fields(&get);
        second.extend(fields(&[("cache-control", "no-cache")]));
        assert_eq!(read(&mut decoder, &bytes(blocks[1])), Ok(second));
        let third = [
            (":method", "GET"),
            (":scheme", "https"),
            (":path", "/index.html"),
            (":authority", "www.example.com"),
            ("custom-key", "custom-value"),
        ];
        assert_eq!(read(&mut decoder, &bytes(blocks[2])), Ok(fields(&third)));
    }
}

#[test]
fn fields_leave_a_table_that_is_full() {
    let mut decoder = Decoder::default();
    // The table takes 100 bytes: two fields of 50, and the first leaves for the third.
    let mut block = bytes("3f 45");
    for value in ["aaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbb", "ccccccccccccccccc"] {
        block.extend([0x40, 1, b'x', 17]);
        block.extend(value.bytes());
    }
    assert_eq!(read(&mut decoder, &block).map(|fields| fields.len()), Ok(3));
    assert_eq!(read(&mut decoder, &[0xbe, 0xbf]).unwrap()[1].1, "b".repeat(17));
    assert_eq!(read(&mut decoder, &[0xc0]), Err(Unreadable::Malformed));
    // One that is larger than the table empties it.
    let mut block = vec![0x40, 1, b'y', 90];
    block.extend([b'y'; 90]);
    assert_eq!(read(&mut decoder, &block).map(|fields| fields.len()), Ok(1));
    assert_eq!(read(&mut decoder, &[0xbe]), Err(Unreadable::Malformed));
}

#[test]
fn what_is_no_block() {
    for (why, block) in [
        ("index 0", "80"),
        ("an index that nothing has", "ff 80 01"),
        ("a name that nothing has", "7f ff 01 01 61"),
        ("a string that ends early", "40 0a 61"),
        ("an integer that ends early", "ff"),
        ("an integer without end", "ff ff ff ff ff ff ff ff"),
        ("a table larger than allowed", "3f e2 1f"),
        ("a change of the table in the middle", "82 20"),
        ("a broken compressed string", "40 01 61 81 1c"),
    ] {
        assert_eq!(read(&mut Decoder::default(), &bytes(block)), Err(Unreadable::Malformed), "{why}");
    }
    // The table may be changed twice: to the smallest and to the last size (§4.2).
    assert_eq!(read(&mut Decoder::default(), &bytes("20 3f e1 1f 82")), Ok(fields(&[(":method", "GET")])));
}

#[test]
fn a_block_that_unfolds_is_not_read_to_its_end() {
    // A field of four thousand bytes, and a byte for each time that it is meant again.
    let mut block = vec![0x40, 1, b'x', 0x7f, 0xa1, 0x1e];
    block.extend([b'y'; 4000]);
    block.extend([0xbe; 60_000]);
    let mut decoder = Decoder::default();
    let mut seen = 0;
    let read = decoder.decode(&block, 64 << 10, &mut |name, value| seen += name.len() + value.len());
    assert_eq!(read, Err(Unreadable::TooLarge));
    assert!(seen <= 64 << 10, "{seen}");
    // Fields without bytes cost something too.
    let read = Decoder::default().decode(&[0x82; 5000], 64 << 10, &mut |_, _| {});
    assert_eq!(read, Err(Unreadable::TooLarge));
}

#[test]
fn what_we_write() {
    let mut block = Vec::new();
    indexed(8, &mut block);
    literal(Name::METHOD, b"CONNECT", &mut block);
    literal(Name::AUTHORITY, &[b'a'; 300], &mut block);
    literal(Name::Literal("baggage"), b"", &mut block);
    let expected = [(":status", "200"), (":method", "CONNECT"), (":authority", &*"a".repeat(300)), ("baggage", "")];
    assert_eq!(read(&mut Decoder::default(), &block), Ok(fields(&expected)));
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(block: Vec<u8>, more: Vec<u8>) {
        let mut decoder = Decoder::default();
        let mut size = 0;
        let _ = decoder.decode(&block, 10_000, &mut |name, value| size += name.len() + value.len() + FIELD);
        prop_assert!(size <= 10_000);
        let _ = decoder.decode(&more, 10_000, &mut |_, _| {});
    }

    /// However a field is written, it is read as it was meant.
    #[test]
    fn literals_are_read_as_they_were_written(
        written in prop::collection::vec((0usize..3, "[a-z]{1,9}", prop::collection::vec(any::<u8>(), 0..200), any::<bool>()), 0..30)
    ) {
        let (mut block, mut expected) = (Vec::new(), Vec::new());
        for (kind, name, value, huffman) in written {
            block.push([0x00, 0x10, 0x40][kind]);
            for text in [name.as_bytes(), &value] {
                let start = block.len();
                let bytes = if huffman { compress(text) } else { text.to_vec() };
                put_string(&bytes, &mut block);
                block[start] |= if huffman { 0x80 } else { 0 };
            }
            expected.push((name.into_bytes(), value));
        }
        let mut got = Vec::new();
        Decoder::default().decode(&block, 1 << 20, &mut |name, value| got.push((name.to_vec(), value.to_vec()))).unwrap();
        prop_assert_eq!(got, expected);
    }
}
