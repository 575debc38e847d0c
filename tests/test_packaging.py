"""Installs contain every package and data file of the checkout, without the links."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
ROOMS = ("convert", "train")  # at the root; parts of dsmoe_jax once installed


def folders(top: Path, package: str) -> set[str]:
    """The packages of a folder and of those below it; `rglob` does not follow links."""
    return {".".join([package, *path.parent.relative_to(top).parts]) for path in top.rglob("*.py")}


def test_the_list_of_packages_is_the_folders():
    found = folders(ROOT / "dsmoe_jax", "dsmoe_jax").union(
        *(folders(ROOT / room, f"dsmoe_jax.{room}") for room in ROOMS)
    )

    assert SETTINGS["packages"] == sorted(found)


def test_the_rooms_at_the_root_are_mapped_into_the_package():
    assert SETTINGS["package-dir"] == {"dsmoe_jax": "dsmoe_jax"} | {f"dsmoe_jax.{room}": room for room in ROOMS}


def test_every_data_file_of_a_package_is_listed():
    home = SETTINGS["package-dir"]
    listed = {ROOT / home[package] / name for package, names in SETTINGS["package-data"].items() for name in names}

    found = {
        path
        for room in ("dsmoe_jax", *ROOMS)
        for path in (ROOT / room).rglob("*")
        if path.is_file()
        and path.suffix not in (".py", ".pyc", ".md", ".png")
        and "launch" not in path.parts
        and not path.is_symlink()
    }

    assert found == listed
