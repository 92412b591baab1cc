"""The packages of drelu_timm import from above to below, in the order of the README's table of modules."""

import ast
import re
from pathlib import Path

import pytest

import drelu_timm
from drelu_timm.__main__ import VERBS

PACKAGE = Path(drelu_timm.__file__).parent
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LAYERS = re.findall(r"^\| `(\w+)/` \|", README, flags=re.MULTILINE)


def test_the_readme_names_every_package_and_module():
    table = README[README.index("## The modules") : README.index("## Where to look next")]
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"`(\w+(?:\.py|/))`", table)) == modules | packages


@pytest.mark.parametrize("layer", LAYERS)
def test_a_package_uses_no_verb_and_nothing_that_comes_after_it(layer):
    after = set(LAYERS[LAYERS.index(layer) + 1 :])
    for path in (PACKAGE / layer).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                names = [node.module.split(".")[0]] if node.module else [name.name for name in node.names]
                assert not after.union(VERBS).intersection(names), f"{path.name}, line {node.lineno}"
