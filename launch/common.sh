# Sourced by the scripts beside it: options, one-sentence errors, and commands that are printed instead of run.
# shellcheck shell=bash disable=SC2034

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=
words=()
train=()

# The user's mistake: one sentence, exit code 2.
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

say() {
    printf '%s %s\n' "$(date +%H:%M:%S)" "$*"
}

# Words as a shell reads them back, whatever they contain.
quote() {
    local word option result='' escaped="'\\''"
    for word; do
        option=''
        if [[ $word =~ ^--[a-z-]+= ]]; then
            option=${BASH_REMATCH[0]}
            word=${word#"$option"}
        fi
        case $word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//"'"/$escaped}'" ;;
        esac
        result="$result $option$word"
    done
    printf '%s' "${result# }"
}

# Runs a command; with --dry-run prints it.
run() {
    if [[ -n $dry_run ]]; then
        printf '%s\n' "$(quote "$@")"
    else
        "$@"
    fi
}

require() { # PROGRAM ADVICE
    [[ -n $dry_run ]] || command -v "$1" > /dev/null ||
        die "$1 is not on PATH: $2, or add --dry-run to see what would run"
}

whole_number() { # OPTION VALUE SMALLEST
    [[ $2 =~ ^[0-9]{1,9}$ ]] || die "--$1 $2: expected a whole number"
    ((10#$2 >= $3)) || die "--$1 $2: expected $3 or more"
}

# "; did you mean X?" for the candidate that begins most alike.
nearest() { # PREFIX WORD CANDIDATE...
    local prefix=$1 word=$2 best='' longest=1 candidate i
    shift 2
    for candidate; do
        i=0
        while ((i < ${#word})) && [[ ${word:i:1} == "${candidate:i:1}" ]]; do i=$((i + 1)); done
        if ((i > longest)); then best=$candidate longest=$i; fi
    done
    if [[ -n $best ]]; then printf '; did you mean %s%s?' "$prefix" "$best"; else printf '; --help lists them'; fi
}

# Options into variables of the same name (- as _), other words into `words`, what follows -- into `train`.
parse_options() { # "OPTIONS WITH A VALUE" "REPEATABLE ONES" "FLAGS" ARGUMENT...
    local single=" $1 " repeated=" $2 " flags=" $3 " word option value
    shift 3
    while (($#)); do
        word=$1
        shift
        case $word in
            --)
                train=("$@")
                return
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            --*)
                option=${word%%=*}
                option=${option#--}
                if [[ $flags == *" $option "* ]]; then
                    [[ $word != *=* ]] || die "--$option takes no value"
                    printf -v "${option//-/_}" 1
                    continue
                fi
                if [[ $single$repeated != *" $option "* ]]; then
                    [[ $option != config && $option != *.* ]] || die "--$option: options of the training come after --"
                    # shellcheck disable=SC2086
                    die "unknown option --$option$(nearest -- "$option" $single $repeated $flags help)"
                fi
                if [[ $word == *=* ]]; then
                    value=${word#*=}
                else
                    [[ $# -gt 0 && $1 != --* ]] ||
                        die "--$option needs a value (--$option=VALUE if it begins with --)"
                    value=$1
                    shift
                fi
                [[ -n $value ]] || die "--$option needs a value"
                [[ $option != env || $value =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env $value: expected NAME=VALUE"
                if [[ $single == *" $option "* ]]; then
                    printf -v "${option//-/_}" %s "$value"
                else
                    eval "${option//-/_}+=(\"\$value\")"
                fi
                ;;
            -*) die "unknown option $word; --help lists them" ;;
            *) words+=("$word") ;;
        esac
    done
}
