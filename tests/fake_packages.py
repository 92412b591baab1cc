"""Packages as pip leaves them: files, and what `importlib.metadata` reads."""

from collections.abc import Iterable
from pathlib import Path

from drelu_timm.doctor import record_hash


def install(
    folder: Path,
    package: str,
    version: str = "1.0",
    *,
    requires: Iterable[str] = (),
    files: dict[str, bytes] | None = None,
    about: str = "",
) -> None:
    """Put a package there: its files, its name, what it requires, more metadata, a RECORD of the files' hashes."""
    place = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    place.mkdir()
    lines = [f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (place / "METADATA").write_text("\n".join(lines) + f"\n{about}")
    files = files or {}
    rows = [f"{name},sha256={record_hash(content)},{len(content)}\n" for name, content in files.items()]
    (place / "RECORD").write_text("".join(rows))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
