"""What an index would hand out: its description, its Pythons, and a wheel that draws by itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = [
    kind.rsplit(" ", 1)[1]
    for kind in PROJECT["classifiers"]
    if re.search(r":: Python :: 3\.\d+$", kind)
]
MOST_MEGABYTES = 45


def interpreter(version: str) -> str | None:
    """A Python of this version, if one is at hand."""
    kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    # first: a shim on the PATH exists for versions that are not switched on, and fails
    return str(kept[-1]) if kept else shutil.which(f"python{version}")


def test_the_classifiers_begin_with_the_oldest_python() -> None:
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert len(PYTHONS) >= 3


@pytest.mark.parametrize("version", PYTHONS)
def test_every_declared_python_reads_every_file(version: str) -> None:
    """Syntax alone: the libraries of the other versions are not here."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} is at hand")
    read = (
        "import ast, pathlib, sys\n"
        "files = list(pathlib.Path(sys.argv[1]).rglob('*.py'))\n"
        "for file in files: ast.parse(file.read_text('utf-8'), str(file))\n"
        "print(len(files))"
    )
    command = [python, "-W", "error", "-c", read, str(ROOT / "src")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(list((ROOT / "src").rglob("*.py")))


def test_the_description_has_no_link_that_leads_nowhere() -> None:
    scope: dict[str, object] = {}
    code = (ROOT / "hatch_build.py").read_text("utf-8")
    # without hatchling, which only builds have
    code = re.sub(r"from hatchling.* import \w+", "MetadataHookInterface = object", code)
    exec(compile(code, "hatch_build.py", "exec"), scope)  # noqa: S102
    absolute, text = scope["absolute"], (ROOT / "README.md").read_text("utf-8")
    assert callable(absolute)
    for source in ("", "https://example.org/ipdiverse"):
        links = re.findall(r"\]\(([^)]+)\)", absolute(text, source))
        assert all(link.startswith("https://") for link in links)
        assert bool(links) == bool(source)
        assert "Quick start" in absolute(text, source)
    assert "![" not in absolute(text, "")
    assert f"]({source}/raw/main/docs/images/demo.png)" in absolute(text, source)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_extras_resolve(extra: str) -> None:
    words = ("pip", "install", "--dry-run", "--quiet", f"{ROOT}[{extra}]")
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
@pytest.mark.network
def test_a_wheel_draws_in_a_new_folder(tmp_path: Path) -> None:
    """Without git and without the repository; the libraries are those of this environment."""

    def run(*command: str | Path) -> str:
        given = [str(word) for word in command]
        return subprocess.run(
            given, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PATH": ""}
        ).stdout

    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT)
    subprocess.run([str(word) for word in pip], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < MOST_MEGABYTES * 1e6
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [n for n in opened.namelist() if n.endswith(".dist-info/METADATA")]
        told = opened.read(name).decode("utf-8")
    assert "Description-Content-Type: text/markdown" in told
    assert not re.search(r"\]\((?!https://|#)", told), "a link that leads nowhere on an index"
    venv.create(tmp_path / "new", with_pip=True)
    home = tmp_path / "new" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (home / "shared.pth").write_text(sysconfig.get_path("purelib"))
    bin_ = tmp_path / "new" / "bin"
    run(bin_ / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert run(bin_ / "ipdiverse", "--version") == f"ipdiverse {PROJECT['version']}\n"
    assert (home / "ipdiverse" / "comfyui" / "nodes.py").is_file()
    run(bin_ / "ipdiverse", "critters", "make", "-n", "1", "--out", "refs")
    drawn = ("generate", "--image", "refs/images/0000000.png", "-n", "1", "--steps", "2")
    run(bin_ / "ipdiverse", *drawn, "--prompt", "in the snow", "--out", "out")
    assert (tmp_path / "out" / "0000.png").is_file()
