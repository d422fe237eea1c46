#!/usr/bin/env bash
# `make matrix`: set-up and tests in each cell of the table in docs/installation.md that this machine has a Python for.
#   CELLS="3.11:oldest"   some cells only
#   ARGS="tests/loss"     goes to pytest; by default everything but the distributed and cluster tests
# A cell is PYTHON:WHAT. WHAT is `lock` (constraints.txt as it is), `oldest` (the oldest transformers that setup.cfg
# allows, all else from the lock) or `newest` (nothing pinned but what constraints.in pins).
set -uo pipefail
cd "$(dirname "$0")/.."
CELLS=${CELLS:-3.10:lock 3.11:lock 3.11:oldest 3.11:newest 3.12:lock}
ARGS=${ARGS:-tests --ignore tests/distributed --ignore tests/cluster}
OLDEST=$(sed -n 's/^ *transformers>=\([0-9.]*\).*/\1/p' setup.cfg)
RESULTS=()
STATUS=0
mkdir -p build/matrix

for cell in $CELLS; do
  version=${cell%%:*} what=${cell##*:} place=build/matrix/${cell/:/-}
  python=python$version
  if ! "$python" -c '' 2> /dev/null; then
    RESULTS+=("$(printf '%-14s %s' "$cell" "left out: no $python here")")
    continue
  fi
  printf '\n=== %s\n' "$cell"
  constraints=constraints.txt
  if [ "$what" = oldest ]; then
    constraints=$place.txt
    { grep -v '^transformers==' constraints.txt; echo "transformers==$OLDEST.*"; } > "$constraints"
  fi
  unpinned=$([ "$what" = newest ] && echo 1)
  [ -z "$unpinned" ] || constraints=constraints.in
  make setup PYTHON="$python" VENV="$place" UNPINNED="$unpinned" CONSTRAINTS="$constraints" > "$place.setup.log" 2>&1 \
    && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$PWD/$place/bin:$PATH" "$place/bin/python" -m pytest -q $ARGS 2>&1 \
      | tee "$place.tests.log" | tail -n 3
  code=$?
  found=$("$place/bin/python" -m pip list 2> /dev/null | awk '$1 ~ /^(torch|transformers|deepspeed)$/ {print $1, $2}' | paste -sd,)
  if [ $code = 0 ]; then said=$(tail -n 1 "$place.tests.log"); else said="FAILED, see $place.*.log"; STATUS=1; fi
  RESULTS+=("$(printf '%-14s %s (%s)' "$cell" "$said" "$found")")
done

printf '\n'
printf '%s\n' "${RESULTS[@]}"
exit $STATUS
