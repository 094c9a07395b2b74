#!/usr/bin/env bash
# Needs:  gcloud, logged in, a project with TPU quota; one host with a TPU (v2-8, v3-8, v4-8, v5litepod-8). Never run.
# Starts: launch/gcp_tpu.sh NAME ZONE --config=configs/FILE.py --workdir=runs/RUN [main.py's flags]; strategy is tpu.
# Resume: on the VM by itself after exit codes 3 and 42; the same command goes on, on a new VM from the copy in runs/.
# Watch:  gcloud compute tpus tpu-vm ssh NAME --zone=ZONE -- -L 6006:localhost:6006 deit/watch.sh; localhost:6006.
# Stop:   gcloud compute tpus tpu-vm delete NAME --zone=ZONE: it costs until then. SPOT=1, ACCELERATOR=, VERSION= adapt.

# "Never run" is meant: this was written from the documentation, and nobody has executed it on a TPU. Read it first.

set -euo pipefail

if [ $# -lt 3 ]; then
    echo "error: launch/gcp_tpu.sh NAME ZONE --config=... --workdir=runs/RUN: the arguments must be three or more" >&2
    exit 1
fi
name=$1 zone=$2
shift 2

accelerator=${ACCELERATOR:-v3-8}
version=${VERSION:-tpu-vm-tf-2.15.1-pjrt} # its TensorFlow is built for the TPU and is the pinned version; PyPI's is not
run=''
for word in "$@"; do
    case $word in --workdir=*) run=${word#--workdir=} ;; esac
done
run=${run%/}
case $run in
    runs/?*) ;;
    *) echo "error: --workdir ($run) must be runs/RUN: it is copied from the VM and back" >&2 && exit 1 ;;
esac

cd "$(dirname "$0")/.."
tpu=(gcloud compute tpus tpu-vm)
remote() { "${tpu[@]}" ssh "$name" --zone="$zone" --command="$1"; }
send() { "${tpu[@]}" scp "$1" "$name:$2" --zone="$zone"; }
# Whether a command succeeds on the VM, as a word: an exit code may be that of gcloud or ssh. No word, no answer.
ask() {
    local word
    word=$(remote "if $1 >/dev/null; then echo yes; else echo no; fi") || return
    word=${word##*[[:space:]]}
    case $word in yes | no) echo "$word" ;; *) return 1 ;; esac
}

# 1. The VM, unless it is there. One that was taken away (SPOT=1) is still listed.
state() { "${tpu[@]}" describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null || true; }
case $(state) in
    PREEMPTED | TERMINATED) "${tpu[@]}" delete "$name" --zone="$zone" --quiet ;;
esac
if [ -z "$(state)" ]; then
    "${tpu[@]}" create "$name" --zone="$zone" --accelerator-type="$accelerator" --version="$version" ${SPOT:+--spot}
fi

packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
on_vm=deit/$(printf %q "$run")
[ -d "$run" ] || [ ! -d "$run.fetch-old" ] || mv "$run.fetch-old" "$run" # ended between the two mv of fetch

begin() {
    # 2. The committed files, and what there is of the run: a preempted VM is gone with its disk.
    local there
    git archive --format=tar.gz --output="$packed/code.tar.gz" HEAD
    send "$packed/code.tar.gz" code.tar.gz
    remote 'mkdir -p deit && tar -xzf code.tar.gz -C deit'
    if [ -d "$run" ]; then
        there=$(ask "test -d $on_vm")
        if [ "$there" = no ]; then
            tar -czf "$packed/run.tar.gz" -C "$run" .
            send "$packed/run.tar.gz" run.tar.gz
            remote "rm -rf sent && mkdir -p sent \$(dirname $on_vm) && tar -xzf run.tar.gz -C sent && mv sent $on_vm"
        fi
    fi

    # 3. The packages, beside the TensorFlow of the VM. VMs before Ubuntu 22.04 have no Python 3.10.
    remote 'cd deit && sudo apt-get install -y -q python3-venv && python3 -m venv --system-site-packages .venv &&
        .venv/bin/pip install -q --constraint constraints.txt --upgrade pip setuptools wheel &&
        .venv/bin/pip install -q --constraint constraints.txt --no-build-isolation --editable .'

    # 4. The run: in the background of the VM, so that a broken connection does not end it. Exit codes as in main.py.
    cat >"$packed/run.sh" <<LOOP
#!/usr/bin/env bash
cd ~/deit
for start in \$(seq 100); do
    .venv/bin/python main.py$(printf ' %q' "$@") --config.strategy=tpu
    code=\$?
    echo "start \$start ended with exit code \$code"
    [ "\$code" = 3 ] || [ "\$code" = 42 ] || break
done
echo "\$code" >exit-code
LOOP
    printf '#!/usr/bin/env bash\ncd ~/deit && exec .venv/bin/tensorboard --logdir runs\n' >"$packed/watch.sh"
    send "$packed/run.sh" deit/run.sh
    send "$packed/watch.sh" deit/watch.sh
    remote 'cd deit && chmod +x run.sh watch.sh && rm -f exit-code &&
        (nohup setsid ./run.sh >>run.log 2>&1 </dev/null &)'
}

# A run under way is left alone, and so is its code. The pattern is the whole command line, so it can't find this one.
running=$(ask 'pgrep -fx "bash [.]/run[.]sh"')
if [ "$running" = yes ]; then
    echo "already running"
else
    begin "$@"
fi

# 5. Every ten minutes the run comes here, so that a lost VM costs no more; Ctrl-C ends this part, not the run. The copy
# is replaced once the new one is whole: what the run has removed goes here, too.
fetch() { # tar ends with 1 where a file grew meanwhile
    local pack="tar -czf run.tar.gz --exclude='tmp-*' -C ${on_vm#deit/} ."
    remote "cd deit && { $pack || [ \$? = 1 ]; } && tail -n 3 run.log" &&
        "${tpu[@]}" scp "$name:deit/run.tar.gz" "$packed/back.tar.gz" --zone="$zone" &&
        rm -rf "$run.fetch-new" "$run.fetch-old" && mkdir -p "$run.fetch-new" &&
        tar -xzf "$packed/back.tar.gz" -C "$run.fetch-new" &&
        { [ ! -d "$run" ] || mv "$run" "$run.fetch-old"; } && mv "$run.fetch-new" "$run" && rm -rf "$run.fetch-old"
}
fetched=$SECONDS
until [ "$(ask 'test -f deit/exit-code')" = yes ]; do
    case $(state) in
        READY) ;;
        *) echo "error: $name is no longer there: the same command goes on from the copy in $run" >&2 && exit 3 ;;
    esac
    sleep 20
    if [ $((SECONDS - fetched)) -ge 600 ]; then
        fetch || echo "not fetched: trying again in ten minutes" >&2
        fetched=$SECONDS
    fi
done
fetch || echo "not fetched: the run is still in $on_vm of $name, if it has come so far" >&2
code=$(remote 'cat deit/exit-code')
echo "main.py ended with exit code $code; the VM still costs: ${tpu[*]} delete $name --zone=$zone"
exit "$code"
