# Sourced by the commands beside it. `prepare EXTRAS` leaves $python at an interpreter that has the project installed
# (editable) with the comma-separated extras: the active virtualenv if it has torch, else .venv in the checkout.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() { # message: one line to stderr, exit status 2
    echo "${0##*/}: $1" >&2
    exit 2
}

usage() { # prints the calling script's leading comment
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
}

find_python() { # the first interpreter of 3.11 or newer
    local candidate
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "needs Python 3.11 or newer (python3 is $(python3 --version 2>&1)); set PYTHON to one"
}

_make_venv() { # .venv in the checkout, whole or not at all
    local base
    "$root/.venv/bin/python" -c "import pip" 2>/dev/null && return
    base=$(find_python)
    rm -rf "$root/.venv"
    "$base" -m venv "$root/.venv" || {
        rm -rf "$root/.venv"
        die "$base cannot make a virtualenv; on Debian and Ubuntu: apt install python3-venv"
    }
}

prepare() { # comma-separated extras; sets $python; installs only when pyproject.toml or the constraints changed
    local extras=$1 env pins=() stamp want
    if [ -n "${VIRTUAL_ENV:-}" ] && "$VIRTUAL_ENV/bin/python" -c 'import torch' 2>/dev/null; then
        env=$VIRTUAL_ENV # its versions are the user's: only what is missing is added
    else
        env=$root/.venv
        pins=(-c "$root/scripts/constraints.txt")
        _make_venv
    fi
    python=$env/bin/python
    stamp=$env/.fxfunc-installed-${extras//,/-}
    want=$({ echo "$root ${pins[*]}"; cat "$root/pyproject.toml" "$root/scripts/constraints.txt"; } | sha256sum)
    [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return
    echo "installing fxfunc[$extras] into $env (once; the first time takes a few minutes)" >&2
    "$python" -m pip install --disable-pip-version-check -q "${pins[@]}" -e "$root[$extras]" >&2
    echo "$want" >"$stamp"
}
