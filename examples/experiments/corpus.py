"""Text to train on: the sources of the Python packages of a machine, split by package, without duplicates.

    python -m examples.experiments.corpus                 what there is on this machine
    python -m examples.experiments.corpus --text DIR      the same of the folders and files in DIR

A package is a folder or a module in one of the machine's folders of packages: the standard library (without its tests)
and site-packages. Whole packages are held out, drawn by the hash of their names. A file counts once, and a held-out
file half of whose lines stand in the text for training (copies that packages bring of one another) is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import site
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Tests are not installed everywhere, and packages that others installed have a folder of their own.
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT = 0.02  # of the text, each of the two sets
LARGE = 0.02  # packages of more than this part of the text are trained on, so that many others are held out
LINE = 20  # shorter lines are alike everywhere


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on, bytes by which settings are chosen, bytes of which the loss is reported; (N,) uint8 each."""

    train: Tensor
    choice: Tensor
    reported: Tensor
    facts: dict[str, Any]  # how much there was, for the record

    def to(self, device: str) -> Corpus:
        return Corpus(self.train.to(device), self.choice.to(device), self.reported.to(device), self.facts)


def folders_of_packages() -> list[Path]:
    paths = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")] + site.getsitepackages()
    return [path for path in map(Path, dict.fromkeys(paths)) if path.is_dir()]


def read(folders: list[Path] | None = None, cache: Path | None = None, most: int | None = None) -> Corpus:
    """The corpus of ``folders``, or of the machine; of ``most`` bytes to train on. Kept in the file ``cache``."""
    if cache is not None and cache.exists() and cache.with_suffix(".json").exists():
        facts = json.loads(cache.with_suffix(".json").read_text())
        text = bytearray(cache.read_bytes())
        assert hashlib.sha256(text).hexdigest() == facts["sha256"], f"{cache} is not what it was; delete it"
    else:
        text, facts = _gather(folders_of_packages() if folders is None else folders)
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            cache.write_bytes(text)
            cache.with_suffix(".json").write_text(json.dumps(facts))
    train, choice, reported = torch.frombuffer(text, dtype=torch.uint8).split(facts["bytes"])
    return Corpus(train[:most], choice, reported, facts)


def _gather(folders: list[Path]) -> tuple[bytearray, dict[str, Any]]:
    packages = _packages(folders)
    total = sum(len(source) for sources in packages.values() for source in sources)
    if not total:
        raise SystemExit(f"no Python sources are in {[str(folder) for folder in folders]}")
    # In an order that has nothing to do with what they are.
    names = sorted(packages, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out: dict[str, list[str]] = {"choice": [], "reported": []}
    for held in held_out.values():
        size = 0
        for name in list(names):
            length = sum(map(len, packages[name]))
            if size < HELD_OUT * total and length < LARGE * total:
                held.append(name)
                names.remove(name)
                size += length

    parts = {"train": b"".join(source for name in names for source in packages[name])}
    known = _lines(parts["train"])
    for part, held in held_out.items():
        kept = [
            source for name in held for source in packages[name] if 2 * len((x := _lines(source)) & known) <= len(x)
        ]
        parts[part] = b"".join(kept)
        known |= _lines(parts[part])
    text = bytearray().join(parts.values())
    sizes = {name: sum(map(len, packages[name])) for name in names}
    facts = {
        "bytes": [len(part) for part in parts.values()],
        "packages": [len(names), *map(len, held_out.values())],
        "largest": sorted(sizes, key=lambda name: -sizes[name])[:20],
        **held_out,
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    return text, facts


def _packages(folders: list[Path]) -> dict[str, list[bytes]]:
    """Sources by package, each once, in the order of names."""
    paths: dict[str, list[Path]] = {}
    for folder in folders:
        for top in sorted(folder.iterdir()):
            if top.name not in LEFT_OUT and (top.is_dir() or top.suffix == ".py"):
                found = [top] if top.is_file() else sorted(top.rglob("*.py"))
                found = [path for path in found if LEFT_OUT.isdisjoint(path.relative_to(folder).parts)]
                paths.setdefault(top.stem, []).extend(found)
    seen: set[bytes] = set()
    packages: dict[str, list[bytes]] = {}
    with ThreadPoolExecutor(16) as pool:
        for name in sorted(paths):
            for source in pool.map(_read, paths[name]):
                digest = hashlib.sha256(b"\n".join(line.strip() for line in source.splitlines())).digest()
                if source and digest not in seen:
                    seen.add(digest)
                    packages.setdefault(name, []).append(source)
    return packages


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # links to nowhere
        return b""


def _lines(source: bytes) -> set[int]:
    return {hash(line) for line in map(bytes.strip, source.splitlines()) if len(line) >= LINE}


class Windows:
    """Batches of windows: all of the text in a random order, then all of it again, shifted; the same for a seed."""

    def __init__(self, text: Tensor, length: int, batch: int, steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        epochs: list[Tensor] = []
        while sum(map(len, epochs)) < steps * batch:
            offset = torch.randint(length, (), generator=generator)
            windows = (len(text) - 1 - offset) // length
            assert windows > 0, f"the text has {len(text)} bytes, a window {length}"
            epochs.append(offset + length * torch.randperm(int(windows), generator=generator))
        self.epochs = steps * batch / len(epochs[0])
        self._starts = torch.cat(epochs)[: steps * batch].view(steps, batch).to(text.device)
        self._text, self._within = text, torch.arange(length + 1, device=text.device)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Bytes (batch, length) and the byte after each of them."""
        bytes_ = self._text[self._starts[step, :, None] + self._within].long()
        return bytes_[:, :-1], bytes_[:, 1:]


def evenly(text: Tensor, length: int, batch: int, batches: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of windows that lie evenly over the text."""
    starts = torch.linspace(0, len(text) - length - 1, batches * batch, dtype=torch.float64, device=text.device).long()
    within = torch.arange(length + 1, device=text.device)
    bytes_ = text[starts[:, None] + within].long()
    return [(part[:, :-1], part[:, 1:]) for part in bytes_.split(batch)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", metavar="DIR", help="folders of packages; default: all")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep the bytes here")
    options = parser.parse_args()
    print(json.dumps(read(options.text, options.cache).facts, indent=1))
