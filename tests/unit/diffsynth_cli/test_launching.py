"""The command that launches several processes, without starting any."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffsynth_cli import launching, ranks, train_session
from diffsynth_cli.console import ConsoleReporter
from diffsynth_cli.errors import Ending
from diffsynth_cli.launching import Launch
from diffsynth_core.config.parameters import Parameters
from diffsynth_core.config.resolve import resolve_stages
from diffsynth_core.errors import DiffSynthError, FaultsFound, Problem
from diffsynth_core.session import Session
from tests.naming import names


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user without a configuration of accelerate; return where `accelerate config` would write it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hf" / "accelerate" / "default_config.yaml"


def asked_for(**parameters: object) -> Launch:
    return Launch.of(Parameters.model_validate(parameters))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_our_place_of_the_default_configuration_is_that_of_accelerate():
    from accelerate.commands.config.config_args import default_yaml_config_file, hf_cache_home

    ours = launching.default_config()
    assert ours.name == Path(default_yaml_config_file).name
    assert Path(default_yaml_config_file).relative_to(hf_cache_home) == ours.relative_to(ours.parents[1])


def test_presets_and_files_are_found_by_name(tmp_path, home):
    own = write(tmp_path / "mine.yaml", "num_processes: 3\n")
    assert launching.find_config("zero2").name == "zero2.yaml"
    assert launching.find_config(str(own)) == own
    assert launching.find_config(None) is None
    write(home, "num_processes: 2\n")
    assert launching.find_config(None) == home


def test_an_unknown_configuration_is_told_with_the_nearest_preset(says):
    with pytest.raises(DiffSynthError) as caught:
        launching.find_config("zero2offlod")
    says(caught.value.problems)
    assert str(caught.value) == names("accelerate configuration", "zero2offlod")
    assert caught.value.problems[0].hint == names("zero2offload")


@pytest.mark.parametrize(
    ("number", "config", "asked"), [(None, None, 1), (4, None, 4), (None, "ddp", 8), (2, "ddp", 2)]
)
def test_how_many_processes_are_asked_for(number, config, asked):
    assert asked_for(num_processes=number, accelerate_config=config).processes == asked


def test_a_configuration_is_looked_for_whatever_the_number(says):
    with pytest.raises(DiffSynthError) as caught:
        asked_for(num_processes=2, accelerate_config="dpp")
    says(caught.value.problems)
    assert str(caught.value) == names("accelerate configuration", "dpp")


@pytest.mark.parametrize(("config", "engine"), [("zero2", "zero2"), ("zero3", "zero3"), (None, "fsdp2")])
def test_a_configuration_says_which_engine_distributes_the_steps(home, config, engine):
    write(home, "num_processes: 2\ndistributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n")
    assert asked_for(num_processes=2, accelerate_config=config).engine.name == engine
    assert asked_for(num_processes=1) == asked_for() == Launch()


MEETING = {"main_process_ip": "10.0.0.1", "main_process_port": 29500}


def test_several_machines_each_start_their_share(home):
    launch = asked_for(num_processes=8, num_machines=2, machine_rank=1, **MEETING)
    words = " ".join(launch.words)
    assert "--num_processes 8" in words and "--num_machines 2 --machine_rank 1 --multi_gpu" in words
    assert words.endswith("--main_process_ip 10.0.0.1 --main_process_port 29500")
    write(
        home,
        "num_processes: 8\nnum_machines: 2\nmachine_rank: 0\nmain_process_ip: 10.0.0.1\nmain_process_port: 29500\n",
    )
    assert replace(asked_for(num_processes=8, machine_rank=1), config=None) == launch, "flags take precedence"


def test_only_the_first_machine_looks_at_the_mirror(photographs, tiny_models, tmp_path, monkeypatch):
    """Another one has no record of the run without a shared output folder, so the mirror would be another's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tiny_models))
    write(tmp_path / "copy" / ".mirror.json", '{"run": "of machine 0", "files": {}}')
    stages = resolve_stages(
        {"recipe": "qwen-image-lora", "dataset_base_path": photographs, "device": "cpu", "mirror": "copy"}
    )
    for rank in range(2):
        launch = asked_for(num_processes=2, num_machines=2, machine_rank=rank, **MEETING)
        session = Session(stages, world_size=2, is_first=launch.is_first)
        if rank:
            assert session.plan()
        else:
            with pytest.raises(FaultsFound, match="another run"):
                session.plan()
    monkeypatch.setenv("RANK", "1")
    assert not Launch(processes=2).is_first, "nor does another process of the first machine"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"main_process_ip": None}, names("2 machines", "main_process_ip")),
        ({"main_process_port": None}, names("2 machines", "main_process_port")),
        ({"machine_rank": 2}, names("machine_rank", "0 to 1")),
        ({"num_processes": 3}, names("num_processes", "not a multiple of 2")),
        ({"num_machines": None}, names("main_process_ip", "one machine")),
        ({"num_machines": 1, "num_processes": None, "main_process_ip": None, "machine_rank": 1}, names("machine_rank")),
    ],
)  # fmt: skip
def test_machines_that_would_not_find_each_other_are_refused(says, changed, problem):
    launch = asked_for(**{"num_processes": 8, "num_machines": 2, **MEETING, **changed})
    says(launch.problems)
    assert [found.message for found in launch.problems] == [problem]
    assert all(found.wrong_use and found.hint for found in launch.problems)


@pytest.mark.parametrize(("number", "config", "launched"), [(1, None, False), (1, "ddp", True), (2, None, True)])
def test_a_configuration_is_launched_with_even_for_one_process(monkeypatch, number, config, launched):
    started, launch = [], asked_for(num_processes=number, accelerate_config=config)
    task = SimpleNamespace(trains=False)
    plan = SimpleNamespace(parameters=Parameters(), task=task, machine=SimpleNamespace(device="cpu"), fitted=())
    session = Session((), world_size=number)
    monkeypatch.setattr(session, "plan", lambda: {None: plan})
    monkeypatch.setattr(launching, "launch", lambda flags, *given: started.append(given) or 0)
    monkeypatch.setattr(train_session, "_announce", lambda *_: pytest.exit("trains in this process"))
    assert launch.is_needed == launched
    if launched:
        assert train_session._train(session, {}, ConsoleReporter(quiet=True), launch) == 0
        assert started == [(launch, "cpu")]
    monkeypatch.setenv("WORLD_SIZE", str(number))
    assert not launch.is_needed, "the launcher did it"


def test_flags_become_the_same_words():
    flags = {"recipe": "a b", "learning_rate": "1e-4", "rehearse": True, "find_unused_parameters": False}
    assert list(launching.as_words(flags)) == [
        *("--recipe", "a b", "--learning_rate", "1e-4", "--rehearse", "--no_find_unused_parameters")
    ]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--cpu", "--num_processes", "2"], 2),
        (["--num-processes", "4", "--multi_gpu"], 4),
        (["--config_file", "{config}"], 3),
        (["--config_file", "{config}", "--num_processes", "5"], 5),
        (["--num_processes=2"], 2),
        (["--config_file={config}"], 3),
        (["--config_file={config}", "--cpu"], 3),
        (["--multi_gpu"], 7),
        (["--cpu"], None),
    ],
)
def test_what_the_launcher_was_asked_for(tmp_path, home, words, asked):
    write(home, "num_processes: 7\n")
    config = write(tmp_path / "c.yaml", "num_processes: 3\n")
    launcher = ["/venv/bin/python", "/venv/bin/accelerate", "launch"]
    entry = ["-m", "diffsynth_cli", "train", "--num_processes", "9"]
    assert launching._asked([*launcher, *(word.format(config=config) for word in words), *entry]) == asked
    module = ["/venv/bin/python", "-m", "accelerate.commands.launch"]
    assert launching._asked([*module, *(word.format(config=config) for word in words), *entry]) == asked


def test_another_number_of_processes_is_an_error(says, monkeypatch):
    launching.check_world_size(None)
    launching.check_world_size(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    launching.check_world_size(2)
    with pytest.raises(DiffSynthError) as caught:
        launching.check_world_size(4)
    says(caught.value.problems)
    assert str(caught.value) == names("num_processes", "4 processes", "world size is 2")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, names("WORLD_SIZE is 2", "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT")),
        ({"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, names("WORLD_SIZE is 2", "but MASTER_ADDR is not set")),
        ({"WORLD_SIZE": "two"}, names("WORLD_SIZE", "two")),
    ],
)  # fmt: skip
def test_a_world_without_a_launcher_is_told_before_anything_waits(cli, monkeypatch, photographs, says, given, problem):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"WORLD_SIZE": "2"} | given).items():
        monkeypatch.setenv(name, value)
    outcome = cli("train", "--recipe", "qwen-image-lora", "--dataset_base_path", photographs)
    assert (outcome.code, outcome.err.splitlines()[0]) == (2, names("error:", problem))
    says(outcome)


def ending(code: int, *problems: str, sentence: str = "") -> Ending:
    return Ending(code, tuple(Problem(problem) for problem in problems), sentence)


@pytest.mark.parametrize(
    ("codes", "endings", "reported"),
    [
        ({1: -9}, {0: ending(ranks.PEER_LOST, "process 2 of 2 has died")}, ranks.killed("process 2 of 2", 9)),
        ({0: 1}, {0: ending(1, "a"), 1: ending(ranks.PEER_LOST, "b")}, ending(1, "a")),
        ({0: 1, 1: 1}, {0: ending(1, "a"), 1: ending(1, "a")}, ending(1, "a")),
        ({0: 1, 1: 2}, {0: ending(1, "a"), 1: ending(2, "b")}, ending(2, "a", "b")),
        ({0: 143, 1: 143}, {0: ending(143, sentence="x"), 1: ending(143, sentence="x")}, ending(143, sentence="x")),
        # The launcher ends with SIGTERM those that run on after one has failed.
        ({0: 1, 1: -15}, {0: ending(1, "in use")}, ending(1, "in use")),
        ({1: -15}, {}, ending(1, "process 2 of 2 was killed (signal 15); continue with `--resume auto`")),
        ({1: 3}, {}, ending(1, "process 2 of 2 ended with 3; continue with `--resume auto`")),
        (
            {0: ranks.PEER_LOST},
            {0: ending(ranks.PEER_LOST, "b")},
            ending(1, "a process on another machine has died; continue with `--resume auto`"),
        ),
    ],
)
def test_several_endings_are_told_as_one(tmp_path, codes, endings, reported):
    (tmp_path / "rank-1.json").write_text("half a rep")  # of one that was killed
    for rank, one in endings.items():
        assert ranks.write_ending(tmp_path / f"rank-{rank}.json", one)
    assert ranks.join_endings(codes, tmp_path, 2) == reported
