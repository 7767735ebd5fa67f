"""docs/architecture.md: its diagram is that of the imports, which run one way."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = {"unilabel": "unilabel", "backends": "unilabel.backends", "conformance": "unilabel.conformance"}
MOST_LINES = 400


def modules():
    """The name of each module of the package, and its file."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = file
    return found


def imports(name, file, known):
    """The modules of the package that one imports when it is imported itself, or later."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            base = ".".join(filter(None, (base, node.module))) if node.level else node.module
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        yield from (target for target in targets if target in known and target != name)


def part(module):
    """What the diagram calls a module: all of conformance/ is one part, and a file of layers/ is its framework's."""
    name = module.removeprefix("unilabel").removeprefix(".")
    return "conformance" if name.startswith("conformance") else name.replace(".", "/")


def graph():
    known = modules()
    edges = {part(name): set() for name in known if name not in ("unilabel", "unilabel.backends", "unilabel.layers")}
    for name, file in known.items():
        if part(name) in edges:
            more = {part(target) for target in imports(name, file, known)} - {part(name), "", "backends", "layers"}
            edges[part(name)] |= more
    return edges


def reduced(edges):
    """Without the arrows that a longer way makes needless."""

    def reach(start):
        seen, left = set(), list(edges[start])
        while left:
            node = left.pop()
            if node not in seen:
                seen.add(node)
                left += edges.get(node, ())
        return seen

    return {
        (start, end)
        for start, ends in edges.items()
        for end in ends
        if not any(end in reach(other) for other in ends - {end})
    }


def test_imports_run_one_way():
    TopologicalSorter(graph()).prepare()  # CycleError names the circle


def test_the_diagram_is_that_of_the_imports():
    drawn = set(re.findall(r"^ +(\S+) --> (\S+)$", PAGE.read_text("utf-8"), re.MULTILINE))
    assert drawn == reduced(graph())


def test_the_library_knows_no_framework():
    """unilabel/ imports neither backends/ nor conformance/ by name, nor a framework but in layers/."""
    frameworks = {"torch", "jax", "tensorflow", "keras", "mlx", "dask"}
    known = modules()
    for name, file in known.items():
        if (ROOT / "unilabel") not in file.parents or "layers" in name:
            continue
        assert not [target for target in imports(name, file, known) if part(target).startswith(("backends", "conf"))]
        text = file.read_text("utf-8")
        assert not set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)) & frameworks


FRAMEWORKS = ("numpy", "torch", "jax", "tensorflow", "array_api")
TESTED_IN = {"mlx": "in_array_api", "keras": "layers", "torch_modes": "torch_internals"}
TESTED_IN |= {name: f"in_{name}" for name in FRAMEWORKS}


def test_the_tests_of_a_module_have_its_name():
    """tests/test_NAME.py tests unilabel/NAME.py, or the package NAME; tests/test_in_NAME.py a framework's backend."""
    names = [part(name) for name in modules() if name.startswith("unilabel.") and not name.startswith("unilabel.conf")]
    for name in names:
        folder, _, file = name.rpartition("/")
        test = TESTED_IN.get(file, file) if folder == "backends" else folder or name
        shared = {"namespaces": "namespace", "loops": "linear", "threads": "blocks"} | {
            name: name for name in ("linear", "sparse")
        }
        test = shared.get(test.rpartition("_")[2], test)
        assert test == "backends" or (ROOT / "tests" / f"test_{test}.py").exists(), name


def test_files_are_short():
    long = {
        name: n for name, file in modules().items() if (n := len(file.read_text("utf-8").splitlines())) > MOST_LINES
    }
    assert {name for name in long if not name.startswith("unilabel.conformance")} == set()
