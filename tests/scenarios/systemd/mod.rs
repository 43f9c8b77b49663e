//! The units of deploy/systemd under a real systemd, run by `make test-systemd`: as root, on a machine of their own in namespaces.
//!
//! What `systemd-analyze` cannot tell: that the programs do their work with no more than the units let them have.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use zspire_testkit::process::Process;
use zspire_testkit::{Mesh, mesh, uncaptured, until};

use crate::scenario;

const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/systemd");

/// A machine with a systemd.
struct Machine {
    process: Process,
    /// The first process of the machine, as the host counts.
    init: u32,
    group: PathBuf,
}

impl Machine {
    #[track_caller]
    fn start(mesh: &Mesh) -> Self {
        let (root, group) = (mesh.path("root"), control_group());
        fs::create_dir(&root).unwrap();
        fs::create_dir(&group).unwrap();
        let namespaces = "--mount --pid --ipc --uts --cgroup --net --fork --kill-child";
        let script = format!("echo $$ >\"$0/cgroup.procs\" && exec unshare {namespaces} sh -c \"$@\"");
        let program = mesh.pod("any").program(&[]).get_program().to_owned();
        let mut command = Command::new("sh");
        command.args(["-c", &script]).arg(&group).arg(include_str!("machine.sh")).arg("machine").arg(&root);
        command.arg(program).arg(UNITS);
        let process = mesh.process_of("machine", command);
        let mut machine = Self { process, init: 0, group };
        until("systemd to answer", || {
            assert!(machine.process.runs(), "{}", machine.process.log());
            let unshare = machine.process.id();
            let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap_or_default();
            machine.init = children.trim().parse().map_err(|_| "there is no machine yet".to_owned())?;
            machine.run("systemctl list-units >/dev/null")
        });
        machine
    }

    /// What a script prints on the machine.
    fn run(&self, script: &str) -> Result<String, String> {
        let init = self.init.to_string();
        let mut command = Command::new("nsenter");
        command.args(["--target", &init, "--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup"]);
        command.args(["env", "-i", "PATH=/opt:/usr/sbin:/usr/bin", "sh", "-euc", script]);
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(format!("{}\n{}", text(&output.stdout), text(&output.stderr))),
        }
    }

    /// The same of one that must succeed.
    #[track_caller]
    fn does(&self, script: &str) -> String {
        self.run(script).unwrap_or_else(|why| panic!("{script}: {why}\n{}", self.logs()))
    }

    /// A property of a unit.
    #[track_caller]
    fn shows(&self, unit: &str, property: &str) -> String {
        self.does(&format!("systemctl show --property={property} --value zspire-{unit}"))
    }

    #[track_caller]
    fn comes_to_show(&self, unit: &str, property: &str, expected: &str) {
        until(&format!("{property} of {unit} to be {expected}"), || match self.shows(unit, property) {
            shown if shown.contains(expected) => Ok(()),
            shown => Err(format!("{shown}\n{}", self.logs())),
        });
    }

    fn logs(&self) -> String {
        self.run("tail -n 20 /var/log/*.log").unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.process.kill();
        let removed = || Command::new("find").arg(&self.group).args(["-depth", "-type", "d", "-delete"]).status();
        // The kernel takes a moment until the processes of the group are gone.
        until("the machine's control group to be empty", || match removed() {
            Ok(status) if status.success() || !self.group.exists() => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }
}

/// A control group of our own, below where the host has those of the second version.
fn control_group() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mut second = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (place, kind) = (words.next()?, words.next()?);
        (kind == "cgroup2").then(|| Path::new(place).to_owned())
    });
    let place = second.next().expect("control groups of the second version are mounted");
    place.join(format!("zspire-test-{}", std::process::id()))
}

/// Two pods of the machine, and what the mesh says of them.
const PODS: &str = r#"
cat >/etc/zspire/mesh.d/mesh.yaml <<END
workloads:
- {uid: c, name: client, namespace: shop, serviceAccount: client, workloadIps: ["10.9.0.2"], protocol: HBONE, node: vm-1, network: ""}
- {uid: s, name: server, namespace: shop, serviceAccount: server, workloadIps: ["10.9.0.3"], protocol: HBONE, node: vm-1, network: ""}
END
ip link add br0 type bridge
ip addr add 10.9.0.1/24 dev br0
ip link set br0 up
for pod in client:2 server:3; do
  name=${pod%:*}
  ip netns add $name
  ip link add v$name type veth peer name eth0 netns $name
  ip link set v$name master br0 up
  ip -n $name addr add 10.9.0.${pod#*:}/24 dev eth0
  ip -n $name link set eth0 up
  ip -n $name link set lo up
done
"#;

const SETTINGS: &str = r#"
echo ZSPIRE_CP_ADDRESS=127.0.0.1:15012 >/etc/zspire/control-plane.env
printf '%s\n' NODE_NAME=vm-1 CA_ADDRESS=https://127.0.0.1:15012 XDS_ADDRESS=https://127.0.0.1:15012 >/etc/zspire/proxy.env
"#;

/// Asks the server from the client; both are Python's.
const ASKING: &str = "ip netns exec client python3 -c 'import urllib.request as it; \
                      print(it.urlopen(\"http://10.9.0.3:8080/passwd\", timeout=5).read().decode())'";

#[test]
fn units_do_their_work_with_what_they_may() {
    scenario(|| {
        let mesh = mesh().node("a").pod(uncaptured("any")).start();
        let join = fs::read_to_string(Path::new(UNITS).join("examples/join.conf")).unwrap();
        let machine = Machine::start(&mesh);
        machine.does(PODS);
        machine.does(SETTINGS);
        machine
            .does(&format!("cat >/units/zspire-proxy.service.d/join.conf <<'END'\n{join}END\nsystemctl daemon-reload"));
        machine.does("ip netns exec server python3 -m http.server 8080 --directory /etc >/dev/null 2>&1 &");

        // Without its token the proxy starts, and says what it waits for.
        machine.does("systemctl start --no-block zspire-proxy");
        machine.comes_to_show("node-agent", "ActiveState", "active");
        machine.comes_to_show("proxy", "StatusText", "not a join token");
        assert_eq!(machine.shows("proxy", "ActiveState"), "activating");
        machine.does("systemctl start zspire-control-plane");
        let state = "ZSPIRE_CP_STATE=/var/lib/private/zspire-control-plane";
        machine.does(&format!("{state} zspire control-plane token --node vm-1 >/etc/zspire/join-token"));
        machine.does("systemctl restart zspire-proxy");
        assert_eq!(machine.shows("proxy", "StatusText"), "ready");

        for pod in ["client", "server"] {
            machine.does(&format!(
                "zspire enroll --netns /run/netns/{pod} --name {pod} --namespace shop --service-account {pod}"
            ));
        }
        assert!(machine.does(ASKING).contains("root:x:0:0"));
        // The line is written when the connection has ended at the server's side as well.
        until("the server's side to tell of the client", || {
            let log = machine.does("cat /var/log/zspire-proxy.log");
            let told =
                log.contains("spiffe://cluster.local/ns/shop/sa/client") && log.contains("direction=\"inbound\"");
            if told { Ok(()) } else { Err(log) }
        });

        // Used once, the token may go.
        machine.does("rm /etc/zspire/join-token");
        has_no_more_than_it_needs(&machine);
        what_hangs_is_started_again(&machine);
        machine.does("systemctl restart zspire-node-agent");
        until("both pods to be served again", || match machine.does("zspire enrolled") {
            table if table.matches("served").count() == 2 => Ok(()),
            table => Err(table),
        });
        assert!(machine.does(ASKING).contains("root:x:0:0"));

        machine.does("systemctl stop zspire-proxy zspire-node-agent zspire-control-plane");
        for unit in ["proxy", "node-agent", "control-plane"] {
            let state = (machine.shows(unit, "ActiveState"), machine.shows(unit, "Result"));
            assert_eq!(state, ("inactive".to_owned(), "success".to_owned()), "{unit}\n{}", machine.logs());
        }
    });
}

/// The kernel says what each process may do.
fn has_no_more_than_it_needs(machine: &Machine) {
    // CAP_NET_ADMIN is 1 << 12, CAP_SYS_PTRACE 1 << 19, CAP_SYS_ADMIN 1 << 21.
    for (unit, capabilities) in
        [("proxy", "0000000000201000"), ("node-agent", "0000000000281000"), ("control-plane", "0000000000000000")]
    {
        let status = machine.does(&format!("cat /proc/{}/status", machine.shows(unit, "MainPID")));
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
            line.unwrap_or_default().split_whitespace().next().unwrap_or_default().to_owned()
        };
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            assert_eq!(of(set), capabilities, "{unit} {set}");
        }
        assert_eq!((of("NoNewPrivs"), of("Seccomp")), ("1".to_owned(), "2".to_owned()), "{unit}");
        assert_eq!(of("Uid") == "0", unit != "control-plane", "{unit}");
    }
}

/// A process that gives no sign of life is ended by the watchdog, and the next one serves the same pods.
fn what_hangs_is_started_again(machine: &Machine) {
    machine.does(&format!("kill -STOP {}", machine.shows("proxy", "MainPID")));
    machine.comes_to_show("proxy", "NRestarts", "1");
    machine.comes_to_show("proxy", "StatusText", "ready");
    until("the pods to be served by the next proxy", || {
        let said = machine.run(ASKING)?;
        if said.contains("root:x:0:0") { Ok(()) } else { Err(said) }
    });
}
