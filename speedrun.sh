#!/usr/bin/env bash
# The whole run, top to bottom: text -> tokenizer -> base model -> mid-training -> SFT -> RL -> report.md.
#
#     bash speedrun.sh [tiny|d12|d20|d26|d32] [--data builtin|FOLDER] [--kernels TEXT] [--fresh]
#
# Without a preset the machine decides: no GPU tiny, fewer than eight d12, eight d20. Finished stages are skipped and a
# stopped one goes on from its checkpoint; --fresh, or another preset or --data, sets the earlier run aside and starts over.
# Everything is kept under $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
py="$here/.venv/bin/python"
base="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"

die() { echo "error: $*" >&2; exit 2; }

# --- what was asked for ---

preset="" data="" kernels="auto" fresh=no
while [ $# -gt 0 ]; do
    case "$1" in
        tiny | d12 | d20 | d26 | d32)
            [ -z "$preset" ] || die "speedrun.sh takes one preset, got $preset and $1"
            preset="$1" ;;
        --fresh) fresh=yes ;;
        --data | --kernels)
            [ $# -gt 1 ] || die "speedrun.sh $1 needs a value"
            [ "$1" = --data ] && data="$2" || kernels="$2"
            shift ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) die "speedrun.sh knows the flags --data, --kernels and --fresh, got $1" ;;
        *) die "speedrun.sh preset must be tiny, d12, d20, d26 or d32, got $1" ;;
    esac
    shift
done
# A folder is meant relative to where the user stands; the programs run from the checkout.
[ -z "$data" ] || [ "$data" = builtin ] || data="$(realpath -m -- "$data")"
cd "$here"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
if [ -z "$preset" ]; then
    if [ "$gpus" -eq 0 ]; then preset=tiny; elif [ "$gpus" -lt 8 ]; then preset=d12; else preset=d20; fi
fi

# --- the presets: nanochat's numbers for d12 to d32, ours for tiny ---

depth=${preset#d} vocab=65536 shards=0
case "$preset" in
    tiny) depth=4 vocab=4096
        plan="5.2M parameters on text that Python itself brings: 9 minutes on two idle cores, 0 dollars, 1 GB of disk" ;;
    d12) shards=80 device_batch=32
        plan="186M parameters, 3.7B tokens: estimated 2.6 h on one H100 (\$8), 16 h on an RTX 4090, 20 GB of disk; not measured" ;;
    d20) shards=240 device_batch=32
        plan="561M parameters, 11.2B tokens: nanochat (Nov 2025) took 3 h 51 and about \$100 on 8x H100; ours not measured;
        estimated 70 GB of disk" ;;
    d26) shards=450 device_batch=16
        plan="1.08B parameters: nanochat (Nov 2025) says about 12 h and \$300 on 8x H100; ours not measured; estimated 130 GB
        of disk" ;;
    d32) shards=800 device_batch=8
        plan="1.88B parameters, 37.6B tokens: nanochat (Nov 2025) says about 33 h and \$800 on 8x H100; ours not measured;
        estimated 220 GB of disk" ;;
esac
if [ "$preset" = tiny ]; then
    data="${data:-builtin}"
    base_flags=(--sequence-len 256 --device-batch-size 8 --total-batch-size 2048 --num-steps 225
        --eval-every 50 --eval-tokens 20480 --save-every 50)
    mid_flags=(--device-batch-size 8 --rows-per-step 8 --num-steps 80 --eval-every 40 --save-every 40)
    sft_flags=(--device-batch-size 24 --rows-per-step 24 --num-steps 200 --lr-scale 0.5 --eval-every 100 --save-every 50)
    rl_flags=(--examples-per-step 16 --num-samples 8 --num-steps 20 --device-batch-size 32 --lr-scale 0.1 --max-tokens 48
        --eval-problems 100 --eval-every 20 --save-every 5)
else
    data="${data:-fineweb-edu}"
    base_flags=(--device-batch-size "$device_batch" --param-data-ratio 20)
    mid_flags=(--device-batch-size "$device_batch" --rows-per-step 256)
    sft_flags=(--device-batch-size 4 --rows-per-step 32)
    rl_flags=()
fi
ranks=$((gpus > 0 ? gpus : 1))

echo "preset $preset: $(echo $plan)"
echo "data $data$([ "$shards" = 0 ] || echo " ($shards shards)"), kernels $kernels, $gpus GPU(s), artifacts in $base"
bash scripts/setup.sh
SECONDS=0

# --- an earlier, different run is set aside, never overwritten ---

mkdir -p "$base"
# Children inherit the lock, so a trainer that outlived a killed speedrun.sh still holds it.
exec 9> "$base/.lock"
flock -n 9 || die "another run is at work in $base; wait for it, stop it, or set NANOCHAT_BASE_DIR"
identity="preset $preset, data $data"
if [ -f "$base/run.txt" ] && { [ "$fresh" = yes ] || [ "$(<"$base/run.txt")" != "$identity" ]; }; then
    aside="$base/earlier/$(date +%Y%m%d-%H%M%S)"
    echo "setting the earlier run ($(<"$base/run.txt")) aside in $aside"
    mkdir -p "$aside"
    for part in run.txt stamps tokenizer checkpoints metrics report mini_bundle; do
        [ ! -e "$base/$part" ] || mv "$base/$part" "$aside/"
    done
fi
echo "$identity" > "$base/run.txt"
mkdir -p "$base/stamps"
[ -e "$base/report/run.json" ] || "$py" -m scripts.report reset --preset "$preset"

# --- how a stage runs ---

# stage NAME COMMAND...: run it unless it is finished; its wall-clock goes to the report.
stage() {
    local name="$1" started=$SECONDS
    shift
    if [ -f "$base/stamps/$name" ]; then
        echo "== $name: finished earlier, skipped"
        return
    fi
    echo "== $name: $*"
    attend "$@"
    printf '{"stage": "%s", "seconds": %d, "started": "%s", "finished": "%s"}\n' "$name" $((SECONDS - started)) \
        "$(date -Iseconds -d "-$((SECONDS - started)) seconds")" "$(date -Iseconds)" >> "$base/report/timing.jsonl"
    touch "$base/stamps/$name"
}

# attend COMMAND...: wait for it and pass a stop on to it; a trainer saves, then ends with status 75.
attend() {
    local status=0
    "$@" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do  # the signal ended the wait, not the child
        status=0
        wait "$child" || status=$?
    done
    trap - TERM INT HUP
    return "$status"
}

run() { exec "$py" -m "$@"; }

# train PROGRAM FLAGS...: on every GPU there is.
train() {
    if [ "$ranks" -gt 1 ]; then
        OMP_NUM_THREADS=1 run torch.distributed.run --standalone --nproc_per_node "$ranks" -m "$@" \
            --resume auto --kernels "$kernels"
    fi
    run "$@" --resume auto --kernels "$kernels"
}

# Whatever happens, the report shows what the run had.
trap 'status=$?; "$py" -m scripts.report generate || true; exit $status' EXIT

# --- the recipe ---

stage dataset         run scripts.dataset --data "$data"
stage tok-train       run scripts.tok_train --data "$data" --vocab-size "$vocab"
stage tok-eval        run scripts.tok_eval --data "$data"
stage base-train      train scripts.base_train --data "$data" --depth "$depth" "${base_flags[@]}"
stage base-eval       run scripts.base_eval --data "$data" --depth "$depth" --kernels "$kernels"
stage mid-train       train scripts.mid_train --depth "$depth" "${mid_flags[@]}"
stage mid-eval        run scripts.chat_eval mid --depth "$depth" --kernels "$kernels"
stage sft-train       train scripts.chat_sft --depth "$depth" "${sft_flags[@]}"
stage sft-eval        run scripts.chat_eval sft --depth "$depth" --kernels "$kernels"
stage sft-eval-bare   run scripts.chat_eval sft --depth "$depth" --kernels "$kernels" --tasks arithmetic,sums --tools off
stage rl-train        train scripts.chat_rl --depth "$depth" "${rl_flags[@]}"
stage rl-eval         run scripts.chat_eval rl --depth "$depth" --kernels "$kernels"

trap - EXIT
"$py" -m scripts.report generate
echo
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s; read report.md, then talk to your model:"
echo "    .venv/bin/python -m scripts.chat_cli                                # a conversation"
echo "    .venv/bin/python -m scripts.chat_cli -p \"What is 37 plus 85?\"       # one question"
