"""Siblings differ exactly where the papers do."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Same-named definitions that may differ from td3_bst.py's, and why.
TD3_BC = {
    "Config": "alpha instead of mu, scale and the Morse network",
    "LOCOMOTION": "omega's mu, floor and gradient; targets' step and rewards",
    "POINTMAZE": "mu, the actor's rate",
    "ANTMAZE": "floor, the gradient through omega",
    "TRACED": "alpha",
    "MAZE": "the weight of Q and the noise",
    "DEFAULTS": "own arrays, where TD3+BC is careful as it is",
    "resolve": "the defaults of what the data decides, of scale and decay",
    "actor_loss": "the objective",
    "update_actor": "hands alpha on, not the supervisor",
    "update": "hands alpha on, not the supervisor",
    "train": "hands alpha on, not the supervisor; the largest omega",
    "main": "the Morse network; the length of a run",
}
IQL_BST = {
    "Config": "expectile, beta and the policy step instead of target noise and delay",
    "LOCOMOTION": "expectile and beta, IQL's settings",
    "POINTMAZE": "IQL's settings",
    "MAZE": "IQL's settings",
    "ANTMAZE": "IQL's settings",
    "DEFAULTS": "IQL's settings",
    "TRACED": "the expectile",
    "resolve": "rewards scaled by the returns' range; neither drift nor decay",
    "Q_PER_SPREAD": "what IQL's critics stand",
    "CAREFUL": "beta instead of w, which is 1",
    "AgentState": "a value, no target actor",
    "dense": "IQL's initialisation",
    "Actor": "the log sigma of AWR",
    "td_target": "the value of the next observation instead of target networks",
    "optimizers": "the value's, no delay",
    "init": "the value; one critic after the other",
    "update_critics": "no noise to draw; the targets follow here",
    "update_actor": "AWR, no target actor",
    "update": "one value, actor and critic step on one batch",
    "train": "no delay",
    "main": "the returns' range; AWR needs no Morse network; the length of a run",
}
ONLY_BST = {"Supervisor", "supervisor"}
ONLY_BST |= {"LARGEST_Q_WEIGHT", "Q_PER_SPREAD", "NOISE_PER_SPREAD"}
ONLY_BST |= {"FLOOR_PER_SPREAD", "CAREFUL", "FALLS"}
ONLY_BST |= {"LOCOMOTION_UPDATES", "MANY_FALLS", "MANY_POLICIES"}
NOT_IQL = {"n_step", "DEEPER"} | ONLY_BST
NOT_IQL -= {"Supervisor", "supervisor", "NOISE_PER_SPREAD", "MANY_FALLS"}
NOT_IQL -= {"Q_PER_SPREAD", "CAREFUL"}
ONLY_IQL = {
    "Value",
    "awr_loss",
    "awr_weight",
    "expectile_loss",
    "state_values",
    "target_q",
    "update_value",
    "value_loss",
}


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


def differing(script: str) -> set[str]:
    """Names that the script and td3_bst.py define differently."""
    own, bst = definitions(script), definitions("td3_bst.py")
    return {name for name in own.keys() & bst.keys() if own[name] != bst[name]}


def test_td3_bc_is_td3_bst_without_the_supervisor():
    bc, bst = definitions("td3_bc.py"), definitions("td3_bst.py")
    assert set(bst) - set(bc) == ONLY_BST
    assert set(bc) - set(bst) == set()
    assert differing("td3_bc.py") == set(TD3_BC)


def test_iql_bst_is_td3_bst_with_another_value_learning():
    iql, bst = definitions("iql_bst.py"), definitions("td3_bst.py")
    assert set(bst) - set(iql) == NOT_IQL  # it learns from one step
    assert set(iql) - set(bst) == ONLY_IQL
    assert differing("iql_bst.py") == set(IQL_BST)
    assert "actor_loss" not in IQL_BST  # the BST step is TD3-BST's own, to the letter


def test_siblings_define_things_in_one_order():
    order = list(definitions("td3_bst.py"))
    for script in ("td3_bc.py", "iql_bst.py"):
        own = [name for name in definitions(script) if name in order]
        assert own == [name for name in order if name in own]


def test_td3_bc_does_not_mention_the_supervisor_above_main():
    source = (ROOT / "td3_bc.py").read_text(encoding="utf-8")
    body = source.split('"""', 2)[2].split("def main(")[0]
    for word in ("morse", "omega", "supervisor", "bst."):
        assert word not in body.lower(), word
