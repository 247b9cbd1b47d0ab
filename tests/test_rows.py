"""Rows in memory and on disk are the same matrix."""

import numpy as np
import pytest

from jaxclust.features import rows as rows_module
from jaxclust.features.rows import Rows
from jaxclust.train.refresh import std_of_unit_rows


@pytest.mark.parametrize("memory_bytes", [10**9, 0])
@pytest.mark.parametrize("row_shape", [(7,), ()])
def test_rows_come_back_in_order_in_chunks(tmp_path, monkeypatch, memory_bytes, row_shape):
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", 300)
    values = np.random.default_rng(0).standard_normal((101, *row_shape)).astype(np.float32)
    rows = Rows(101, row_shape, values.dtype, memory_bytes, tmp_path / "tmp")
    for start in range(0, 101, 13):
        rows.append(values[start : start + 13])
    rows.finish()
    assert rows.shape == values.shape
    for _ in range(2):  # may be read again
        chunks = list(rows.chunks())
        assert len(chunks) > 1 and all(chunk.nbytes <= 300 for chunk in chunks)
        np.testing.assert_array_equal(np.concatenate(chunks), values)
    np.testing.assert_array_equal(rows.array(), values)


def test_too_few_or_too_many_rows_are_noticed(tmp_path):
    rows = Rows(3, (2,), np.dtype(np.float32), 10**6, tmp_path)
    rows.append(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="only 2 of 3"):
        rows.finish()
    with pytest.raises(ValueError, match="do not fit"):
        rows.append(np.zeros((2, 2)))


def test_std_of_unit_rows_tells_collapse_from_spread(tmp_path):
    def filled(values):
        rows = Rows(len(values), values.shape[1:], values.dtype, 10**9, tmp_path)
        rows.append(values)
        return rows.finish()

    rng = np.random.default_rng(0)
    spread = rng.standard_normal((4000, 64)).astype(np.float32)
    np.testing.assert_allclose(std_of_unit_rows(filled(spread)), 1 / 8, rtol=0.02)
    unit = spread.astype(np.float64) / np.linalg.norm(spread, axis=1, keepdims=True)
    np.testing.assert_allclose(std_of_unit_rows(filled(spread)), unit.std(axis=0).mean(), rtol=1e-6)
    assert std_of_unit_rows(filled(np.full((10, 64), 3.0, np.float32))) < 1e-6
