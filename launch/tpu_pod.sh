#!/usr/bin/env bash
# The same command on all workers of a TPU VM, which find each other:
#
#     launch/tpu_pod.sh [--dry-run] NAME ZONE --config=configs/deepcluster.py:imagenet --workdir=SHARED/runs/imagenet
#
# --dry-run prints the command and runs nothing. Ctrl-C and SIGTERM make the job save and stop. The exit code is that of
# the first worker whose is not 0, 75 after stopping.
#
# Environment: REMOTE_DIR   the repository on every worker, with its .venv (jaxclust, in the home folder)
set -euo pipefail

dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=yes
    shift
fi
if (($# < 2)) || [[ $1 == -* || $2 == -* ]]; then
    echo "usage: launch/tpu_pod.sh [--dry-run] NAME ZONE --config=FILE [flags of jaxclust.main]" >&2
    exit 2
fi
name=$1 zone=$2
shift 2

printf -v run '%q ' python -m jaxclust.main "$@"
printf -v folder '%q' "${REMOTE_DIR:-jaxclust}"
run="cd $folder && export PATH=\"\$PWD/.venv/bin:\$PATH\" && exec ${run% }"

on_workers() { # on_workers COMMAND
    local command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1")
    if [[ -n $dry ]]; then
        printf '%q ' "${command[@]}"
        echo
    else
        "${command[@]}" </dev/null
    fi
}

if [[ -n $dry ]]; then
    on_workers "$run"
    exit
fi

signals=0
on_signal() { # the end of ssh does not end what it started, so the workers are told
    signals=$((signals + 1))
    on_workers "pkill -TERM -f '[j]axclust.main'" || true # the brackets keep pkill from finding itself
}
trap on_signal INT TERM
set -m # its own process group: Ctrl-C then reaches this script alone
on_workers "$run" &
set +m
job=$!
seen=-1
until ((seen == signals)); do # a signal ends the waiting, not the job
    seen=$signals
    code=0
    wait "$job" || code=$?
done
exit "$code"
