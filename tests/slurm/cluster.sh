#!/usr/bin/env bash
# Starts a Slurm of two nodes on this machine, and runs a command as its login node. Everything ends with the command.
#
#   sudo tests/slurm/cluster.sh FOLDER COMMAND [ARG ...]
#
# Debian packages: slurmctld slurmd slurm-client munge iproute2. FOLDER is the file system that the nodes share. The nodes n1
# (10.77.0.11) and n2 (10.77.0.12) and the login node ctl (10.77.0.1) are network and UTS namespaces on a bridge; `ip link set
# vn2 down` cuts n2 off. They share processes and /dev/shm, which real nodes do not. Each node has two GPUs that are only
# device files, so that Slurm sets CUDA_VISIBLE_DEVICES.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
if [ -z "${XPYD_SLURM_INSIDE:-}" ]; then
    export XPYD_SLURM_INSIDE=1
    exec unshare --net --mount --uts --ipc --pid --fork --mount-proc "$0" "$folder" "$@"
fi
mkdir -p "$folder"/{etc,log,state,dev,munge,spool}
mount --make-rprivate /
mkdir -p /run/netns
mount -t tmpfs tmpfs /run/netns
hostname ctl
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.1/24 dev br0
ip link set br0 up
hosts=$'127.0.0.1 localhost\n10.77.0.1 ctl\n'
slurm_nodes=""
for number in 1 2; do
    node=n$number address=10.77.0.1$number
    hosts+="$address $node"$'\n'
    slurm_nodes+="NodeName=$node NodeAddr=$address CPUs=$(nproc) RealMemory=4000 Gres=gpu:h100:2 State=UNKNOWN"$'\n'
    ip netns add $node
    ip link add v$node type veth peer name eth0 netns $node
    ip link set v$node master br0 up
    ip -n $node addr add $address/24 dev eth0
    ip -n $node link set eth0 up
    ip -n $node link set lo up
    ip -n $node route add default via 10.77.0.1
done
printf '%s' "$hosts" > "$folder/etc/hosts"
mount --bind "$folder/etc/hosts" /etc/hosts

[ -s "$folder/etc/munge.key" ] || head -c 1024 /dev/urandom > "$folder/etc/munge.key"
chmod 400 "$folder/etc/munge.key"
chown -R root "$folder/etc" "$folder/munge"
chmod 755 "$folder/munge"
munged --force --key-file="$folder/etc/munge.key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --seed-file="$folder/munge/seed" --log-file="$folder/log/munged.log"

for index in 0 1; do
    [ -c "$folder/dev/nvidia$index" ] || mknod "$folder/dev/nvidia$index" c 1 3
done
printf 'AutoDetect=off\nNodeName=n[1-2] Name=gpu Type=h100 File=%s\n' "$folder/dev/nvidia[0-1]" > "$folder/etc/gres.conf"
cat > "$folder/etc/slurm.conf" <<CONF
ClusterName=xpyd
SlurmctldHost=ctl(10.77.0.1)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/log/slurmctld.pid
SlurmdPidFile=$folder/log/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=5
GresTypes=gpu
${slurm_nodes}PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=YES State=UP
CONF
export SLURM_CONF=$folder/etc/slurm.conf
slurmctld -D > "$folder/log/slurmctld.out" 2>&1 &
daemons=($!)
for node in n1 n2; do
    mkdir -p "$folder/spool/$node"
    # `ip netns exec` would hide /sys/fs/cgroup. One host can be only one node, so each has its own name.
    nsenter --net=/run/netns/$node unshare --uts sh -c "hostname $node; exec slurmd -D -N $node" \
        > "$folder/log/slurmd.$node.out" 2>&1 &
    daemons+=($!)
done
trap 'scancel --quiet --user root; kill "${daemons[@]}" 2> /dev/null' EXIT
for _ in $(seq 120); do
    [ "$(sinfo --noheader --states=idle --format=%D)" = 2 ] && break
    sleep 0.5
done
"$@"
