#!/usr/bin/env bash
# `make check-gpu`: run bench.gpu with this machine's own python and torch. It needs neither .venv nor a network.
#   OUT=build/check_gpu   the folder for the results
#   MINUTES=8             what does not fit is left out
#   DEVICE=cuda           or cpu: the twin
#   WHEELS=.whl           a folder of wheels for what the python lacks; without one, .venv if it is there
#   ARGS=                 goes to python -m bench.gpu, as in ARGS='--only card losses'
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-.whl} SITE=$PWD/build/gpu_site
if compgen -G "$WHEELS/*.whl" > /dev/null; then
  rm -rf "$SITE"
  "$PYTHON" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --root-user-action=ignore --find-links "$WHEELS" --target "$SITE" "$WHEELS"/*.whl
  mkdir -p "$SITE/bin"
  # The demo types `python`. A link would lose the virtual environment that PYTHON may belong to.
  printf '#!/bin/sh\nexec %q "$@"\n' "$(command -v "$PYTHON")" > "$SITE/bin/python"
  chmod +x "$SITE/bin/python"
  export PATH="$SITE/bin:$PATH" PYTHONPATH="$SITE:$PWD"
else
  [ ! -x .venv/bin/python ] || { PYTHON=$PWD/.venv/bin/python && export PATH="$PWD/.venv/bin:$PATH"; }
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PYTHONPATH:$PWD/build/peers"  # `make peers`: other packages' losses, if they are there
exec "$PYTHON" -m bench.gpu --device "${DEVICE:-cuda}" --out "${OUT:-build/check_gpu}" --minutes "${MINUTES:-8}" ${ARGS:-}
