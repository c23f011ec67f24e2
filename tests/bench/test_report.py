"""Reports: quantiles that are right, JSON that every parser reads, pictures that are written."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from semipd.bench.measure import Measurements, Record
from semipd.bench.report import (
    json_line,
    latency_table,
    milliseconds,
    plot_curves,
    plot_distributions,
    quantiles,
)
from semipd.core.errors import ConfigError


def test_quantiles() -> None:
    values = quantiles(list(range(1, 102)))
    assert values == {"mean": 51.0, "p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 101.0}
    assert set(quantiles([]).values()) == {None}


def test_json_is_strict_and_one_line() -> None:
    line = json_line(
        {"a": math.nan, "b": [np.float64(2.5), math.inf], "c": {"d": np.int64(3)}, "e": "x\ny"}
    )
    assert "\n" not in line
    assert json.loads(line) == {"a": None, "b": [2.5, None], "c": {"d": 3}, "e": "x\ny"}


def test_a_request_of_one_token_has_no_tpot() -> None:
    """Dividing by tokens - 1 must not fail, nor count as a miss of the TPOT target."""
    measured = Measurements()
    measured.targets.tpot = 0.001
    record = Record(10.0, 5, 1, sent=10.5)
    record.chunks.append(11.0)
    measured.add(record)
    result = measured.summary(2.0)
    assert result["ttft_s"]["mean"] == 1.0 and result["send_delay_s"]["mean"] == 0.5
    assert result["tpot_s"]["mean"] is None and result["attainment"] == 1.0


def test_the_table_shows_what_it_is_given() -> None:
    file = io.StringIO()
    latency_table(
        "Title", {"TTFT": quantiles([0.1, 0.2]), "TPOT": quantiles([])}, [("a [fact]", "[b]")], file
    )
    text = file.getvalue()
    assert "Title" in text and "a [fact]" in text and "[b]" in text and "150.0" in text
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0001234, "0.123"),
        (0.005, "5.00"),
        (0.0421, "42.1"),
        (1.2345, "1,234"),
        (None, "-"),
        (math.nan, "-"),
    ],
)
def test_milliseconds(seconds: float | None, text: str) -> None:
    assert milliseconds(seconds) == text


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = [("semi-pd", [1, 2, 3], [0.1, 0.2, 0.9]), ("chunked", [1, 2, 3], [0.1, 0.4, 2.0])]
    plot_curves(tmp_path / "a.png", curves, title="T", x="rate", y="s", targets={"SLO": 0.3}, log_y=True)
    plot_curves(tmp_path / "b.png", curves, title="T", x="time", y="units", steps=True)
    plot_distributions(tmp_path / "c.svg", {"ITL": [1.0, 2.0], "none": []}, title="T", x="s", log_x=True)
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.png", "b.png", "c.svg"))
    with pytest.raises(ConfigError, match="cannot write"):
        plot_curves(tmp_path / "none" / "a.png", curves, title="T", x="rate", y="s")


def test_clients_need_neither_torch_nor_matplotlib() -> None:
    """They run where no engine does; and a second of imports is a second of every command."""
    heavy = "{'torch', 'transformers', 'matplotlib'}"
    code = f"import sys, semipd.bench.client, semipd.chat; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
