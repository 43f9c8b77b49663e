//! The words of the schema for the closed choices of the model.

use serde::Deserialize;
use zspire_model::Protocol;
use zspire_model::policy::{Action, Scope as PolicyScope};
use zspire_model::service::{HealthPolicy, IpFamilies, Mode, Scope, Visibility};
use zspire_model::workload::{ApplicationProtocol, Health, NetworkMode, WorkloadType};

/// The words of the file for the values of the model.
macro_rules! words {
    ($(
        $word:ident => $model:ident { $($(#[$attribute:meta])* $text:literal $(| $alias:literal)* => $value:ident,)+ }
    )+) => {$(
        #[derive(Deserialize, Clone, Copy)]
        pub(super) enum $word {
            $( #[serde(rename = $text $(, alias = $alias)*)] $value, )+
        }

        impl From<$word> for $model {
            fn from(word: $word) -> Self {
                match word { $( $word::$value => Self::$value, )+ }
            }
        }
    )+};
}

words! {
    ProtocolWord => Protocol { "TCP" => Tcp, "HBONE" => Hbone, }
    NetworkModeWord => NetworkMode { "Standard" => Standard, "HostNetwork" => HostNetwork, }
    HealthWord => Health { "Healthy" => Healthy, "Unhealthy" => Unhealthy, }
    WorkloadTypeWord => WorkloadType {
        "deployment" | "Deployment" => Deployment,
        "cronjob" | "CronJob" => CronJob,
        "pod" | "Pod" => Pod,
        "job" | "Job" => Job,
    }
    ApplicationProtocolWord => ApplicationProtocol { "NONE" | "None" => None, "PROXY" | "Proxy" => Proxy, }
    ScopeWord => Scope {
        "Region" => Region,
        "Zone" => Zone,
        "Subzone" => Subzone,
        "Node" => Node,
        "Cluster" => Cluster,
        "Network" => Network,
    }
    ModeWord => Mode {
        "Standard" => Standard, "Strict" => Strict, "Failover" => Failover, "Passthrough" => Passthrough,
    }
    HealthPolicyWord => HealthPolicy { "OnlyHealthy" => OnlyHealthy, "AllowAll" => AllowAll, }
    IpFamiliesWord => IpFamilies {
        "Automatic" => Automatic, "IPv4" | "IPv4Only" => Ipv4, "IPv6" | "IPv6Only" => Ipv6, "Dual" => Dual,
    }
    VisibilityWord => Visibility { "Public" => Public, "Namespace" => Namespace, }
    PolicyScopeWord => PolicyScope {
        "Global" => Global, "Namespace" => Namespace, "WorkloadSelector" => WorkloadSelector,
    }
    ActionWord => Action { "Allow" => Allow, "Deny" => Deny, }
}

macro_rules! default_words {
    ($($word:ident = $value:ident),+ $(,)?) => {$(
        impl Default for $word {
            fn default() -> Self {
                Self::$value
            }
        }
    )+};
}

default_words! {
    ProtocolWord = Tcp,
    NetworkModeWord = Standard,
    HealthWord = Healthy,
    WorkloadTypeWord = Deployment,
    ModeWord = Standard,
    HealthPolicyWord = OnlyHealthy,
    VisibilityWord = Public,
}
