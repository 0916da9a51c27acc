"""README.md: every Python block runs as it stands, in order; the commands and files it names exist."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import fxfunc

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    """What the blocks leave behind, run in a folder of their own; the rows to be added to rules are left out."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("readme"))
    scope: dict = {"__name__": "readme"}
    try:
        for i, block in enumerate(BLOCKS):
            if not block.startswith("elementwise("):
                exec(compile(block, f"README.md block {i}", "exec"), scope)
    finally:
        os.chdir(before)
    return scope


def test_per_sample_gradients_are_those_of_torch_func(namespace):
    params, x, y = namespace["params"], torch.randn(3, 784), torch.tensor([1, 2, 3])
    torch_loss = lambda p, x, y: torch.nn.functional.cross_entropy(
        torch.func.functional_call(namespace["model"], p, (x,)), y
    )
    expected = torch.func.vmap(torch.func.grad(torch_loss), (None, 0, 0))(params, x, y)
    torch.testing.assert_close(namespace["per_sample"](params, x, y), expected)
    assert all(g.shape == (32, *params[name].shape) for name, g in namespace["grads"].items())


def test_the_artifact_of_the_readme_gives_the_meta_gradient(namespace):
    data = [namespace[name] for name in ("x", "y", "x", "y")]
    torch.testing.assert_close(namespace["meta_grads"], namespace["meta_grad"](namespace["params"], *data))


def test_shapes_in_comments_are_true(namespace):
    comments = re.findall(r"^(fxfunc\.\S.*\))  # \[([\d, ]+)\]", TEXT, re.M)
    assert len(comments) == 3
    for call, shape in comments:
        assert list(eval(call, namespace).shape) == [int(n) for n in shape.split(",")]


def test_rows_that_the_readme_shows_are_those_of_the_rules():
    (rows,) = [block for block in BLOCKS if block.startswith("elementwise(")]
    rules = "".join(path.read_text() for path in (ROOT / "passes" / "rules").glob("*.py"))
    squeezed = re.sub(r"\s+", "", rules)
    for row in rows.splitlines():
        assert re.sub(r"\s+|#.*", "", row) in squeezed, row


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^(scripts/\w+)", TEXT, re.M))))
def test_commands_exist_and_are_executable(command):
    assert os.access(ROOT / command, os.X_OK)


def test_the_commands_come_first():
    first = re.search(r"```bash\n(.*?)```", TEXT, re.S)[1].splitlines()
    assert [line.split()[0] for line in first] == ["scripts/maml", "scripts/bench", "scripts/test"]
    assert TEXT.index("```bash") < TEXT.index("```python")


def test_names_and_files_in_the_text_exist():
    for name in set(re.findall(r"fxfunc\.([a-z_]+)\b", TEXT)) - {"py", "bench"}:
        assert hasattr(fxfunc, name), name
    for path in set(re.findall(r"`((?:passes|fxfunc|tests|scripts|codegen|bench)/[\w./]*)`", TEXT)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "what, call",
    [
        ("value", lambda x: fxfunc.vmap(lambda x: x if x > 0 else -x)(x)),
        ("value", lambda x: fxfunc.jit(lambda x: x[x > 0])(x)),
    ],
)
def test_what_the_readme_says_is_missing_raises_and_says_so(what, call):
    with pytest.raises(fxfunc.errors.FxfuncError, match=what):
        call(torch.randn(3))
