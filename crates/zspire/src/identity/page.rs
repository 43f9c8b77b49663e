//! `/identities` of a proxy, and the one identity in it that an operator means. Lenient: what is missing is empty.

use std::fmt;

use serde::Deserialize;
use serde_json::Value;

/// A parsed page, with its text for JSON output.
#[derive(Debug)]
pub(crate) struct Page {
    raw: Vec<Value>,
    pub(crate) identities: Vec<Identity>,
}

#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Identity {
    pub(crate) of: String,
    pub(crate) pod: Option<Pod>,
    pub(crate) source: String,
    pub(crate) agent: Option<String>,
    pub(crate) expected_id: Option<String>,
    pub(crate) state: String,
    pub(crate) why: Option<String>,
    pub(crate) since: Option<String>,
    pub(crate) asked: Option<Asked>,
    pub(crate) asked_times: u64,
    pub(crate) answer: Option<Vec<Svid>>,
    pub(crate) updates: u64,
    pub(crate) certificate: Option<Certificate>,
    pub(crate) bundles: Vec<Bundle>,
    pub(crate) last_error: Option<LastError>,
    pub(crate) retry_at: Option<String>,
}

#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) service_account: String,
    pub(crate) uid: String,
}

#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Asked {
    pub(crate) kind: String,
    pub(crate) reference: String,
    pub(crate) selectors: Vec<String>,
}

#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct Svid {
    pub(crate) id: String,
    pub(crate) hint: String,
}

#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Certificate {
    pub(crate) id: String,
    pub(crate) serial_number: String,
    pub(crate) not_before: String,
    pub(crate) not_after: String,
}

#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Bundle {
    pub(crate) trust_domain: String,
    pub(crate) roots: usize,
    pub(crate) since: String,
}

#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct LastError {
    pub(crate) code: String,
    pub(crate) why: String,
    pub(crate) at: String,
    pub(crate) lasts: bool,
}

/// Why a name does not say which identity is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unclear {
    Nobody { asked: String },
    Several { asked: String, pods: Vec<String> },
}

impl fmt::Display for Unclear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nobody { asked } => {
                write!(f, "this proxy serves no pod {asked:?}: `zspire identity list` shows those that it serves")
            }
            Self::Several { asked, pods } => {
                write!(f, "{asked:?} is several pods; name one by namespace or uid:")?;
                pods.iter().try_for_each(|pod| write!(f, "\n  {pod}"))
            }
        }
    }
}

impl Page {
    /// Reads a page.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Raw {
            identities: Vec<Value>,
        }
        let not = |e: serde_json::Error| format!("not a page of identities: {e}");
        let Raw { identities: raw } = serde_json::from_str(text).map_err(not)?;
        let identities = raw.iter().map(Identity::deserialize).collect::<Result<_, _>>().map_err(not)?;
        Ok(Self { raw, identities })
    }

    /// Those of one namespace, or all.
    pub(crate) fn of_namespace(&self, namespace: Option<&str>) -> Vec<usize> {
        let wanted =
            |it: &Identity| namespace.is_none_or(|name| it.pod.as_ref().is_some_and(|pod| pod.namespace == name));
        (0..self.identities.len()).filter(|n| wanted(&self.identities[*n])).collect()
    }

    /// The one that is meant by `namespace/name`, a name, or a UID; `proxy` is the proxy's own.
    pub(crate) fn find(&self, asked: &str) -> Result<usize, Unclear> {
        let of =
            |pod: &Pod| pod.uid == asked || pod.name == asked || format!("{}/{}", pod.namespace, pod.name) == asked;
        let found = self.identities.iter().enumerate().filter(|(_, it)| it.pod.as_ref().is_some_and(of));
        let found: Vec<usize> = found.map(|(n, _)| n).collect();
        match found[..] {
            [one] => Ok(one),
            [] => {
                let own = self.identities.iter().position(|it| it.of == "proxy").filter(|_| asked == "proxy");
                own.ok_or_else(|| Unclear::Nobody { asked: asked.to_owned() })
            }
            _ => {
                let pods = found.iter().map(|n| self.identities[*n].name()).collect();
                Err(Unclear::Several { asked: asked.to_owned(), pods })
            }
        }
    }

    /// These, as they stand in the page.
    pub(crate) fn json(&self, which: &[usize]) -> String {
        let all: Vec<&Value> = which.iter().map(|n| &self.raw[*n]).collect();
        format!("{:#}\n", Value::from(all.into_iter().cloned().collect::<Vec<_>>()))
    }

    /// This one, as it stands in the page.
    pub(crate) fn json_of(&self, which: usize) -> &Value {
        &self.raw[which]
    }
}

impl Identity {
    /// What it is called: `namespace/name (uid …)`.
    pub(crate) fn name(&self) -> String {
        match &self.pod {
            Some(Pod { name, namespace, uid, .. }) => format!("{namespace}/{name} (uid {uid})"),
            None => self.short_name(),
        }
    }

    /// The same without the UID.
    pub(crate) fn short_name(&self) -> String {
        match &self.pod {
            Some(Pod { name, namespace, .. }) => format!("{namespace}/{name}"),
            None if self.of == "proxy" => "the proxy itself".into(),
            None => "no pod of this proxy".into(),
        }
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.state == "Ready"
    }

    /// What went wrong, if it still does.
    pub(crate) fn error(&self) -> Option<&LastError> {
        self.last_error.as_ref().filter(|error| error.lasts)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn page(pods: &[(&str, &str, &str)]) -> Page {
        let pod = |(namespace, name, uid): &(&str, &str, &str)| json!({ "of": "pod", "pod": { "namespace": namespace, "name": name, "uid": uid }, "new": "field" });
        let mut identities: Vec<Value> = pods.iter().map(pod).collect();
        identities.push(json!({ "of": "proxy" }));
        Page::parse(&json!({ "trustDomain": "td", "identities": identities }).to_string()).unwrap()
    }

    #[test]
    fn a_pod_by_name_by_namespace_or_by_uid() {
        let page = page(&[("shop", "web-1", "u1"), ("shop", "db", "u2"), ("test", "db", "u3")]);
        assert_eq!(page.find("web-1"), Ok(0));
        assert_eq!(page.find("test/db"), Ok(2));
        assert_eq!(page.find("u2"), Ok(1));
        assert_eq!(page.find("proxy"), Ok(3));
        let several = page.find("db").unwrap_err().to_string();
        assert!(several.contains("shop/db (uid u2)\n  test/db (uid u3)"), "{several}");
        assert!(page.find("cache").unwrap_err().to_string().contains("no pod \"cache\""));
        assert_eq!(page.of_namespace(Some("shop")), [0, 1]);
        assert!(page.json(&[2]).contains("\"new\": \"field\""), "fields that this program does not know are kept");
    }
}
