# Sourced by run_all.sh and run_tests.sh, from the repository root: puts a python3 that has what the kit needs first.
# The active conda or virtual environment is used if the kit is installed in it; otherwise .venv is made, once.

use_environment() { # [extra of pyproject.toml]
    local extra=${1:-} stamp wanted python
    local has_kit="from importlib.metadata import version; version('unmask'); version('diffusers'); version('onnxruntime')"
    if [ -n "$extra" ]; then has_kit="$has_kit; import hypothesis, pytest, pywt, xdist"; fi
    # The code of this clone, also where an environment was installed from another one.
    local inherited=${PYTHONPATH:-}
    unset PYTHONPATH
    if ! python3 -c "$has_kit" 2>/dev/null; then
        python=$(find_python) || return 1
        stamp=".venv/installed${extra:+-$extra}"
        wanted=$(cat pyproject.toml constraints.txt | "$python" -c \
            "import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())")
        if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
            echo "Setting up .venv (once; this downloads PyTorch and can take some minutes) ..." >&2
            # Half made, or made by another Python, it cannot be built upon.
            "$python" -m venv $(compgen -G ".venv/installed*" >/dev/null || echo --clear) .venv || {
                echo "Python's venv is missing: install it (on Debian or Ubuntu: apt install python3-venv)." >&2
                return 1
            }
            .venv/bin/python3 -m pip install --quiet -c constraints.txt -e ".${extra:+[$extra]}" || {
                echo "Installing failed; the lines above say why. Run this script again to go on." >&2
                return 1
            }
            echo "$wanted" >"$stamp"
            echo "Environment ready." >&2
        fi
        export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
    fi
    export PYTHONPATH="$PWD/lib${inherited:+:$inherited}"
    # Memory that was freed stays with the process (glibc): a network on a CPU is up to half faster when its maps are
    # not given back and fetched anew with every batch.
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}
}

find_python() {
    local candidate
    for candidate in python3.11 python3 python3.12 python3.13; do
        if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "Python 3.11 or newer is needed, and none is on the PATH." >&2
    return 1
}
