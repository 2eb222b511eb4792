"""Hypothesis strategies for SIDs, schemes and ragged batches."""

from hypothesis import strategies as st

from torchrec_sid.tables import HashedPrefix, NGramGroups, PerLevel

cardinalities = st.lists(st.sampled_from([2, 3, 4, 5, 7, 8]), min_size=1, max_size=4).map(tuple)
rows = st.none() | st.integers(2, 80)


@st.composite
def schemes(draw, levels: int):
    kind = draw(st.sampled_from(["prefix", "level", "ngram"]))
    separate = draw(st.booleans())
    if kind == "prefix":
        return HashedPrefix(draw(st.integers(1, levels)), draw(rows), separate, draw(st.integers(0, 3)))
    depth = draw(st.none() | st.integers(1, levels))
    if kind == "level":
        return PerLevel(depth, separate)
    n = draw(st.integers(1, levels))
    return NGramGroups(
        n=n,
        stride=draw(st.none() | st.integers(1, n)),
        depth=depth,
        num_embeddings=draw(rows),
        separate=separate,
        seed=draw(st.integers(0, 3)),
    )


@st.composite
def bags(draw, sizes: tuple[int, ...], batch: int):
    """Per example a list of items: codes, or None for the unknown item."""
    item = st.none() | st.tuples(*[st.integers(0, k - 1) for k in sizes])
    return draw(st.lists(st.lists(item, max_size=4), min_size=batch, max_size=batch))
