#!/usr/bin/env bash
# Runs the tests of what touches PyTorch's internals on other releases of torch, each in an environment of its own under
# .versions. `other_versions.sh 2.11.0 2.15.0` names them; CUDA builds do where there is no GPU, but take gigabytes.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=()
summaries=()
for version in "${@:-2.11.0}"; do
    home=.versions/$version
    if [ ! -x "$home/bin/python" ]; then
        "$python" -m venv "$home" &&
            "$home/bin/python" -m pip install -q "torch==$version" numpy pytest hypothesis expecttest || {
            failed+=("torch $version: could not be installed")
            continue
        }
    fi
    log=$(mktemp)
    CI=1 "$home/bin/python" -m pytest -q -p no:cacheprovider test/test_ops.py test/test_direct.py test/test_sdpa.py \
        test/test_sdpa_promises.py test/test_sdpa_distributed.py test/test_registry.py test/test_enable.py \
        test/test_policy.py test/test_context_parallel.py test/test_flash_attn.py test/test_kvcache.py \
        -m "not interpreter and not compile" 2>&1 | tee "$log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("torch $version")
    summaries+=("torch $version: $(tail -n 1 "$log")")
done
printf '%s\n' "${summaries[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
