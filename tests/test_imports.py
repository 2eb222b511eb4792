"""What must import with torch alone does, and importing changes nothing."""

import subprocess
import sys

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
print(quantizer.quality(x).items)
"""


def test_torch_alone_is_enough() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "300"
