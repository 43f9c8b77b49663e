# A machine whose first process is systemd, with the units of deploy/systemd and nothing else. Run in mount, process, IPC, network and
# control-group namespaces of its own. Its root is in memory, and nothing of the host's can be written to from there.
#
#   sh machine.sh ROOT PROGRAM UNITS
set -eu
root=$1 program=$2 units=$3
mount --make-rprivate /
mount -t tmpfs none "$root"
cd "$root"
mkdir -p usr etc/zspire/mesh.d dev proc sys run var/lib var/log var/tmp tmp root host units opt
for folder in bin sbin lib lib32 lib64; do
  if [ -L "/$folder" ]; then
    cp -P "/$folder" "$folder"
  elif [ -d "/$folder" ]; then
    mkdir "$folder"
    mount --rbind "/$folder" "$folder"
  fi
done
mount --rbind /usr usr
mount -o remount,bind,ro usr
cp "$program" opt/zspire
for unit in "$units"/*.service; do
  sed 's|^ExecStart=/usr/bin/zspire|ExecStart=/opt/zspire|' "$unit" >"units/${unit##*/}"
  # There is no journal here, and nobody waits half a minute for a watchdog.
  mkdir "units/${unit##*/}.d"
  log="append:/var/log/$(basename "$unit" .service).log"
  printf '[Service]\nStandardOutput=%s\nStandardError=%s\nWatchdogSec=5s\n' "$log" "$log" >"units/${unit##*/}.d/test.conf"
done
# The targets that services depend on are systemd's business; here they have nothing to do.
for target in basic sysinit shutdown network-online multi-user; do
  printf '[Unit]\nDefaultDependencies=no\n' >"units/$target.target"
done
echo 'root:x:0:0:root:/root:/bin/sh' >etc/passwd
printf 'root:x:0:\nnogroup:x:65534:\n' >etc/group
printf 'passwd: files systemd\ngroup: files systemd\nhosts: files\n' >etc/nsswitch.conf
echo '127.0.0.1 localhost' >etc/hosts
echo 0123456789abcdef0123456789abcdef >etc/machine-id
mount -t tmpfs none dev
for device in null zero full random urandom tty; do
  touch "dev/$device"
  mount --bind "/dev/$device" "dev/$device"
done
mkdir dev/shm dev/pts dev/mqueue dev/hugepages
mount -t tmpfs none dev/shm
mount -t devpts none dev/pts
ln -s pts/ptmx dev/ptmx
mount -t mqueue none dev/mqueue
mount -t proc none proc
mount -t sysfs none sys
mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs none run
ip link set lo up
pivot_root . host
umount -l /host
cd /
mount --make-rshared /
exec env -i container=test PATH=/usr/sbin:/usr/bin SYSTEMD_UNIT_PATH=/units /lib/systemd/systemd --system --unit=basic.target \
  --show-status=no
