"""What is installed: the folders that make up the package, whole, and nothing beside them."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {
    package: SETUPTOOLS["package-dir"].get(package, package.replace(".", "/")) for package in SETUPTOOLS["packages"]
}


def unhidden(paths):
    """Those below no hidden folder, and no build/."""
    relative = [path.relative_to(ROOT) for path in paths]
    return [path for path in relative if not any(part.startswith(".") or part == "build" for part in path.parts)]


def files_of(folder):
    return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()} - {
        path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("__pycache__/*")
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree to build in: a build/ left in the tree itself would ship deleted modules later."""
    copy = tmp_path_factory.mktemp("build") / "tree"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=left_out)
    return copy


def build(*command, cwd):
    quiet = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    process = subprocess.run([sys.executable, *command], cwd=cwd, env=quiet, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


def test_packages_are_the_folders_with_modules():
    with_modules = {path.parent.as_posix() for path in unhidden(ROOT.rglob("__init__.py"))}
    assert set(FOLDERS.values()) == with_modules


@pytest.mark.parametrize("folder", ["unilabel", "backends", "conformance"])
def test_every_module_is_in_a_package(folder):
    """setuptools installs only the packages that pyproject.toml lists."""
    assert {path.parent.as_posix() for path in unhidden((ROOT / folder).rglob("*.py"))} <= set(FOLDERS.values())


def test_wheel_holds_the_package_and_nothing_else(tree, tmp_path):
    build("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ".", cwd=tree)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if name.startswith("unilabel-") and ".dist-info/" in name}
    package = {
        f"{package.replace('.', '/')}/{name}" for package, folder in FOLDERS.items() for name in files_of(folder)
    }
    assert "unilabel/py.typed" in package
    assert names - about == package
    assert {name.partition("/")[0] for name in package} == {"unilabel"}
    assert {name.partition(".dist-info/")[2] for name in about} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"
    }  # fmt: skip


def test_sdist_is_enough_to_build_from(tree, tmp_path):
    build(
        "-c", "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])", tmp_path, cwd=tree
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {f"{folder}/{name}" for folder in FOLDERS.values() for name in files_of(folder)}
    assert needed | {"pyproject.toml", "README.md", "LICENSE"} <= names
