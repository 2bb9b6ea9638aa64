"""The record of the model in the page: numbers read as they are shown, machines kept apart."""

import json

import pytest
import time_try_it
from time_try_it import Way, keep, number, summary, visit


@pytest.mark.parametrize(
    ("cell", "value"),
    [("1,234 ms", 1234), ("0.95 ms", 0.95), ("38.4", 38.4), ("25.6 GB/s", 25.6), ("501", 501)],
)
def test_a_cell_is_read_as_its_number(cell, value):
    assert number(cell) == value


@pytest.mark.parametrize("cell", ["", "fp32, cache", "12% longer", "∞"])
def test_a_cell_without_a_number_is_refused(cell):
    with pytest.raises(ValueError, match="where a number should be"):
        number(cell)


def test_a_summary_has_the_median_and_the_range_of_each_number():
    rounds = [{"measured_ms": value, "first_ms": 1 / 3} for value in (3.0, 9.0, 1.0)]
    assert summary(rounds) == {
        "measured_ms": {"median": 3, "low": 1, "high": 9},
        "first_ms": {"median": 0.3333, "low": 0.3333, "high": 0.3333},
    }


def test_a_record_replaces_its_machines_older_one_alone(tmp_path):
    path = tmp_path / "new" / "speeds.json"
    for record in (
        {"machine": "a", "n": 1},
        {"machine": "b", "n": 2},
        {"machine": "a", "n": 3},
    ):
        keep(record, path)
    assert json.loads(path.read_text()) == [{"machine": "b", "n": 2}, {"machine": "a", "n": 3}]
    assert [file.name for file in path.parent.iterdir()] == ["speeds.json"]


@pytest.mark.parametrize("given", ["0", "-1", "many", "1.5"])
def test_a_number_of_rounds_that_is_none_is_refused(given, monkeypatch):
    monkeypatch.setattr("sys.argv", ["time_try_it.py", given])
    with pytest.raises(SystemExit, match=f"ROUNDS is {given}, but must be a whole number"):
        time_try_it.main()


@pytest.mark.browser
@pytest.mark.site
@pytest.mark.parametrize("way", [Way("int8", True, 12), Way("fp32", False, 4)])
def test_a_visit_reads_what_the_page_shows(browser, way):
    from screenshot import serving
    from site_files import built_site

    if not (built_site() / "try_it" / "models" / "models.json").exists():
        pytest.skip("the model was left out of the built site; `make book` says why.")
    with serving(built_site()) as address:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(time_try_it.WAIT)
        page.goto(f"{address}/{time_try_it.PAGE}", wait_until="networkidle")
        numbers = visit(page, way)
        context.close()
    assert ("products_gb_s" in numbers) == way.cached
    assert all(value > 0 for value in numbers.values())
    assert numbers["measured_to_predicted"] == pytest.approx(
        numbers["measured_ms"] / numbers["predicted_ms"]
    )
