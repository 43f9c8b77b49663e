//! The columns of each view.

use comfy_table::{Table, presets};

use super::View;
use super::dump::{Connection, Dump, PodState, identity_namespace};

/// One view as text, rows sorted, columns aligned, without borders.
pub(super) fn table(dump: &Dump, view: View, namespace: Option<&str>) -> String {
    let wanted = |given: &str| namespace.is_none_or(|n| n == given);
    let (header, mut rows): (&[&str], Vec<Vec<String>>) = match view {
        View::Workloads => (
            &["NAMESPACE", "WORKLOAD", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL", "STATUS"],
            dump.workloads.iter().filter(|w| wanted(&w.namespace)).map(workload).collect(),
        ),
        View::Services => (
            &["NAMESPACE", "SERVICE", "VIP", "WAYPOINT", "ENDPOINTS"],
            dump.services.iter().filter(|s| wanted(&s.namespace)).map(service).collect(),
        ),
        View::Policies => (
            &["NAMESPACE", "POLICY", "ACTION", "SCOPE"],
            dump.policies
                .iter()
                .filter(|p| wanted(&p.namespace))
                .map(|p| {
                    let action = if p.dry_run { format!("{} (dry run)", p.action) } else { p.action.clone() };
                    vec![p.namespace.clone(), p.name.clone(), action, p.scope.clone()]
                })
                .collect(),
        ),
        View::Certificates => (
            &["IDENTITY", "TYPE", "STATE", "SOURCE", "SERIAL NUMBER", "NOT BEFORE", "NOT AFTER"],
            dump.certificates
                .iter()
                .filter(|c| namespace.is_none() || identity_namespace(&c.identity) == namespace)
                .flat_map(certificate)
                .collect(),
        ),
        View::Connections => (
            &["WORKLOAD", "DIRECTION", "SOURCE", "DESTINATION", "ORIGINAL DESTINATION", "PROTOCOL"],
            dump.state.values().filter(|p| wanted(&p.info.namespace)).flat_map(connections).collect(),
        ),
    };
    if view != View::Certificates {
        rows.sort();
    }
    render(header, rows)
}

/// Rows under a header.
pub(crate) fn render(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text: String = table.lines().map(|line| line.trim_end().to_owned() + "\n").collect();
    if text.is_empty() {
        text.push('\n');
    }
    text
}

fn or_none(text: &str) -> String {
    if text.is_empty() { "None".into() } else { text.into() }
}

fn workload(w: &super::dump::Workload) -> Vec<String> {
    let address = if w.workload_ips.is_empty() { or_none(&w.hostname) } else { w.workload_ips.join(",") };
    vec![
        w.namespace.clone(),
        w.name.clone(),
        address,
        or_none(&w.node),
        or_none(w.waypoint.as_ref().map_or("", |d| &d.destination)),
        w.protocol.clone(),
        w.status.clone(),
    ]
}

fn service(s: &super::dump::Service) -> Vec<String> {
    let healthy = s.endpoints.values().filter(|e| e.status == "Healthy").count();
    // `network/ip`: the network is shown only where there is one.
    let vips: Vec<&str> = s.vips.iter().map(|vip| vip.strip_prefix('/').unwrap_or(vip)).collect();
    vec![
        s.namespace.clone(),
        s.name.clone(),
        or_none(&vips.join(",")),
        or_none(s.waypoint.as_ref().map_or("", |d| &d.destination)),
        format!("{healthy}/{}", s.endpoints.len()),
    ]
}

fn certificate(c: &super::dump::Certificate) -> Vec<Vec<String>> {
    let source = or_none(&c.source);
    if c.cert_chain.is_empty() {
        let none = || "None".to_owned();
        return vec![vec![c.identity.clone(), "Leaf".into(), c.state.clone(), source, none(), none(), none()]];
    }
    let intermediates =
        c.cert_chain.iter().enumerate().map(|(i, cert)| (if i == 0 { "Leaf" } else { "Intermediate" }, cert));
    let roots = c.root_certs.iter().map(|cert| ("Root", cert));
    intermediates
        .chain(roots)
        .map(|(kind, cert)| {
            vec![
                c.identity.clone(),
                kind.into(),
                c.state.clone(),
                source.clone(),
                cert.serial_number.clone(),
                cert.valid_from.clone(),
                cert.expiration_time.clone(),
            ]
        })
        .collect()
}

fn connections(pod: &PodState) -> Vec<Vec<String>> {
    let name = format!("{}/{}", pod.info.namespace, pod.info.name);
    let row = |direction: &str, c: &Connection| {
        vec![
            name.clone(),
            direction.to_owned(),
            c.src.clone(),
            c.actual_dst.clone(),
            or_none(c.original_dst.as_deref().unwrap_or("")),
            c.protocol.clone(),
        ]
    };
    let inbound = pod.connections.inbound.iter().map(|c| row("Inbound", c));
    let outbound = pod.connections.outbound.iter().map(|c| row("Outbound", c));
    inbound.chain(outbound).collect()
}
