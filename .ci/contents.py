"""Compares the archives of a release with the repository they were built from.

python .ci/contents.py SDIST WHEEL

Run where `git ls-files` knows the repository. The sdist has to hold every file of the
package, its tests, examples and benchmarks, and the wheel every file of the package;
neither may hold anything else.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

FOLDERS = ("optaxplus", "tests", "examples", "benchmarks")
# Beside the folders: what builds the package, and what it says of itself. The build
# backend adds .gitignore, so that building the sdist leaves out the same.
FILES = ("README.md", "LICENSE", "pyproject.toml", ".gitignore")
METADATA = ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")


def tracked(*paths: str) -> set[str]:
    """Files of the repository below these paths."""
    command = ["git", "ls-files", "-z", "--", *paths]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(listed.split("\0")) - {""}


def compare(archive: Path, found: set[str], wanted: set[str]) -> None:
    """Ends the program if an archive holds something else than it should."""
    if found != wanted:
        missing, unknown = sorted(wanted - found), sorted(found - wanted)
        sys.exit(f"{archive.name}: missing {missing}, not expected {unknown}")
    print(f"{archive.name}: {len(found)} files, as they should be")


def main(sdist: Path, wheel: Path) -> None:
    """Compares both."""
    release = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        files = {member.name for member in archive if member.isfile()}
    wanted = {*tracked(*FOLDERS, *FILES), "PKG-INFO"}
    compare(sdist, files, {f"{release}/{name}" for name in wanted})
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    metadata = {f"{release}.dist-info/{name}" for name in METADATA}
    compare(wheel, files, {*tracked("optaxplus"), *metadata})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
