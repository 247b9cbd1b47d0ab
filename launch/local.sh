#!/usr/bin/env bash
# Several processes on this machine, each a host of one job:
#
#     launch/local.sh N --config=configs/deepcluster.py [flags of jaxclust.main]
#
# For trying out several hosts on CPU cores; one process alone already uses all GPUs of a machine. SIGTERM and Ctrl-C
# make the job save and stop, once more ends it. The exit code is 75 if the job stopped after saving, otherwise the first
# one that is not 0. No process is left behind.
#
# Environment: PYTHON          which Python (python)
#              JAX_PLATFORMS   what it computes on (cpu)
#              GRACE           seconds that the others have to end by themselves once one has ended with an error (90)
set -euo pipefail

count=${1:-}
if ! [[ $count =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local.sh N --config=FILE [flags of jaxclust.main]; N is a number of processes" >&2
    exit 2
fi
shift
python=${PYTHON:-python}
grace=${GRACE:-90}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
common=(--coordinator="127.0.0.1:$port" --num_processes="$count")
if ! [[ " $* " =~ \ --?config\.runtime\.cpu_devices[=\ ] ]]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    common+=(--config.runtime.cpu_devices=$((cores > count ? cores / count : 1)))
fi

pids=() # of the processes that still run; each leads a process group
signals=0
code=0

ask() { # asks all to save and stop
    local pid
    for pid in ${pids[@]+"${pids[@]}"}; do kill -s TERM "$pid" 2>/dev/null || true; done
}

end() { # ends all, with whatever they started
    local pid
    for pid in ${pids[@]+"${pids[@]}"}; do kill -s KILL -- "-$pid" 2>/dev/null || true; done
}

on_signal() {
    signals=$((signals + 1))
    if ((signals == 1)); then ask; else end; fi
}

collect() { # takes those that have ended out of `pids`, and the exit code that matters into `code`
    local pid status running=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            running+=("$pid")
            continue
        fi
        status=0
        wait "$pid" || status=$?
        kill -s KILL -- "-$pid" 2>/dev/null || true # what it started and left
        if ((status == 75 || (status && !code))); then code=$status; fi
    done
    pids=(${running[@]+"${running[@]}"})
}

trap on_signal INT TERM HUP
trap end EXIT
set -m # a process group for each: Ctrl-C then reaches this script alone
for ((id = 0; id < count && !signals; id++)); do
    "$python" -m jaxclust.main "${common[@]}" --process_id="$id" "$@" </dev/null &
    pids+=($!)
done
set +m
if ((signals)); then ask; fi # the one that was just starting, too
if ((!${#pids[@]})); then exit 143; fi

deadline=0
while ((${#pids[@]})); do
    sleep 0.2 || true # which Ctrl-C ends too
    collect
    if ((code && !deadline)); then deadline=$((SECONDS + grace)); fi
    if ((deadline && SECONDS > deadline && ${#pids[@]})); then
        echo "local.sh: ${#pids[@]} of $count processes still ran $grace s after the first had ended, now killed" >&2
        end
    fi
done
exit "$code"
