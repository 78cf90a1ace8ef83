#!/usr/bin/env bash
# Set up what is missing, then run a verb:
#   ./run.sh [trainer flags]      the main job: train to the target, print a summary and a sample
#   ./run.sh test [pytest args]   the tests
#   ./run.sh compare|scaling|records ...   what a trick saves, at one size and at several; kept evidence
#   ./run.sh gpu-check            what this machine's GPUs compute, and how fast: ten minutes, unattended
#   ./run.sh train|data|sample|schedules|optimizers ...            the tools, with their own --help
set -euo pipefail
cd "$(dirname "$0")"

say() { printf '%s\n' "$*" >&2; }

find_python() { # the newest Python >= 3.10, preferring one that has torch 2.13 already
  local candidates=(python3 python3.13 python3.12 python3.11 python3.10 python) found=""
  for p in "${candidates[@]}"; do
    "$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    [ -n "$found" ] || found=$p
    if "$p" -c 'import torch, sys; sys.exit(not torch.__version__.startswith("2.13."))' 2>/dev/null; then
      found=$p && break
    fi
  done
  [ -n "$found" ] || { say "run.sh: Python 3.10 or newer is needed and none was found"; exit 2; }
  echo "$found"
}

install() { # install FILE once per content: a stamp in .venv remembers its hash
  local stamp=".venv/.$(basename "$(dirname "$1")")-$(basename "$1").$(cksum <"$1" | tr -d ' ')"
  [ -f "$stamp" ] && return
  say "installing $1"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" || {
    say "run.sh: could not install $1; check the network and run this again"
    exit 2
  }
  touch "$stamp"
}

setup() {
  if [ ! -x .venv/bin/python ]; then
    local python
    python=$(find_python)
    say "making .venv with $($python --version)"
    # an installed torch of the pinned release is seen through --system-site-packages, so pip leaves it alone
    local flags=()
    "$python" -c 'import torch, sys; sys.exit(not torch.__version__.startswith("2.13."))' 2>/dev/null && flags+=(--system-site-packages)
    "$python" -m venv ${flags[@]+"${flags[@]}"} .venv || {
      rm -rf .venv
      say "run.sh: $python cannot make a virtual environment; on Debian: apt install python3-venv"
      exit 2
    }
  fi
  install requirements.txt
}

main_job() {
  local gpus track run
  gpus=0 # importing torch only to count takes seconds: first ask the driver
  if command -v nvidia-smi >/dev/null; then
    gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
  fi
  if [ "$gpus" -gt 0 ]; then
    install data/requirements.txt
    track=gpt2-small
    .venv/bin/python -m data prepare fineweb10B --tokenizer gpt2 --for "$track:record"
    .venv/bin/torchrun --standalone --nproc_per_node="$gpus" train_gpt.py --track "$track" --tricks record \
      --resume never "$@"
  else
    track=cpu
    [ -f corpora/sotu-bytes/dataset.json ] || .venv/bin/python -m data prepare sotu
    .venv/bin/python train_gpt.py --track "$track" --tricks record --resume never "$@"
  fi
  run=$(ls -td "runs/$track"/*/ | head -n 1) # the newest: the one just trained
  echo
  install lab/requirements.txt
  .venv/bin/python -m lab.records summary "$run"
  echo
  .venv/bin/python sample.py --run "$run" --prompt "My fellow citizens, " --tokens 300
}

verb=${1:-main}
case "$verb" in
  -*) verb=main ;; # ./run.sh --seed 1: flags for the main job
  *) [ $# -eq 0 ] || shift ;;
esac
case "$verb" in
  main) setup && main_job "$@" ;;
  test) # on all cores: a process each, with one thread
    setup && install requirements-test.txt && OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n auto "$@"
    ;;
  train) setup && exec .venv/bin/python train_gpt.py "$@" ;;
  data) setup && exec .venv/bin/python -m data "$@" ;;
  sample) setup && exec .venv/bin/python sample.py "$@" ;;
  compare) setup && install lab/requirements.txt && exec .venv/bin/python compare.py "$@" ;;
  scaling) setup && install lab/requirements.txt && exec .venv/bin/python scaling.py "$@" ;;
  records) setup && install lab/requirements.txt && exec .venv/bin/python -m lab.records "$@" ;;
  gpu-check) setup && exec .venv/bin/python -m lab.gpu_check "$@" ;;
  schedules) setup && exec .venv/bin/python -m engine.schedules "$@" ;;
  optimizers) setup && exec .venv/bin/python -m optimizers "$@" ;;
  *)
    say "run.sh: unknown verb '$verb': main (or nothing), test, train, compare, scaling, records, gpu-check, data, sample, schedules, optimizers"
    exit 2
    ;;
esac
