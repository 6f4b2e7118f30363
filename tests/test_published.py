"""Data files of published numbers: what is in them, and what a malformed one is refused for."""

import pandas as pd
import pytest

from unmask import published

GOOD = {
    "row": "gru", "method": "TALL", "metric": "AUC", "value": "90.8", "level": "video", "tested_on": "DFDC",
    "trained_on": "FF++", "real": "30", "fake": "10", "protocol": "32 frames", "source": "ICCV 2023",
}  # fmt: skip


def parsed(**changes):
    return published.parse(pd.DataFrame([GOOD, GOOD | {"tested_on": "UADFV"} | changes]), "some.csv")


@pytest.mark.parametrize("name", published.names())
def test_every_file_can_be_read(name):
    table = published.read(name)
    assert len(table) and list(table.columns) == [*published.COLUMNS, "majority"]


def test_numbers_and_the_majority_of_the_test_set():
    table = parsed(real="", fake="", row="")
    assert table["value"].tolist() == [90.8, 90.8] and table["majority"].iloc[0] == 75
    assert table[["real", "fake", "majority"]].iloc[1].isna().all()


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"value": "0,9"}, "numbers"), ({"value": ""}, "0 to 100"), ({"value": "101"}, "0 to 100"),
        ({"metric": "F1"}, "metric"), ({"level": "clip"}, "level"), ({"source": " "}, "empty"),
        ({"protocol": ""}, "empty"), ({"real": ""}, "one class"), ({"fake": "0"}, "count"), ({"fake": "1.5"}, "count"),
        ({"tested_on": "DFDC"}, "twice"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused(changes, fault):
    with pytest.raises(ValueError, match=f"some.csv.*{fault}"):
        parsed(**changes)


def test_other_columns_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="columns"):
        published.parse(pd.DataFrame([GOOD]).drop(columns="level"), "some.csv")
    with pytest.raises(KeyError, match="sbi"):
        published.read("../sbi")


def test_counterparts_are_one_line_a_row_and_others_have_none():
    table = parsed(value="76.8")
    table.loc[2] = table.loc[0].to_dict() | {"metric": "accuracy", "value": 70.0}
    table.loc[3] = table.loc[0].to_dict() | {"row": ""}
    assert published.beside(table) == {"gru": "TALL: AUC 90.8 DFDC, 76.8 UADFV; TALL: accuracy 70 DFDC"}
