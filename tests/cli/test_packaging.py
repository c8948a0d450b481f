"""The wheel ships conf/, and Makefile, CI and hooks name things that exist."""

import ast
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = {name: (ROOT / name).read_text() for name in ("Makefile", ".ci/run", "setup.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A real wheel, built from a copy so that no build directory is left behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("esm2mega", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True, timeout=240)
    return next(out.glob("*.whl"))


def test_wheel_ships_the_configurations(wheel):
    shipped = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("esm2mega/conf/")}
    conf = ROOT / "conf"
    assert shipped == {f"esm2mega/conf/{path.relative_to(conf)}" for path in conf.rglob("*.yaml")}


def test_wheel_ships_every_module_table_and_the_license(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {
        path.relative_to(ROOT).as_posix()
        for kind in ("*.py", "*.csv")
        for path in (ROOT / "esm2mega").rglob(kind)
    }
    assert "esm2mega/autoeval/published.csv" in files
    assert files <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_shipped_name_works_from_the_wheel_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import esm2mega; from esm2mega.config.load import load_run, conf_dir; "
        "print(esm2mega.__file__, conf_dir(), load_run('pretrain_esm2_8M').model.num_layers)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    package = tmp_path / "esm2mega"
    assert done.stdout.split() == [str(package / "__init__.py"), str(package / "conf"), "6"]


def test_console_script_names_the_entry_point(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert "esm2mega = esm2mega.cli.app:main" in archive.read(name).decode()


@pytest.mark.parametrize(
    "target", ["quickstart", "test", "test-all", "setup", "lint", "type", "format", "example", "image-root"]
)
def test_makefile_targets(target):
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_an_installation_is_made_once_and_again_for_new_requirements(tmp_path):
    """The stamp decides; pip and venv are replaced by a script that writes down what it was asked."""
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> calls\n'
        'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
    )
    python.chmod(0o755)

    def calls() -> list[str]:
        (tmp_path / "calls").unlink(missing_ok=True)
        make = ["make", "--silent", "setup", f"PYTHON={python}", "TORCH=torch==1.2.3"]
        subprocess.run(make, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []

    assert calls() == [
        "-m venv .venv/dev",
        "-m pip install --quiet --upgrade pip",
        "-m pip install --quiet torch==1.2.3",
        "-m pip install --quiet --editable .[dev]",
    ]
    assert calls() == []
    stamp = (tmp_path / ".venv/dev/.installed").stat().st_mtime
    os.utime(tmp_path / "setup.py", (stamp + 5, stamp + 5))
    assert len(calls()) == 4


def test_quickstart_can_be_made_again(tmp_path):
    """Each time in a directory of its own, unless one is named."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    bin_dir = tmp_path / ".venv/quickstart/bin"
    bin_dir.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", ".venv/quickstart/.installed"):
        (tmp_path / name).touch()
    (bin_dir / "esm2mega").write_text('#!/bin/sh\nmkdir "$3" && echo "$@" >> calls\n')
    (bin_dir / "esm2mega").chmod(0o755)
    for variables in ([], [], [], ["OUT=mine"]):
        subprocess.run(["make", "quickstart", *variables], cwd=tmp_path, check=True, capture_output=True)
    made = [line.split()[-1] for line in (tmp_path / "calls").read_text().splitlines()]
    assert made == ["quickstart", "quickstart-2", "quickstart-3", "mine"]


def test_the_cpu_installation_pins_torch():
    assert re.search(r"^TORCH \?= torch==2\.13\.0$", TEXT["Makefile"], re.MULTILINE)


def test_ci_runs_make_test():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    script = [line for line in TEXT[".ci/run"].splitlines() if not line.startswith("#")]
    assert script == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]


def test_hooks_are_local_and_run_installed_tools():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    environment = re.search(r"^DEV := (\S+)$", TEXT["Makefile"], re.MULTILINE).group(1)
    for hook in hooks["repos"][0]["hooks"]:
        tool = shlex.split(hook["entry"])[0]
        if tool != "sh":
            folder, _, name = tool.rpartition("/")
            assert folder == f"{environment}/bin"
            assert name in TEXT["setup.py"], f"{name} is no development requirement"


def test_every_required_package_is_imported_somewhere():
    """A requirement that no module imports would be installed by everyone for nothing."""
    from packaging.requirements import Requirement

    assigned = {
        node.targets[0].id: node.value
        for node in ast.parse(TEXT["setup.py"]).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    required = [Requirement(line) for line in ast.literal_eval(assigned["REQUIRED"])]
    assert len(required) > 10
    modules_of: dict[str, set[str]] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            modules_of.setdefault(distribution.lower(), set()).add(module)
    imported = set()
    for path in (ROOT / "esm2mega").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    here = [each.name for each in required if each.marker is None or each.marker.evaluate()]
    assert [name for name in here if not modules_of[name.lower()] & imported] == []


def test_extras_and_python_versions():
    setup = TEXT["setup.py"]
    assert 'python_requires=">=3.10"' in setup
    assert "megatron-core==0.16.1; python_version < '3.12'" in setup
    assert "megatron-core>=0.19,<0.20; python_version >= '3.12'" in setup
    assert re.findall(r'^        "(\w+)": ', setup.partition("extras_require")[2], re.MULTILINE) == [
        "te",
        "hf",
        "logging",
        "parquet",
        "tape",
        "excel",
        "onnx",
        "finetune",
        "dev",
    ]
