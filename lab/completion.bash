# Completion of ./run.sh in bash, written by `./run.sh completion bash` from the verbs' own parsers.

_run_sh_words() { # what may follow a verb, or a verb and a flag
  case "$1" in
    # WORDS
  esac
}

_run_sh() {
  local word=${COMP_WORDS[COMP_CWORD]} verb=${COMP_WORDS[1]} flag="" prefix="" words i
  case "$COMP_CWORD:$verb" in
    *:-*) verb=train ;; # flags of the main job
    1:* | *:help) verb="" ;;
  esac
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "$i:${COMP_WORDS[i]}" in
      *:--) verb=train flag="" ;; # what follows is for the trainer
      *:-*) flag=${COMP_WORDS[i]} ;;
      2:*) [ -z "$(_run_sh_words "$verb ${COMP_WORDS[i]}")" ] || verb="$verb ${COMP_WORDS[i]}" ;;
    esac
  done
  [ "$word" != "=" ] || word="" # --flag=WORD
  case "$word" in
    -*) flag="" ;;
    *,*) prefix=${word%,*}, word=${word##*,} ;;
  esac
  words=$(_run_sh_words "$verb${flag:+ $flag}")
  [ "$verb" != plan ] || words="$words $(_run_sh_words "train${flag:+ $flag}")" # plan passes the trainer's flags on
  COMPREPLY=($(compgen -P "$prefix" -W "$words" -- "$word"))
}
complete -o default -F _run_sh run.sh
