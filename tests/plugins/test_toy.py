"""The quantizer, scheme and channel of docs/architecture.md: one file that the package knows nothing of."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchrec import KeyedJaggedTensor

from tests.logs import small_log
from torchrec_sid import SidCatalog, SidEmbeddingBagCollection, SidEmbeddingBagConfig, SidSpec
from torchrec_sid.models.build import RankingConfig
from torchrec_sid.models.channels import CHANNELS
from torchrec_sid.plugins import load_plugins
from torchrec_sid.quality import measure_quality
from torchrec_sid.quantizers import QUANTIZERS, load_quantizer, make_quantizer
from torchrec_sid.side.basis import FrozenBasis
from torchrec_sid.tables.scheme_registry import SCHEMES
from torchrec_sid.training.run import build_run, open_stores
from torchrec_sid.training.train_config import TrainConfig

_PAGE = (Path(__file__).resolve().parents[2] / "docs" / "architecture.md").read_text()
_BLOCKS = re.findall(r"```python\n(.*?)```", _PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's examples as one file, loaded as ``--plugin`` does; once, since a name is taken once."""
    file = tmp_path_factory.mktemp("outside") / "toy.py"
    file.write_text("\n\n".join(_BLOCKS[:3]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHREC_SID_PLUGINS", "")
        load_plugins(file)
        yield file
    for registry, name in ((QUANTIZERS, "hyperplanes"), (SCHEMES, "ends"), (CHANNELS, "ends")):
        del registry._parts[name]


def test_the_quantizer_learns_saves_and_serves_side(toy: Path, tmp_path: Path) -> None:
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(1)) * torch.linspace(2, 0.1, 16)
    quantizer = make_quantizer(16, QUANTIZERS["hyperplanes"].config_type(bits=10))
    report = quantizer.fit(x)
    assert report.fvu == tuple(sorted(report.fvu, reverse=True)) and 0.2 < report.fvu[-1] < 0.8
    assert measure_quality(quantizer, x).items == 500
    quantizer.save(tmp_path / "q.safetensors")
    # Another process knows the kind by the environment alone.
    program = "import sys, torchrec_sid as s; print(s.load_quantizer(sys.argv[1]).fingerprint)"
    command = [sys.executable, "-c", program, str(tmp_path / "q.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == quantizer.fingerprint, done.stderr
    codes = quantizer.encode(x)
    basis = FrozenBasis.from_quantizer(load_quantizer(tmp_path / "q.safetensors"))
    assert basis.spec == quantizer.spec == SidSpec((2,) * 10)
    torch.testing.assert_close(basis.decode(codes), quantizer.decode(codes), rtol=1e-4, atol=1e-4)


def test_the_scheme_addresses_tables(toy: Path) -> None:
    spec, scheme = SidSpec((4, 4, 4)), SCHEMES["ends"](num_embeddings=50)
    table = SidEmbeddingBagConfig(
        name="t", feature_names=["item"], embedding_dim=8, scheme=scheme, spec=spec
    )
    bags = SidEmbeddingBagCollection(tables=[table])
    assert sorted(p.shape[0] for p in bags.parameters()) == [5, 50]
    packed = spec.pack(torch.tensor([[1, 2, 3], [1, 0, 0], [2, 2, 3]]))
    vectors = bags(
        KeyedJaggedTensor.from_lengths_sync(
            keys=["item"], values=packed, lengths=torch.ones(3, dtype=torch.int64)
        )
    ).values()
    coarse = next(p for p in bags.parameters() if p.shape[0] == 5)
    gradient = torch.autograd.grad(vectors.sum(), coarse)[0].sum(1)
    assert gradient.tolist() == [0, 16, 8, 0, 0], "two items share the first code"


def test_the_channel_trains_beside_ids(toy: Path, tmp_path: Path) -> None:
    log = small_log(tmp_path)
    ids = torch.tensor([int(i) for i in log.item_ids])
    codes = torch.randint(0, 8, (log.items, 3), generator=torch.Generator().manual_seed(0))
    SidCatalog.create(tmp_path / "catalog", SidSpec((8, 8, 8)), ids, codes, "0" * 64)
    config = TrainConfig(
        str(tmp_path / "log"),
        str(tmp_path / "run"),
        catalog=str(tmp_path / "catalog"),
        model=RankingConfig("full_id+ends", dim=8, heads=2, history_length=8, table_rows=100),
    )
    ranking = build_run(config, log, open_stores(config, log))
    assert ranking.bytes_per_event == 10
    tables = {name for name, _ in ranking.module.named_parameters() if "_ends" in name}
    assert len(tables) == 4, "two slots of the candidate, two of the history"


def test_the_feature_is_described() -> None:
    names: dict = {}
    exec(_BLOCKS[3], names)
    assert [feature.name for feature in names["specification"].features] == ["genre", "price", "country"]
