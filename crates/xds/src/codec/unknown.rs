//! Finds fields of a policy that this program does not know.
//!
//! The generated code skips them, as protobuf asks for. In a policy that is wrong: a condition that is skipped makes an allow
//! policy allow more. So the bytes of a policy are walked once more by its field numbers.

use prost::bytes::{Buf, Bytes};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// The fields of a message.
struct Message {
    name: &'static str,
    /// Numbers of the fields that are not messages, or whose inside does not matter.
    plain: &'static [u32],
    /// The others.
    nested: &'static [(u32, &'static Message)],
}

const AUTHORIZATION: Message = Message { name: "policy", plain: &[1, 2, 3, 4, 6, 7], nested: &[(5, &GROUP)] };
const GROUP: Message = Message { name: "group", plain: &[], nested: &[(1, &RULES)] };
const RULES: Message = Message { name: "rule", plain: &[], nested: &[(2, &MATCH)] };
const MATCH: Message = Message {
    name: "match",
    plain: &[9, 10, 13],
    nested: &[
        (1, &STRING_MATCH),
        (2, &STRING_MATCH),
        (3, &STRING_MATCH),
        (4, &STRING_MATCH),
        (5, &ADDRESS),
        (6, &ADDRESS),
        (7, &ADDRESS),
        (8, &ADDRESS),
        (11, &SERVICE_ACCOUNT),
        (12, &SERVICE_ACCOUNT),
    ],
};
const STRING_MATCH: Message = Message { name: "string match", plain: &[1, 2, 3, 4], nested: &[] };
const ADDRESS: Message = Message { name: "address", plain: &[1, 2], nested: &[] };
const SERVICE_ACCOUNT: Message = Message { name: "service account match", plain: &[1, 2], nested: &[] };

/// The first unknown field of an `istio.security.Authorization`, in words.
pub(super) fn field(policy: &Bytes) -> Option<String> {
    walk(policy.clone(), &AUTHORIZATION)
}

/// Number of the field that says where a policy applies.
const SCOPE: u32 = 3;

/// What a policy that cannot be decoded says of its scope before the place that cannot be read. The last one counts, as for
/// protobuf.
pub(super) fn scope(policy: &Bytes) -> Option<i32> {
    let (mut bytes, mut scope) = (policy.clone(), None);
    while bytes.has_remaining() {
        let Ok((number, wire_type)) = decode_key(&mut bytes) else { break };
        if number == SCOPE && wire_type == WireType::Varint {
            let Ok(value) = decode_varint(&mut bytes) else { break };
            scope = i32::try_from(value).ok();
        } else if skip_field(wire_type, number, &mut bytes, DecodeContext::default()).is_err() {
            break;
        }
    }
    scope
}

/// The depth is that of the messages above, whatever the bytes say.
fn walk(mut bytes: Bytes, message: &Message) -> Option<String> {
    while bytes.has_remaining() {
        let Ok((number, wire_type)) = decode_key(&mut bytes) else { return Some(malformed(message)) };
        if let Some((_, inner)) = message.nested.iter().find(|(nested, _)| *nested == number) {
            let length = decode_varint(&mut bytes).ok().and_then(|length| usize::try_from(length).ok());
            match length.filter(|length| wire_type == WireType::LengthDelimited && *length <= bytes.len()) {
                Some(length) => {
                    if let found @ Some(_) = walk(bytes.split_to(length), inner) {
                        return found;
                    }
                }
                None => return Some(malformed(message)),
            }
        } else if !message.plain.contains(&number) {
            return Some(format!("unknown field {number} in a {}", message.name));
        } else if skip_field(wire_type, number, &mut bytes, DecodeContext::default()).is_err() {
            return Some(malformed(message));
        }
    }
    None
}

fn malformed(message: &Message) -> String {
    format!("malformed {}", message.name)
}
