"""The benchmarks of the data run, on a few records here; the straightforward way gives what ours gives."""

import pytest

from benchmarks import data_loading, record_store


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("setup")


@pytest.mark.slow
def test_both_loaders_give_the_same_and_are_compared(directory, capsys, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as the benchmark sets it; put back afterwards
    few = ["--records", "24", "--pictures", "4", "--rounds", "1"]
    data_loading.main(["--directory", str(directory), *few, "--alternatives"])
    lines = capsys.readouterr().out.splitlines()
    ratios = [line.split("|")[2:-1] for line in lines if line.startswith("| ratio to that, ")]
    assert [len(row) for row in ratios] == [3, 3] and all(float(ratio) > 0 for row in ratios for ratio in row)
    assert any(line.startswith("| decode: Pillow |") and line.endswith("| none |") for line in lines)

    straightforward, ours = data_loading.Straightforward(directory), data_loading.Ours(directory)
    data_loading.check_that_both_give_the_same(straightforward, ours, range(24))
    straightforward.records[5]["conversations"][1]["value"] += " w1"
    with pytest.raises(AssertionError):
        data_loading.check_that_both_give_the_same(straightforward, ours, range(24))


@pytest.mark.slow
def test_the_store_is_opened_measured_and_read_by_workers(directory, capsys):
    few = ["--records", "200", "--pictures", "4", "--workers", "2", "--batches", "1", "--lengths"]
    record_store.main(["--directory", str(directory), *few])
    table = capsys.readouterr().out
    for row in ("200 records", "open, cold", "open, warm", "length pass, again", "2 workers, private memory"):
        assert f"| {row}" in table
