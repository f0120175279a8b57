#!/bin/sh
# One model on several processes: is it the same model, and does a failure end all of them? Each MPI that is here
# is tried: those that Debian calls mpicc.mpich and mpicc.openmpi, else mpicc. Installs nothing. The last line is
# `N passed, N failed`.
#
#   make test-mpi          MPIS="mpich" make test-mpi       only that one
set -u
cd "$(dirname "$0")/.." || exit 1
folder=build/mpi-test
rm -rf $folder && mkdir -p $folder || exit 1
export OMP_WAIT_POLICY=passive # threads that wait do not take the processor from others
passed=0 failed=0

check() { # NAME COMMAND...: status 0 is a pass; what the command says is shown when it is not
    what="$mpi: $1"
    shift
    if "$@" >$folder/said 2>&1; then
        echo "ok     $what"
        passed=$((passed + 1))
    else
        echo "FAILED $what"
        sed 's/^/    /' $folder/said | tail -n 12
        failed=$((failed + 1))
    fi
}

# 77 examples of different lengths, which updates of 8 do not divide: in an epoch's last update some ranks have none.
./data/stories text --seed 1 --megabytes 0.02 >$folder/stories.txt
./data/stories questions --seed 1 --count 77 >$folder/questions.jsonl
./tokenizer train --vocab-size 400 --out $folder/tokenizer $folder/stories.txt >/dev/null || exit 1
MODEL="--tokenizer $folder/tokenizer --n-layer 2 --n-embd 64 --n-head 2 --n-positions 64 --threads 1"
SMALL="$MODEL --train $folder/questions.jsonl --batch-size 4 --accumulate 2 --learning-rate 1e-3 --quiet --matmul builtin"
FORTY="$SMALL --steps 40 --val-every 10 --save-every 10 --keep 9"
ADAPTER="--init $folder/alone-freeze --lora-rank 2 --lora-target c_ --threads 1 ${FORTY#"$MODEL"}"

run() { # N OUT OPTIONS...: N ranks of the program that was built with $mpi
    ranks=$1 out=$folder/$mpi-$2
    shift 2
    launch "$ranks" $program "$@" --out "$out"
}

launch() { # N PROGRAM...: a run that hangs ends after a minute
    ranks=$1
    shift
    timeout 60 $mpirun -np "$ranks" "$@"
}

results() { cut -d, -f1-4,6,7 "$folder/$1/log.csv"; } # of a run: all but the accuracy (a near tie may turn) and times

same_bits() { # RUN RUN
    results "$1" >$folder/a && results "$2" >$folder/b && cmp $folder/a $folder/b &&
        cmp "$folder/$1/model.safetensors" "$folder/$2/model.safetensors"
}

close() { # RUN RUN [LOSS NORM]: the same lines, with losses and norms that differ by at most these parts
    results "$1" >$folder/a && results "$2" >$folder/b && [ "$(wc -l <$folder/a)" = "$(wc -l <$folder/b)" ] &&
        paste -d, $folder/a $folder/b | awk -F, -v loss_limit="${3:-1e-6}" -v norm_limit="${4:-1e-5}" '
            NR == 1 { next }
            { loss = ($4 - $10) / $4; norm = $6 ? ($6 - $12) / $6 : 0
              if (loss < 0) loss = -loss
              if (norm < 0) norm = -norm
              if (loss > worst) worst = loss
              if (norm > worst_norm) worst_norm = norm
              if ($1 != $7 || $3 != $9 || !($4 > 0)) worst = 9 }
            END { print "worst difference: loss", worst, "norm", worst_norm
                  exit !(NR > 40 && worst <= loss_limit && worst_norm <= norm_limit) }'
}

compared() { # N NAME OPTIONS...: N ranks train as one process does
    ranks=$1 name=$2
    shift 2
    run "$ranks" "$name-$ranks" $FORTY "$@" && close "alone-$name" "$mpi-$name-$ranks" $limits
}
limits=
adapted() { run "$1" lora-"$1" $ADAPTER && close alone-lora "$mpi-lora-$1"; } # N

rounded() { # N NAME: with gradients that are sent in bfloat16
    run "$1" "$2-$1" $FORTY --dropout 0.1 --sum-precision bfloat16 && close alone-dropout "$mpi-$2-$1" $limits
}
different() { ! same_bits "$@" >/dev/null; }

resumed() { # FROM N: N ranks go on from checkpoint 20 of FROM
    from=$folder/$mpi-$1 to=$folder/$mpi-$1-resumed-$2
    mkdir -p "$to" && cp -r "$from"/checkpoint-000010 "$from"/checkpoint-000020 "$from"/log.csv "$to" &&
        run "$2" "$1-resumed-$2" $FORTY --dropout 0.1 --resume
}

# Failures. fails STATUS TEXT COMMAND...: ends within 20 seconds with that status (any but 0 when it is "any") and
# says TEXT, once.
fails() {
    wanted=$1 text=$2
    shift 2
    begin=$(date +%s)
    "$@" >$folder/output 2>&1
    status=$? seconds=$(($(date +%s) - begin))
    cat $folder/output
    echo "status $status after $seconds s; wanted: status $wanted, once: $text"
    { [ $status = "$wanted" ] || { [ "$wanted" = any ] && [ $status != 0 ]; }; } && [ $seconds -le 20 ] &&
        [ "$(grep -c "$text" $folder/output)" = 1 ]
}

differing() { # OPTIONS OPTIONS: ranks 0 and 1 have options of their own
    timeout 60 $mpirun -np 1 $program $MODEL $1 --out $folder/differs : -np 1 $program $MODEL $2 --out $folder/differs
}

apart() { # ONE OTHER: rank 1 has OTHER in place of ONE: a model's folder, a file of data, or the program
    rm -rf $folder/apart
    for here in 0 1; do
        mkdir -p $folder/apart/$here && cp -r $folder/alone-freeze $folder/apart/$here/model &&
            cp $folder/questions.jsonl $folder/apart/$here && cp $program $folder/apart/$here/train_gpt2 || return 9
    done
    rm -r "$folder/apart/1/$1" && cp -r "$2" "$folder/apart/1/$1" || return 9
    words="--init model --train questions.jsonl --steps 9 --threads 1 --quiet --out out"
    timeout 60 $mpirun -np 1 sh -c "cd $PWD/$folder/apart/0 && exec ./train_gpt2 $words" : \
        -np 1 sh -c "cd $PWD/$folder/apart/1 && exec ./train_gpt2 $words"
}

shim() { # NAME: builds $folder/NAME.so, which takes the place of functions of MPI, from standard input
    cat >"$folder/$1.c" && $compiler -shared -fPIC -o "$folder/$1.so" "$folder/$1.c"
}

drifting() { # rank 1 gets another sum of gradients than rank 0, which the next evaluation must notice
    shim drift <<'END' || return 9
#include <mpi.h>
int MPI_Allreduce(const void *from, void *to, int n, MPI_Datatype type, MPI_Op op, MPI_Comm all) {
    int rank, status = PMPI_Allreduce(from, to, n, type, op, all);
    PMPI_Comm_rank(all, &rank);
    if (type == MPI_FLOAT && rank == 1) ((float *)to)[n / 2] += 1;
    return status;
}
END
    launch 2 env LD_PRELOAD="$PWD/$folder/drift.so" $program $SMALL --steps 40 --val-every 10 --out "$folder/$mpi-drifts"
}

full_disk() { # of rank 0, which alone writes: log.csv takes nothing
    mkdir -p $folder/full && ln -sf /dev/full $folder/full/log.csv && launch 2 $program $SMALL --steps 9 --out $folder/full
}

processes() { # of the run $name: the ranks in order
    for p in /proc/[0-9]*; do
        words=$(tr '\0' ' ' <"$p/cmdline") && [ "${words#"$program "}" != "$words" ] &&
            [ "${words%"--out $folder/$name "}" != "$words" ] && echo "${p#/proc/}"
    done 2>/dev/null | sort -n
}

# Sends a signal to a process of a long run of two ranks as soon as it trains, and waits for its end.
#   signalled SIGNAL WHOM: `launcher`, or a rank's number
signalled() {
    name=$mpi-signal-$1-$2
    rm -rf "$folder/$name"
    $mpirun -np 2 $program $SMALL --steps 100000 --val-every 100000 --out "$folder/$name" >$folder/output 2>&1 &
    launcher=$!
    tries=0
    until [ "$(wc -l <"$folder/$name/log.csv" 2>/dev/null || echo 0)" -gt 20 ] || [ $tries -gt 200 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    pids=$(processes)
    [ "$2" = launcher ] && target=$launcher || target=$(echo "$pids" | sed -n "$(($2 + 1))p")
    begin=$(date +%s)
    kill "-$1" $target || kill $launcher
    wait $launcher
    status=$? seconds=$(($(date +%s) - begin))
    sleep 1
    left=$(processes)
    saved=$(ls "$folder/$name" | grep -c '^checkpoint-[0-9]*$')
    cat $folder/output
    echo "SIG$1 to $2 ($target of $pids): status $status after $seconds s, checkpoints: $saved, still there: $left"
    [ -z "$left" ] && [ $seconds -le 20 ] && { [ $status != 0 ] || [ "$2" = launcher ]; }
}

stops_and_saves() { signalled "$1" "$2" && [ "$saved" = 1 ]; }
hanging_end() { # MPI_Finalize never returns: all is saved, and all end
    name=$mpi-hanging
    shim hang <<'END' || return 9
#include <unistd.h>
int MPI_Finalize(void) { for (;;) pause(); }
END
    begin=$(date +%s)
    launch 2 env LD_PRELOAD="$PWD/$folder/hang.so" $program $SMALL --steps 9 --out "$folder/$name" # Open MPI says 1 then
    status=$? seconds=$(($(date +%s) - begin))
    echo "status $status after $seconds s"
    [ "$seconds" -ge 10 ] && [ "$seconds" -le 20 ] && [ -f "$folder/$name/model.safetensors" ] && [ -z "$(processes)" ] &&
        { [ "$mpi" != mpich ] || [ $status = 0 ]; }
}
ends_all() { signalled "$1" "$2"; }

# What one process without MPI does is the measure of all.
mpi=none
alone() { name=$1 && shift && ./train_gpt2 $FORTY "$@" --out "$folder/alone-$name"; }
check "dropout, uneven examples, accumulation" alone dropout --dropout 0.1
check "frozen tensors" alone freeze --freeze 'wte|wpe|h.0.'
check "bfloat16" alone bfloat16 --precision bfloat16
check "an adapter (LoRA)" ./train_gpt2 $ADAPTER --out $folder/alone-lora
program=./train_gpt2

if [ -z "${MPIS:-}" ]; then
    MPIS=
    for mpi in mpich openmpi; do
        command -v mpicc.$mpi >/dev/null && command -v mpirun.$mpi >/dev/null && MPIS="$MPIS $mpi"
    done
    [ -n "$MPIS" ] || { command -v mpicc >/dev/null && command -v mpirun >/dev/null && MPIS=mpicc; }
    [ -n "$MPIS" ] || echo "dev/mpi_test.sh: SKIPPED: no MPI here (MPI=1 sh dev/deps.sh installs one)"
fi

for mpi in $MPIS; do
    program=build/$mpi/train_gpt2 compiler=mpicc.$mpi
    [ "$mpi" = mpicc ] && compiler=mpicc
    case $mpi in
    openmpi) mpirun="mpirun.openmpi --allow-run-as-root --oversubscribe" ;;
    mpich) mpirun=mpirun.mpich ;;
    *) mpirun=mpirun ;;
    esac
    check "builds" make -s O="build/$mpi/" MPI=$compiler $program
    check "1 rank trains" run 1 dropout-1 $FORTY --dropout 0.1
    check "1 rank gives the same bits as no MPI" same_bits alone-dropout "$mpi-dropout-1"
    for ranks in 2 3 4; do
        check "$ranks ranks: dropout, uneven examples, accumulation" compared $ranks dropout --dropout 0.1
    done
    check "2 ranks again" run 2 again-2 $FORTY --dropout 0.1
    check "2 ranks twice give the same bits" same_bits "$mpi-dropout-2" "$mpi-again-2"
    check "3 ranks: frozen tensors" compared 3 freeze --freeze 'wte|wpe|h.0.'
    check "3 ranks: an adapter (LoRA)" adapted 3
    # A rounding to bfloat16 that falls the other way moves a loss further than the order of sums does.
    limits="2e-4 2e-3"
    check "2 ranks: bfloat16" compared 2 bfloat16 --precision bfloat16
    for ranks in 2 3; do
        check "$ranks ranks: sums in bfloat16" rounded $ranks rounded
        check "$ranks ranks: which are not those in float32" different "$mpi-dropout-$ranks" "$mpi-rounded-$ranks"
        check "$ranks ranks again: sums in bfloat16" rounded $ranks rounded-again
        check "$ranks ranks: the same bits" same_bits "$mpi-rounded-$ranks" "$mpi-rounded-again-$ranks"
    done
    limits=
    check "2 ranks resume" resumed dropout-2 2
    check "2 ranks resume with the same bits" same_bits "$mpi-dropout-2" "$mpi-dropout-2-resumed-2"
    check "3 ranks resume what 2 began" resumed dropout-2 3
    check "3 ranks resume what 2 began, with the same losses" close "$mpi-dropout-2" "$mpi-dropout-2-resumed-3"

    check "a wrong option is said once" fails 2 "unknown option --stpes" launch 2 $program $SMALL --stpes 9
    check "data that is nowhere is said once" fails 1 "nowhere.jsonl" \
        launch 2 $program $MODEL --train $folder/nowhere.jsonl --out $folder/nowhere
    check "other options on another rank" fails 1 "rank 1 on .*options: not the same as on rank 0" \
        differing "--train $folder/questions.jsonl" "--train $folder/questions.jsonl --seed 2"
    check "a rank that cannot see the data" fails 1 "rank 1 on .*nowhere.jsonl" \
        differing "--train $folder/questions.jsonl" "--train $folder/nowhere.jsonl"
    sed '1s/cat/dog/; 1s/the/a/' $folder/questions.jsonl >$folder/others.jsonl
    { cat $program && echo; } >$folder/another && chmod +x $folder/another
    check "another model on rank 1" fails 1 "rank 1 on .*the model: not the same as on rank 0" \
        apart model $folder/alone-dropout
    check "other data on rank 1" fails 1 "rank 1 on .*questions.jsonl: not the same as on rank 0" \
        apart questions.jsonl $folder/others.jsonl
    check "another program on rank 1" fails 1 "rank 1 on .*the program: not the same as on rank 0" \
        apart train_gpt2 $folder/another
    check "weights that drift apart are noticed" fails 1 "rank 1 on .*the model: not the same as on rank 0" drifting
    check "a full disk" fails 1 "log.csv: " full_disk
    for signal in TERM INT USR1; do
        check "SIG$signal to rank 1 stops all, which save" stops_and_saves $signal 1
    done
    check "SIGUSR1 to the launcher stops all, which save" stops_and_saves USR1 launcher
    check "SIGKILL to rank 1 ends all" ends_all KILL 1
    check "SIGTERM to the launcher ends all" ends_all TERM launcher
    check "an MPI that hangs at the end" hanging_end
    check "a build without MPI" fails 1 "started 2 times, but built without MPI" launch 2 ./train_gpt2 $SMALL
done

# Another MPI's mpirun
case $MPIS in
*mpich*openmpi*)
    mpi=mpich mpirun=mpirun.mpich program=build/openmpi/train_gpt2
    check "Open MPI's program by MPICH's mpirun" fails 1 "started 2 times, but not as one program" launch 2 $program $SMALL
    mpi=openmpi mpirun="mpirun.openmpi --allow-run-as-root --oversubscribe" program=build/mpich/train_gpt2
    check "MPICH's program by Open MPI's mpirun" fails 1 "started 2 times, but not as one program" launch 2 $program $SMALL
    ;;
esac

echo "$passed passed, $failed failed"
[ $failed = 0 ]
