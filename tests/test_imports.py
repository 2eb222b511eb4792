"""What must import with torch alone does, and importing changes nothing."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import torchrec_sid

PROGRAM = """
import random, sys
import numpy, torch
torch.manual_seed(1)
before = torch.get_num_threads(), torch.initial_seed(), random.getstate(), torch.get_default_dtype()
handlers = list(__import__("logging").getLogger().handlers)
heavy = {"torchrec", "fbgemm_gpu", "torchx", "pyarrow", "rich", "matplotlib", "sentencepiece", "faiss"}
for name in heavy:
    sys.modules[name] = None  # importing it is now an error

import torchrec_sid
import torchrec_sid.artifact, torchrec_sid.catalog, torchrec_sid.quality
import torchrec_sid.quantizers, torchrec_sid.side

after = torch.get_num_threads(), torch.initial_seed(), random.getstate(), torch.get_default_dtype()
assert before == after and handlers == list(__import__("logging").getLogger().handlers)

x = torch.randn(300, 8)
quantizer = torchrec_sid.quantizers.ResidualKMeans(
    8, torchrec_sid.quantizers.ResidualKMeansConfig(cardinalities=(4, 4))
)
quantizer.fit(x)
print(torchrec_sid.quality.measure_quality(quantizer, x).items)
assert torchrec_sid.ResidualKMeans is torchrec_sid.quantizers.ResidualKMeans
assert torchrec_sid.SidCatalog and torchrec_sid.DiscretePca and torchrec_sid.CodeSpaceAttention
"""


def test_torch_alone_is_enough() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "300"


def test_the_front_door_opens_on_what_the_rooms_have() -> None:
    for name in torchrec_sid.__all__:
        value = getattr(torchrec_sid, name)
        if name in torchrec_sid._HOME:
            room = importlib.import_module(f"torchrec_sid.{torchrec_sid._HOME[name]}")
            assert value is getattr(room, name)
    assert set(torchrec_sid.__all__) <= set(dir(torchrec_sid))
    # What a type checker is told is what a program gets.
    tree = ast.parse(Path(torchrec_sid.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    told = {
        (statement.module, alias.name)
        for statement in checked.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert told == {(f"torchrec_sid.{room}", name) for name, room in torchrec_sid._HOME.items()}
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        torchrec_sid.nothing_of_the_kind  # noqa: B018
