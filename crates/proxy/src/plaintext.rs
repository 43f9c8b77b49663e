//! Connections to the pod that come in no tunnel (15006, redirected): from outside the mesh. The peer has no identity, and
//! policies are asked about it like about any other.

use crate::accept::Accepted;
use crate::admission::{self, likely_service, source_workload};
use crate::flow::{self, About, Direction, Transport};
use crate::live::Question;
use crate::pod::Pod;

/// Serves one redirected connection.
pub(crate) async fn serve(pod: Pod, accepted: Accepted) {
    let Ok(destination) = accepted.destination() else { return accepted.refuse() };
    let refused = |reason: &'static str, why: &dyn std::fmt::Display| {
        let metrics = &pod.shared().metrics;
        flow::deny_early(metrics, Direction::Inbound, accepted.source, Some(destination), reason, why);
    };
    if pod.shared().config.routing.own_ports.contains(&destination.port()) {
        refused("own_port", &format_args!("port {} belongs to the proxy itself", destination.port()));
        return accepted.refuse();
    }
    let local = match pod.local().await {
        Ok(local) => local,
        Err(error) => {
            refused(error.label(), &error);
            return accepted.refuse();
        }
    };
    let workload = &local.workload;
    if !workload.addresses.contains(&destination.ip()) {
        refused("not_here", &format_args!("{} is not an address of workload {}", destination.ip(), workload.uid));
        return accepted.refuse();
    }
    let (source, service) = pod.mesh(|snapshot| {
        let source = source_workload(snapshot, workload, accepted.source.ip(), None);
        (source, likely_service(snapshot, workload, destination.port()))
    });
    let flow = pod.open(About {
        direction: Direction::Inbound,
        transport: Transport::Tcp,
        source_address: accepted.source,
        source,
        source_identity: None,
        destination_address: destination,
        next_hop: destination,
        hbone_address: None,
        original_destination: Some(destination),
        destination: Some(workload.clone()),
        destination_identity: None,
        service,
    });
    let question = Question { destination, peer: None, peer_address: accepted.source.ip() };
    let connected = match admission::authorize(&pod, &local, question, accepted.source, destination.ip()) {
        Ok(authorized) => authorized.connect(&pod, None).await,
        Err(failure) => Err(failure),
    };
    match connected {
        Ok(connected) => pod.connections().spawn(connected.relay_plain(accepted.socket, flow)),
        Err(failure) => {
            flow.finish(false, Err(failure));
            accepted.refuse();
        }
    }
}
