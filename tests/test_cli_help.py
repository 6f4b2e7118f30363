"""How the command line speaks: help that reads well, one sentence for what is mistyped or not there, completion."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest

from unmask import cli, workflow

PARSER = cli.build_parser()
COMMANDS = PARSER._subparsers._group_actions[0].choices
# A call of every command with files that are not there; OUT is a place to write to.
ABSENT = {
    "doctor": "--profile nothing.yaml",
    "fetch": "nothing",
    "completion": "nothing",
    "world": "OUT --profile nothing.yaml",
    "index": "nothing --layout folder --out OUT",
    "preprocess": "nothing OUT",
    "cluster": "nothing --out OUT.csv",
    "fingerprints": "nothing OUT",
    "unsupervised": "--stage 1 --manifest nothing --crops nothing --out OUT",
    "train": "convnext --manifest nothing --crops nothing --out OUT",
    "score": "nothing --checkpoint nothing --out OUT.csv",
    "panel": "nothing --manifest nothing --crops nothing --out OUT",
    "export": "nothing --format onnx --out OUT",
    "lare": "nothing --settings demo-t200-e4-128 --out OUT",
    "evaluate": "nothing nothing --out OUT.csv",
    "table": "nothing",
}


def said(capsys, *words):
    """Exit code and what was said on stderr; whatever else is raised is a traceback that a user would see."""
    try:
        code = cli.main(list(words))
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().err


def complaints(help_text):
    return [line for line in help_text.splitlines() if len(line) > 120]


def test_the_overview_names_every_command_once_in_a_group():
    text = PARSER.format_help()
    listed = re.findall(r"^    ([a-z]+) ", text, re.M)
    assert sorted(listed) == sorted(COMMANDS)
    assert "unmask [-h] COMMAND" in text and not complaints(text)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_an_example_that_it_takes_and_explains_every_option(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    sub = COMMANDS[name]
    title, _, example = sub.epilog.partition("\n  ")
    assert title == "example:"
    words = shlex.split(example.partition(" >")[0])
    assert words[:2] == ["unmask", name] and PARSER.parse_args(words[1:]).run
    text = sub.format_help()
    assert example in text and sub.description.endswith(".")
    assert not [action.dest for action in sub._actions if not action.help]
    for action in sub._actions:
        told = action.option_strings and action.dest != "help" and not isinstance(action.default, bool)
        if told and isinstance(action.default, (str, int)):
            assert "default" in sub._get_formatter()._get_help_string(action), action.dest


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistyped_command_or_option_is_one_sentence_with_the_nearest(name, capsys):
    wrong = name[:-1] + name[-1] * 2
    code, told = said(capsys, wrong)
    assert (code, told.count("\n")) == (2, 1) and f"did you mean {name}?" in told
    option = next(
        o for o in COMMANDS[name]._option_string_actions if o.startswith("--") and o != "--help" or o == "--help"
    )
    code, told = said(capsys, name, option + "x")
    assert (code, told.count("\n")) == (2, 1) and f"no option {option}x (did you mean {option}?)" in told
    assert told.startswith(f"unmask {name}: ")


@pytest.mark.parametrize(
    "words, what",
    [
        ("--profil tiny", "there is no option --profil (did you mean --profile?)"),
        ("--profile=tiny --dryrun", "there is no option --dryrun (did you mean --dry-run?)"),
        ("05", "unrecognized arguments: 05"),
        ("--jobs 0", "--jobs must be at least 1"),
        ("--only 05 --from 03", "--only and --from exclude each other"),
    ],
)
def test_run_all_speaks_as_the_commands_do(words, what, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["workflow.py", *words.split()])  # as run_all.sh starts it
    with pytest.raises(SystemExit) as caught:
        workflow.main()
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told == f"run_all.sh: {what}; `run_all.sh --help` says more.\n"


def test_the_parser_needs_nothing_that_is_slow_to_import():
    code = "import sys; from unmask import cli; cli.build_parser().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "unmask.commands.training" in loaded
    assert not {"torch", "numpy", "pandas", "cv2", "scipy", "sklearn", "matplotlib", "shtab"} & set(loaded)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", ["absent", "folder", "noise"])
def test_a_wrong_file_is_one_sentence_and_nothing_is_written(name, kind, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "folder":
        (tmp_path / "nothing").mkdir()
        (tmp_path / "nothing.yaml").mkdir()
    elif kind == "noise":
        for file in ("nothing", "nothing.yaml"):
            (tmp_path / file).write_bytes(bytes(range(256)) * 20)
    before = sorted(p.name for p in tmp_path.iterdir())
    code, told = said(capsys, name, *shlex.split(ABSENT[name]))
    assert code == 2 and told.count("\n") == 1 and told.startswith("unmask"), told
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_words_after_two_dashes_are_media_and_options_may_have_an_equals_sign():
    options = PARSER.parse_args(["score", "--checkpoint=c", "--out=o", "--", "--odd.mp4"])
    assert options.media == ["--odd.mp4"] and options.checkpoint == ["c"]


def test_options_of_a_layout_are_given_by_name(tmp_path, monkeypatch, capsys):
    from trees import make_dfo, make_ffpp

    monkeypatch.chdir(tmp_path)
    make_dfo(tmp_path / "dfo")
    make_ffpp(tmp_path / "ffpp", comp="c40")
    words = ["index", "dfo", "--layout", "deeperforensics", "--out", "m.parquet", "--option", "ffpp_root=ffpp"]
    assert cli.main([*words, "--option", "compression=c40"]) == 0 and "no real class" not in capsys.readouterr().out
    code, told = said(capsys, *words, "--option", "compresion=c40")
    assert code == 2 and "takes no option compresion; it takes ffpp_root, compression" in told
    for key in ("seed", "root", "layout", "dataset", "tree"):  # arguments of functions on the way
        code, told = said(capsys, *words, "--option", f"{key}=1")
        assert code == 2 and f"takes no option {key}; it takes ffpp_root, compression" in told
    code, told = said(capsys, *words, "--option", "c40")
    assert code == 2 and "KEY=VALUE" in told


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_valid_and_know_commands_and_detectors(shell, capsys, tmp_path):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "preprocess" in script and "clip-adapter" in script and "manifest" in script
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed here; its script was only read")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_bash_completes_commands_options_and_detectors(capsys, tmp_path):
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def complete(*words):
        line = " ".join(shlex.quote(word) for word in words)
        function = '$(complete -p unmask | sed "s/.*-F \\([^ ]*\\).*/\\1/")'
        call = f"source {tmp_path / 'script'}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; {function}; "
        call += 'printf "%s\\n" "${COMPREPLY[@]}"'
        return subprocess.run(["bash", "-c", call], capture_output=True, text=True, check=True).stdout.split()

    assert complete("unmask", "pre") == ["preprocess"]
    assert "--layout" in complete("unmask", "index", "--")
    assert set(complete("unmask", "train", "convnext-")) == {"convnext-fusion", "convnext-frequency"}


def test_plugins_are_named_where_they_are_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("UNMASK_PLUGINS", "absent.py")
    code, told = said(capsys, "index", str(tmp_path), "--layout", "mine", "--out", str(tmp_path / "m.parquet"))
    assert (
        code == 2
        and told == "unmask: UNMASK_PLUGINS names absent.py, which is no file; mend the variable or unset it.\n"
    )


def test_a_plugin_runs_once_and_cannot_take_a_name_of_the_kit(monkeypatch, tmp_path):
    from unmask import plugins
    from unmask.data.datasets import LAYOUTS, DatasetError
    from unmask.detectors import base

    layouts, detectors = dict(LAYOUTS), dict(base._REGISTRY)
    (tmp_path / "one.py").write_text(
        "from unmask.data.datasets import register\n"
        f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n"
        "register('mine', 'anything')(lambda tree: None)\n"
    )
    (tmp_path / "two.py").write_text(
        "from unmask.data.datasets import register\nregister('ffpp', '')(lambda tree: None)\n"
    )
    (tmp_path / "three.py").write_text(
        "from unmask.detectors.base import Detector, register\n@register('convnext')\nclass Mine(Detector): ...\n"
    )
    try:
        for _ in range(2):
            monkeypatch.setenv("UNMASK_PLUGINS", str(tmp_path / "one.py"))
            plugins.load()
        assert "mine" in LAYOUTS and (tmp_path / "runs").read_text() == "x"
        monkeypatch.setenv("UNMASK_PLUGINS", str(tmp_path / "two.py"))
        with pytest.raises(DatasetError, match="'ffpp' is one of unmask.data"):
            plugins.load()
        monkeypatch.setenv("UNMASK_PLUGINS", str(tmp_path / "three.py"))
        with pytest.raises(ValueError, match="'convnext' belongs to the detector of unmask.detectors.convnext"):
            plugins.load()
    finally:
        LAYOUTS.clear()
        LAYOUTS.update(layouts)
        base._REGISTRY.clear()
        base._REGISTRY.update(detectors)
