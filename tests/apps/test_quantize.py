"""The quantize app: a folder in; quantizer, catalog and report out; and new items appended."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from apps.quantize import Quantization, QuantizeConfig, main, quantize
from tests.quantizers.test_registry import PLUGIN
from torchrec_sid import plugins
from torchrec_sid.catalog import SidCatalog
from torchrec_sid.data.prepare import PrepareConfig, prepare
from torchrec_sid.data.prepared import PreparedLog
from torchrec_sid.data.synthetic import SyntheticConfig, write_synthetic
from torchrec_sid.errors import ArtifactError, SidError
from torchrec_sid.learn import SidRecipe, learn_sids
from torchrec_sid.quantizers import (
    QUANTIZERS,
    DiscretePcaConfig,
    ResidualKMeansConfig,
    RqVaeConfig,
    VqFusionConfig,
    load_quantizer,
)
from torchrec_sid.quantizers.bottleneck import Bottleneck
from torchrec_sid.tables import PieceTrainerConfig, SidPieces

KMEANS = ResidualKMeansConfig(cardinalities=(8, 8))


def write_items(folder: Path, ids: np.ndarray, seed: int = 0, dim: int = 16) -> np.ndarray:
    """Items of six topics with a title and a category; no events."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    topic = random.integers(0, 6, len(ids))
    middle = np.random.default_rng(99).standard_normal((6, dim))
    x = (middle[topic] + 0.3 * random.standard_normal((len(ids), dim))).astype(np.float32)
    np.save(folder / "item_emb.npy", x)
    titles = [f"topic {t} item {i} <&>" for t, i in zip(topic, ids, strict=True)]
    categories = [f"t{t}, other" for t in topic]
    pq.write_table(
        pa.table({"item_id": ids, "title": titles, "kind": categories}), folder / "items.parquet"
    )
    return x


@pytest.fixture
def config(tmp_path: Path) -> QuantizeConfig:
    write_items(tmp_path / "data", 10 * np.arange(600))
    return QuantizeConfig(str(tmp_path / "data"), str(tmp_path / "out"), KMEANS, report=False)


def changed(config: QuantizeConfig, **fields: object) -> Quantization:
    output = str(Path(config.output).with_name("changed"))
    return quantize(dataclasses.replace(config, **{"output": output, **fields}))  # type: ignore[arg-type]


def test_a_folder_becomes_a_catalog_and_a_report(config: QuantizeConfig) -> None:
    x = torch.from_numpy(np.load(Path(config.data) / "item_emb.npy"))
    result = quantize(dataclasses.replace(config, label="kind", separator=", ", parquet=True, report=True))
    output = Path(config.output)
    loaded = load_quantizer(output / "quantizer.safetensors")
    catalog = SidCatalog.open(output / "catalog")
    assert catalog.quantizer_fingerprint == loaded.fingerprint == result.quantizer.fingerprint
    assert torch.equal(catalog.codes(10 * torch.arange(600)), loaded.encode(x))
    quality = json.loads((output / "quality.json").read_text())
    assert 0 < quality["held_out"] < 120 and quality["items"] == 600
    assert quality["prefixes"][0]["purity"]["kind"] > 0.95 and quality["verdict"]["name"] == "healthy"
    assert quality["catalog_fingerprint"] == catalog.fingerprint
    page = (output / "report.html").read_text()
    assert (
        "healthy" in page and "data:image/png;base64," in page and page.count("data:image/png;base64,") == 6
    )
    assert "&lt;&amp;&gt;" in page and "<&>" not in page, "texts of items are escaped"
    example = quality["examples"][0]
    topics = {name.split()[1] for name in example["names"]}
    assert len(example["names"]) == 5 and len(topics) == 1, "the items nearest to a prefix are of one topic"
    assert pq.read_table(output / "sids.parquet").num_rows == 600


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("held_out", 0.4),
        ("beam", 4),
        ("quantizer", ResidualKMeansConfig(cardinalities=(8, 9))),
        ("quantizer", DiscretePcaConfig.trits(8)),
    ],
)
def test_options_change_the_catalog(config: QuantizeConfig, field: str, value: object) -> None:
    before = quantize(config).catalog
    after = changed(config, **{field: value}).catalog
    assert after.fingerprint != before.fingerprint and len(after) == len(before)


def test_every_quantizer_can_be_chosen(config: QuantizeConfig) -> None:
    trits = changed(config, quantizer=DiscretePcaConfig(stages=((2, 3),) * 3))
    assert trits.catalog.spec.cardinalities == (3,) * 6
    small = RqVaeConfig(cardinalities=(8, 8), epochs=1)
    vae = changed(config, quantizer=small, overwrite=True)
    assert vae.catalog.spec.cardinalities == (8, 8) and vae.quantizer.kind == "rq_vae"


def test_a_fit_that_was_cut_off_continues(config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    small = RqVaeConfig(cardinalities=(8, 8), epochs=4, batch_size=64)
    fields = {"quantizer": small, "checkpoint_every": 5}
    whole = changed(config, **{**fields, "checkpoint_every": 0}).quantizer.fingerprint
    steps = 0
    follow = Bottleneck.follow

    def cut_off(*args: object) -> int:
        nonlocal steps
        steps += 1
        if steps == 12:
            raise KeyboardInterrupt
        return follow(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Bottleneck, "follow", cut_off)
    run = dataclasses.replace(config, **fields)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        quantize(run)
    checkpoint = Path(config.output) / "fit.safetensors"
    assert checkpoint.is_file()
    steps = 100
    assert quantize(run).quantizer.fingerprint == whole
    assert not checkpoint.exists(), "a finished fit needs it no more"
    assert steps < 100 + 34, "the steps before the checkpoint are not taken again"


def test_several_sources_become_one_sid_and_new_items_need_not_have_all(
    config: QuantizeConfig, tmp_path: Path
) -> None:
    data = Path(config.data)
    random = np.random.default_rng(5)
    np.save(data / "item_emb_image.npy", random.standard_normal((600, 6)).astype(np.float16))
    small = VqFusionConfig(codebooks=(8,), stages=((4, 3),), epochs=4.0, hidden=(16,))
    fields = {"quantizer": small, "categories": ("kind",)}
    first = quantize(dataclasses.replace(config, report=True, **fields))  # type: ignore[arg-type]
    assert first.catalog.spec.cardinalities == (8, 3, 3, 3, 3)
    quality = json.loads((Path(config.output) / "quality.json").read_text())
    assert set(quality["sources"]) == {"content", "image", "kind"}
    assert quality["sources"]["kind"]["top1"] > 0.9 > 2 * quality["sources"]["kind"]["top1_majority"]
    assert quality["sources"]["content"]["fvu"] < 0.6
    assert "What the SID keeps of each source" in first.report.read_text()
    assert first.quantizer.sources["kind"].width == 6  # type: ignore[attr-defined]
    split = changed(config, separator=", ", **fields)
    assert split.quantizer.sources["kind"].width == 7, "six topics, and 'other'"  # type: ignore[attr-defined]
    one = changed(config, sources=("content",), quantizer=small, overwrite=True)
    assert set(one.quantizer.sources) == {"content"}  # type: ignore[attr-defined]
    # New items have no image, and one has a category that the fit has not seen.
    write_items(tmp_path / "more", 10 * np.arange(50) + 1, seed=1)
    table = pq.read_table(tmp_path / "more" / "items.parquet")
    kinds = ["new"] + table.column("kind").to_pylist()[1:]
    table = table.set_column(2, "kind", pa.array(kinds))
    pq.write_table(table, tmp_path / "more" / "items.parquet")
    np.save(tmp_path / "more" / "item_emb_image.npy", np.ones((1, 6), np.float16))
    rows = pa.table({"item_id": pa.array([1])})
    pq.write_table(rows, tmp_path / "more" / "item_emb_image_rows.parquet")
    appended = quantize(
        dataclasses.replace(
            config, data=str(tmp_path / "more"), output=str(tmp_path / "new"), append_to=config.output
        )
    )
    assert len(appended.catalog) == 650 and appended.catalog.generation == 2
    ids = torch.from_numpy(10 * np.arange(600))
    assert torch.equal(appended.catalog.lookup(ids), first.catalog.lookup(ids))


def test_another_source_and_rows_of_ones_own_choice(config: QuantizeConfig) -> None:
    other = np.random.default_rng(5).standard_normal((600, 5)).astype(np.float16)
    np.save(Path(config.data) / "item_emb_image.npy", other)
    assert changed(config, source="image").quantizer.dim == 5
    rows = np.arange(600) < 300
    chosen = quantize(config, fit_rows=rows)
    assert chosen.quality.held_out == 300 and chosen.quality.items == 600
    everything = changed(config, held_out=0.0, overwrite=True)
    assert everything.quality.held_out == 600, "with nothing held out, errors are those of the fitted items"


@pytest.mark.parametrize("last_digit", [0, 64])
def test_new_items_are_appended_and_nothing_moves(
    config: QuantizeConfig, tmp_path: Path, last_digit: int
) -> None:
    first = quantize(dataclasses.replace(config, last_digit=last_digit))
    ids = torch.from_numpy(10 * np.arange(600))
    published = first.catalog.lookup(ids)
    write_items(
        tmp_path / "more", np.concatenate([10 * np.arange(580, 600), 10 * np.arange(100) + 1]), seed=1
    )
    more = dataclasses.replace(
        config, data=str(tmp_path / "more"), output=str(tmp_path / "new"), append_to=config.output
    )
    second = quantize(more)
    assert second.catalog.generation == 2 and len(second.catalog) == 700
    assert torch.equal(second.catalog.lookup(ids), published)
    assert second.quality.items == second.quality.held_out == 100, "the report is about the new items"
    assert second.quality.fvu < 0.5, "new items of the same topics fit the frozen quantizer"
    if last_digit:
        every = second.catalog.item_ids()
        assert len(second.catalog.lookup(every).unique()) == 700
    with pytest.raises(SidError, match="every item is in the catalog already"):
        quantize(more)


def test_drift_from_an_earlier_run(config: QuantizeConfig) -> None:
    quantize(config)
    same = changed(config, drift_from=config.output)
    assert same.drift is not None and (same.drift.common, same.drift.moved) == (600, 0)
    refitted = changed(config, drift_from=config.output, seed=5, overwrite=True, report=True)
    assert refitted.drift is not None and refitted.drift.moved > 0
    written = json.loads((refitted.report.parent / "quality.json").read_text())["drift"]
    assert written["moved"] == refitted.drift.moved and "<h2>Drift</h2>" in refitted.report.read_text()
    with pytest.raises(ArtifactError, match="no manifest"):
        changed(config, drift_from="nowhere", overwrite=True)


@pytest.mark.parametrize("kind", ["residual_kmeans", "rq_vae", "vq_fusion"])
def test_a_new_generation_is_aligned_to_the_one_before(
    config: QuantizeConfig, tmp_path: Path, kind: str
) -> None:
    training = {"epochs": 2.0, "batch_size": 128}
    quantizers = {
        "residual_kmeans": KMEANS,
        "rq_vae": RqVaeConfig(cardinalities=(6, 4), **training),  # type: ignore[arg-type]
        "vq_fusion": VqFusionConfig(codebooks=(6,), stages=((2, 3),), **training),  # type: ignore[arg-type]
    }
    first = dataclasses.replace(config, quantizer=quantizers[kind])
    quantize(first)
    # Half of the items are new, and the fit has another seed.
    write_items(tmp_path / "later", 10 * np.arange(300, 900), seed=3)
    x = np.load(tmp_path / "later" / "item_emb.npy")
    x[:300] = np.load(tmp_path / "data" / "item_emb.npy")[300:]
    np.save(tmp_path / "later" / "item_emb.npy", x)
    later = dataclasses.replace(
        first,
        data=str(tmp_path / "later"),
        quantizer=dataclasses.replace(quantizers[kind], seed=7),
        align_to=first.output,
        label="kind",
        separator=", ",
    )
    second = changed(later)
    assert second.drift is not None and second.drift.common == 300
    assert second.alignment is not None and "of traffic keeps its first code" in second.alignment
    quality = json.loads((Path(first.output).with_name("changed") / "quality.json").read_text())
    shares = quality["alignment"]
    assert shares["aligned"]["items"] == list(second.drift.changed.items)
    assert shares["aligned"]["items"][0] <= 0.2 <= 1 - 1 / 8
    assert shares["aligned"]["items"][0] <= shares["unaligned"]["items"][0]
    assert second.drift.purity_after["kind"][0] > 0.9
    # The quantizer that was saved is the aligned one: new items follow.
    content = torch.from_numpy(x)
    codes = second.quantizer.encode({"content": content} if kind == "vq_fusion" else content)
    assert torch.equal(second.catalog.codes(10 * torch.arange(300, 900)), codes)
    # The same command again finds all done; without the alignment it is another recipe.
    assert changed(later).catalog.fingerprint == second.catalog.fingerprint
    with pytest.raises(SidError, match="another recipe"):
        changed(dataclasses.replace(later, align_to=None))
    with pytest.raises(SidError, match="leave one out"):
        dataclasses.replace(later, append_to=first.output)


def test_sids_of_another_shape_are_not_aligned(config: QuantizeConfig) -> None:
    quantize(config)
    with pytest.raises(SidError, match="SIDs of another shape need a new model"):
        changed(config, align_to=config.output, quantizer=ResidualKMeansConfig(cardinalities=(4, 4)))
    assert not (Path(config.output).with_name("changed") / "catalog").exists()


def test_bad_input_is_refused_before_anything_is_written(config: QuantizeConfig, tmp_path: Path) -> None:
    write_items(tmp_path / "nan", np.arange(50))
    x = np.load(tmp_path / "nan" / "item_emb.npy")
    x[7, 3] = np.nan
    np.save(tmp_path / "nan" / "item_emb.npy", x)
    with pytest.raises(SidError, match="row 7 holds a NaN"):
        quantize(dataclasses.replace(config, data=str(tmp_path / "nan"), held_out=0.0))
    write_items(tmp_path / "short", np.arange(50))
    np.save(tmp_path / "short" / "item_emb.npy", x[:40])
    with pytest.raises(SidError, match="40 rows for 50 items"):
        quantize(dataclasses.replace(config, data=str(tmp_path / "short")))
    with pytest.raises(SidError, match="no such folder"):
        quantize(dataclasses.replace(config, data=str(tmp_path / "gone")))
    with pytest.raises(SidError, match="no column 'colour'"):
        quantize(dataclasses.replace(config, label="colour"))
    assert not Path(config.output).exists()


def test_an_existing_catalog_is_safe(config: QuantizeConfig, tmp_path: Path) -> None:
    first = quantize(config)
    with pytest.raises(SidError, match="holds a catalog already, of another recipe"):
        quantize(dataclasses.replace(config, seed=3))
    assert SidCatalog.open(Path(config.output) / "catalog").fingerprint == first.catalog.fingerprint
    again = quantize(dataclasses.replace(config, overwrite=True, seed=3))
    assert again.catalog.fingerprint != first.catalog.fingerprint
    # A quantizer that is not the catalog's own must not append to it.
    write_items(tmp_path / "more", np.arange(5))
    other = changed(config, seed=4)
    other.quantizer.save(Path(config.output) / "quantizer.safetensors")
    with pytest.raises(ArtifactError, match="was made by quantizer"):
        quantize(dataclasses.replace(config, data=str(tmp_path / "more"), append_to=config.output))


@pytest.mark.parametrize(
    "fields", [{"held_out": 1.0}, {"held_out": -0.1}, {"last_digit": 1}, {"checkpoint_every": -1}]
)
def test_bad_options_are_named(fields: dict[str, float]) -> None:
    with pytest.raises(SidError, match=next(iter(fields))):
        QuantizeConfig("data", **fields)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the card is there")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(SidError, match="device: cuda"):
        QuantizeConfig("data", device="cuda")


def test_the_command_line(config: QuantizeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "--data",
        config.data,
        "--output",
        config.output,
        "--residual-kmeans.cardinalities",
        "[8, 8]",
    ]
    main(command)
    out = capsys.readouterr().out
    assert "healthy" in out and "report.html" in out.replace("\n", "")
    main(command)  # it finds all done
    with pytest.raises(SystemExit, match="holds a catalog already"):
        main([*command, "--seed", "1"])


# ---- from events


def shop(path: Path) -> PreparedLog:
    """A synthetic log, prepared beside itself."""
    write_synthetic(path, SyntheticConfig(items=300, users=100, events=3000, topics=6, subtopics=2, dim=16))
    return prepare(path, path.with_name("prepared"), PrepareConfig())


@pytest.mark.parametrize("quantizer", [KMEANS, VqFusionConfig(codebooks=(8,), stages=((3, 3),), epochs=1)])
def test_a_folder_with_events_is_learned_from_as_the_comparisons_do(
    quantizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = shop(tmp_path / "log")
    config = QuantizeConfig(str(tmp_path / "log"), str(tmp_path / "out"), quantizer, report=False)
    learned = quantize(config)
    compared = learn_sids(SidRecipe(quantizer), tmp_path / "log", log, tmp_path / "compared")
    assert learned.catalog.fingerprint == compared.fingerprint
    assert learned.quantizer.fingerprint == SidCatalog.open(compared.catalog).quantizer_fingerprint
    figures = json.loads((tmp_path / "out" / "quality.json").read_text())
    impressed = int((np.array(log.item_train_events) > 0).sum())
    assert figures["fitted_on"]["items"] == impressed < 300
    assert "training events" in figures["fitted_on"]["how"]
    # Errors are those of items that had no event yet; without events, a share of the items is learned from.
    assert figures["held_out"] == 300 - impressed
    plain = changed(config, events=False, pieces=24)
    trained = SidPieces.load(tmp_path / "changed" / "pieces.safetensors")
    assert trained.spec == plain.catalog.spec
    assert plain.catalog.fingerprint != learned.catalog.fingerprint
    assert json.loads((tmp_path / "changed" / "quality.json").read_text())["fitted_on"]["how"] == (
        "a random 90% of the items"
    )


def test_what_was_learned_is_learned_again_when_its_content_changed(tmp_path: Path) -> None:
    log = shop(tmp_path / "log")
    recipe = SidRecipe(KMEANS)

    def learn() -> str:
        return learn_sids(recipe, tmp_path / "log", log, tmp_path / "sids").fingerprint

    first = learn()
    written = (tmp_path / "sids" / "quantizer.safetensors").stat().st_mtime_ns
    file = next((tmp_path / "log").glob("item_emb*.npy"))
    os.utime(file)  # another time, the same bytes
    assert learn() == first
    assert (tmp_path / "sids" / "quantizer.safetensors").stat().st_mtime_ns == written
    np.save(file, np.load(file)[::-1])
    second = learn()
    assert second != first
    # A run that was cut off half-way leaves no stamp, so that nothing of it is believed.
    other = learn_sids(SidRecipe(ResidualKMeansConfig((4, 4))), tmp_path / "log", log, tmp_path / "other")
    shutil.copytree(other.catalog, tmp_path / "sids" / "catalog", dirs_exist_ok=True)
    assert learn() == second, "a catalog of another quantizer is not believed"


def test_a_quantizer_of_a_plugin_is_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(QUANTIZERS, "_parts", dict(QUANTIZERS._parts))
    write_items(tmp_path / "data", np.arange(200))
    plugin = tmp_path / "coin.py"
    source = PLUGIN.replace("random_signs", "coin").replace("RandomSigns", "Coin")
    plugin.write_text(source)
    command = ["--plugin", str(plugin), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "o")]
    main([*command, "--quantizer", "coin", "--coin.bits", "4", "--report", "false"])
    assert "catalog: 200 items" in capsys.readouterr().out
    assert SidCatalog.open(tmp_path / "o" / "catalog").spec.cardinalities == (2,) * 4
    assert load_quantizer(tmp_path / "o" / "quantizer.safetensors").kind == "coin"
    with pytest.raises(SystemExit):
        main([*command, "--quantizer", "dice"])
    assert "coin" in capsys.readouterr().err, "the choices name it"


# ---- items without content


def test_items_without_content_are_counted_and_a_fusion_takes_the_union(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    write_items(data, np.arange(100))
    x = np.load(data / "item_emb.npy")
    (data / "item_emb.npy").unlink()
    # Text for items 0..69, an image for 50..89, nothing for the last ten.
    for name, rows in (("text", np.arange(70)), ("image", np.arange(50, 90))):
        np.save(data / f"item_emb_{name}.npy", x[rows])
        pq.write_table(pa.table({"item_id": rows}), data / f"item_emb_{name}_rows.parquet")
    base = ["--data", str(data), "--report", "false"]
    main([*base, "--output", str(tmp_path / "one"), "--source", "text"])
    out = capsys.readouterr().out
    assert "items without a SID: 30" in out and "catalog: 70 items" in out
    assert json.loads((tmp_path / "one" / "quality.json").read_text())["without_sid"] == {
        "text": 30,
        "any": 30,
    }
    small = VqFusionConfig(codebooks=(8,), stages=((3, 3),), epochs=1.0, hidden=(16,))
    fused = quantize(QuantizeConfig(str(data), str(tmp_path / "two"), small, report=False))
    assert fused.missing == {"image": 60, "text": 30, "any": 10}
    assert torch.equal(fused.catalog.item_ids(), torch.arange(90))
    figures = json.loads((tmp_path / "two" / "quality.json").read_text())
    assert figures["without_sid"] == fused.missing and figures["catalog_items"] == 90
    # A category is a source as well: every item has one.
    both = changed(
        QuantizeConfig(str(data), str(tmp_path / "x"), small, report=False), categories=("kind",)
    )
    assert both.missing["any"] == 0 and len(both.catalog) == 100


def test_a_quantize_that_was_killed_late_goes_on_with_the_same_command(
    config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = changed(config).catalog.fingerprint
    first = dataclasses.replace(config, quantizer=ResidualKMeansConfig((4, 4)))
    before = quantize(first).catalog.fingerprint
    output = Path(config.output)
    kept = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # While it learns, what is there stays as it is.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("torchrec_sid.learn.measure_quality", killed)
        quantize(dataclasses.replace(config, overwrite=True))
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == kept
    assert quantize(first).catalog.fingerprint == before
    # While it publishes, the folder is its own: neither is believed, and the same command goes on.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("torchrec_sid.learn.finish", killed)
        quantize(dataclasses.replace(config, overwrite=True))
    with pytest.raises(SidError, match="holds a catalog already, of another recipe"):
        quantize(first)
    assert quantize(config).catalog.fingerprint == whole
    assert not [path.name for path in output.parent.iterdir() if ".work-" in path.name]


def test_vocabulary_and_quantizer_belong_to_what_was_learned(tmp_path: Path) -> None:
    log = shop(tmp_path / "log")
    recipe = SidRecipe(KMEANS, pieces=PieceTrainerConfig(100))

    def learn() -> tuple[str, str]:
        made = learn_sids(recipe, tmp_path / "log", log, tmp_path / "sids")
        assert made.pieces is not None
        return load_quantizer(made.quantizer).fingerprint, SidPieces.load(made.pieces).fingerprint

    first = learn()
    other = learn_sids(
        SidRecipe(ResidualKMeansConfig((4, 4)), pieces=PieceTrainerConfig(100)),
        tmp_path / "log",
        log,
        tmp_path / "other",
    )
    assert other.pieces is not None
    shutil.copy(other.pieces, tmp_path / "sids")
    assert learn() == first
    shutil.copy(other.quantizer, tmp_path / "sids")
    assert learn() == first


def test_a_refused_quantize_leaves_the_prepared_log(tmp_path: Path) -> None:
    shop(tmp_path / "log")
    shutil.copytree(tmp_path / "log", tmp_path / "next")
    events = pq.read_table(tmp_path / "next" / "events.parquet")
    pq.write_table(events.slice(0, len(events) - 50), tmp_path / "next" / "events.parquet")
    mine = QuantizeConfig(str(tmp_path / "log"), str(tmp_path / "out"), KMEANS, report=False)
    quantize(mine)
    before = PreparedLog.open(tmp_path / "out" / "prepared").fingerprint
    with pytest.raises(SidError, match="holds a catalog already"):
        quantize(dataclasses.replace(mine, data=str(tmp_path / "next")))
    assert PreparedLog.open(tmp_path / "out" / "prepared").fingerprint == before
    # A byte of the prepared log is part of what SIDs are learned from.
    file = tmp_path / "out" / "prepared" / "items" / "train_events.npy"
    np.save(file, np.load(file)[::-1])
    with pytest.raises(ArtifactError, match="train_events.npy: its contents do not match"):
        quantize(mine)
