//! Service account tokens: signed by the configured issuer, for our audience, in time, and about a service account.

use std::sync::Arc;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Validation, decode, decode_header};
use serde::Deserialize;
use zspire_model::{SpiffeId, Str, TrustDomain};

use super::Account;
use super::keys::{Key, Keys};
use crate::config::Jwt;

/// Clocks may differ by this, in seconds.
const LEEWAY: u64 = 60;

/// Verifies tokens of one issuer.
#[derive(Debug)]
pub(crate) struct Tokens {
    issuer: String,
    audience: String,
    keys: Arc<Keys>,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Option<Kubernetes>,
}

/// What a Kubernetes token is bound to.
#[derive(Deserialize)]
struct Kubernetes {
    pod: Option<Bound>,
    node: Option<Bound>,
}

#[derive(Deserialize)]
struct Bound {
    name: Str,
}

impl Tokens {
    pub(crate) fn new(config: &Jwt, keys: Arc<Keys>) -> Self {
        Self { issuer: config.issuer.clone(), audience: config.audience.clone(), keys }
    }

    pub(crate) fn keys(&self) -> &Arc<Keys> {
        &self.keys
    }

    pub(crate) fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The service account that a token is about.
    pub(super) fn verify(&self, token: &str, domain: &TrustDomain) -> Result<Account, Refused> {
        // A token with alg `none`, or any other that is not a signature known here, ends in this line.
        let header = decode_header(token).map_err(|e| Refused::of(&e))?;
        let current = self.keys.current();
        let mut last = Refused::UnknownKey;
        let candidates = current.iter().filter(|key| header.kid.is_none() || key.id == header.kid);
        for key in candidates.filter(|key| key.algorithms.contains(&header.alg)) {
            match self.verify_with(key, token) {
                Ok(claims) => return account(claims, domain),
                Err(error) => last = error,
            }
        }
        if last == Refused::UnknownKey {
            self.keys.ask_again();
        }
        Err(last)
    }

    fn verify_with(&self, key: &Key, token: &str) -> Result<Claims, Refused> {
        let mut rules = Validation::new(key.algorithms[0]);
        rules.algorithms.clone_from(&key.algorithms);
        rules.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        rules.set_issuer(&[&self.issuer]);
        rules.set_audience(&[&self.audience]);
        rules.validate_nbf = true;
        rules.leeway = LEEWAY;
        decode(token, &key.key, &rules).map(|data| data.claims).map_err(|e| Refused::of(&e))
    }
}

/// `system:serviceaccount:<namespace>:<name>` becomes an identity of our trust domain.
fn account(claims: Claims, domain: &TrustDomain) -> Result<Account, Refused> {
    let mut parts = claims.sub.split(':');
    let parts = [(); 5].map(|()| parts.next());
    let [Some("system"), Some("serviceaccount"), Some(namespace), Some(name), None] = parts else {
        return Err(Refused::Subject);
    };
    let id = SpiffeId::istio(domain, namespace, name).map_err(|_| Refused::Subject)?;
    let (pod, node) = claims.kubernetes.map_or((None, None), |bound| (bound.pod, bound.node));
    let name_of = |bound: Option<Bound>| bound.map(|bound| bound.name);
    Ok(Account { id, namespace: namespace.into(), name: name.into(), pod: name_of(pod), node: name_of(node) })
}

/// Why a token is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("it is not a JWT with a signature that is accepted here (RS, PS or ES)")]
    Malformed,
    #[error("no key of the issuer fits it")]
    UnknownKey,
    #[error("its signature is wrong")]
    Signature,
    #[error("it has expired")]
    Expired,
    #[error("it is not valid yet")]
    NotYet,
    #[error("it is of another issuer")]
    Issuer,
    #[error("it is for another audience")]
    Audience,
    #[error("it lacks one of exp, iss, aud and sub")]
    Claim,
    #[error("it is not about a service account")]
    Subject,
}

impl Refused {
    fn of(error: &jsonwebtoken::errors::Error) -> Self {
        match error.kind() {
            ErrorKind::InvalidSignature => Self::Signature,
            ErrorKind::ExpiredSignature => Self::Expired,
            ErrorKind::ImmatureSignature => Self::NotYet,
            ErrorKind::InvalidIssuer => Self::Issuer,
            ErrorKind::InvalidAudience => Self::Audience,
            ErrorKind::MissingRequiredClaim(_) | ErrorKind::InvalidClaimFormat(_) => Self::Claim,
            _ => Self::Malformed,
        }
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::jwk::Jwk;
    use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
    use serde_json::{Value, json};

    use super::*;

    /// A P-256 key as OpenSSL makes it; it guards nothing.
    fn signer() -> EncodingKey {
        let pem = zspire_identity::PrivateKey::generate().to_pem();
        EncodingKey::from_ec_pem(pem.as_bytes()).unwrap()
    }

    fn tokens(signer: &EncodingKey) -> Tokens {
        let mut jwk = Jwk::from_encoding_key(signer, Algorithm::ES256).unwrap();
        jwk.common.key_id = Some("k1".into());
        let document = json!({"keys": [jwk, {"kty": "of the future"}, {"kty": "oct", "k": "AAAA", "kid": "k1"}]});
        let keys = Keys::of(&serde_json::to_vec(&document).unwrap()).unwrap();
        Tokens { issuer: "https://issuer".into(), audience: "istio-ca".into(), keys: Arc::new(keys) }
    }

    fn now() -> u64 {
        jsonwebtoken::get_current_timestamp()
    }

    fn claims() -> Value {
        json!({
            "iss": "https://issuer", "aud": ["other", "istio-ca"], "exp": now() + 600, "nbf": now(),
            "sub": "system:serviceaccount:istio-system:ztunnel",
            "kubernetes.io": {"namespace": "istio-system", "pod": {"name": "ztunnel-a", "uid": "1"}, "node": {"name": "a"}},
        })
    }

    fn with(name: &str, value: Value) -> Value {
        let mut claims = claims();
        claims[name] = value;
        claims
    }

    fn header(algorithm: Algorithm, kid: Option<&str>) -> Header {
        Header { kid: kid.map(str::to_owned), ..Header::new(algorithm) }
    }

    fn verify(signer: &EncodingKey, header: &Header, claims: &Value, tokens: &Tokens) -> Result<Account, Refused> {
        tokens.verify(&encode(header, claims, signer).unwrap(), &"td.example".parse().unwrap())
    }

    #[test]
    fn a_good_token_says_who_and_where() {
        let signer = signer();
        for kid in [Some("k1"), None] {
            let account = verify(&signer, &header(Algorithm::ES256, kid), &claims(), &tokens(&signer)).unwrap();
            assert_eq!(account.id.as_str(), "spiffe://td.example/ns/istio-system/sa/ztunnel");
            assert_eq!((account.pod.as_deref(), account.node.as_deref()), (Some("ztunnel-a"), Some("a")));
        }
        let plain = with("aud", json!("istio-ca"));
        assert!(verify(&signer, &header(Algorithm::ES256, None), &plain, &tokens(&signer)).is_ok());
    }

    #[test]
    fn bad_claims() {
        let signer = signer();
        let tokens = tokens(&signer);
        for (name, value, why) in [
            ("iss", json!("https://elsewhere"), Refused::Issuer),
            ("iss", json!(null), Refused::Claim),
            ("aud", json!(["vault"]), Refused::Audience),
            ("aud", json!([]), Refused::Audience),
            ("aud", json!(null), Refused::Claim),
            ("exp", json!(now() - 120), Refused::Expired),
            ("exp", json!(null), Refused::Claim),
            ("exp", json!("tomorrow"), Refused::Claim),
            ("nbf", json!(now() + 600), Refused::NotYet),
            ("sub", json!("system:serviceaccount:a"), Refused::Subject),
            ("sub", json!("system:serviceaccount:a:b:c"), Refused::Subject),
            ("sub", json!("system:serviceaccount:a/../b:c"), Refused::Subject),
            ("sub", json!("system:serviceaccount::b"), Refused::Subject),
            ("sub", json!("system:node:a"), Refused::Subject),
            ("sub", json!("alice"), Refused::Subject),
            ("sub", json!(5), Refused::Malformed),
            ("kubernetes.io", json!("x"), Refused::Malformed),
        ] {
            let outcome = verify(&signer, &header(Algorithm::ES256, Some("k1")), &with(name, value.clone()), &tokens);
            assert_eq!(outcome.unwrap_err(), why, "{name} = {value}");
        }
    }

    #[test]
    fn bad_signatures() {
        let (signer, stranger) = (signer(), self::signer());
        let tokens = tokens(&signer);
        let refused = |key: &EncodingKey, header: &Header| verify(key, header, &claims(), &tokens).unwrap_err();
        assert_eq!(refused(&stranger, &header(Algorithm::ES256, Some("k1"))), Refused::Signature);
        assert_eq!(refused(&stranger, &header(Algorithm::ES256, None)), Refused::Signature);
        assert_eq!(refused(&signer, &header(Algorithm::ES256, Some("k2"))), Refused::UnknownKey);
        let shared = EncodingKey::from_secret(b"\0\0\0");
        assert_eq!(refused(&shared, &header(Algorithm::HS256, Some("k1"))), Refused::UnknownKey, "no shared secrets");
    }

    #[test]
    fn no_signature_at_all() {
        use base64::Engine as _;
        let signer = signer();
        let tokens = tokens(&signer);
        let part = |value: &Value| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(value.to_string());
        for header in [json!({"alg": "none", "typ": "JWT"}), json!({"alg": "None"}), json!({"typ": "JWT"})] {
            let token = format!("{}.{}.", part(&header), part(&claims()));
            assert_eq!(tokens.verify(&token, &"td".parse().unwrap()).unwrap_err(), Refused::Malformed);
        }
        for garbage in ["", ".", "..", "a.b.c", "é.é.é", "eyJhbGciOiJFUzI1NiJ9"] {
            assert!(tokens.verify(garbage, &"td".parse().unwrap()).is_err(), "{garbage}");
        }
    }
}
