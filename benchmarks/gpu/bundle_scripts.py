"""Scripts that travel with a bundle: they run where there is nothing but Python, pip and torch."""

INSTALL = """\
#!/bin/sh
# sh install.sh SITE: join pieces, check digests, install what this machine lacks into the folder SITE.
# All parts of the bundle lie in the folder of this script. PYTHON names the interpreter, python3 unless set.
set -eu
site=${1:?"usage: sh install.sh SITE"}
python=${PYTHON:-python3}
mkdir -p "$site"
site=$(cd "$site" && pwd)
cd "$(dirname "$0")"
for first in *.piece-001; do
  [ -e "$first" ] || continue
  name=${first%.piece-001}
  cat "$name".piece-* > "$name"
done
sha256sum --check --quiet SHA256SUMS
if [ -e cache.tar ]; then
  mkdir -p "$site/cache"
  tar -xf cache.tar -C "$site/cache"
  echo "export NEMO_MINITRON_CACHE=$site/cache"
fi
"$python" absent.py > absent.txt
if [ -s absent.txt ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" --upgrade -r absent.txt
fi
echo "export PYTHONPATH=$site"
"""

ABSENT = '''\
"""Wheels of this folder to install: of distributions that are not here, or are here in a version that does not do."""

import os
import sys
from importlib import metadata

# Versions of these belong together, or are the only ones that work.
EXACT = {
    *("megatron-core", "lightning", "nemo-toolkit", "antlr4-python3-runtime"),
    *("pydantic", "pydantic-core", "typing-extensions", "typing-inspection"),
}


def normal(name):
    return name.lower().replace("_", "-").replace(".", "-")


for wheel in sorted(name for name in os.listdir(".") if name.endswith(".whl")):
    name, version = wheel.split("-")[:2]
    try:
        here = metadata.version(name)
    except metadata.PackageNotFoundError:
        here = None
    if here is None or (normal(name) in EXACT and here != version):
        print("./" + wheel)
    else:
        print(f"{name} {here} is here already", file=sys.stderr)
'''

ENGINE = """\
#!/bin/sh
# sh engine.sh SITE, after install.sh: compile Transformer Engine's binding against this machine's torch, into SITE.
set -eu
site=$(cd "${1:?"usage: sh engine.sh SITE"}" && pwd)
cd "$(dirname "$0")"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
export NVTE_FRAMEWORK=pytorch MAX_JOBS="${MAX_JOBS:-$(nproc)}"
# pip would replace the complete folder `transformer_engine`, which other wheels have filled.
"${PYTHON:-python3}" -m pip wheel --no-index --no-deps --no-build-isolation --wheel-dir built \\
  ./transformer_engine_torch-*.tar.gz
for wheel in built/*.whl; do "${PYTHON:-python3}" -m zipfile -e "$wheel" "$site"; done
"${PYTHON:-python3}" -c "import transformer_engine.pytorch as engine; print('it imports:', engine.__file__)"
"""

SCRIPTS = {"install.sh": INSTALL, "absent.py": ABSENT, "engine.sh": ENGINE}
"""By file name."""
