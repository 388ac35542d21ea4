"""Pinned npm packages: fetched once with `npm pack`, verified, read straight from the archive."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class PackageError(RuntimeError):
    """A package could not be fetched, or is not the one that was pinned."""


@dataclass(frozen=True)
class Package:
    """One npm package at one version; `sha256` is of the `.tgz` that `npm pack` writes."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def archive_name(self) -> str:
        """File name `npm pack` gives the archive."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT",
)

# Style name -> icon set. The order is the order of the rows in the built data set.
STYLES: dict[str, Package] = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
    ),
    "openmoji": Package(
        "@iconify-json/openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
    ),
    "noto-v1": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
    ),
    "emojione-monotone": Package(
        "@iconify-json/emojione-monotone",
        "1.2.1",
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
        "CC-BY-4.0",
    ),
    "fxemoji": Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
    ),
    "fluent-emoji-flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
}

# The style whose images are never trained on: it measures transfer to an unseen way of drawing.
HELDOUT_STYLE = "fluent-emoji-flat"


def fetch(package: Package, cache: Path) -> Path:
    """Returns the path of the verified archive in `cache`, running `npm pack` when it is missing.

    Raises PackageError when npm is missing or fails, or when the archive's SHA-256 differs from
    the pinned one.
    """
    path = cache / package.archive_name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        spec = f"{package.name}@{package.version}"
        command = ["npm", "pack", spec, "--silent", "--pack-destination", str(cache)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise PackageError(
                f"{package.archive_name} is not in {cache} and npm is not installed; install "
                "Node.js, or put the archive there yourself"
            ) from error
        except subprocess.CalledProcessError as error:
            raise PackageError(f"`npm pack {spec}` failed: {error.stderr.strip()}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise PackageError(
            f"{path} has SHA-256 {digest}, expected {package.sha256}; delete the file to fetch it "
            "again"
        )
    return path


def read_json(archive: Path, *members: str) -> list[Any]:
    """Parsed JSON files of an npm archive, named relative to the package root, in the order asked.

    Raises KeyError when a member is absent.
    """
    with tarfile.open(archive, "r:gz") as tar:
        found: dict[str, Any] = {}
        for entry in tar:
            name = entry.name.partition("/")[2]
            if name in members:
                stream = tar.extractfile(entry)
                assert stream is not None
                found[name] = json.load(stream)
    return [found[member] for member in members]
