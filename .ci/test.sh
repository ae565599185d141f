#!/usr/bin/env bash
# Runs every part even when one fails, and closes with pytest's summary of each part that has tests. `test.sh lint` runs the
# linters alone.
set -uo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=()
summaries=()

lint() { # lint NAME ARGUMENTS...
    echo "== $*"
    if ! $python -c "import $1" 2>/dev/null; then
        echo "skipped: $1 is not installed"
        # CI may not pass by skipping.
        [ -z "${CI:-}" ] || failed+=("$1 is not installed")
    else
        $python -m "$@" || failed+=("$*")
    fi
}

tests() { # tests NAME MARKER-EXPRESSION ARGUMENTS...
    echo "== pytest: $1"
    $python -m pytest test -m "$2" "${@:3}" 2>&1 | tee "$log"
    local status=${PIPESTATUS[0]}
    # 5: this part has no tests.
    [ "$status" -eq 5 ] && return
    [ "$status" -eq 0 ] || failed+=("pytest: $1")
    summaries+=("$(tail -n 1 "$log")")
}

lint ruff check .
lint ruff format --check .
lint mypy
if [ "${1:-}" != lint ]; then
    # Two processes each: these parts hold no memory to speak of, and none of them is timed.
    tests compile "compile" -n 2 --dist worksteal
    TRITON_INTERPRET=1 tests interpreter "interpreter" -n 2 --dist worksteal
    tests host "not interpreter and not compile"
fi

if [ ${#summaries[@]} -gt 0 ]; then
    echo "== pytest: ${#summaries[@]} parts"
    printf '%s\n' "${summaries[@]}"
fi
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
