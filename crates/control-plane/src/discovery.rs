//! Who may follow the mesh: everybody with a certificate of this CA or a token of the issuer, who says the truth about where it runs.
//!
//! A stranger is turned away before any of its messages is read; what a client says of itself is compared with what it has
//! proved, as istiod does.

use std::sync::Arc;

use tonic::{Request, Status};
use zspire_xds::server::{Authorize, Caller as Admitted, Node};

use crate::auth::{Authenticator, Caller, Connection};

/// Checks the headers of a stream, before its first message.
pub(crate) fn gate(
    authenticator: Arc<Authenticator>,
) -> impl FnMut(Request<()>) -> Result<Request<()>, Status> + Clone + Send + Sync + 'static {
    move |mut request| {
        let caller = match authenticator.caller(request.metadata(), request.extensions()) {
            Ok(caller @ (Caller::Node(_) | Caller::Workload(_) | Caller::Account(_))) => caller,
            refused => {
                let remote = request.extensions().get::<Connection>().map(|connection| connection.remote);
                let reason = refused.err().map_or_else(|| "a join token is for joining only".into(), |e| e.to_string());
                tracing::info!(?remote, reason, "refused a discovery stream");
                return Err(Status::unauthenticated("authentication failure"));
            }
        };
        request.extensions_mut().insert(caller);
        Ok(request)
    }
}

/// The hook of the discovery server, behind [`gate`].
pub(crate) fn authorize() -> Arc<Authorize> {
    Arc::new(|extensions, _, node| match extensions.get::<Caller>() {
        Some(caller) => admit(caller, node),
        None => Err(Status::unauthenticated("authentication failure")),
    })
}

fn admit(caller: &Caller, node: &Node) -> Result<Admitted, Status> {
    let said = |name| node.metadata(name).filter(|text| !text.is_empty());
    let denied = |why: String| Err(Status::permission_denied(format!("authorization failed: {why}")));
    let (id, namespace, account) = match caller {
        Caller::Node(name) => {
            return match node.node_name() {
                Some(other) if *other != **name => {
                    denied(format!("the client certificate is that of node {name}: set NODE_NAME to it"))
                }
                _ => Ok(Admitted { name: caller.to_string() }),
            };
        }
        Caller::Account(account) => (&account.id, &*account.namespace, &*account.name),
        Caller::Workload(id) => match id.istio_view() {
            Some(view) => (id, view.namespace, view.service_account),
            None => return denied(format!("{id} is not the identity of a workload or a node")),
        },
        Caller::Joining(_) => return Err(Status::unauthenticated("authentication failure")),
    };
    let matches = |name, proved: &str| said(name).is_none_or(|said| said == proved);
    if matches("NAMESPACE", namespace) && matches("SERVICE_ACCOUNT", account) {
        return Ok(Admitted { name: caller.to_string() });
    }
    let [claimed_namespace, claimed_account] = ["NAMESPACE", "SERVICE_ACCOUNT"].map(|name| said(name).unwrap_or(""));
    denied(format!("no identities ([{id}]) matched {claimed_namespace}/{claimed_account}"))
}
