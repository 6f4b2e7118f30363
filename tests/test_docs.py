"""The documentation does what it says: its commands and code run, its trees are indexed, its tables match the files."""

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from commands import NOT_RUN, PARSED, SMALL, YUNET, blocks, commands, drawn_media, run_page
from conftest import SHARED
from safetensors import safe_open
from trees import MAKERS

from unmask import cli
from unmask.data.crops import read_items
from unmask.data.datasets import LAYOUTS, index
from unmask.data.manifest import SPLITS, read_manifest
from unmask.data.world import plan
from unmask.detectors.base import load_checkpoint
from unmask.profile import ROOT, load_profile

DOCS = ROOT / "docs"
OWN = [DOCS / "own_data.md", DOCS / "own_detector.md"]
EVERY_SET = sorted((DOCS / "datasets").glob("*.md"))
SETS = [page for page in EVERY_SET if page.stem not in ("README", "world", "folder")]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "data/README.md",
    ROOT / "benchmarks/RESULTS.md",
    *sorted(DOCS.rglob("*.md")),
]


def drawn_tree(page: Path) -> dict[str, str]:
    """The files of a page's drawing, relative to its root, with the remark behind each."""
    (text,) = (block.text for block in blocks(page) if block.title == "tree")
    found, above = {}, []
    for line in text.splitlines()[1:]:
        prefix, name, remark = re.fullmatch(r"([│├└─ ]*)(\S+)\s*#?\s*(.*)", line).groups()
        above = [*above[: len(prefix) // 4 - 1], name]
        if Path(name).suffix:
            found["/".join(above)] = remark
    return found


def plant(page: Path, root: Path) -> dict[str, str]:
    """Make the tree that a page draws, lists with the content that the page gives; returns the drawing."""
    texts = {block.title: block.text for block in blocks(page)}
    tree = drawn_tree(page)
    for name in tree:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(texts.get(name, "a medium that nobody opens"))
    return tree


def layouts(page: Path) -> list[str]:
    """The layouts that a page's commands index."""
    return sorted(set(re.findall(r"unmask index \S+ --layout (\S+)", "\n".join(commands(page)))))


def test_every_layout_has_its_page_and_a_row_in_the_list():
    told = [layout for page in EVERY_SET if page.name != "README.md" for layout in layouts(page)]
    assert sorted(told) == sorted(set(LAYOUTS) & set(told)) == sorted(MAKERS)
    rows = [line for line in (DOCS / "datasets/README.md").read_text().splitlines() if line.startswith("| [")]
    listed = {layout: page for line in rows for page in re.findall(r"\((.*?)\)", line)[:1]
              for layout in re.findall(r"`(.*?)`", line)}  # fmt: skip
    assert set(listed) == set(told)
    assert all(layout in layouts(DOCS / "datasets" / page) for layout, page in listed.items())


@pytest.mark.parametrize("page", [*SETS, DOCS / "datasets/folder.md"], ids=lambda page: page.stem)
def test_the_tree_that_a_page_draws_is_what_its_adapter_reads(page, tmp_path):
    tree = plant(page, tmp_path)
    media = {name: remark for name, remark in tree.items() if remark.startswith(("real", "fake"))}
    for layout in layouts(page):
        df, notes = index(tmp_path, layout)
        found = df.set_index("path")
        assert set(found.index) == set(media), notes
        for name, remark in media.items():
            kind, split = re.fullmatch(r"(real|fake)(?:, (train|val|test))?(?:: .*)?", remark).groups()
            assert found.loc[name, "label"] == (kind == "fake")
            assert found.loc[name, "split"] == split if split else found.loc[name, "split"] in SPLITS
            assert split or layout == "folder" or found.loc[name, "split"] != "test"
        odd = [note for note in notes if "left out" in note and "side files" not in note or "names unlike" in note]
        assert not odd


def test_the_tree_of_the_world_is_what_the_world_writes(tiny_world):
    (text,) = (block.text for block in blocks(DOCS / "datasets/world.md") if block.language == "text")
    drawn = re.findall(r"── ([\w.-]+)(?:/\w{4}\.+(\w+))?$", text, re.M)
    assert len(drawn) == 8
    for name, suffix in drawn:
        found = list(tiny_world.rglob(name))
        assert found and (not suffix or list(found[0].glob(f"*.{suffix}"))), name


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """What became of the commands on the pages of data sets, run on the trees that these pages draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home := tmp_path_factory.mktemp("sets"))
        for page in SETS:
            for root in re.findall(r"unmask index (\S+) --layout", "\n".join(commands(page))):
                plant(page, home / root)
        # The same tree in another compression, which the page only names.
        shutil.copytree(home / "data/raw/FaceForensics++", home / "c40")
        for folder in list((home / "c40").rglob("c23")):
            shutil.copytree(folder, home / "data/raw/FaceForensics++" / folder.relative_to(home / "c40").parent / "c40")
        for name in drawn_tree(DOCS / "datasets/folder.md"):
            (home / "my_media" / name).parent.mkdir(parents=True, exist_ok=True)
            (home / "my_media" / name).write_text("a medium that nobody opens")
        yield {page: run_page(page, patch) for page in EVERY_SET}


@pytest.mark.parametrize("page", EVERY_SET, ids=lambda page: page.stem)
def test_the_commands_on_the_pages_of_data_sets_end_well(sets, page):
    for command, ran in sets[page].items():
        assert ran.code == 0, f"{command}: {ran.said}"
    if page.stem == "deeperforensics":
        assert "no real class" not in sets[page][commands(page)[0]].said


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder where the pages on data and detectors of one's own were followed, and what became of the commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home := tmp_path_factory.mktemp("own"))
        patch.delenv("UNMASK_PLUGINS", raising=False)
        if YUNET:
            patch.setenv("UNMASK_MODELS", str(SHARED / "data/models"))
        settings = SMALL | {"world.pairs_train": 2, "world.pairs_val": 1, "world.pairs_test": 1, "world.pairs_b": 0}
        words = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        assert cli.main(["world", "world", "--profile", "tiny", *words]) == 0
        people = "abcdefgh"
        for path in drawn_media(home / "world", home / "my_media"):
            person, method = people[int(path.stem[1:])], path.relative_to(home / "my_media").parts[-2]
            (home / "studio").mkdir(exist_ok=True)
            shutil.copy(path, home / f"studio/{person}_1_{method}.mp4")
        ran = {}
        for page in OWN:
            for block in blocks(page):
                if block.language == "python" and block.title:
                    (home / block.title).write_text(block.text)
            ran |= run_page(page, patch)
        yield home, ran


@pytest.mark.parametrize("command", [c for page in OWN for c in commands(page) if c not in NOT_RUN])
def test_the_commands_of_the_how_to_pages_end_well(home, command):
    ran = home[1][command]
    assert ran.code == 0, ran.said


def test_a_detector_of_ones_own_is_trained_loaded_scored_and_in_a_table(home):
    home = home[0]
    detector, card = load_checkpoint(home / "highpass")
    assert detector.name == "highpass" and detector.config == {"size": 64, "width": 16} and len(card["history"]) == 2
    assert card["options"]["source"] == "sbi"
    assert load_checkpoint(home / "highpass-fakes")[1]["options"]["source"] == "fakes"
    scores, table = (pd.read_csv(home / name) for name in ("highpass.csv", "highpass-table.csv"))
    assert (scores["status"] == "ok").mean() > 0.3 and scores["score"].dropna().between(0, 1).all()
    assert len(table) and table["n_fake"].max() > 0


def test_it_takes_less_than_forty_lines():
    (code,) = (block.text for block in blocks(DOCS / "own_detector.md") if block.title == "my_detector.py")
    assert len(code.splitlines()) < 40


def test_the_python_of_the_page_runs(home, monkeypatch, capsys):
    monkeypatch.chdir(home[0])
    for block in blocks(DOCS / "own_detector.md"):
        if block.language == "python" and not block.title:
            exec(compile(block.text, "own_detector.md", "exec"), {})
    assert "'width': 16" in capsys.readouterr().out


def test_a_layout_of_ones_own_is_indexed_grouped_and_cut(home):
    df, items = read_manifest(home[0] / "studio.parquet"), read_items(home[0] / "studio-crops")
    assert len(df) == len(items) == 8 * 5 and df["group_id"].nunique() == 8
    assert set(df["method"]) == {"real", "swap", "reenact", "texture", "synthesis"}
    assert (df.loc[df["label"] == 0, "path"].str.endswith("_real.mp4")).all()


def test_the_list_on_the_page_replaces_the_guess(tmp_path):
    (listed,) = (b.text for b in blocks(DOCS / "own_data.md") if b.title == "my_media/media.csv")
    (tmp_path / "media.csv").write_text(listed)
    df = index(tmp_path, "folder")[0].set_index("path")
    rows = [line.split(",") for line in listed.splitlines()[1:]]
    assert df["split"].to_dict() == {row[0]: row[4] for row in rows}
    assert df["label"].to_dict() == {row[0]: int(row[1] == "fake") for row in rows} and df["group_id"].nunique() == 3


@pytest.mark.parametrize("name", PARSED)
def test_the_commands_of_other_pages_are_ones_that_the_kit_knows(name):
    for line in commands(ROOT / name):
        for words in re.findall(r"(?:^|[\s;&(])unmask (\w[^|;&)]*)", line):
            words = re.sub(r"\\?\$\{?\w+\}?", "0", words.replace('"', "")).split(" >")[0].split()
            cli.build_parser().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_and_pages_are_about_the_project(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), target
    assert not re.search(r"(?<![\w.>}-])/(work|tmp|home|root|mnt|srv|Users)/\w|localhost:\d", text)


def test_every_page_is_in_the_table_of_contents():
    listed = (DOCS / "README.md").read_text() + (DOCS / "datasets/README.md").read_text()
    assert not [page.name for page in DOCS.rglob("*.md") if page.name != "README.md" and f"{page.name})" not in listed]


def test_the_glossary_is_in_order():
    terms = re.findall(r"^\*\*(.+?)\*\*", (DOCS / "glossary.md").read_text(), re.M)
    assert terms == sorted(terms, key=str.lower) and len(terms) == len(set(terms)) > 40


def test_the_model_card_names_every_network_with_its_size_and_hash():
    files = sorted((ROOT / "lib/unmask/weights").rglob("*.safetensors"))
    lines = (DOCS / "model_card.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if re.search(r"`[0-9a-f]{12}`", line)]
    told = {row[5].strip(" `"): (row[3].strip(), float(row[4])) for row in rows}
    for path in files:
        with safe_open(path, "pt") as weights:
            count = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
        if count < 10_000:  # the stand-in for a text encoder, which gives every text the same embedding
            continue
        millions, megabytes = told.pop(hashlib.sha256(path.read_bytes()).hexdigest()[:12])
        assert millions == f"{count / 1e6:.1f} M" and megabytes == round(path.stat().st_size / 1e6, 1), path
    assert not told


def test_the_scores_in_the_model_card_are_those_of_the_weights():
    text = " ".join((DOCS / "model_card.md").read_text().split())
    for name in ("convnext-demo", "convnext-demo-128"):
        history = json.loads((ROOT / f"lib/unmask/weights/{name}/config.json").read_text())["history"]
        best = min(history, key=lambda epoch: epoch["val_loss"])["val_auc"]
        assert f"`{name}` AUC {best:.2f}" in text
    results = (ROOT / "benchmarks/RESULTS.md").read_text()
    for figure in re.findall(r"0\.\d{3} \(0\.\d{3} to 0\.\d{3}\)", text):
        assert figure in results, "a new measurement: write it into the model card"
    assert "A verdict for 0 of 68" in results


def test_the_data_card_counts_what_the_demo_generates():
    spec = dict(load_profile("demo").world)
    table = {row[0].strip(): [[int(n) for n in re.findall(r"\d+", cell)] for cell in row[1:3]]
             for row in (line.split("|")[1:] for line in (DOCS / "data_card.md").read_text().splitlines()
                         if line.startswith("| "))}  # fmt: skip
    for i, world in enumerate(("world-a", "world-b")):
        people = 2 * sum(pair.world == world for pair in plan(spec))
        assert table["people, in pairs that are each other's donors"][i] == [people]
        assert table["real videos, pictures"][i] == [people * spec["clips"], people]
        assert table["forged videos, pictures"][i] == [4 * people, people]
    assert [cell[0] for cell in table["cameras"]] == [spec["cameras"], spec["cameras"] // 2]
