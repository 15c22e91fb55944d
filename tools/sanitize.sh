#!/usr/bin/env bash
# The compiled core under AddressSanitizer and UndefinedBehaviorSanitizer: builds it in
# build/sanitize with GCC and runs its tests on that build. The first report ends the run with a
# status that is not 0. Arguments go to pytest. PYTHON names the interpreter of an environment
# that has geofast and its test and dev extras.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
python=$("$python" -c 'import sys; print(sys.executable)')
export PATH="$(dirname "$python"):$PATH"
export CXX=${CXX:-g++}
build=$PWD/build/sanitize
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

mkdir -p "$build/plugin"
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DGEOFAST_SANITIZE=ON \
    -DSKBUILD_PROJECT_VERSION="$version" -DPython_EXECUTABLE="$python" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$build/configure.log" ||
    { cat "$build/configure.log"; exit 1; }
cmake --build "$build"

# A pytest plugin, loaded before any test, puts the build where `import geofast._core` looks first:
# an editable and a plain installation both have a core of their own. torch comes before it, because
# both must share one libgomp.
cat >"$build/plugin/sanitized_core.py" <<'EOF'
import glob
import importlib.util
import os
import sys

import torch  # noqa: F401

(path,) = glob.glob(os.path.join(os.environ["GEOFAST_SANITIZED"], "_core*.so"))
spec = importlib.util.spec_from_file_location("geofast._core", path)
sys.modules["geofast._core"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["geofast._core"])
print("core under test:", path)
EOF

# detect_leaks: Python and torch leave memory to the end of the process on purpose.
GEOFAST_SANITIZED=$build PYTHONPATH=$build/plugin \
    LD_PRELOAD=$("$CXX" -print-file-name=libasan.so):$("$CXX" -print-file-name=libubsan.so) \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" -c 'import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))' \
    -p sanitized_core -s -q tests/test_core_*.py "$@"
