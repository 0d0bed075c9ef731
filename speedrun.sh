#!/usr/bin/env bash
# The whole run, top to bottom: text -> tokenizer -> base model -> mid-training -> SFT -> RL -> report.md.
#
#     bash speedrun.sh [tiny|d12|d20|d26|d32] [--data builtin|fineweb-edu|FOLDER] [--kernels TEXT] [--fp8] [--fresh]
#                      [--gpus N] [--dry-run] [--rehearse]
#
# Without a preset the machine decides: no GPU tiny, fewer than eight d12, eight d20. Finished stages are skipped and a
# stopped one goes on from its checkpoint; --fresh, or another preset or --data, sets the earlier run aside and starts over.
# --dry-run prints every command and runs none; --rehearse runs the whole recipe at its shapes with a few steps a stage.
# Everything is kept under $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
py="$here/.venv/bin/python"
base="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"

die() { echo "error: $*" >&2; exit 2; }

# --- what was asked for ---

preset="" data="" kernels="auto" gpus="" fresh=no dry=no rehearse=no fp8=()
while [ $# -gt 0 ]; do
    case "$1" in
        tiny | d12 | d20 | d26 | d32)
            [ -z "$preset" ] || die "speedrun.sh takes one preset, got $preset and $1"
            preset="$1" ;;
        --fresh) fresh=yes ;;
        --dry-run) dry=yes ;;
        --rehearse) rehearse=yes ;;
        --fp8) fp8=(--fp8) ;;
        --data | --kernels | --gpus)
            [ $# -gt 1 ] || die "speedrun.sh $1 needs a value"
            declare "${1#--}=$2"
            shift ;;
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) die "speedrun.sh knows the flags --data, --kernels, --fp8, --gpus, --fresh, --dry-run and --rehearse, got $1" ;;
        *) die "speedrun.sh preset must be tiny, d12, d20, d26 or d32, got $1" ;;
    esac
    shift
done
cd_from="$PWD"
cd "$here"

found=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || found=0
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then  # the programs see no more; -1 ends the list
    visible=",$CUDA_VISIBLE_DEVICES" visible="${visible%%,-1*}"
    IFS=, read -ra visible <<< "${visible#,}"
    [ "$found" -le ${#visible[@]} ] || found=${#visible[@]}
fi
gpu_field() { nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits | sort -n | head -1; }
if [ -z "$preset" ]; then
    if [ "$found" -eq 0 ]; then preset=tiny; elif [ "$found" -lt 8 ]; then preset=d12; else preset=d20; fi
fi
case "$gpus" in
    "" | [1-9] | [1-9][0-9] | [1-9][0-9][0-9]) ;;
    *) die "speedrun.sh --gpus must be a whole number from 1 to 999, got $gpus" ;;
esac
if [ "$preset" = tiny ]; then
    [ "${gpus:-1}" = 1 ] || die "preset tiny runs in one process, so --gpus must be 1, got $gpus"
    [ ${#fp8[@]} -eq 0 ] || die "speedrun.sh --fp8 is for d12 to d32, got it with preset tiny"
    gpus=1
fi
kind=""
if [ "$found" -gt 0 ]; then
    gpus="${gpus:-$found}" kind=$(gpu_field name) memory=$(($(gpu_field memory.total) / 1024))
    [ "$dry" = yes ] || [ "$gpus" -le "$found" ] || die "speedrun.sh --gpus must be from 1 to the $found here, got $gpus"
elif [ "$preset" = tiny ]; then
    gpus=0
elif [ "$dry" = yes ]; then
    gpus="${gpus:-8}" kind=H100 memory=80
    echo "no GPU here: printed as for $gpus x H100 of 80 GiB"
else
    listed="nvidia-smi lists${CUDA_VISIBLE_DEVICES+ and CUDA_VISIBLE_DEVICES shows}"
    die "preset $preset needs a GPU that $listed, found none (tiny runs without; --dry-run only prints)"
fi
ranks=$((gpus > 0 ? gpus : 1))

[ "$dry" = yes ] || bash scripts/setup.sh
[ -x "$py" ] || py=python3  # of a dry run on a fresh clone
SECONDS=0

# --- the presets: nanochat's numbers for d12 to d32, but for a fifth to a quarter more shards, since rows that begin with
#     a document lose text: 23 % of drawn lengths (bench_packing); ours for tiny ---

depth=${preset#d}
case "$preset" in
    tiny) depth=4 ;;
    d12) shards=100 ;;
    d20) shards=300 ;;
    d26) shards=560 ;;
    d32) shards=960 ;;
esac
if [ "$preset" = tiny ]; then
    echo "preset tiny: 5.2M parameters on text that Python itself brings: 9 minutes on two idle cores, 0 dollars, 1 GB of disk"
    data="${data:-builtin}" vocab=4096
    base_flags=(--sequence-len 256 --device-batch-size 8 --total-batch-size 2048 --num-steps 225
        --eval-every 50 --eval-tokens 20480 --save-every 50)
    mid_flags=(--tasks tiny --device-batch-size 8 --rows-per-step 8 --num-steps 80 --eval-every 40 --eval-batches 8
        --save-every 40)
    sft_flags=(--tasks tiny --device-batch-size 24 --rows-per-step 24 --num-steps 200 --lr-scale 0.5 --eval-every 100
        --eval-batches 8 --save-every 50)
    rl_flags=(--task arithmetic-hard --examples-per-step 16 --num-samples 8 --num-steps 20 --device-batch-size 32
        --lr-scale 0.1 --max-tokens 48 --top-k 0 --eval-problems 100 --eval-every 20 --save-every 5)
    rl_eval_flags=()
else
    plan=(-m scripts.plan --depth "$depth" --gpus "$gpus" --gpu "$kind" --memory-gib "$memory")
    if [ "$dry" = yes ]; then "$py" "${plan[@]}"; else "$py" "${plan[@]}" --must-fit; fi
    batches=$("$py" "${plan[@]}" --batches)  # nanochat's, or what comes nearest with so many GPUs
    read -r rows step_rows sft_rows sft_step_rows problems <<< "$batches"
    data="${data:-fineweb-edu}" vocab=65536
    base_flags=(--device-batch-size "$rows" --total-batch-size $((step_rows * 2048)) --param-data-ratio 20 "${fp8[@]}")
    mid_flags=(--device-batch-size "$rows" --rows-per-step "$step_rows" "${fp8[@]}")
    sft_flags=(--device-batch-size "$sft_rows" --rows-per-step "$sft_step_rows")
    rl_flags=(--examples-per-step "$problems")
    rl_eval_flags=(-a GSM8K)
fi
base_eval_flags=() chat_eval_flags=() called="$preset"
if [ "$rehearse" = yes ]; then  # the last value of a flag counts
    shards=8 called="$preset rehearsal"
    base_flags+=(--num-steps 20 --eval-tokens 65536)
    mid_flags+=(--num-steps 5 --eval-batches 2)
    sft_flags+=(--num-steps 5 --eval-batches 2)
    rl_flags+=(--num-steps 1 --eval-problems 16)
    base_eval_flags+=(--eval-tokens 65536 --max-per-task 20)
    chat_eval_flags+=(--max-problems 16)
fi
# A folder is meant relative to where the user stands; the programs run from the checkout.
case "$data" in builtin | fineweb-edu) ;; *) data="$(cd "$cd_from" && realpath -m -- "$data")" ;; esac
shard_flags=() first_shards=()
if [ "$data" = fineweb-edu ]; then
    [ "$preset" != tiny ] || shards=2
    shard_flags=(--shards "$shards")
    first_shards=(--shards $((shards < 8 ? shards : 8)))
fi
spare=$([ "$preset" = tiny ] || [ "$rehearse" = yes ] || echo ", some to spare")
echo "data $data${shard_flags[*]:+ ($shards shards$spare)}, kernels $kernels, $gpus GPU(s), artifacts in $base"

# --- an earlier, different run is set aside, never overwritten ---

prepare_folder() {
    mkdir -p "$base"
    # Children inherit the lock, so a trainer that outlived a killed speedrun.sh still holds it.
    exec 9> "$base/.lock"
    flock -n 9 || die "another run is at work in $base; wait for it, stop it, or set NANOCHAT_BASE_DIR"
    identity="preset $called, data $data"
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
    [ -e "$base/report/run.json" ] || "$py" -m scripts.report reset --preset "$called"
}
[ "$dry" = yes ] || prepare_folder

# --- how a stage runs ---

# stage NAME COMMAND...: run it unless it is finished; the wall-clock of every attempt goes to the report.
stage() {
    local name="$1" started=$SECONDS status=0
    shift
    if [ "$dry" = yes ]; then "$@"; return; fi
    if [ -f "$base/stamps/$name" ]; then
        echo "== $name: finished earlier, skipped"
        return
    fi
    echo "== $name: $*"
    attend "$@" || status=$?
    printf '{"stage": "%s", "seconds": %d, "started": "%s", "finished": "%s", "status": %d, "gpus": %d, "gpu": "%s"}\n' \
        "$name" $((SECONDS - started)) "$(date -Iseconds -d "-$((SECONDS - started)) seconds")" "$(date -Iseconds)" \
        "$status" "$gpus" "$kind" >> "$base/report/timing.jsonl"
    [ "$status" -eq 0 ] || return "$status"
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

# run PROGRAM FLAGS...: in the place of this subshell; in a dry run only the words.
run() {
    if [ "$dry" = yes ]; then printf ' %q' .venv/bin/python -m "$@" | cut -c 2-; else exec "$py" -m "$@"; fi
}

# spread PROGRAM FLAGS...: over every GPU there is.
spread() {
    [ "$ranks" -gt 1 ] || run "$@" --kernels "$kernels"
    [ "$ranks" -eq 1 ] || OMP_NUM_THREADS=1 run torch.distributed.run --standalone --nproc_per_node "$ranks" -m "$@" \
        --kernels "$kernels"
}

# Whatever happens, the report shows what the run had.
[ "$dry" = yes ] || trap 'status=$?; "$py" -m scripts.report generate || true; exit $status' EXIT

# --- the recipe ---

if [ "$data" = fineweb-edu ]; then
    stage first-shards    run scripts.dataset --data "$data" "${first_shards[@]}"
    # The others arrive while the tokenizer learns from the first; the stage `dataset` waits for them.
    if [ "$dry" = no ] && [ ! -f "$base/stamps/dataset" ]; then
        (run scripts.dataset --data "$data" "${shard_flags[@]}") > "$base/download.log" 2>&1 9>&- &
    fi
else
    stage dataset         run scripts.dataset --data "$data"
fi
stage tok-train       run scripts.tok_train --data "$data" --vocab-size "$vocab"
stage tok-eval        run scripts.tok_eval --data "$data"
[ "$data" != fineweb-edu ] || stage dataset run scripts.dataset --data "$data" "${shard_flags[@]}"
stage base-train      spread scripts.base_train --resume auto --depth "$depth" "${base_flags[@]}" --data "$data" \
    "${shard_flags[@]}"
stage base-eval       spread scripts.base_eval --data "$data" --depth "$depth" "${base_eval_flags[@]}"
stage mid-train       spread scripts.mid_train --resume auto --depth "$depth" "${mid_flags[@]}"
stage mid-eval        spread scripts.chat_eval -i mid --depth "$depth" "${chat_eval_flags[@]}"
stage sft-train       spread scripts.chat_sft --resume auto --depth "$depth" "${sft_flags[@]}"
stage sft-eval        spread scripts.chat_eval -i sft --depth "$depth" "${chat_eval_flags[@]}"
if [ "$preset" = tiny ]; then
    stage sft-eval-bare   spread scripts.chat_eval -i sft --depth "$depth" -a "arithmetic|sums" --tools off
fi
stage rl-train        spread scripts.chat_rl --resume auto --depth "$depth" "${rl_flags[@]}"
stage rl-eval         spread scripts.chat_eval -i rl --depth "$depth" "${rl_eval_flags[@]}" "${chat_eval_flags[@]}"

[ "$dry" = no ] || exit 0
trap - EXIT
"$py" -m scripts.report generate
echo
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s; read report.md, then talk to your model:"
echo "    .venv/bin/python -m scripts.chat_cli                                # a conversation"
echo "    .venv/bin/python -m scripts.chat_cli -p \"What is 37 plus 85?\"       # one question"
echo "    .venv/bin/python -m scripts.chat_web                                # in the browser"
