"""Who is compared: found by name, missing with a reason, and every test medium accounted for."""

import json

import pandas as pd
import pytest
from test_aggregation import media, scored

from unmask.contenders import CONTENDERS, Contender, coverage, gather, home
from unmask.evaluation import ScoreError, write_scores
from unmask.workflow import CHAPTERS

TWO = (
    Contender("first", "05_convnext", "convnext", "convnext", "sbi"),
    Contender("second", "07_clip_prompts", "clip", "ufd"),
)


def leave(work, table, scores, chapter, numbers):
    write_scores(scores, work / "scores" / f"{table}.parquet")
    (work / "results").mkdir(exist_ok=True)
    (work / "results" / f"{chapter}.json").write_text(json.dumps({"numbers": numbers}))


@pytest.fixture
def work(tmp_path):
    (tmp_path / "scores").mkdir()
    manifest = media("test", [0, 1, 0, 1])
    for table, detector, variant, chapter in (
        ("convnext", "convnext", "sbi", "05_convnext"),
        ("clip", "ufd", "", "07_clip_prompts"),
    ):
        scores = scored(manifest, lambda label, frames: [0.2] * frames, detector).assign(variant=variant)
        leave(tmp_path, table, pd.concat([scores, scores.assign(variant="other")]), chapter, {"rows": []})
    return tmp_path


def test_every_contender_names_a_chapter_and_has_a_name_of_its_own():
    assert len({c.name for c in CONTENDERS}) == len(CONTENDERS)
    assert {c.chapter for c in CONTENDERS} <= {chapter.stem for chapter in CHAPTERS}


def test_gather_takes_the_named_variant_under_the_contenders_name(work):
    scores, missing = gather(work, TWO)
    assert missing == {}
    assert scores.groupby("detector").size().to_dict() == {"first": 28, "second": 28}
    assert set(scores["variant"]) == {""}


def test_a_removed_table_is_missing_and_the_others_stay(work):
    (work / "scores" / "clip.parquet").unlink()
    scores, missing = gather(work, TWO)
    assert set(scores["detector"]) == {"first"}
    assert missing == {"second": "missing: 07_clip_prompts left no scores"}


def test_a_chapter_that_ended_is_missing_whatever_it_left_before(work):
    (work / "results" / "07_clip_prompts.json").write_text(json.dumps({"numbers": {"ended": "No labelled fake."}}))
    scores, missing = gather(work, TWO)
    assert set(scores["detector"]) == {"first"} and missing == {"second": "missing: No labelled fake."}


def test_a_table_without_the_detector_is_missing_too(work):
    scores, missing = gather(work, (*TWO, Contender("third", "05_convnext", "convnext", "convnext", "nobody")))
    assert missing == {"third": "missing: convnext.parquet has no scores of convnext, nobody"}


def test_a_damaged_table_is_an_error(work):
    (work / "scores" / "clip.parquet").write_bytes(b"PAR1")
    with pytest.raises(ScoreError, match="clip.parquet"):
        gather(work, TWO)


def test_home_is_where_most_is_learned_from_and_else_what_is_tested_first():
    def split(**counts):
        rows = [(dataset, split) for key, n in counts.items() for dataset, split in [key.split("_")] * n]
        return home(pd.DataFrame(rows, columns=["dataset", "split"], index=range(7, 7 + len(rows))))

    assert split(a_test=9, z_train=2, b_train=3, a_train=1) == "b"
    assert split(a_test=9, z_train=2, b_train=2) == "z", "the first of equals"
    assert split(c_val=3, b_test=1, a_test=5) == "b" and split(d_val=1, c_val=2) == "d"


def test_coverage_accounts_for_every_test_medium():
    manifest = pd.concat([media("test", [0, 1, 0, 1, 0]), media("test", [0, 1], "image", "p"), media("val", [0])])
    items = manifest[["item_id"]].assign(status="ok", reason="")
    items.loc[items["item_id"] == "vtest0", ["status", "reason"]] = "failed", "no face"
    items = items[items["item_id"] != "vtest1"]  # never preprocessed
    scored_items = manifest[manifest["item_id"].isin(["vtest2", "vtest3", "ptest0", "vval0"])]
    scores = scored(scored_items, lambda label, frames: [0.5] * frames, "net")
    table = coverage(scores, manifest, items).set_index("kind")
    assert table.loc["video", ["due", "scored", "rejected", "unjudged"]].tolist() == [5, 2, 2, 1]
    assert set(table.loc["video", "reasons"].split("; ")) == {"1 no face", "1 never preprocessed"}
    assert table.loc["image", ["due", "scored", "rejected", "unjudged", "reasons"]].tolist() == [2, 1, 0, 1, ""]
