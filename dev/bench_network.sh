#!/bin/sh
# Two machines made of this one: two network namespaces, joined by a cable (veth) of a given rate in each direction,
# with one core each. Trains a model over it and compares the time that sums of gradients take with the least that is
# possible, 2 (N - 1) / N * bytes / rate. Linux, root, ip and tc (Debian: iproute2), two cores.
#
#   sh dev/bench_network.sh [OPTIONS OF train_gpt2]     RATE=1gbit UPDATES=6 INIT=d12 MPIS="mpich openmpi"
set -u
cd "$(dirname "$0")/.." || exit 1
rate=${RATE:-1gbit} updates=${UPDATES:-6} init=${INIT:-d12}
folder=build/network
# Without these Open MPI 4.1 takes 1.0 to 1.4 of the least time for sums in float32, 1.4 to 2.1 in bfloat16.
several="--mca btl_tcp_links 2 --mca btl_tcp_eager_limit 4194304 --mca btl_tcp_max_send_size 4194304"
mkdir -p $folder || exit 1

fail() {
    echo "bench_network.sh: $*" >&2
    exit 1
}

take_down() { ip netns del tg0 2>/dev/null; ip netns del tg1 2>/dev/null; }
trap take_down EXIT
trap 'exit 1' INT TERM
take_down
ip netns add tg0 && ip netns add tg1 && ip link add cable netns tg0 type veth peer name cable netns tg1 ||
    fail "no network namespaces: root and iproute2 are needed"
for i in 0 1; do
    ip netns exec tg$i sh -c "ip link set lo up && ip addr add 10.99.0.$((i + 1))/24 dev cable && ip link set cable up &&
        tc qdisc add dev cable root tbf rate $rate burst 256k latency 20ms" || fail "no cable"
done
for i in 0 1; do # the cable is plugged in a moment later
    until ip netns exec tg$i ip link show cable | grep -q 'state UP'; do sleep 0.1; done
done

# What an MPI calls in place of ssh: [options] HOST COMMAND. It runs the command on that host, with a core of its own.
cat >$folder/on_host <<'END'
#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1 number=$((${1##*.} - 1))
shift
exec ip netns exec tg$number unshare --uts sh -c "hostname host$number; exec taskset -c $number sh -c '$*'"
END
chmod +x $folder/on_host
make -s build/data/stories_train.txt build/stories_tokenizer/merges.txt || exit 1

run() { # NAME MPIRUN...
    name=$1
    shift
    rm -rf $folder/out
    ip netns exec tg0 timeout 900 "$@" "$PWD/build/$mpi/train_gpt2" --init "$init" --tokenizer build/stories_tokenizer \
        --train build/data/stories_train.txt --batch-size 8 --seq-len 64 --steps "$updates" --val-every "$updates" \
        --val-batches 1 --threads 1 --out $folder/out $options >$folder/said 2>&1 || { tail -n 5 $folder/said; fail "$name"; }
    grep -E '^(machine|model):' $folder/said | head -n 2
    trained=$(sed -n 's/^model: .* \([0-9]*\) of them trained$/\1/p' $folder/said)
    sed -n 's/^sums of gradients took \([0-9.]*\) s of the updates. \([0-9.]*\) s.*/\1 \2/p' $folder/said |
        awk -v name="$name" -v rate="$rate" -v n="$updates" -v bytes="$((trained * width))" '{
            unit = rate ~ /gbit/ ? 1e9 : 1e6; limit = bytes * 8 / (rate + 0) / unit
            printf "%s: %.2f s a sum, at least %.2f at %s: %.2f of it; %.2f s an update\n", name, $1 / n, limit, rate, $1 / n / limit, $2 / n }'
}

for mpi in ${MPIS:-mpich openmpi}; do
    make -s O="build/$mpi/" MPI="mpicc.$mpi" "build/$mpi/train_gpt2" || fail "no mpicc.$mpi"
    for precision in ${PRECISIONS:-float32 bfloat16}; do
        width=4
        [ $precision = float32 ] || width=2
        options="--sum-precision $precision $*"
        case $mpi in
        mpich)
            run "MPICH, sums in $precision" env UCX_TLS=tcp,self UCX_NET_DEVICES=cable mpirun.mpich -launcher ssh \
                -launcher-exec "$PWD/$folder/on_host" -hosts 10.99.0.1,10.99.0.2 -np 2 -ppn 1
            ;;
        openmpi)
            run "Open MPI, sums in $precision" mpirun.openmpi --allow-run-as-root --bind-to none --mca plm_rsh_agent "$PWD/$folder/on_host" \
                --host 10.99.0.1:1,10.99.0.2:1 -np 2 --mca btl_tcp_if_include 10.99.0.0/24 \
                --mca oob_tcp_if_include 10.99.0.0/24 ${OPENMPI_OPTIONS:-$several}
            ;;
        esac
    done
done
