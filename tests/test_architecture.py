"""Architecture: import order of rooms, and file sizes."""

import ast
import builtins
import importlib
import inspect
import os
import re
import symtable
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dsmoe_jax"
README = PACKAGE.parent / "README.md"
LINES = 450  # of a file at most
ROOT_FILES = 15

# Bottom-up; a room may import from the same or a lower floor. README.md has the same order.
FLOORS = (
    ("axes", "errors", "progress", "xla_options"),
    ("storage",),
    ("config",),
    ("text",),
    ("kernels", "sharding"),
    ("kv_cache",),
    ("layers",),
    ("model",),
    ("checkpoint", "info", "lora", "quantize"),
    ("convert",),
    ("loading",),
    ("generate",),
    ("evaluate",),
    ("train",),
    ("plan", "serve"),
    ("experiments",),
    ("cli",),
)
PARTS = {"config_aliases": "config", "__main__": "cli"}  # a single file on a different floor
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
LEVEL |= {part: LEVEL[room] for part, room in PARTS.items()}

# Only these files may use the mesh or collectives.
COMMUNICATORS = {"layers/token_dispatcher.py"}
COLLECTIVES = {"shard_map", "psum", "psum_scatter", "all_gather", "all_to_all", "ppermute", "axis_index"}
HEAVY = {"torch", "transformers", "tensorflow"}


def source_files() -> dict[str, ast.Module]:
    """Every module of the package by its path, including symlinked rooms."""
    files = {}
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(folder) / name
                files[path.relative_to(PACKAGE).as_posix()] = ast.parse(path.read_text(encoding="utf-8"))
    return files


def imports(file: str, tree: ast.Module) -> set[str]:
    """The dotted names a module imports; relative ones are resolved within the package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = ["dsmoe_jax", *file.split("/")[:-1]]
            base = home[: len(home) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if module == "dsmoe_jax" or is_module(name) else module for name in names}
    return found


def is_module(dotted: str) -> bool:
    return PACKAGE.parent.joinpath(*dotted.split(".")).with_suffix(".py").is_file()


def room_of(dotted_or_file: str) -> str:
    return dotted_or_file.removeprefix("dsmoe_jax.").split("/")[0].split(".")[0]


FILES = source_files()
MODULES = {file: tree for file, tree in FILES.items() if file != "__init__.py"}  # the public module is lazy


def test_every_room_has_a_floor():
    assert {room_of(file) for file in MODULES} == set(LEVEL)
    assert {"convert/reader.py", "train/loss.py", "layers/moe.py", "generate/generator.py"} <= set(FILES)


@pytest.mark.parametrize("file", MODULES)
def test_a_room_imports_only_from_its_floor_or_lower(file: str):
    own = LEVEL[room_of(file)]

    rooms = {room_of(name) for name in imports(file, MODULES[file]) if name.startswith("dsmoe_jax.")}
    above = {room for room in rooms if LEVEL.get(room, -1) > own}

    assert not above


def test_the_readme_states_these_floors():
    text = " ".join(README.read_text(encoding="utf-8").split())
    stated = re.search(r"lower floors: (.*?)\.", text)

    assert stated is not None
    assert [tuple(floor.split(", ")) for floor in stated[1].split(" → ")] == list(FLOORS)


def module_graph() -> dict[str, set[str]]:
    """The modules of the package that each module imports on import."""
    names = {file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): file for file in MODULES}
    graph = {}
    for name, file in names.items():
        top_level = ast.Module([node for node in MODULES[file].body if not isinstance(node, ast.If)], [])
        for node in ast.walk(top_level):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = []
        found = {imported.removeprefix("dsmoe_jax.") for imported in imports(file, top_level)}
        graph[name] = {module for module in found if module in names} - {name}
    return graph


def test_no_import_cycles():
    graph, done = module_graph(), set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("file", FILES)
def test_files_are_short(file: str):
    assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) <= LINES


def test_the_root_is_short():
    assert len(list(PACKAGE.glob("*.py"))) <= ROOT_FILES


def test_the_check_finds_upward_and_relative_imports():
    tree = ast.parse("from dsmoe_jax.layers.moe import MoE\nfrom dsmoe_jax import model\nfrom .param_mapping import x")

    assert imports("convert/reader.py", tree) == {
        "dsmoe_jax.layers.moe",
        "dsmoe_jax.model",
        "dsmoe_jax.convert.param_mapping",
    }


def test_train_imports_only_the_adapter_modules_of_convert():
    found = {name for file, tree in MODULES.items() if room_of(file) == "train" for name in imports(file, tree)}

    assert {name for name in found if name.startswith("dsmoe_jax.convert")} == {
        "dsmoe_jax.convert.peft",
        "dsmoe_jax.convert.peft_matching",
    }


@pytest.mark.parametrize("file", sorted(file for file in MODULES if room_of(file) in ("layers", "kernels", "model")))
def test_only_the_dispatcher_communicates(file: str):
    names = {node.attr for node in ast.walk(MODULES[file]) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(MODULES[file]) if isinstance(node, ast.Name)}

    assert file in COMMUNICATORS or not names & COLLECTIVES


def test_no_other_framework_is_imported():
    roots = {name.split(".")[0] for file, tree in FILES.items() for name in imports(file, tree)}

    assert not roots & HEAVY


def undefined(table: symtable.SymbolTable, known: set[str]) -> set[str]:
    """The global names that a scope or one within it uses, and nothing defines."""
    found = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    return (found - known).union(*(undefined(scope, known) for scope in table.get_children()))


@pytest.mark.parametrize("file", MODULES)
def test_every_used_name_is_defined(file: str):
    """ruff cannot check this, as F821 is disabled for shape strings."""
    whole = symtable.symtable((PACKAGE / file).read_text(encoding="utf-8"), file, "exec")

    own = {symbol.get_name() for symbol in whole.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    known = (
        own
        | {scope.get_name() for scope in whole.get_children()}
        | set(dir(builtins))
        | {"__file__", "__name__", "__path__"}
    )

    assert not undefined(whole, known)


def test_every_module_has_a_docstring():
    assert not [file for file, tree in FILES.items() if not ast.get_docstring(tree)]


def public_callables() -> dict[str, Any]:
    """The exported functions, and the methods of exported classes."""
    found = {}
    for room in ("dsmoe_jax", "dsmoe_jax.convert", "dsmoe_jax.generate", "dsmoe_jax.train"):
        module = importlib.import_module(room)
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.ismodule(thing):
                continue
            members = {name: thing} if inspect.isfunction(thing) else {f"{name}.{k}": v for k, v in vars(thing).items()}
            found |= {key: getattr(value, "__func__", value) for key, value in members.items() if "._" not in key}
    return {name: thing for name, thing in found.items() if inspect.isfunction(thing)}


def test_public_functions_have_google_sections():
    missing = []
    for name, function in public_callables().items():
        signature, doc = inspect.signature(function), inspect.getdoc(function) or ""
        wanted = ["Args:"] if signature.return_annotation in (None, "None") else ["Args:", "Returns:|Yields:"]
        if len(signature.parameters.keys() - {"self", "cls"}) > 1:
            missing += [f"{name} {section}" for section in wanted if not re.search(section, doc)]

    assert not missing
