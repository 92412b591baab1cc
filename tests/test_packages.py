"""Packages of drelu_timm import only packages below them, and no verb."""

import ast
from pathlib import Path

import pytest

import drelu_timm
from drelu_timm.__main__ import VERBS

PACKAGE = Path(drelu_timm.__file__).parent
LAYERS = (  # from the lowest
    "models",
    "zoo",
    "attacks",
    "data",
    "training",
    "results",
    "evaluation",
    "publishing",
    "reports",
    "sweeps",
)


def test_every_package_has_a_layer():
    assert sorted(LAYERS) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_package_imports_no_verb_and_no_package_above_it(layer):
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    for path in (PACKAGE / layer).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                names = [node.module.split(".")[0]] if node.module else [name.name for name in node.names]
                assert not above.union(VERBS).intersection(names), f"{path.name}, line {node.lineno}"
