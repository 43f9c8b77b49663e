# The machine that Istio's node agent is on: a root of its own, with what the chart mounts into the agent's container. Run in mount,
# process and IPC namespaces of its own, which end with it; as the first process there it only waits for that.
#
#   sh machine.sh ROOT PROGRAMS ZDS SECRETS READY NAME=NETNS...
set -eu
root=$1 programs=$2 zds=$3 secrets=$4 ready=$5
shift 5
mount -t tmpfs none "$root"
cd "$root"
mkdir -p proc tmp programs run/istio-cni run/ztunnel run/netns run/secrets/kubernetes.io/serviceaccount var \
  opt/cni/bin host/proc host/opt/cni/bin host/etc/cni/net.d host/var/run/netns
for folder in usr bin sbin lib lib32 lib64 etc dev sys; do
  if [ -L "/$folder" ]; then
    cp -P "/$folder" "$folder"
  elif [ -d "/$folder" ]; then
    mkdir "$folder"
    mount --rbind "/$folder" "$folder"
    case "$folder" in dev | sys) ;; *) mount -o remount,bind,ro "$folder" ;; esac
  fi
done
ln -s ../run var/run
mount --bind "$zds" run/ztunnel
mount --bind "$secrets" run/secrets/kubernetes.io/serviceaccount
mount --bind "$programs" programs
touch opt/cni/bin/istio-cni
mount --bind "$programs/istio-cni" opt/cni/bin/istio-cni
for pod in "$@"; do
  touch "run/netns/${pod%%=*}"
  mount -c --bind "${pod#*=}" "run/netns/${pod%%=*}"
done
mount --rbind run/netns host/var/run/netns
# The network plugin that pods have in this place; Istio's is chained to it.
echo '{ "cniVersion": "0.3.1", "name": "test", "plugins": [{ "type": "bridge" }] }' >host/etc/cni/net.d/10-test.conflist
# Istio's agent can be told to look for the kubelet's user: here is a process of that name.
cp "$(readlink -f "$(command -v sh)")" run/kubelet
run/kubelet -c 'while :; do sleep 1000; done' &
mount -t proc proc proc
mount --rbind proc host/proc
: >"$ready"
exec sleep infinity
