"""Without .venv and without a network: what the python lacks comes from a folder of wheels."""

import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from running import ROOT, make

FILES = {
    "rich/__init__.py": "raise ImportError('the wheel goes before what the python has')\n",
    "check_gpu_probe-1.0.data/scripts/check-gpu-probe": "#!python\nprint('found')\n",
    "check_gpu_probe-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: check-gpu-probe\nVersion: 1.0\n",
    "check_gpu_probe-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}


def write_wheel(folder: Path, left_out: str = "") -> None:
    folder.mkdir()
    record = "check_gpu_probe-1.0.dist-info/RECORD"
    with zipfile.ZipFile(folder / "check_gpu_probe-1.0-py3-none-any.whl", "w") as wheel:
        lines = []
        for name, text in FILES.items():
            if name != left_out:
                digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
                entry = zipfile.ZipInfo(name)
                entry.external_attr = (0o100755 if "scripts" in name else 0o100644) << 16
                wheel.writestr(entry, text)
                lines.append(f"{name},sha256={digest},{len(text)}")
        wheel.writestr(record, "\n".join([*lines, f"{record},,"]) + "\n")


def check_gpu(folder: Path, wheels: Path) -> tuple[int, str]:
    done = make("check-gpu", f"PYTHON={sys.executable}", f"WHEELS={wheels}", f"OUT={folder}")
    return done.returncode, done.stdout + done.stderr


def test_wheels_go_before_the_pythons_own_packages(tmp_path):
    write_wheel(tmp_path / "wheels")
    code, said = check_gpu(tmp_path, tmp_path / "wheels")
    assert code and "ImportError: the wheel goes before what the python has" in said
    probe = subprocess.run([ROOT / "build/gpu_site/bin/check-gpu-probe"], capture_output=True, text=True, check=True)
    assert probe.stdout == "found\n"
    prefix = "import sys; print(sys.prefix)"
    ours = subprocess.run(
        [ROOT / "build/gpu_site/bin/python", "-c", prefix], capture_output=True, text=True, check=True
    )
    assert ours.stdout.strip() == sys.prefix, "`python` is the one that was named, with its virtual environment"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_what_an_earlier_run_installed_is_gone(tmp_path):
    write_wheel(tmp_path / "wheels", left_out="rich/__init__.py")
    code, said = check_gpu(tmp_path, tmp_path / "wheels")
    assert code and "torch finds no CUDA device" in said
    assert not (ROOT / "build/gpu_site/rich").exists()
