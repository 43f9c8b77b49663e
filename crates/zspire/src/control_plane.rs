//! `zspire control-plane` and `zspire validate`: flags in, tables out. What they do is in `zspire_control_plane`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args as ClapArgs, Subcommand, ValueEnum};
use comfy_table::{Table, presets};
use zspire_control_plane::config::{Options, SETTINGS, duration};
use zspire_control_plane::{Config, IssuedRecord, Validated};

use crate::exit;

/// Run zspire's own control plane: certificate authority and workload discovery
#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve certificates and discovery until told to stop (the default)
    Run,
    /// Print a token that lets one node join, once
    Token {
        /// Accepted for `token create`; means nothing
        #[arg(hide = true, value_parser = ["create"])]
        verb: Option<String>,
        /// Name of the node that may join
        #[arg(long)]
        node: String,
        /// How long the token is valid
        #[arg(long, default_value = "1h", value_parser = duration, value_name = "DURATION")]
        ttl: std::time::Duration,
    },
    /// Show the certificates issued last
    Issued {
        /// How many
        #[arg(long, default_value_t = 50, value_name = "COUNT")]
        limit: u32,
        /// How to print them
        #[arg(short, long, default_value = "table", value_enum)]
        output: Output,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Table,
    Json,
}

/// The settings; each has a variable of the environment, which the control plane itself reads.
#[derive(Debug, ClapArgs)]
struct Flags {
    /// Where certificates and discovery are served [ZSPIRE_CP_ADDRESS, 0.0.0.0:15012]
    #[arg(long, global = true)]
    address: Option<String>,
    /// Where metrics and status are served [ZSPIRE_CP_ADMIN, 127.0.0.1:15014]
    #[arg(long, global = true, value_name = "ADDRESS")]
    admin: Option<String>,
    /// File or folder of workloads, services and policies [ZSPIRE_CP_MESH, ./mesh.d]
    #[arg(long, global = true, value_name = "PATH")]
    mesh: Option<String>,
    /// Folder of the CA's key and its records [ZSPIRE_CP_STATE, ./zspire-state]
    #[arg(long, global = true, value_name = "FOLDER")]
    state: Option<String>,
    /// Trust domain of every identity [ZSPIRE_CP_TRUST_DOMAIN, cluster.local]
    #[arg(long, global = true, value_name = "NAME")]
    trust_domain: Option<String>,
    /// Further names and addresses of the serving certificate, by commas [ZSPIRE_CP_HOSTNAMES]
    #[arg(long, global = true, value_name = "NAMES")]
    hostnames: Option<String>,
    /// Folder with a CA of your own, as Istio's cacerts [ZSPIRE_CP_CACERTS]
    #[arg(long, global = true, value_name = "FOLDER")]
    cacerts: Option<String>,
    /// Issuer whose tokens are accepted [ZSPIRE_CP_JWT_ISSUER]
    #[arg(long, global = true, value_name = "ISSUER")]
    jwt_issuer: Option<String>,
    /// Audience that its tokens must have [ZSPIRE_CP_JWT_AUDIENCE, istio-ca]
    #[arg(long, global = true, value_name = "AUDIENCE")]
    jwt_audience: Option<String>,
    /// Its keys: a file or an https URL [ZSPIRE_CP_JWT_JWKS]
    #[arg(long, global = true, value_name = "SOURCE")]
    jwt_jwks: Option<String>,
    /// Roots for that URL: a PEM file or SYSTEM [ZSPIRE_CP_JWT_JWKS_ROOT, SYSTEM]
    #[arg(long, global = true, value_name = "ROOTS")]
    jwt_jwks_root: Option<String>,
    /// Service accounts of node proxies, namespace/name by commas [ZSPIRE_CP_TRUSTED_NODE_ACCOUNTS, istio-system/ztunnel]
    #[arg(long, global = true, value_name = "ACCOUNTS")]
    trusted_node_accounts: Option<String>,
    /// Lifetime of certificates that ask for none [ZSPIRE_CP_DEFAULT_TTL, 24h]
    #[arg(long, global = true, value_name = "DURATION")]
    default_ttl: Option<String>,
    /// Longest lifetime that may be asked for [ZSPIRE_CP_MAX_TTL, 90d]
    #[arg(long, global = true, value_name = "DURATION")]
    max_ttl: Option<String>,
    /// Log level or filter [ZSPIRE_CP_LOG, info]
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
}

impl From<Flags> for Options {
    fn from(flags: Flags) -> Self {
        Self {
            address: flags.address,
            admin: flags.admin,
            mesh: flags.mesh,
            state: flags.state,
            trust_domain: flags.trust_domain,
            hostnames: flags.hostnames,
            cacerts: flags.cacerts,
            jwt_issuer: flags.jwt_issuer,
            jwt_audience: flags.jwt_audience,
            jwt_jwks: flags.jwt_jwks,
            jwt_jwks_root: flags.jwt_jwks_root,
            trusted_node_accounts: flags.trusted_node_accounts,
            default_ttl: flags.default_ttl,
            max_ttl: flags.max_ttl,
            log: flags.log,
        }
    }
}

/// Runs what was asked for.
pub(crate) fn run(args: Args) -> ExitCode {
    let config = match Config::load(args.flags.into()) {
        Ok(config) => config,
        Err(error) => return complain(error, exit::usage()),
    };
    match args.command {
        None | Some(Command::Run) => serve(config),
        Some(Command::Token { node, ttl, .. }) => match zspire_control_plane::create_token(&config, &node, ttl) {
            Ok(token) => exit::print(&format!("{}\n", *token)),
            Err(error) => complain(error, exit::finding()),
        },
        Some(Command::Issued { limit, output }) => match zspire_control_plane::issued(&config.state, limit) {
            Ok(records) => exit::print(&render(&records, output)),
            Err(error) => complain(error, exit::cannot_reach()),
        },
    }
}

/// The settings as a section of the reference page.
pub(crate) fn reference() -> String {
    let mut page = String::from(
        "\n## The control plane\n\n`zspire control-plane` has a flag for each of its variables (`--help`); the flag wins.\n\n\
         | Variable | Default | Meaning |\n|---|---|---|\n",
    );
    for setting in SETTINGS {
        let default = if setting.default.is_empty() { "–".to_owned() } else { format!("`{}`", setting.default) };
        page += &format!("| `{}` | {default} | {} |\n", setting.name, sentence(setting.help));
    }
    page
}

/// With a capital letter and a full stop.
fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).chain(['.']).collect()).unwrap_or_default()
}

fn serve(config: Config) -> ExitCode {
    // Every node holds a connection open. Where it cannot be raised, the log says so when descriptors run out.
    let _ = zspire_sys::privileges::raise_descriptor_limit();
    match zspire_control_plane::run(config) {
        Ok(()) => exit::OK,
        Err(error) if error.is_configuration() => complain(error, exit::usage()),
        Err(error) => complain(error, exit::finding()),
    }
}

fn render(records: &[IssuedRecord], output: Output) -> String {
    if let Output::Json = output {
        let text = serde_json::to_string_pretty(records).expect("texts have a JSON form");
        return format!("{text}\n");
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["ISSUED", "IDENTITY", "CALLER", "EXPIRES", "SERIAL"]);
    for record in records {
        table.add_row([&record.issued_at, &record.identity, &record.caller, &record.not_after, &record.serial]);
    }
    format!("{}\n", table.trim_fmt())
}

/// Checks files as the control plane and the proxy would read them.
pub(crate) fn validate(files: &[PathBuf]) -> ExitCode {
    match zspire_control_plane::validate(files) {
        Ok(Validated { summary, findings }) => {
            let said = exit::print(&format!(
                "valid: {} workloads, {} services, {} policies\n{}",
                summary.workloads,
                summary.services,
                summary.policies,
                findings.iter().map(|finding| format!("finding: {finding}\n")).collect::<String>(),
            ));
            if findings.is_empty() { said } else { exit::finding() }
        }
        Err(error) => complain(error, exit::finding()),
    }
}

fn complain(error: impl std::error::Error + Send + Sync + 'static, code: ExitCode) -> ExitCode {
    exit::complain(anyhow::Error::new(error), code)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flags, variables and defaults are told in one place each; they must not drift apart.
    #[test]
    fn every_setting_has_a_flag_whose_help_names_it_and_its_default() {
        let command = Args::augment_args(clap::Command::new("control-plane"));
        let helps: Vec<_> = command.get_arguments().filter_map(|it| it.get_help()).map(ToString::to_string).collect();
        for setting in SETTINGS {
            let expected = match setting.default {
                "" => format!("[{}]", setting.name),
                default => format!("[{}, {default}]", setting.name),
            };
            assert!(helps.iter().any(|help| help.ends_with(&expected)), "no flag ends with {expected}: {helps:#?}");
        }
    }
}
