#!/usr/bin/env bash
# Makes .venv hold all that `make demo` and `make test` need. A torch that is already installed is
# kept, nothing that exists is upgraded, and pip is called only for what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=.venv

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "torch_flash2 needs Python 3.10 or newer; PYTHON=/path/to/python make ... names another"; exit 1; }

# Prints the folder of an installed torch that is new enough.
torch_folder() {
    "$1" 2>/dev/null - <<'EOF'
import pathlib, torch
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
print(pathlib.Path(torch.__file__).parents[1])
EOF
}

has() {
    "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec(sys.argv[1]))' "$1"
}

# A venv without pip is enough where the pip outside can install into it.
pip_install() {
    if has pip; then "$venv/bin/python" -m pip install -q "$@"
    else "$python" -m pip --python "$venv/bin/python" install -q "$@"
    fi
}

echo "setup: a virtual environment in $venv (once)"
rm -rf "$venv"
if kept=$(torch_folder "$python"); then
    # --system-site-packages would not reach a torch that itself lives in a virtual environment.
    "$python" -m venv --without-pip --system-site-packages "$venv"
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$kept')" >"$packages/kept_torch.pth"
else
    "$python" -m venv "$venv" || "$python" -m venv --without-pip "$venv"
    if [ "$(uname -s)" != Linux ] || nvidia-smi >/dev/null 2>&1; then pip_install "torch>=2.11"
    else pip_install torch==2.13.0 triton==3.7.1
    fi
fi

# module=requirement; the linters are pinned, since each release words its findings anew.
for entry in numpy=numpy pytest=pytest xdist=pytest-xdist hypothesis=hypothesis expecttest=expecttest \
    matplotlib=matplotlib transformers=transformers==5.23.0 diffusers=diffusers==0.42.1 ruff=ruff==0.17.5 mypy=mypy==2.4.1 "triton=triton>=3.6,<3.10"; do
    module=${entry%%=*} requirement=${entry#*=}
    [ "$module" = triton ] && [ "$(uname -s)" != Linux ] && continue
    has "$module" || pip_install --retries 1 "$requirement" ||
        echo "setup: $requirement could not be installed; what needs it is skipped"
done
for module in torch numpy pytest hypothesis; do
    has "$module" || { echo "setup: $module is required"; exit 1; }
done
touch "$venv/ready"
