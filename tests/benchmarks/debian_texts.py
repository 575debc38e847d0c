"""Texts of several domains from Debian's packages, as JSON lines: `python -m tests.benchmarks.debian_texts OUT`.

Needs `apt-get download` and `dpkg-deb`, no root. Writes dictionary, linux, git, perl and python .jsonl, 100 MB.
"""

import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dsmoe_jax.train.data.sources import PYTHON_STDLIB, documents

# domain: package, pattern of its files
PACKAGES: Final = {
    "dictionary": ("dict-gcide", "usr/share/dictd/gcide.dict.dz"),
    "linux": ("linux-doc-6.1", "usr/share/doc/**/*.rst.gz"),
    "git": ("git-doc", "usr/share/doc/**/*.txt"),
    "perl": ("perl-doc", "usr/share/perl/**/*.pod"),
}
_DOCUMENT: Final = 8000  # characters of a part of the dictionary, which is one file


def texts(package: str, pattern: str) -> Iterator[str]:
    """Yield the texts of a package; the dictionary in parts."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
        (archive,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, "files"], cwd=folder, check=True)
        for path in sorted(Path(folder, "files").glob(pattern)):
            data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
            yield from _parts(data.decode("utf-8", "replace"))


def _parts(text: str) -> Iterator[str]:
    """Split at blank lines into parts of some thousand characters if a text is very long."""
    if len(text) < 100 * _DOCUMENT:
        yield text
        return
    part: list[str] = []
    for paragraph in text.split("\n\n"):
        part.append(paragraph)
        if sum(map(len, part)) > _DOCUMENT:
            yield "\n\n".join(part)
            part = []
    yield "\n\n".join(part)


def main(out: Path) -> None:
    """Write one file per domain."""
    out.mkdir(parents=True, exist_ok=True)
    found = {domain: texts(*package) for domain, package in PACKAGES.items()}
    found["python"] = (document.text for document in documents(PYTHON_STDLIB))
    for domain, values in found.items():
        with open(out / f"{domain}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in values)
        print(out / f"{domain}.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
