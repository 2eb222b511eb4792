"""The Triton kernels without a card; tests/gpu/run.sh checks and times them on one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="pip install triton, or the dev extra")


def test_interpreted_kernels_equal_decode_then_attend() -> None:
    """The cases of interpreted.py, in a process where Triton was imported for its interpreter."""
    cases = Path(__file__).with_name("interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(cases), "-p", "no:cacheprovider", "-rs"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 25, done.stdout[-2000:]


def test_kernels_compile_for_hopper_with_tensor_cores() -> None:
    """Triton compiles for a card that is not there."""
    script = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torchrec_sid.side.kernels import triton_kernels as kernels
from torchrec_sid.side.kernels.triton_attention import choose_tiles
for kernel in (kernels.attention_forward, kernels.attention_backward):
    for rows in (4, 256):
        tiles = choose_tiles(rows, 25)
        constants = dict(columns=5, radix=3, values=243, heads=4, has_shared=False,
                         has_limits=True, has_multiplicity=True, bias_heads=0,
                         softmax=True, splits=3, widen=False, chunk=2048, search_steps=9,
                         block_m=tiles.block_m, block_n=tiles.block_n, block_f=tiles.block_f)
        types = dict(events="*u8", offsets="*i64", item_starts="*i64", row_starts="*i64",
                     limits="*i64", users="i32", most_rows="i32",
                     num_features="i32", num_events="i32")
        signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature,
                           constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()})
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                               options=dict(num_warps=tiles.warps, num_stages=1))
        matrix = built.asm["ptx"].count("mma.sync") + built.asm["ptx"].count("wgmma.mma_async")
        print(kernel.__name__, rows, "tensor" if matrix else "none")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == 4
    assert all(line.split()[2] == "tensor" for line in lines), done.stdout


@pytest.mark.slow
def test_the_script_for_a_card_runs_in_the_interpreter(tmp_path: Path) -> None:
    """Its checks hold and its timings are written; the times themselves mean nothing here."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        ["bash", str(root / "tests/gpu/run.sh"), str(tmp_path), "--device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHON": sys.executable},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    checks = json.loads((tmp_path / "check_attention.json").read_text())
    assert checks["worst_error"]["triton"] < 1e-5
    assert "check_corrupt" in checks["checks"]
    results = json.loads((tmp_path / "time_attention.json").read_text())["results"]
    assert {row["pass"] for row in results[0]["kernels"]} == {"forward", "backward"}
