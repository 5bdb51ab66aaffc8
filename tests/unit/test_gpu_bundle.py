import os
import subprocess
import sys
import zipfile
from importlib import metadata

from benchmarks.gpu import bundle


def wheel(folder, name, version, body=""):
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", body)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_bundle_in_parts_is_joined_checked_and_installed(tmp_path):
    files, parts, there, site = (tmp_path / name for name in ("files", "parts", "there", "site"))
    files.mkdir()
    noise = os.urandom(9000).hex()  # larger than a part, and not to be compressed
    wheel(files, "carried_large", "1.0", f"DATA = {noise!r}")
    wheel(files, "carried_small", "1.0", "VALUE = 3")
    wheel(files, "pytest", "0.0.1")  # is here, in a version that does
    sizes = bundle.pack(files, parts, limit=8000)
    assert max(sizes.values()) <= 8000
    there.mkdir()
    for path in parts.glob("part-*/*"):
        path.rename(there / path.name)
    done = subprocess.run(
        ["sh", there / "install.sh", site],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"export PYTHONPATH={site}" in done.stdout
    assert f"pytest {metadata.version('pytest')} is here already" in done.stderr
    assert sorted(path.name for path in site.iterdir() if path.suffix != ".dist-info") == [
        "carried_large",
        "carried_small",
    ]
    assert noise in (site / "carried_large" / "__init__.py").read_text()


def test_a_damaged_part_is_refused(tmp_path):
    files, parts = tmp_path / "files", tmp_path / "parts"
    files.mkdir()
    wheel(files, "carried", "1.0")
    bundle.pack(files, parts, limit=1 << 20)
    (parts / "part-1" / "carried-1.0-py3-none-any.whl").write_bytes(b"something else")
    done = subprocess.run(
        ["sh", parts / "part-1" / "install.sh", tmp_path / "site"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "carried-1.0-py3-none-any.whl: FAILED" in done.stdout


def test_every_distribution_of_a_set_has_its_version():
    versions = bundle.pinned((bundle.ROOT / "constraints.txt").read_text())
    absent = [name for names in bundle.SETS.values() for name in names if bundle._normal(name) not in versions]
    assert not absent
