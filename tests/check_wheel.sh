#!/usr/bin/env bash
# `make check-wheel`: the wheel, made from the sdist, in an empty environment and outside the checkout. Its programs make
# the demo's data and run both stages on the demo's models. Nothing may come from the checkout but the models.
set -euo pipefail
cd "$(dirname "$0")/.."
CHECKOUT=$PWD
PLACE=$(mktemp -d)
trap 'rm -rf "$PLACE"' EXIT
export PIP_CONSTRAINT=$CHECKOUT/constraints.txt PIP_BUILD_CONSTRAINT=$CHECKOUT/constraints.txt PIP_ROOT_USER_ACTION=ignore

say() { printf '\n--- %s (at %d s)\n' "$*" $SECONDS; }

say "sdist, and the wheel from it"
python -m build --outdir "$PLACE/dist" . > "$PLACE/build.log" 2>&1 || { cat "$PLACE/build.log"; exit 1; }
if grep -i 'warning' "$PLACE/build.log" | grep -vE 'neither a file nor a directory|byte-compiling is disabled'; then
  echo "the build warns: see above" >&2; exit 1
fi
ls "$PLACE/dist"

say "an empty environment"
"${PYTHON:-python3}" -m venv "$PLACE/venv"
"$PLACE/venv/bin/python" -m pip --disable-pip-version-check install --quiet "$(echo "$PLACE"/dist/*.whl)[mpi]" 2> "$PLACE/pip.log" \
  || { cat "$PLACE/pip.log"; exit 1; }

mkdir "$PLACE/work" && cd "$PLACE/work"
unset PYTHONPATH PIP_CONSTRAINT
export PATH="$PLACE/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python - "$CHECKOUT" <<'END'
import sys
from pathlib import Path
import data_prep, launch, pipeline
for package in (data_prep, launch, pipeline):
    assert sys.argv[1] not in package.__file__, package.__file__
    assert (Path(package.__file__).parent / "py.typed").is_file(), package
END

say "vlsi-data"
vlsi-data --help > /dev/null
vlsi-data shard --source puzzles --count 64 --held-out-count 16 --noise 0.4 --seed 0 --output data/puzzles
RECIPE=$(python -c 'from pipeline.recipe.resolve import SHIPPED; print(SHIPPED / "recipes" / "demo.yaml")')
MODELS=$CHECKOUT/demo/models/puzzles
SET=(teacher.path="$MODELS/teacher" student.path="$MODELS/student" verbalize.steps=2 interact.steps=2 reinforce.steps=2)

say "vlsi-train, both stages, and vlsi-cache"
vlsi-train -q --num_accelerators 2 --stage 1 --only verbalize --recipe "$RECIPE" --set "${SET[@]}"
vlsi-cache -q --num_accelerators 2 --recipe "$RECIPE" --set "${SET[@]}"
vlsi-train -q --num_accelerators 2 --stage 2 --recipe "$RECIPE" --set "${SET[@]}"

say "vlsi"
vlsi status runs/demo
vlsi status runs/demo | grep -q 'next: .*evaluate'
vlsi env | grep -E 'version|commit|transformers|recipes'
vlsi recipes | grep 'Qwen2-VL-72B-Instruct -> Qwen2-VL-2B-Instruct'
vlsi recipes --for "$MODELS/teacher" "$MODELS/student" --out first.yaml
[ -f runs/demo/student/model.safetensors ]
vlsi trace --run runs/demo --limit 2 --max-new-tokens 4 --page traces
[ -f traces/index.html ]
vlsi report runs/demo
[ -f runs/demo/report.html ]
say "the wheel works by itself"
