"""Siblings differ exactly where the papers do."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Same-named definitions of td3_bc.py that may differ from td3_bst.py's, and why.
DIFFERENT = {
    "Config": "alpha instead of mu, scale and the Morse network",
    "LOCOMOTION": "mu",
    "POINTMAZE": "mu",
    "resolve": "the scale's default",
    "actor_loss": "the objective",
    "update_actor": "hands the supervisor on",
    "update": "hands the supervisor on",
    "train": "hands the supervisor on, the largest omega",
    "main": "the Morse network",
}
ONLY_BST = {"Supervisor", "supervisor"}


def definitions(script: str) -> dict[str, str]:
    """Source of every top-level function, class and constant, by name."""
    source = (ROOT / script).read_text(encoding="utf-8")
    found = {}
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node) or ""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = text
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = text
    return found


def test_td3_bc_is_td3_bst_without_the_supervisor():
    bc, bst = definitions("td3_bc.py"), definitions("td3_bst.py")
    assert set(bst) - set(bc) == ONLY_BST
    assert set(bc) - set(bst) == set()
    differing = {name for name in bc if bc[name] != bst[name]}
    assert differing == set(DIFFERENT)


def test_td3_bc_does_not_mention_the_supervisor_above_main():
    source = (ROOT / "td3_bc.py").read_text(encoding="utf-8")
    body = source.split('"""', 2)[2].split("def main(")[0]
    for word in ("morse", "omega", "supervisor", "bst."):
        assert word not in body.lower(), word
